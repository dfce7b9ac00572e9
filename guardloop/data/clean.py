"""Normalising, deduplicating (exact and near), and keeping the traffic apart from the test set."""

import hashlib
import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
from datasketch import MinHash

from guardloop.core.errors import GuardLoopError
from guardloop.core.records import Row
from guardloop.data.settings import DatasetSettings
from guardloop.data.sources import CONTROL, read_conversations

NEAR_DUPLICATE = 0.8  # Jaccard similarity of word 3-grams from which two prompts count as near-duplicates
MAX_CHARS = 8000  # guards and responders cut what is longer
PERMUTATIONS = 64
RECALL = 0.99
SHINGLE = 3
EMPTY = MinHash(num_perm=PERMUTATIONS, hashfunc=int)  # of what is hashed already
# Thai, Lao, Myanmar, Khmer; Hiragana and Katakana, half-width too; CJK ideographs and their extensions
UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"
    r"\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")  # no spaces tell these scripts' words: each character is one


@dataclass
class CleanReport:
    """What was read and what became of it."""

    read: int = 0
    kept: int = 0
    empty: int = 0
    too_long: int = 0
    exact_duplicates: int = 0
    near_duplicates: int = 0
    overlap_with_test: int = 0
    test: int = 0
    test_unsafe: int = 0
    response_test: int = 0

    def plain(self) -> dict[str, int]:
        """The counts by name."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Sketch:
    """What near-duplicates are found by: a text's word 3-grams, and one hash of each band of its MinHash."""

    shingles: np.ndarray
    bands: list[int]


class NearIndex:
    """Finds near-duplicates by MinHash over word 3-grams (Broder 1997), in about a KiB a row.

    MinHash only proposes: the similarity of what it finds is then counted. The bands' rows are kept as numbers, since
    datasketch's own index takes four times the memory.
    """

    def __init__(self, threshold: float = NEAR_DUPLICATE) -> None:
        self.threshold = threshold
        self.bands = _bands(threshold)
        self.keys: list[str] = []
        self.shingles: list[np.ndarray] = []
        self.buckets: dict[int, int | list[int]] = {}

    def find(self, text: str, sketch: Sketch | None = None) -> str | None:
        """The key of a near-duplicate already here, or None. `sketch` is the text's, where it is known."""
        sketch = sketch or self.sketch(text)
        alike: set[int] = set()
        for band in sketch.bands:
            match self.buckets.get(band):
                case int(row):
                    alike.add(row)
                case list(rows):
                    alike.update(rows)
        near = (row for row in alike if _jaccard(sketch.shingles, self.shingles[row]) >= self.threshold)
        return min((self.keys[row] for row in near), default=None)

    def add(self, key: str, text: str, sketch: Sketch | None = None) -> None:
        """Remember `text` under `key`, which is new."""
        sketch, row = sketch or self.sketch(text), len(self.keys)
        self.keys.append(key)
        self.shingles.append(sketch.shingles)
        for band in sketch.bands:
            match self.buckets.setdefault(band, row):
                case list(rows):
                    rows.append(row)
                case int(other) if other != row:
                    self.buckets[band] = [other, row]

    def sketch(self, text: str) -> Sketch:
        """The text's sketch, for indexes of this threshold."""
        shingles = _shingles(text)
        count, rows = self.bands
        bands = _signature(shingles)[: count * rows].reshape(count, rows)
        return Sketch(shingles, [hash((place, band.tobytes())) for place, band in enumerate(bands)])


def prepare(settings: DatasetSettings, seed: int = 0) -> tuple[list[Row], list[Row], CleanReport]:
    """Traffic and test conversations, cleaned, grouped and disjoint, with a report of what was dropped.

    Raises GuardLoopError for an empty set, a test set without both labels, or one that overlaps with the traffic.
    """
    report = CleanReport()
    test = list(_test_rows(settings, report, seed))
    seen_in_test: set[str] = set()
    near_test = NearIndex()
    for row in test:
        near_test.add(row["id"], row["prompt"])
    exact: set[bytes] = set()
    ids: set[str] = set()
    near = NearIndex()
    traffic: list[Row] = []
    for row in read_conversations(settings.traffic, seed, "dataset.traffic"):
        report.read += 1
        text = normalise(row["prompt"])
        if not text:
            report.empty += 1
            continue
        if len(text) > MAX_CHARS:
            report.too_long += 1
            continue
        folded, sketch = _digest(_fold(text)), near.sketch(text)
        if (twin := near_test.find(text, sketch)) is not None:
            report.overlap_with_test += 1
            seen_in_test.add(twin)
        elif folded in exact:
            report.exact_duplicates += 1
        elif near.find(text, sketch) is not None:
            report.near_duplicates += 1
        else:
            identity = _distinct(row["id"], ids)
            exact.add(folded)
            near.add(identity, text, sketch)
            traffic.append({**row, "id": identity, "prompt": text, "response": None, "group": identity})
    report.kept = len(traffic)
    _check(traffic, test, seen_in_test, settings, report)
    return traffic, test, report


