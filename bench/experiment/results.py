"""What the arms scored, with paired bootstrap intervals: a short table, a file of all figures, and a plot."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
SHOWN = (DEFAULT, RECIPE, f"{RECIPE}, at full strength", *RIVALS, GOLD)
"""The arms on the page; the file beside it has all of them."""
TITLE = "# Results\n"
COLUMNS = (
    *("part", "rows", "unsafe", "arm", "against", "version", "guards"),
    *("auprc", "auprc_change", "auprc_low", "auprc_high", "recall", "recall_change", "recall_low", "recall_high"),
    *("gap_closed", "gap_low", "gap_high", "auprc_spread", "safe_blocked", "unsafe_caught", "promoted", "held_back_by"),
    *("passed_score_auprc", "passed_target_auprc"),
)
"""Of the file. `version`, written by hand, is GuardLoop's where an arm's settings are gone since; its rows stay."""


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
    """Write the page's section, its plot and the file of all figures beside it, and figures.json in `folder`."""
    parts = [part for part in (_part(subset, cells) for subset in [*settings.subsets, Subset(name=RESPONSES)]) if part]
    scores = {part.name: measure(part, settings) for part in parts}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "figures.json").write_text(json.dumps(_plain(scores), indent=2) + "\n", "utf-8")
    beside = page.with_suffix("")
    plot, table = beside / f"{folder.name}.svg", beside / f"{folder.name}.csv"
    _plot(scores, plot)
    rows = [*_figures(parts, scores, cells), *_by_source(parts), *_rivals(parts, settings)]
    _write(rows, table)
    lines = [
        f"## {settings.title}",
        "",
        *_missing(settings, cells),
        *_table(parts, scores, _gate(cells)),
        *_mined(cells),
    ]
    lines += [f"![gains over the baseline]({plot.relative_to(page.parent)})", ""]
    lines += [f"{settings.evaluation.resamples:,} bootstrap resamples of near-duplicate groups. {machine()}"]
    write_section(folder.name, "\n".join(lines), page, TITLE)


