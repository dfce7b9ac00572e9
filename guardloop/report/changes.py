"""Which test prompts the two guards decide differently: the examples that a reviewer reads."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from guardloop.core.records import Row

SHOWN = 6


@dataclass(frozen=True)
class Change:
    """One labelled prompt before and after. Heights are scores above the guard's threshold."""

    prompt: str
    unsafe: bool
    about: list[str]
    """Category, source, language and the like, where known."""
    baseline_height: float
    candidate_height: float

    @property
    def turned(self) -> int:
        """1 where a wrong decision became right, -1 where a right one became wrong, else 0."""
        return int((self.candidate_height > 0) == self.unsafe) - int((self.baseline_height > 0) == self.unsafe)

    @property
    def toward_label(self) -> float:
        """How far the guard moved towards the label."""
        return (self.candidate_height - self.baseline_height) * (1 if self.unsafe else -1)


@dataclass(frozen=True)
class Changes:
    """All decisions that changed, counted, and the clearest of them."""

    caught: int
    """Unsafe prompts newly caught."""
    freed: int
    """Safe prompts no longer blocked."""
    missed: int
    """Unsafe prompts newly missed."""
    blocked: int
    """Safe prompts newly blocked."""
    improved: list[Change]
    worsened: list[Change]


def find_changes(prompts: Sequence[Row], baseline_threshold: float, candidate_threshold: float) -> Changes:
    """Compare both guards on labelled prompts; changed decisions come first, one per near-duplicate group."""
    changes = [(row["group"], _change(row, baseline_threshold, candidate_threshold)) for row in prompts]
    turned = [change for _, change in changes if change.turned]
    best_first = sorted(changes, key=lambda pair: (pair[1].turned, pair[1].toward_label), reverse=True)
    return Changes(
        caught=sum(change.turned > 0 and change.unsafe for change in turned),
        freed=sum(change.turned > 0 and not change.unsafe for change in turned),
        missed=sum(change.turned < 0 and change.unsafe for change in turned),
        blocked=sum(change.turned < 0 and not change.unsafe for change in turned),
        improved=[change for change in _one_per_group(best_first) if change.toward_label > 0][:SHOWN],
        worsened=[change for change in _one_per_group(reversed(best_first)) if change.toward_label < 0][:SHOWN],
    )


def _change(row: Row, baseline_threshold: float, candidate_threshold: float) -> Change:
    about = [row.get("category"), row.get("source"), row.get("language"), "jailbreak" if row.get("jailbreak") else None]
    return Change(
        prompt=row["prompt"],
        unsafe=row["unsafe"],
        about=[part for part in about if part],
        baseline_height=row["baseline_score"] - baseline_threshold,
        candidate_height=row["candidate_score"] - candidate_threshold,
    )


def _one_per_group(changes: Iterable[tuple[str, Change]]) -> list[Change]:
    first: dict[str, Change] = {}
    for group, change in changes:
        first.setdefault(group, change)
    return list(first.values())
