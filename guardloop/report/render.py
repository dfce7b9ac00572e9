"""The three pages: an evaluation to decide from, its short summary, and what a round of traffic brought.

Labelled text is hostile. Every value that a template prints passes through `finalize`, which writes out control and
bidi characters, and then through jinja's escaping; the page's policy allows its own stylesheet and nothing else.
"""

import base64
import hashlib
import math
from collections.abc import Iterable
from functools import cache
from itertools import groupby

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from guardloop.core.records import Row
from guardloop.evaluation.result import Evaluation
from guardloop.report import plots, text
from guardloop.report.changes import find_changes
from guardloop.report.story import MiningSummary, RunStory, StageCounts
from guardloop.report.summary import (
    SYMBOLS,
    TONES,
    benchmark_rows,
    checks_by_weight,
    comparisons,
    held_out_line,
    key_figures,
    outcome_line,
    tone,
    wording,
)

EXCERPT = 1500
KINDS = ("positive", "hard_negative")


def render_html(evaluation: Evaluation, scores: Iterable[Row], story: RunStory) -> str:
    """One self-contained page that a reviewer can decide from.

    `scores` are rows of `records.SCORES`; the plots and examples show those that are labelled prompts
    with finite scores, which is what the figures of `evaluation` are about.
    """
    prompts = [row for row in scores if _is_scored_prompt(row)]
    compared = comparisons(evaluation)
    gain_scale, gain_whiskers = plots.forest([row.gain for row in compared])
    slice_scale, slice_whiskers = plots.forest([part.gain for part in evaluation.slices])
    slices = list(zip(evaluation.slices, slice_whiskers, strict=True))
    benchmarks = [(result, benchmark_rows(result)) for result in evaluation.benchmarks if result.metrics]
    benchmark_scale, marks = plots.forest([row.gain for _, rows in benchmarks for row in rows])
    whiskers = iter(marks)
    return _page(
        "evaluation.html.jinja",
        title=story.title,
        story=story,
        evaluation=evaluation,
        wording=wording(evaluation.decision),
        outcome_line=outcome_line(evaluation),
        key_figures=key_figures(evaluation),
        comparisons=list(zip(compared, gain_whiskers, strict=True)),
        gain_scale=gain_scale,
        checks=[(check, plots.check_whisker(check)) for check in checks_by_weight(evaluation.decision)],
        changes=find_changes(prompts, evaluation.baseline.threshold, evaluation.candidate.threshold),
        prompts=len(prompts),
        curves=plots.curve_plots(prompts, evaluation),
        hills=plots.hill_plots(prompts, evaluation),
        slices=[(name, list(parts)) for name, parts in groupby(slices, key=lambda pair: pair[0].dimension)],
        slice_scale=slice_scale,
        held_out_line=held_out_line(evaluation.held_out) if evaluation.held_out else "",
        benchmarks=[(result, [(row, next(whiskers)) for row in rows]) for result, rows in benchmarks],
        benchmark_scale=benchmark_scale,
    )


def render_markdown(evaluation: Evaluation, story: RunStory) -> str:
    """The decision, the metrics and the checks in brief, for the KFP UI and for MLflow's run description."""
    environment = _environment(autoescape=False)
    return environment.get_template("summary.md.jinja").render(
        story=story,
        evaluation=evaluation,
        wording=wording(evaluation.decision),
        outcome_line=outcome_line(evaluation),
        comparisons=comparisons(evaluation),
        checks=checks_by_weight(evaluation.decision),
        held_out_line=held_out_line(evaluation.held_out) if evaluation.held_out else "",
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
        flow=StageCounts(
            prompts=mined.screened,
            flagged=mined.screened - mined.passed,
            passed=mined.passed,
            responses=mined.responses,
            refusals=mined.refusals,
            blocked=mined.blocked,
        ),
        counts=[(text.label(kind), mined.counts[kind], _style(kind)) for kind in kinds if kind in mined.counts],
        examples={kind: found for kind, found in examples.items() if found},
    )


def _style(kind: str) -> str:
    return kind if kind in KINDS else "replay"


def _page(template: str, **values: object) -> str:
    environment = _environment(autoescape=True)
    style = environment.get_template("style.css.jinja").render()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return environment.get_template(template).render(style=Markup(style), style_hash=Markup(digest), **values)


@cache
def _environment(autoescape: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("guardloop.report"),
        autoescape=autoescape,
        finalize=_finalize_html if autoescape else _finalize_markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=False,
    )
    environment.filters |= {
        "excerpt": text.excerpt,
        "interval": text.interval,
        "label": text.label,
        "number": text.number,
        "sentence": text.sentence,
        "percent": text.percent,
        "setting": text.setting,
        "tone": tone,
    }
    environment.globals |= {"EXCERPT": EXCERPT, "SYMBOLS": SYMBOLS, "TONES": TONES}
    return environment


def _finalize_html(value: object) -> object:
    return text.visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _finalize_markdown(value: object) -> object:
    return text.markdown(value) if isinstance(value, str) else value


def _is_scored_prompt(row: Row) -> bool:
    scores = row["baseline_score"], row["candidate_score"]
    return row.get("response") is None and row.get("unsafe") is not None and all(map(math.isfinite, scores))
