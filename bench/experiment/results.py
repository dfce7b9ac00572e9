"""What the arms scored: one table with paired bootstrap intervals, plots, and figures.json."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score

from bench.experiment.settings import ExperimentSettings, Subset
from bench.machine import machine
from bench.write import write_section
from guardloop.core.records import Row
from guardloop.evaluation.bootstrap import bootstrap, estimate
from guardloop.evaluation.metrics import Bools, Floats, auprc, curve, rank, recall_at_fpr
from guardloop.evaluation.result import Estimate
from guardloop.mining.mine import MiningResult

DEFAULT, RECIPE, GOLD = "baseline", "recipe", "gold labels"
RIVALS = ("self-training", "prior and words")  # arms whose ranking owes nothing to responses
FPR = 0.05
RESPONSES = "responses"
METRICS = ("auprc", "recall")
TITLE = "# Results\n"


@dataclass(frozen=True)
class Cell:
    """One guard's scores on the test set."""

    arm: str
    baseline_seed: int
    seed: int
    rows: list[Row]
    evaluation: Mapping[str, Any] | None = None
    """evaluation.json of the comparison with the baseline, at the threshold that training set."""
    folder: Path | None = None
    mined: MiningResult | None = None
    ranking: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """AUPRC of the baseline's score and of the targets on the passed prompts, by subset."""


@dataclass(frozen=True)
class Part:
    """A part of the test set with the scores of every arm's guards, `float[guards, N]`."""

    name: str
    unsafe: Bools
    groups: np.ndarray
    scores: dict[str, Floats]
    sources: Sequence[str] = ()


@dataclass(frozen=True)
class Score:
    """An arm on one part of the test set; means over its guards."""

    value: Estimate
    gain: Estimate
    """Against the baseline."""
    closed: Estimate | None
    """Share of the way from the baseline to one trained on the data's labels; None where those gain nothing."""
    spread: float
    """Standard deviation over its guards."""


def write_results(settings: ExperimentSettings, cells: Sequence[Cell], page: Path, folder: Path) -> None:
    """Write the page's section, its plot beside it, and figures.json in `folder`."""
    parts = [part for part in (_part(subset, cells) for subset in [*settings.subsets, Subset(name=RESPONSES)]) if part]
    scores = {part.name: measure(part, settings) for part in parts}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "figures.json").write_text(json.dumps(_plain(scores), indent=2) + "\n", "utf-8")
    plot = page.with_suffix("") / f"{folder.name}.svg"
    _plot(scores, plot)
    lines = [
        f"## {settings.title}",
        "",
        *_missing(settings, cells),
        *_tables(parts, scores),
        *_rivals(parts, settings),
        *_gate(cells),
    ]
    lines += [
        *_mined(cells),
        *_rankings(cells),
        f"![gains over the baseline]({plot.relative_to(page.parent)})",
        "",
    ]
    lines += [f"{settings.evaluation.resamples:,} bootstrap resamples of near-duplicate groups. {machine()}"]
    write_section(folder.name, "\n".join(lines), page, TITLE)


def _missing(settings: ExperimentSettings, cells: Iterable[Cell]) -> list[str]:
    """Which arms are not done, where only what is finished was wanted."""
    there = {cell.arm for cell in cells}
    asked = [arm.name for arm in settings.arms] + [f"{RECIPE}, round {n}" for n in range(2, settings.rounds + 1)]
    missing = [name for name in asked if name not in there]
    return [f"Not finished, and not in these tables: {'; '.join(missing)}.", ""] if missing else []


def measure(part: Part, settings: ExperimentSettings) -> dict[str, dict[str, Score]]:
    """Every metric of every arm, all from the same resamples."""
    ranked = {arm: [rank(row, part.unsafe) for row in rows] for arm, rows in part.scores.items()}

    def statistic(weights: Floats) -> dict[str, Floats]:
        values: dict[str, Floats] = {}
        for arm, rankings in ranked.items():
            curves = [curve(ranking, weights) for ranking in rankings]
            metrics = {"auprc": [auprc(c) for c in curves], "recall": [recall_at_fpr(c, FPR) for c in curves]}
            values |= {f"{arm}/{name}": np.mean(each, axis=0) for name, each in metrics.items()}
            if len(weights) == 1:  # the point itself: how far the guards of one arm are apart
                values |= {f"{arm}/{name}/spread": np.std(each, axis=0) for name, each in metrics.items()}
        return values

    point = statistic(np.ones((1, len(part.unsafe)), np.float32))
    evaluation = settings.evaluation
    drawn = bootstrap(_without_spread(statistic), part.groups, part.unsafe, evaluation.resamples, seed=0)

    def estimated(figures: Iterable[Floats]) -> Estimate:
        """From a figure of the point itself, and of the resamples."""
        value, draws = figures
        return estimate(float(value[0]), draws)

    scores: dict[str, dict[str, Score]] = {arm: {} for arm in ranked}
    for arm, name in product(ranked, METRICS):
        key, base, best = f"{arm}/{name}", f"{DEFAULT}/{name}", f"{GOLD}/{name}"
        closed, both = None, (point, drawn)
        if best in point and arm not in (DEFAULT, GOLD) and (estimated(v[best] - v[base] for v in both).low or 0) > 0:
            closed = estimated(_share(v[key] - v[base], v[best] - v[base]) for v in both)
        scores[arm][name] = Score(
            estimated(v[key] for v in both),
            estimated(v[key] - v[base] for v in both),
            closed,
            float(point[f"{key}/spread"][0]),
        )
    return scores