def _write(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The file of all figures, with the rows of arms that only an earlier version could train."""
    earlier = list(csv.DictReader(path.open(encoding="utf-8"))) if path.exists() else []
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows([*rows, *(row for row in earlier if row["version"])])


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


def _table(
    parts: Sequence[Part], scores: Mapping[str, dict[str, dict[str, Score]]], gate: Mapping[str, Mapping[str, str]]
) -> list[str]:
    """The arms that the page shows, one line each."""
    heads = ["arm"]
    for part in parts:
        heads += [f"{part.name}: AUPRC"] + ([f"recall at {FPR:.0%} FPR"] if part.name != RESPONSES else [])
    lines = [f"| {' | '.join([*heads, 'promoted'])} |", f"| --- |{' ---: |' * len(heads)}"]
    for arm in (arm for arm in SHOWN if arm in parts[0].scores):
        cells = [arm]
        for part in parts:
            for name in METRICS[: 1 if part.name == RESPONSES else 2]:
                found = scores[part.name][arm][name]
                change = "" if arm == DEFAULT else f" ({found.gain.low:+.3f} to {found.gain.high:+.3f})"
                cells.append(f"{found.value.value:.3f}{change}")
        lines += [f"| {' | '.join([*cells, gate.get(arm, {}).get('promoted', '')])} |"]
    sizes = [f"{part.name} {len(part.unsafe):,}, {int(part.unsafe.sum()):,}" for part in parts]
    return [*lines, "", f"Rows, unsafe: {'; '.join(sizes)}.", ""]


def _figures(
    parts: Sequence[Part], scores: Mapping[str, dict[str, dict[str, Score]]], cells: Sequence[Cell]
) -> Iterator[dict[str, Any]]:
    """A row for each arm on each part: what it scored, what the gate said of it, and how well its targets rank."""
    gate, ranked = _gate(cells), _rankings(cells)
    for part in parts:
        for arm, found in scores[part.name].items():
            row = {
                **_size(part),
                "arm": arm,
                "against": "" if arm == DEFAULT else DEFAULT,
                "guards": len(part.scores[arm]),
            }
            for name in METRICS:
                row[name] = f"{found[name].value.value:.3f}"
                row |= {} if arm == DEFAULT else _change(name, found[name].gain)
            if closed := found["auprc"].closed:
                row |= {"gap_closed": f"{closed.value:.2f}", "gap_low": f"{closed.low:.2f}"}
                row |= {"gap_high": f"{closed.high:.2f}"}
            row["auprc_spread"] = f"{found['auprc'].spread:.3f}"
            yield {**row, **(gate.get(arm, {}) if part is parts[0] else {}), **ranked.get((part.name, arm), {})}


def _size(part: Part) -> dict[str, Any]:
    return {"part": part.name, "rows": len(part.unsafe), "unsafe": int(part.unsafe.sum())}


def _change(name: str, gain: Estimate) -> dict[str, str]:
    return {
        f"{name}_{end}": f"{value:.3f}"
        for end, value in zip(("change", "low", "high"), (gain.value, gain.low, gain.high), strict=True)
    }


def _by_source(parts: Iterable[Part]) -> Iterator[dict[str, Any]]:
    """What knowing only the data set of each row is worth; the labels hold that, too."""
    for part in parts:
        names, sources = np.unique(part.sources, return_inverse=True)
        if len(names) < 2:
            continue
        shares = np.bincount(sources, part.unsafe) / np.bincount(sources)
        area = average_precision_score(part.unsafe, shares[sources])
        yield {**_size(part), "arm": "source alone", "auprc": f"{area:.3f}"}


def _rivals(parts: Iterable[Part], settings: ExperimentSettings) -> Iterator[dict[str, Any]]:
    """The recipe against what costs no responses. A lowered threshold ranks as the baseline does."""
    for part, rival in product(parts, RIVALS):
        if part.name == RESPONSES or RECIPE not in part.scores or rival not in part.scores:
            continue
        row = {**_size(part), "arm": RECIPE, "against": rival, "guards": len(part.scores[RECIPE])}
        for name, gain in compare(part, RECIPE, rival, settings).items():
            row |= _change(name, gain)
        yield row


def _gate(cells: Iterable[Cell]) -> dict[str, dict[str, str]]:
    """What each arm blocks at its own threshold, how often the gate promoted it, and what held it back."""
    by_arm: dict[str, list[Mapping[str, Any]]] = {}
    for cell in cells:
        if cell.evaluation:
            by_arm.setdefault(cell.arm, []).append(cell.evaluation)
    found = {DEFAULT: _rates(by_arm[RECIPE], "baseline")} if RECIPE in by_arm else {}
    for arm, evaluations in by_arm.items():
        decisions = [one["decision"] for one in evaluations]
        checks = [check for decision in decisions for check in decision["checks"]]
        failed = sorted({check["name"] for check in checks if check["blocks"] and check["outcome"] != "passed"})
        promoted = f"{sum(bool(decision['promote']) for decision in decisions)} of {len(decisions)}"
        found[arm] = {**_rates(evaluations, "candidate"), "promoted": promoted, "held_back_by": " ".join(failed)}
    return found


def _rates(evaluations: Sequence[Mapping[str, Any]], guard: str) -> dict[str, str]:
    """Means of the false-positive rate and of recall, at each guard's own threshold."""
    named = {"safe_blocked": "fpr", "unsafe_caught": "recall"}
    return {
        key: f"{np.mean([e['metrics'][name][guard]['value'] for e in evaluations]):.3f}" for key, name in named.items()
    }


def _mined(cells: Iterable[Cell]) -> list[str]:
    """What the recipe's mining found, of the first baseline."""
    mined = next((cell.mined for cell in cells if cell.arm == RECIPE and cell.mined), None)
    if not mined:
        return []
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in mined.counts.items())
    lines = [f"Of {mined.screened:,} prompts {mined.passed:,} passed; {mined.blocked:,} of their "]
    lines[0] += f"{mined.responses:,} responses were blocked, {mined.refusals:,} were refusals. Examples: {kinds}."
    return [*lines, ""]


def _rankings(cells: Iterable[Cell]) -> dict[tuple[str, str], dict[str, str]]:
    """How well scores and targets rank the passed prompts, by part and arm; means over baselines."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for cell in cells:
        for subset, pair in cell.ranking.items():
            found.setdefault((subset, cell.arm), []).append(pair)
    names = ("passed_score_auprc", "passed_target_auprc")
    return {
        key: {name: f"{value:.3f}" for name, value in zip(names, np.mean(pairs, 0), strict=True)}
        for key, pairs in found.items()
    }


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
