"""The scored test set as columns, refused at the door when it cannot be evaluated."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from guardloop.core.errors import GuardLoopError
from guardloop.core.records import SCORES
from guardloop.evaluation.metrics import Bools, Floats, Ints


@dataclass(frozen=True)
class Table:
    """N labelled test rows with both guards' scores, as columns [N]."""

    unsafe: Bools
    is_response: Bools
    """Whether a response was judged."""
    group: Ints
    """Near-duplicates share a number."""
    baseline: Floats
    candidate: Floats
    length: Ints
    """Characters of prompt and response."""
    category: NDArray[np.object_]
    source: NDArray[np.object_]
    language: NDArray[np.object_]
    jailbreak: NDArray[np.object_]

    def __len__(self) -> int:
        return len(self.unsafe)

    def take(self, rows: Bools) -> "Table":
        """The rows where `rows[N]` is true, their groups numbered anew from 0."""
        columns = {field.name: getattr(self, field.name)[rows] for field in fields(self)}
        columns["group"] = np.unique(columns["group"], return_inverse=True)[1]
        return Table(**columns)

    def distinct(self, rows: Bools) -> int:
        """Number of near-duplicate groups among the rows where `rows[N]` is true."""
        return len(np.unique(self.group[rows]))


def digest_of_test_set(rows: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 of a labelled test set: of its texts and labels, whatever their order."""
    each = sorted(
        sha256(json.dumps([row[k] for k in ("prompt", "response", "unsafe")]).encode()).digest() for row in rows
    )
    return sha256(b"".join(each)).hexdigest()


def read_scores(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Read rows of the SCORES contract.

    Raises GuardLoopError when there are no rows, a column or a label is missing, or a score is not a finite number.
    """
    listed = list(rows)
    if not listed:
        raise GuardLoopError("there are no test rows to evaluate", "check the test split and the screen stage's output")
    if missing := [name for name in SCORES.names if name not in listed[0]]:
        raise GuardLoopError(f"the scores lack the columns {', '.join(missing)}")

    def column(name: str) -> NDArray[np.object_]:
        values = np.empty(len(listed), object)
        values[:] = [row[name] for row in listed]
        return values

    if unlabelled := sum(row["unsafe"] is None for row in listed):
        raise GuardLoopError(
            f"{unlabelled} of {len(listed)} test rows have no label in `unsafe`",
            "evaluate labelled rows only: label them or leave them out of the test split",
        )
    return Table(
        unsafe=column("unsafe").astype(bool),
        is_response=np.array([row["response"] is not None for row in listed]),
        group=np.unique(column("group").astype(str), return_inverse=True)[1],
        baseline=_scores(column("baseline_score"), "baseline_score"),
        candidate=_scores(column("candidate_score"), "candidate_score"),
        length=np.array([len(row["prompt"]) + len(row["response"] or "") for row in listed]),
        category=column("category"),
        source=column("source"),
        language=column("language"),
        jailbreak=column("jailbreak"),
    )


def _scores(values: NDArray[np.object_], name: str) -> Floats:
    """Float64, so that comparing with a threshold rounds nothing."""
    scores = values.astype(np.float64)  # None becomes NaN
    if bad := int((~np.isfinite(scores)).sum()):
        raise GuardLoopError(
            f"{bad} of {len(scores)} values of {name} are missing or not finite",
            "leave out rows that a guard could not judge and give their number as `unreadable`",
        )
    return scores