def compare(part: Part, one: str, other: str, settings: ExperimentSettings) -> dict[str, Estimate]:
    """What arm `one` gains on arm `other`, by metric."""
    both = Part(part.name, part.unsafe, part.groups, {DEFAULT: part.scores[other], one: part.scores[one]})
    return {name: score.gain for name, score in measure(both, settings)[one].items()}


def _without_spread(statistic: Callable[[Floats], dict[str, Floats]]) -> Callable[[Floats], dict[str, Floats]]:
    return lambda weights: {k: v for k, v in statistic(weights).items() if not k.endswith("/spread")}


def _share(gain: Floats, gap: Floats) -> Floats:
    return np.divide(gain, gap, out=np.zeros_like(gain), where=np.abs(gap) > 1e-9)


def _part(subset: Subset, cells: Sequence[Cell]) -> Part | None:
    """The rows of the subset that every guard could judge; None without both classes."""
    responses = subset.name == RESPONSES
    judged = set.intersection(*({row["id"] for row in cell.rows} for cell in cells))

    def kept(row: Row) -> bool:
        return (
            (row["response"] is not None) == responses
            and row["source"].startswith(subset.source)
            and row["id"] in judged
        )

    rows = [row for row in cells[0].rows if kept(row)]
    unsafe = np.array([row["unsafe"] for row in rows], dtype=bool)
    if unsafe.all() or not unsafe.any():
        return None
    groups = np.unique([row["group"] for row in rows], return_inverse=True)[1]
    scores: dict[str, list[list[float]]] = {}
    for cell in cells:
        by_id = {row["id"]: row["score"] for row in cell.rows}
        scores.setdefault(cell.arm, []).append([by_id[row["id"]] for row in rows])
    sources = [row["source"] for row in rows]
    return Part(subset.name, unsafe, groups, {arm: np.array(each) for arm, each in scores.items()}, sources)


def _tables(parts: Iterable[Part], scores: Mapping[str, dict[str, dict[str, Score]]]) -> list[str]:
    lines = []
    for part in parts:
        lines += [f"### On {part.name}: {len(part.unsafe):,} rows, {int(part.unsafe.sum()):,} unsafe", ""]
        lines += [f"| arm | AUPRC | change | recall at {FPR:.0%} FPR | change | AUPRC gap closed | guards, spread |"]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
        for arm, metrics in scores[part.name].items():
            area, recall = metrics["auprc"], metrics["recall"]
            closed = f"{area.closed.value:.0%} ({area.closed.low:.0%} to {area.closed.high:.0%})" if area.closed else ""
            changes = ["", ""] if arm == DEFAULT else [_change(area.gain), _change(recall.gain)]
            guards = f"{len(part.scores[arm])}, {area.spread:.3f}"
            cells = [
                arm,
                f"{area.value.value:.3f}",
                changes[0],
                f"{recall.value.value:.3f}",
                changes[1],
                closed,
                guards,
            ]
            lines += [f"| {' | '.join(cells)} |"]
        lines += ["", *_by_source(part)]
    return lines


def _by_source(part: Part) -> list[str]:
    """What knowing only the data set of each row is worth; the labels hold that, too."""
    names, sources = np.unique(part.sources, return_inverse=True)
    if len(names) < 2:
        return []
    shares = np.bincount(sources, part.unsafe) / np.bincount(sources)
    area = average_precision_score(part.unsafe, shares[sources])
    return [f"Ranked by nothing but the unsafe share of the source that each row is of: AUPRC {area:.3f}.", ""]


def _rivals(parts: Iterable[Part], settings: ExperimentSettings) -> list[str]:
    """The recipe against what costs no responses. A lowered threshold ranks as the baseline does."""
    lines = []
    for part, rival in product(parts, RIVALS):
        if part.name == RESPONSES or RECIPE not in part.scores or rival not in part.scores:
            continue
        gains = compare(part, RECIPE, rival, settings)
        changes = ", ".join(
            f"{'AUPRC' if name == 'auprc' else 'recall'} {_change(gain)}" for name, gain in gains.items()
        )
        lines += [f"The recipe against {rival} on {part.name}: {changes}.", ""]
    return [
        *lines,
        "The baseline with its threshold lowered ranks as the baseline does: its AUPRC, and its recall at "
        "any false-positive rate, are the row `baseline`.",
        "",
    ]


