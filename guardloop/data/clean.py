"""Normalising, deduplicating (exact and near), and keeping the traffic apart from the test set.

Whoever writes traffic must not decide what becomes of other rows: which near-duplicates are kept, and which split a
group falls into, follow from a salt that only all rows together give.
"""

import hashlib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field

from guardloop.core.errors import GuardLoopError
from guardloop.core.records import Row
from guardloop.data.labels import LabelCounts
from guardloop.data.near import NearIndex, fold
from guardloop.data.settings import DatasetSettings, SourceSettings
from guardloop.data.sources import CONTROL, read_conversations

MAX_CHARS = 8000  # guards and responders cut what is longer
KEPT_PER_GROUP = 8  # near-duplicates: one text on a template must not stand for all others on it
NAMED = 3  # rows in a message


@dataclass
class CleanReport:
    """What was read and what became of it."""

    read: int = 0
    kept: int = 0
    empty: int = 0
    too_long: int = 0
    exact_duplicates: int = 0
    near_duplicates: int = 0
    """Dropped, since their group has enough."""
    overlap_with_test: int = 0
    test: int = 0
    test_unsafe: int = 0
    response_test: int = 0
    unlabelled: int = 0
    """Rows of labelled sets that were dropped, as they have no label."""
    labelled_again: int = 0
    """Texts with labels of several rows."""
    contradictions: int = 0
    """Of these, texts whose labels differ."""
    ties: int = 0
    """Of these, texts of a labelled set that were dropped, as both labels are as frequent."""
    overlap_contradictions: int = 0
    """Rows of the traffic that are labelled otherwise than the same text of the test set."""
    salt: str = ""
    """What groups are named with."""
    labels: dict[str, LabelCounts] = field(default_factory=dict)
    """By set: the values of its label column, and what each became."""
    notes: list[str] = field(default_factory=list)
    """What people should know, in sentences."""

    def plain(self) -> dict[str, int]:
        """The counts by name."""
        return {name: value for name, value in asdict(self).items() if isinstance(value, int)}


@dataclass(slots=True)
class Text:
    """A distinct text, with the labels of all rows that hold it."""

    row: Row
    group: str = ""
    labels: Counter[bool] = field(default_factory=Counter)

    def add(self, unsafe: bool | None) -> None:
        """Count the label of one row."""
        if unsafe is not None:
            self.labels[unsafe] += 1

    @property
    def is_tie(self) -> bool:
        """Whether as many rows say unsafe as say safe."""
        return self.labels[True] == self.labels[False] > 0

    def unsafe(self, contradictions: str) -> bool | None:
        """The label of the text by the setting `contradictions`; None where it has none, or by a tie."""
        if contradictions == "any" and self.labels[True]:
            return True
        return None if self.labels[True] == self.labels[False] else self.labels[True] > self.labels[False]


class Ids:
    """Makes ids distinct, in time that grows with their number."""

    def __init__(self) -> None:
        self.taken: set[str] = set()
        self.next: dict[str, int] = {}

    def distinct(self, wanted: str) -> str:
        """`wanted`, or with a number where it is taken; taken from now on."""
        identity, number = wanted, self.next.get(wanted, 1)
        while identity in self.taken:
            identity, number = f"{wanted}-{number}", number + 1
            self.next[wanted] = number
        self.taken.add(identity)
        return identity


def prepare(settings: DatasetSettings, seed: int = 0) -> tuple[list[Row], list[Row], CleanReport]:
    """Traffic and test conversations, cleaned, grouped and disjoint, with a report of what was dropped.

    Raises GuardLoopError for an empty set, a test set without both labels or with labels that nobody named, and for
    traffic of which nothing is left.
    """
    report = CleanReport()
    test = list(_test_rows(settings, report, seed))
    texts, overlap = _distinct_texts(settings, test, report, seed)
    _count_labels("dataset.traffic", texts, settings.contradictions, report)
    lines = [_digest(f"{text.row['id']}\0{text.row['prompt']}") for text in texts]
    report.salt = hashlib.sha256(f"{seed}/{fingerprint(test)}/".encode() + b"".join(sorted(lines))).hexdigest()[:16]

    traffic = [
        {
            **text.row,
            "unsafe": text.unsafe(settings.contradictions),
            "group": _digest(f"{report.salt}/{text.group}").hex(),
        }
        for text in _some_of_each_group(texts, report.salt)
    ]
    report.kept, report.near_duplicates = len(traffic), len(texts) - len(traffic)
    _check(traffic, test, overlap, settings, report)
    return traffic, test, report


