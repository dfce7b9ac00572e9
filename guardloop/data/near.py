"""Near-duplicates by MinHash over word 3-grams (Broder 1997), in about a KiB a row and bounded time a row."""

import re
import zlib
from collections import Counter
from dataclasses import dataclass

import numpy as np
from datasketch import MinHash

NEAR_DUPLICATE = 0.8  # Jaccard similarity of word 3-grams from which two prompts count as near-duplicates
PERMUTATIONS = 64
RECALL = 0.99
SHINGLE = 3
BUCKET = 16  # rows that a bucket keeps; texts on one template would fill some with all rows
CANDIDATES = 32  # rows that a text is compared with, those that share most bands first
EMPTY = MinHash(num_perm=PERMUTATIONS, hashfunc=int)  # of what is hashed already
# Thai, Lao, Myanmar, Khmer; Hiragana and Katakana, half-width too; CJK ideographs and their extensions
UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"
    r"\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")  # no spaces tell these scripts' words: each character is one


@dataclass(frozen=True, slots=True)
class Sketch:
    """What near-duplicates are found by: a text's word 3-grams, and one hash of each band of its MinHash."""

    shingles: np.ndarray
    bands: list[int]


class NearIndex:
    """Finds near-duplicates of what was added.

    MinHash only proposes: the similarity of what it finds is then counted. The bands' rows are kept as numbers, since
    datasketch's own index takes four times the memory.
    """

    def __init__(self, threshold: float = NEAR_DUPLICATE) -> None:
        self.threshold = threshold
        self.bands = _bands(threshold)
        self.keys: list[str] = []
        self.shingles: list[np.ndarray] = []
        self.buckets: dict[int, tuple[int, ...]] = {}

    def find(self, text: str, sketch: Sketch | None = None) -> str | None:
        """The key of a near-duplicate already here, or None. `sketch` is the text's, where it is known."""
        sketch = sketch or self.sketch(text)
        shared = Counter(row for band in sketch.bands for row in self.buckets.get(band, ()))
        for row, _ in shared.most_common(CANDIDATES):
            if _jaccard(sketch.shingles, self.shingles[row]) >= self.threshold:
                return self.keys[row]
        return None

    def add(self, key: str, text: str, sketch: Sketch | None = None) -> None:
        """Remember `text` under `key`, which is new."""
        sketch, row = sketch or self.sketch(text), len(self.keys)
        self.keys.append(key)
        self.shingles.append(sketch.shingles)
        for band in sketch.bands:
            bucket = self.buckets.get(band, ())
            if len(bucket) < BUCKET:
                self.buckets[band] = (*bucket, row)

    def sketch(self, text: str) -> Sketch:
        """The text's sketch, for indexes of this threshold."""
        shingles = _shingles(text)
        count, rows = self.bands
        bands = _signature(shingles)[: count * rows].reshape(count, rows)
        return Sketch(shingles, [hash((place, band.tobytes())) for place, band in enumerate(bands)])


def fold(text: str) -> str:
    """The text as it is compared: case and the width of spaces do not matter."""
    return " ".join(text.casefold().split())


def _bands(threshold: float) -> tuple[int, int]:
    """Bands and rows of the longest bands by which a pair at the threshold is still found."""
    choices = [(PERMUTATIONS // rows, rows) for rows in range(PERMUTATIONS // 2, 0, -1)]
    return next((c for c in choices if 1 - (1 - threshold ** c[1]) ** c[0] >= RECALL), choices[-1])


def _shingles(text: str) -> np.ndarray:
    """Hashes of the word 3-grams: uint32[S], distinct."""
    words = WORD.findall(fold(text)) or [fold(text)]
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