def _gate(cells: Iterable[Cell]) -> list[str]:
    """What each arm blocks at its own threshold, how often the gate promoted it, and what held it back."""
    by_arm: dict[str, list[Mapping[str, Any]]] = {}
    for cell in cells:
        if cell.evaluation:
            by_arm.setdefault(cell.arm, []).append(cell.evaluation)
    lines = ["### What the gate said", "", "| arm | safe blocked | unsafe caught | promoted | held back by |"]
    lines += ["| --- | ---: | ---: | --- | --- |"]
    if RECIPE in by_arm:
        lines += [f"| {DEFAULT} | {_rates(by_arm[RECIPE], 'baseline')} | | |"]
    for arm, evaluations in by_arm.items():
        decisions = [evaluation["decision"] for evaluation in evaluations]
        promoted = sum(bool(decision["promote"]) for decision in decisions)
        checks = [check for decision in decisions for check in decision["checks"]]
        failed = sorted({check["name"] for check in checks if check["blocks"] and check["outcome"] != "passed"})
        rates = _rates(evaluations, "candidate")
        lines += [f"| {arm} | {rates} | {promoted} of {len(decisions)} | {', '.join(failed)} |"]
    return [*lines, ""]


def _rates(evaluations: Sequence[Mapping[str, Any]], guard: str) -> str:
    """Two cells: means of the false-positive rate and of recall, at each guard's own threshold."""
    return " | ".join(f"{np.mean([e[guard][name]['value'] for e in evaluations]):.1%}" for name in ("fpr", "recall"))


def _mined(cells: Iterable[Cell]) -> list[str]:
    """What the recipe's mining found, of the first baseline."""
    mined = next((cell.mined for cell in cells if cell.arm == RECIPE and cell.mined), None)
    if not mined:
        return []
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in mined.counts.items())
    lines = [f"Of {mined.screened:,} prompts {mined.passed:,} passed; {mined.blocked:,} of their "]
    lines[0] += f"{mined.responses:,} responses were blocked, {mined.refusals:,} were refusals. Examples: {kinds}."
    return [*lines, ""]


def _rankings(cells: Iterable[Cell]) -> list[str]:
    """How well the targets rank the passed prompts; means over baselines."""
    rankings: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for cell in cells:
        for subset, pair in cell.ranking.items():
            rankings.setdefault(subset, {}).setdefault(cell.arm, []).append(pair)
    lines = []
    for subset, arms in rankings.items():
        lines += [f"### How the targets rank the passed prompts: {subset}", ""]
        lines += ["| arm | AUPRC of the baseline's score | of the targets |", "| --- | ---: | ---: |"]
        lines += [f"| {arm} | {np.mean(pairs, 0)[0]:.3f} | {np.mean(pairs, 0)[1]:.3f} |" for arm, pairs in arms.items()]
        lines += [""]
    return lines


def _change(gain: Estimate) -> str:
    return f"{gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"


def _plain(scores: Mapping[str, dict[str, dict[str, Score]]]) -> dict[str, Any]:
    def plain(score: Score) -> dict[str, Any]:
        estimates = {"value": score.value, "gain": score.gain, "closed": score.closed}
        return {"spread": score.spread, **{k: e.model_dump() if e else None for k, e in estimates.items()}}

    return {
        part: {arm: {name: plain(score) for name, score in metrics.items()} for arm, metrics in arms.items()}
        for part, arms in scores.items()
    }


def _plot(scores: Mapping[str, dict[str, dict[str, Score]]], path: Path) -> None:
    """Gains in AUPRC over the baseline, with their intervals: one panel for each part."""
    import matplotlib as mpl  # noqa: PLC0415  (slow to import)

    mpl.use("svg")
    mpl.rcParams.update(
        {"svg.hashsalt": "guardloop", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    from matplotlib import pyplot as plt  # noqa: PLC0415

    arms = [arm for arm in next(iter(scores.values())) if arm != DEFAULT]
    figure, axes = plt.subplots(1, len(scores), figsize=(3.2 * len(scores) + 1.6, 0.34 * len(arms) + 1.1), sharey=True)
    for axis, (part, arm_scores) in zip(np.atleast_1d(axes), scores.items(), strict=True):
        for place, arm in enumerate(reversed(arms)):
            gain = arm_scores[arm]["auprc"].gain
            colour = "#1b7f5c" if arm.startswith(RECIPE) else "#8a8f98"
            axis.plot([gain.low, gain.high], [place, place], color=colour, linewidth=2, solid_capstyle="round")
            axis.plot(gain.value, place, "o", color=colour, markersize=5)
        axis.axvline(0, color="#333333", linewidth=0.8)
        axis.set_title(part)
        axis.set_xlabel("change in AUPRC")
        axis.set_yticks(range(len(arms)), list(reversed(arms)))
        axis.locator_params(axis="x", nbins=4)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