def normalise(text: str) -> str:
    """Unicode NFC, control characters removed, outer space stripped; the words stay as the user wrote them."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return unicodedata.normalize("NFC", CONTROL.sub("", text)).strip()


def fingerprint(rows: Iterable[Row]) -> str:
    """A hash of ids, texts and labels, whatever their order: names the data set in reports and the registry."""
    lines = sorted(_digest(f"{r['id']}\0{r['prompt']}\0{r.get('response')}\0{r.get('unsafe')}") for r in rows)
    return hashlib.sha256(b"".join(lines)).hexdigest()[:16]


def _distinct_texts(
    settings: DatasetSettings, test: list[Row], report: CleanReport, seed: int
) -> tuple[list[Text], set[str]]:
    """The traffic's distinct texts that are not in the test set, and the ids of test rows that are in the traffic."""
    near_test, near = NearIndex(), NearIndex()
    for row in test:
        near_test.add(row["id"], row["prompt"])
    test_labels = {_digest(fold(row["prompt"])): row["unsafe"] for row in test if row["response"] is None}
    texts: list[Text] = []
    places: dict[bytes, int | None] = {}  # of each digest, among `texts`; None where it is in the test set
    groups: dict[str, str] = {}
    overlap: set[str] = set()
    ids = Ids()
    report.labels["dataset.traffic"] = labels = LabelCounts()
    for row in read_conversations(settings.traffic, seed, "dataset.traffic", labels, with_response=False):
        report.read += 1
        prompt = normalise(row["prompt"])
        if not prompt or len(prompt) > MAX_CHARS:
            report.empty += not prompt
            report.too_long += bool(prompt)
            continue
        digest = _digest(fold(prompt))
        if digest not in places:
            sketch = near.sketch(prompt)
            if (twin := near_test.find(prompt, sketch)) is not None:
                overlap.add(twin)
                places[digest] = None
            else:
                identity = ids.distinct(row["id"])
                twin = near.find(prompt, sketch)
                groups[identity] = groups[twin] if twin else identity
                near.add(identity, prompt, sketch)
                places[digest] = len(texts)
                texts.append(Text({**row, "id": identity, "prompt": prompt, "response": None}, groups[identity]))
        elif places[digest] is not None:
            report.exact_duplicates += 1
        place = places[digest]
        if place is None:
            report.overlap_with_test += 1
            known = test_labels.get(digest)
            report.overlap_contradictions += None not in (known, row["unsafe"]) and known != row["unsafe"]
        else:
            texts[place].add(row["unsafe"])
    return texts, overlap


def _some_of_each_group(texts: list[Text], salt: str) -> Iterator[Text]:
    """At most KEPT_PER_GROUP of each group of near-duplicates, drawn by the salt, in their own order."""
    groups: dict[str, list[Text]] = defaultdict(list)
    for text in texts:
        groups[text.group].append(text)
    kept = {
        text.row["id"]
        for members in groups.values()
        for text in sorted(members, key=lambda text: _digest(f"{salt}/{text.row['id']}"))[:KEPT_PER_GROUP]
    }
    return (text for text in texts if text.row["id"] in kept)


def _test_rows(settings: DatasetSettings, report: CleanReport, seed: int) -> Iterator[Row]:
    """Labelled test rows: one for each distinct text, with near-duplicates in one group."""
    near, ids = NearIndex(), Ids()
    groups: dict[str, str] = {}
    sources = {"dataset.test": settings.test, "dataset.response_test": settings.response_test}
    for where, source in sources.items():
        texts = _labelled_texts(source, where, report, seed) if source else []
        _count_labels(where, texts, settings.contradictions, report)
        for text in texts:
            unsafe = text.unsafe(settings.contradictions)
            if unsafe is None:
                continue
            row = text.row
            identity = ids.distinct(row["id"])
            twin = near.find(row["prompt"])
            groups[identity] = groups[twin] if twin else identity
            near.add(identity, row["prompt"])
            report.test += row["response"] is None
            report.response_test += row["response"] is not None
            report.test_unsafe += unsafe and row["response"] is None
            yield {**row, "id": identity, "unsafe": unsafe, "group": groups[identity]}


