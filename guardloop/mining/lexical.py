"""What the words of a prompt say, learnt from the targets of the prompts that read like it.

One judge errs on one prompt; over many prompts with the same words its errors mostly cancel. The guard that is trained
reads the prompts as vectors, and this reads them as strings, so that each corrects the other (co-training: Blum and
Mitchell, 1998).
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import MultinomialNB

FOLDS = 5
SMOOTHING = 0.3  # added to the count of each string of characters
STRINGS = HashingVectorizer(
    analyzer="char_wb",  # within words, and so in any language
    ngram_range=(5, 5),
    n_features=2**18,  # as much memory whatever the traffic is
    binary=True,
    norm=None,
    alternate_sign=False,
    dtype=np.float32,
)


def by_words(texts: Sequence[str], targets: np.ndarray, groups: Sequence[str], seed: int = 0) -> np.ndarray:
    """P(unsafe) of each text by its strings of five characters, `float64[N]`, from `targets`, `float[N]` in 0 .. 1.

    Naive Bayes with the targets as soft labels. Each text is told by the others: a text and its group, which are
    near-duplicates, are left out of what tells them. The sum of N strings' log-likelihood ratios is divided by the
    root of N, as strings that overlap count too much otherwise, and put on the targets' scale by logistic regression.
    """
    if not 0 < targets.sum() < len(targets):  # nothing to tell apart
        return targets
    strings = STRINGS.transform(texts)
    folds = np.array([_fold(group, seed) for group in groups])
    ratios = np.zeros(len(texts))
    for fold in range(FOLDS):
        inside = folds == fold
        if inside.any() and 0 < targets[~inside].sum() < (~inside).sum():
            ratios[inside] = _ratios(strings[~inside], targets[~inside], strings[inside])
    ratios /= np.sqrt(np.maximum(np.asarray(strings.sum(axis=1)).ravel(), 1))
    return _on_scale(ratios, targets)


def _ratios(known: csr_matrix, targets: np.ndarray, asked: csr_matrix) -> np.ndarray:
    """log P(strings | unsafe) - log P(strings | safe)."""
    model = MultinomialNB(alpha=SMOOTHING, fit_prior=False)
    for label, weights in enumerate((1 - targets, targets)):
        model.partial_fit(known, np.full(len(targets), label), classes=[0, 1], sample_weight=weights)
    safe, unsafe = model.predict_log_proba(asked).T
    ratios: np.ndarray = unsafe - safe
    return ratios


def _on_scale(ratios: np.ndarray, targets: np.ndarray) -> np.ndarray:
    twice, labels = np.tile(ratios, 2)[:, None], np.repeat([1, 0], len(ratios))
    scale = LogisticRegression().fit(twice, labels, sample_weight=np.concatenate([targets, 1 - targets]))
    probabilities: np.ndarray = scale.predict_proba(ratios[:, None])[:, 1]
    return probabilities


def _fold(group: str, seed: int) -> int:
    digest = hashlib.sha256(f"words/{seed}/{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % FOLDS
