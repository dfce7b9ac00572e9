"""The short summary: for the KFP UI, and as the description of runs and versions in MLflow."""

from guardloop.evaluation.result import Evaluation
from guardloop.evaluation.wording import use_of_test_set
from guardloop.report.story import RunStory
from guardloop.report.summary import checks_by_weight, held_out_line, metric_rows, outcome_line, wording
from guardloop.report.templating import environment


def render_markdown(evaluation: Evaluation, story: RunStory) -> str:
    """The decision, the metrics and the checks in brief, and where they come from."""
    return (
        environment(autoescape=False)
        .get_template("summary.md.jinja")
        .render(
            story=story,
            evaluation=evaluation,
            wording=wording(evaluation.decision),
            outcome_line=outcome_line(evaluation),
            metrics=metric_rows(evaluation.metrics),
            checks=checks_by_weight(evaluation.decision),
            use_of_test_set=use_of_test_set(evaluation.test_set_uses),
            held_out_line=held_out_line(evaluation.held_out),
        )
    )
