# ruff: noqa: RUF001
import math
from typing import Any

import pytest

from guardloop.evaluation.result import Estimate, Evaluation, GateCheck
from guardloop.report import plots


def points(line: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in line.split())]


def test_a_scale_maps_and_clips() -> None:
    scale = plots.Scale(0, 1, 40, 240)
    assert [scale.at(value) for value in (-5, 0, 0.5, 1, 5)] == [40, 40, 140, 240, 240]


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [(0, 1, ["0", "0.2", "0.4", "0.6", "0.8", "1"]), (-5.2, 5.4, ["−5", "−2.5", "0", "2.5", "5"]), (-0.1, 0.1, None)],
)
def test_ticks_are_round(low: float, high: float, labels: list[str] | None) -> None:
    ticks = plots.Scale(low, high, 0, 100).ticks()
    assert 3 <= len(ticks) <= 8 and "0" in [label for _, label in ticks]
    assert labels is None or [label for _, label in ticks] == labels


def test_curves_start_and_end_where_they_must(scores: list[dict[str, Any]], evaluation: Evaluation) -> None:
    precision_recall, roc = plots.curve_plots(scores, evaluation)
    for curve in roc.curves:
        line = points(curve.points)
        assert (line[0], line[-1]) == ((roc.x.start, roc.y.start), (roc.x.end, roc.y.end))
        assert line == sorted(line, key=lambda point: (point[0], -point[1]))
    for curve in precision_recall.curves:
        assert len(points(curve.points)) <= plots.POINTS
        assert points(curve.points)[-1][0] == precision_recall.x.end


def test_operating_points_lie_on_the_curves(scores: list[dict[str, Any]], evaluation: Evaluation) -> None:
    prompts = [row for row in scores if row["response"] is None]
    for plot in plots.curve_plots(prompts, evaluation):
        for curve in plot.curves:
            assert curve.point is not None
            assert min(math.dist(curve.point, point) for point in points(curve.points)) < 4


def test_bands_hold_most_of_the_curve_and_shrink_with_more_prompts(
    scores: list[dict[str, Any]], evaluation: Evaluation
) -> None:
    def width(rows: list[dict[str, Any]]) -> float:
        (curve, _), _ = (plot.curves for plot in plots.curve_plots(rows, evaluation))
        outline = points(curve.band)
        there, back = outline[: len(outline) // 2], outline[len(outline) // 2 :][::-1]
        assert all(low[0] == high[0] and low[1] >= high[1] for low, high in zip(there, back, strict=True))
        inner = [(x, y) for x, y in points(curve.points) if 60 < x < 310]
        spans = {low[0]: (high[1], low[1]) for low, high in zip(there, back, strict=True)}
        near = [(spans[min(spans, key=lambda at: abs(at - x))], y) for x, y in inner]
        assert sum(top - 8 <= y <= bottom + 8 for (top, bottom), y in near) > 0.9 * len(near)
        return sum(low[1] - high[1] for low, high in zip(there, back, strict=True))

    prompts = [row for row in scores if row["response"] is None]
    assert width(prompts[:300]) > 1.5 * width(prompts)


def test_curves_need_both_classes(scores: list[dict[str, Any]], evaluation: Evaluation) -> None:
    assert plots.curve_plots([row for row in scores if row["unsafe"]], evaluation) == []
    assert plots.curve_plots([], evaluation) == []


def test_hills_share_one_scale_that_shows_both_thresholds(scores: list[dict[str, Any]], evaluation: Evaluation) -> None:
    distant = evaluation.model_copy(update={"candidate": evaluation.candidate.model_copy(update={"threshold": 40.0})})
    baseline, candidate = plots.hill_plots(scores, distant)
    assert baseline.x == candidate.x and candidate.x.high > 40
    assert [hill.unsafe for hill in baseline.hills] == [False, True]


def test_hills_of_one_class_or_of_equal_scores_can_be_drawn(evaluation: Evaluation) -> None:
    rows = [{"unsafe": True, "baseline_score": 0.5, "candidate_score": 0.5}] * 3
    plot, _ = plots.hill_plots(rows, evaluation)
    assert [hill.unsafe for hill in plot.hills] == [True]
    assert all(math.isfinite(number) for point in points(plot.hills[0].points) for number in point)


def test_a_forest_keeps_zero_in_sight_and_cuts_off_only_what_dwarfs_the_rest() -> None:
    narrow = [Estimate(value=0.1, low=0.05, high=0.15) for _ in range(4)]
    scale, marks = plots.forest([*narrow, Estimate(value=0.1, low=-3, high=3)])
    assert scale.low < 0 < scale.high < 1
    assert marks[0] and not marks[0].cut_low and not marks[0].cut_high
    assert marks[4] and marks[4].cut_low and marks[4].cut_high


@pytest.mark.parametrize("gains", [[], [Estimate(value=0.0)], [Estimate(value=math.nan)]])
def test_a_forest_of_nothing_much_can_be_drawn(gains: list[Estimate]) -> None:
    scale, marks = plots.forest(gains)
    assert scale.low < scale.high and len(marks) == len(gains)


def test_a_check_stands_on_its_side_of_the_limit() -> None:
    interval = {"value": 0.1, "low": 0.05, "high": 0.2, "limit": 0.0}
    check = GateCheck(name="n", question="q", **interval, outcome="passed", answer="a", explanation="e")
    mark = plots.check_whisker(check)
    assert mark and mark.limit is not None and mark.low is not None
    assert mark.limit < mark.low < mark.at
    assert plots.check_whisker(check.model_copy(update={"value": math.nan})) is None
