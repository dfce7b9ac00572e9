"""The two pages: an evaluation to decide from, and what mining found in a round of traffic.

They load and run nothing: the page's policy allows its own stylesheet alone.
"""

import base64
import hashlib
import math
from collections.abc import Iterable
from itertools import groupby

from markupsafe import Markup

from guardloop.core.records import Row
from guardloop.evaluation.result import Evaluation
from guardloop.report import plots, text
from guardloop.report.changes import find_changes
from guardloop.report.story import MiningSummary, RunStory
from guardloop.report.summary import (
    BENCHMARK_METRICS,
    KEY_METRICS,
    USES,
    checks_by_weight,
    held_out_line,
    metric_rows,
    outcome_line,
    wording,
)
from guardloop.report.templating import environment

KINDS = ("positive", "hard_negative")


def render_html(evaluation: Evaluation, scores: Iterable[Row], story: RunStory) -> str:
    """One self-contained page that a reviewer can decide from.

    `scores` are rows of `records.SCORES`; the plots and examples show those that are labelled prompts
    with finite scores, which is what the figures of `evaluation` are about.
    """
    prompts = [row for row in scores if _is_scored_prompt(row)]
    metrics = metric_rows(evaluation.metrics)
    change_scale, change_whiskers = plots.forest([row.change for row in metrics])
    slice_scale, slice_whiskers = plots.forest([part.gain for part in evaluation.slices])
    slices = list(zip(evaluation.slices, slice_whiskers, strict=True))
    benchmarks = [(b, metric_rows(b.metrics, BENCHMARK_METRICS)) for b in evaluation.benchmarks if b.metrics]
    benchmark_scale, benchmark_whiskers = plots.forest([row.change for _, rows in benchmarks for row in rows])
    whiskers = iter(benchmark_whiskers)
    return _page(
        "evaluation.html.jinja",
        title=story.title,
        story=story,
        evaluation=evaluation,
        wording=wording(evaluation.decision),
        outcome_line=outcome_line(evaluation),
        key_figures=metric_rows(evaluation.metrics, KEY_METRICS),
        metrics=list(zip(metrics, change_whiskers, strict=True)),
        change_scale=change_scale,
        checks=[(check, plots.check_whisker(check)) for check in checks_by_weight(evaluation.decision)],
        changes=find_changes(prompts, evaluation.baseline.threshold, evaluation.candidate.threshold),
        prompts=len(prompts),
        curves=plots.curve_plots(prompts, evaluation),
        hills=plots.hill_plots(prompts, evaluation),
        slices=[(name, list(parts)) for name, parts in groupby(slices, key=lambda pair: pair[0].dimension)],
        slice_scale=slice_scale,
        held_out_line=held_out_line(evaluation.held_out),
        uses=Markup(USES),
        benchmarks=[(result, [(row, next(whiskers)) for row in rows]) for result, rows in benchmarks],
        benchmark_scale=benchmark_scale,
    )


def render_mining(mined: MiningSummary, story: RunStory | None = None) -> str:
    """The page of the mining step, and of a run that ended there because there was too little to train on."""
    kinds = dict.fromkeys([*KINDS, *mined.counts, *(example.kind for example in mined.examples)])
    examples = {kind: [example for example in mined.examples if example.kind == kind] for kind in kinds}
    return _page(
        "mining.html.jinja",
        title=story.title if story else "What mining found",
        story=story or RunStory(),
        mined=mined,
        flow=mined.stage_counts(),
        counts=[(text.label(kind), mined.counts[kind], _style(kind)) for kind in kinds if kind in mined.counts],
        examples={kind: found for kind, found in examples.items() if found},
    )


def _style(kind: str) -> str:
    return kind if kind in KINDS else "replay"


def _page(template: str, **values: object) -> str:
    templates = environment(autoescape=True)
    style = templates.get_template("style.css.jinja").render()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return templates.get_template(template).render(style=Markup(style), style_hash=Markup(digest), **values)


def _is_scored_prompt(row: Row) -> bool:
    scores = row["baseline_score"], row["candidate_score"]
    return row.get("response") is None and row.get("unsafe") is not None and all(map(math.isfinite, scores))
