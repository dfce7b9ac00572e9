"""How often the gate promotes, over simulated evaluations whose truth is known: its false alarms and its power.

Run: python -m bench.gate_simulation [--only equal] [--processes 2]

Without options it gives the table of docs/gate.md. The gate is the default one. Where the guards are equal, the slices
are measured only if every other check passed: promotion needs all of them, so the count of promotions is exactly that
of the whole gate at a quarter of the time.
"""

import argparse
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest, norm

from guardloop.evaluation.compare import evaluate
from guardloop.evaluation.paired import GuardRun
from guardloop.evaluation.result import Evaluation
from guardloop.evaluation.settings import EvaluationSettings

CATEGORIES = ("S1", "S2", "S9", "S10")
LANGUAGES = ("en", "de", "fr")


@dataclass(frozen=True)
class World:
    """A population of prompts and two guards on it; scores are normal, unsafe rows shifted by the separation."""

    rows: int = 5000
    unsafe_share: float = 0.2
    baseline_auprc: float = 0.60
    candidate_auprc: float = 0.60
    correlation: float = 0.9
    """Of the two guards' scores, given the label."""
    response_rows: int = 1000
    benign_fpr: float = 0.05
    """At which both thresholds are set, on as many validation rows as test rows."""


def simulate(world: World, resamples: int, seed: int, stop_early: bool = False) -> Evaluation:
    """One evaluation on a fresh test set; with `stop_early` without its slices where they cannot matter any more."""
    rows, guards = draw(world, seed)
    settings = EvaluationSettings(resamples=resamples)
    if stop_early:
        first = evaluate(rows, *guards, settings.model_copy(update={"slices": ()}), seed=seed)
        if not first.decision.promote:
            return first
    return evaluate(rows, *guards, settings, seed=seed)


def draw(world: World, seed: int) -> tuple[list[dict[str, Any]], tuple[GuardRun, GuardRun]]:
    """A test set of SCORES rows, and the two guards with thresholds set on validation rows."""
    rng = np.random.default_rng(seed)
    shifts = tuple(separation(auprc, world.unsafe_share) for auprc in (world.baseline_auprc, world.candidate_auprc))
    unsafe, scores = _scores(rng, world.rows, world.unsafe_share, shifts, world.correlation)
    known, seen = _scores(rng, world.rows, world.unsafe_share, shifts, world.correlation)
    thresholds = np.quantile(seen[~known], 1 - world.benign_fpr, axis=0)
    response_unsafe, response_scores = _scores(rng, world.response_rows, 0.5, (2.5, 2.5), 0.95)
    rows = [*_rows(rng, unsafe, scores, None), *_rows(rng, response_unsafe, response_scores, "a response")]
    baseline, candidate = (
        GuardRun(n, float(t), 0.99, 0) for n, t in zip(("baseline", "candidate"), thresholds, strict=True)
    )
    return rows, (baseline, candidate)


@cache
def separation(auprc: float, unsafe_share: float) -> float:
    """The shift between two unit normals whose population AUPRC is `auprc`, found by bisection."""
    low, high = 0.0, 6.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if _population_auprc(middle, unsafe_share) < auprc else (low, middle)
    return high


def _population_auprc(shift: float, unsafe_share: float) -> float:
    at = np.linspace(-6, 12, 4001)
    caught, blocked = norm.sf(at, loc=shift) * unsafe_share, norm.sf(at) * (1 - unsafe_share)
    precision = caught / (caught + blocked)
    return float(-np.trapezoid(precision, caught / unsafe_share))


def _scores(
    rng: np.random.Generator, rows: int, unsafe_share: float, shifts: tuple[float, ...], correlation: float
) -> tuple[np.ndarray, np.ndarray]:
    unsafe = rng.random(rows) < unsafe_share
    noise = rng.multivariate_normal([0, 0], [[1, correlation], [correlation, 1]], size=rows)
    return unsafe, noise + unsafe[:, None] * np.array(shifts)


def _rows(
    rng: np.random.Generator, unsafe: np.ndarray, scores: np.ndarray, response: str | None
) -> Iterable[dict[str, Any]]:
    count = len(unsafe)
    languages, categories = rng.choice(LANGUAGES, count, p=(0.7, 0.2, 0.1)), rng.choice(CATEGORIES, count)
    lengths, sources = rng.choice((100, 600, 2000), count), rng.choice(("a", "b"), count)
    jailbreaks = rng.random(count) < 0.1
    for i in range(count):
        yield {
            "id": str(i),
            "prompt": "x" * lengths[i],
            "response": response,
            "unsafe": bool(unsafe[i]),
            "category": str(categories[i]) if unsafe[i] else None,
            "source": str(sources[i]),
            "language": str(languages[i]),
            "jailbreak": bool(jailbreaks[i]),
            "group": f"{response}-{i}",
            "baseline_score": scores[i, 0],
            "candidate_score": scores[i, 1],
        }


EQUAL, BETTER = World(), World(candidate_auprc=0.65)
WORLDS = {  # the truth, and how many simulations of how many resamples each
    "equal guards": (EQUAL, 2000, 1000),
    "equal, correlation 0.7": (replace(EQUAL, correlation=0.7), 400, 1000),
    "equal, 7% unsafe": (replace(EQUAL, unsafe_share=0.07), 300, 500),
    "5 AUPRC points worse": (replace(EQUAL, candidate_auprc=0.55), 150, 500),
    "5 AUPRC points better": (BETTER, 150, 500),
    "5 better, correlation 0.7": (replace(BETTER, correlation=0.7), 150, 500),
    "5 better, 7% unsafe": (replace(BETTER, unsafe_share=0.07), 150, 500),
    "5 better, 1,000 rows": (replace(BETTER, rows=1000), 150, 500),
}


def main() -> None:
    """Simulate every world and print how often its candidate was promoted, and which checks held it back."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", default="", help="how the names of the worlds wanted begin")
    options = parser.parse_args()
    console = Console(width=160)
    table = Table("world", "simulations", "resamples", "promoted (95% interval)", "not passed (share)")
    with ProcessPoolExecutor(options.processes) as pool:
        for name, (world, count, resamples) in WORLDS.items():
            if not name.startswith(options.only):
                continue
            equal = world.baseline_auprc >= world.candidate_auprc
            found = list(pool.map(partial(simulate, world, resamples, stop_early=equal), range(count), chunksize=5))
            blocked = Counter(c.name for e in found for c in e.decision.checks if c.outcome != "passed")
            why = ", ".join(f"{check} {n / count:.2f}" for check, n in blocked.most_common(5))
            promoted = sum(e.decision.promote for e in found)
            ends = binomtest(promoted, count).proportion_ci()
            share = f"{promoted / count:.2%} ({ends.low:.2%} to {ends.high:.2%})"
            console.log(f"{name}: {share} of {count} promoted; {why}")  # a long run that is cut short still tells
            table.add_row(name, str(count), str(resamples), share, why)
    console.print(table)


if __name__ == "__main__":
    main()
