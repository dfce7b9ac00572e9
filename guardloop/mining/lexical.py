"""Lexical smoothing: a character n-gram classifier, cross-fitted on the targets of prompts that read alike.

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
PSEUDO_COUNT = 0.3  # added to the count of each n-gram
NGRAMS = HashingVectorizer(
    analyzer="char_wb",  # within words, and so in any language
    ngram_range=(5, 5),
    n_features=2**18,  # as much memory whatever the traffic is
    binary=True,
    norm=None,
    alternate_sign=False,
    dtype=np.float32,
)


def ngram_targets(texts: Sequence[str], targets: np.ndarray, groups: Sequence[str], seed: int = 0) -> np.ndarray:
    """P(unsafe) of each text by its character 5-grams, `float64[N]`, learnt from `targets`, `float[N]` in 0 .. 1.

    Naive Bayes with the targets as soft labels, cross-fitted in five folds that keep a group of near-duplicates
    together. The sum of N n-grams' log-likelihood ratios is divided by the root of N, as overlapping n-grams count too
    much otherwise, and put on the targets' scale by logistic regression.
    """
    if not 0 < targets.sum() < len(targets):  # one class only
        return targets
    counts = NGRAMS.transform(texts)
    folds = np.array([_fold(group, seed) for group in groups])
    ratios = np.zeros(len(texts))
    for fold in range(FOLDS):
        inside = folds == fold
        if inside.any() and 0 < targets[~inside].sum() < (~inside).sum():
            ratios[inside] = _ratios(counts[~inside], targets[~inside], counts[inside])
    ratios /= np.sqrt(np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1))
    return _on_scale(ratios, targets)


def _ratios(train: csr_matrix, targets: np.ndarray, test: csr_matrix) -> np.ndarray:
    """log P(n-grams | unsafe) - log P(n-grams | safe) of `test`."""
    model = MultinomialNB(alpha=PSEUDO_COUNT, fit_prior=False)
    for label, weights in enumerate((1 - targets, targets)):
        model.partial_fit(train, np.full(len(targets), label), classes=[0, 1], sample_weight=weights)
    safe, unsafe = model.predict_log_proba(test).T
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