def normalise(text: str) -> str:
    """Unicode NFC, control characters removed, outer space stripped; the words stay as the user wrote them."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return unicodedata.normalize("NFC", CONTROL.sub("", text)).strip()


def fingerprint(rows: Iterable[Row]) -> str:
    """A hash of ids, texts and labels, whatever their order: names the data set in reports and the registry."""
    lines = sorted(_digest(f"{r['id']}\0{r['prompt']}\0{r.get('response')}\0{r.get('unsafe')}") for r in rows)
    return hashlib.sha256(b"".join(lines)).hexdigest()[:16]


def _test_rows(settings: DatasetSettings, report: CleanReport, seed: int) -> Iterator[Row]:
    """Labelled test rows: exact duplicates dropped, near-duplicates kept and put in one group."""
    near = NearIndex()
    seen: set[tuple[str, str | None]] = set()
    sources = [(settings.test, "dataset.test"), (settings.response_test, "dataset.response_test")]
    ids: set[str] = set()
    groups: dict[str, str] = {}
    for source, where in sources:
        if source is None:
            continue
        for row in read_conversations(source, seed, where):
            text = normalise(row["prompt"])
            response = normalise(row["response"]) if row["response"] and where.endswith("response_test") else None
            key = (_fold(text), response)
            if not text or key in seen or row["unsafe"] is None:
                continue
            if where.endswith("response_test") and not response:
                raise GuardLoopError(f"{where}: row {row['id']} has no response", "map the response column")
            seen.add(key)
            identity = _distinct(row["id"], ids)
            twin = near.find(text)
            groups[identity] = groups[twin] if twin else identity
            near.add(identity, text)
            report.test += response is None
            report.response_test += response is not None
            report.test_unsafe += bool(row["unsafe"]) and response is None
            yield {**row, "id": identity, "prompt": text, "response": response, "group": groups[identity]}


def _check(
    traffic: list[Row], test: list[Row], seen_in_test: set[str], settings: DatasetSettings, report: CleanReport
) -> None:
    if not report.read:
        raise GuardLoopError(
            f"dataset.traffic: {settings.traffic.path} has no rows", "check the path, split and filter"
        )
    if not report.test:
        raise GuardLoopError(
            f"dataset.test: {settings.test.path} has no labelled rows", "map its label: `columns: {label: <name>}`"
        )
    groups = {row["id"]: row["group"] for row in test}  # one key may have been found for a whole group
    share = len({groups[key] for key in seen_in_test}) / len(set(groups.values()))
    if share > settings.max_overlap:
        raise GuardLoopError(
            f"dataset.test overlaps with the training data: {share:.0%} of the test prompts, near-duplicates "
            "counted once, are in the traffic too",
            "use a separate test set, or raise dataset.max_overlap to have them removed from the traffic",
        )
    if not traffic:
        raise GuardLoopError(
            "dataset.traffic: no prompt is left after cleaning",
            f"check the column; prompts of more than {MAX_CHARS:,} characters are dropped",
        )
    if report.test_unsafe in (0, report.test):
        kind = "safe" if report.test_unsafe == 0 else "unsafe"
        raise GuardLoopError(f"dataset.test: every row is labelled {kind}", "check columns.label and unsafe_labels")


def _distinct(wanted: str, taken: set[str]) -> str:
    """`wanted`, or with a number where it is taken; taken from now on."""
    identity, number = wanted, len(taken)
    while identity in taken:
        identity, number = f"{wanted}-{number}", number + 1
    taken.add(identity)
    return identity


def _bands(threshold: float) -> tuple[int, int]:
    """Bands and rows of the longest bands by which a pair at the threshold is still found."""
    choices = [(PERMUTATIONS // rows, rows) for rows in range(PERMUTATIONS // 2, 0, -1)]
    return next((c for c in choices if 1 - (1 - threshold ** c[1]) ** c[0] >= RECALL), choices[-1])


def _shingles(text: str) -> np.ndarray:
    """Hashes of the word 3-grams: uint32[S], distinct."""
    words = WORD.findall(_fold(text)) or [_fold(text)]
    grams = (" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1)))
    return np.unique(np.fromiter((zlib.crc32(gram.encode()) for gram in grams), np.uint32))


def _signature(shingles: np.ndarray) -> np.ndarray:
    """The MinHash of hashed shingles: uint[PERMUTATIONS]."""
    signature = EMPTY.copy()
    signature.update_batch(shingles)
    values: np.ndarray = signature.hashvalues
    return values


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def _digest(text: str) -> bytes:
    """Sixteen bytes that stand for a text in memory."""
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()


def _fold(text: str) -> str:
    return " ".join(text.casefold().split())