def _labelled_texts(source: SourceSettings, where: str, report: CleanReport, seed: int) -> list[Text]:
    """The distinct texts of a labelled set: prompts, or prompts with responses."""
    judges_responses = where == "dataset.response_test"
    report.labels[where] = labels = LabelCounts()
    texts: dict[tuple[str, str | None], Text] = {}
    rows = list(read_conversations(source, seed, where, labels, with_response=judges_responses))
    labels.check(source, where)
    for row in rows:
        prompt, response = normalise(row["prompt"]), row["response"] and normalise(row["response"])
        if row["unsafe"] is None:
            report.unlabelled += 1
        elif prompt:
            if judges_responses and not response:
                raise GuardLoopError(f"{where}: row {row['id']} has no response", "map the response column")
            text = texts.setdefault((fold(prompt), response), Text({**row, "prompt": prompt, "response": response}))
            text.add(row["unsafe"])
    return list(texts.values())


def _count_labels(where: str, texts: list[Text], contradictions: str, report: CleanReport) -> None:
    """Count texts with several labels. Raises GuardLoopError for contradictions that are to be refused."""
    again = [text for text in texts if text.labels.total() > 1]
    contrary = [text for text in again if len(text.labels) > 1]
    ties = [text for text in contrary if text.is_tie and contradictions == "majority"]
    if contrary and contradictions == "refuse":
        raise GuardLoopError(
            f"{where}: {len(contrary)} texts have labels that contradict each other: {_named(contrary)}",
            "mend them, or choose dataset.contradictions: majority or any",
        )
    report.labelled_again += len(again)
    report.contradictions += len(contrary)
    if again:
        agreed = f"{len(again) - len(contrary)} of {len(again)} texts that are labelled more than once agree"
        named = f"; {len(ties)} ties have no label: {_named(ties)}" if ties else ""
        report.notes.append(f"{where}: {agreed}{named}.")
    if where != "dataset.traffic":
        report.ties += len(ties)


def _named(texts: list[Text]) -> str:
    ids = [repr(text.row["id"]) for text in texts[:NAMED]]
    return ", ".join(ids) + (f" and {len(texts) - NAMED} more" if len(texts) > NAMED else "")


def _check(
    traffic: list[Row], test: list[Row], overlap: set[str], settings: DatasetSettings, report: CleanReport
) -> None:
    if not report.read:
        raise GuardLoopError(
            f"dataset.traffic: {settings.traffic.path} has no rows", "check the path, split and filter"
        )
    if not report.test:
        raise GuardLoopError(
            f"dataset.test: {settings.test.path} has no labelled rows", "map its label: `columns: {label: <name>}`"
        )
    groups = {row["id"]: row["group"] for row in test}  # one row may stand for a whole group
    share = len({groups[key] for key in overlap}) / len(set(groups.values()))
    if not traffic:
        reason = (
            f"{report.overlap_with_test:,} of {report.read:,} rows are in the test set too"
            if report.overlap_with_test
            else f"{report.empty:,} rows are empty and {report.too_long:,} longer than {MAX_CHARS:,} characters"
        )
        raise GuardLoopError(
            f"dataset.traffic: no prompt is left after cleaning: {reason}", "check the path and the column"
        )
    if report.overlap_contradictions:
        report.notes.append(
            f"{report.overlap_contradictions:,} rows of the traffic are labelled otherwise than the same text of the "
            "test set; they were removed with the overlap."
        )
    if share > settings.max_overlap:
        report.notes.append(
            f"{share:.0%} of the test prompts, near-duplicates counted once, are in the traffic too: "
            f"{report.overlap_with_test:,} rows were removed from it."
        )
    if report.test_unsafe in (0, report.test):
        kind = "safe" if report.test_unsafe == 0 else "unsafe"
        raise GuardLoopError(f"dataset.test: every row is labelled {kind}", "check columns.label and unsafe_labels")


def _digest(text: str) -> bytes:
    """Sixteen bytes that stand for a text in memory."""
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()
