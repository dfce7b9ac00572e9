"""The components. Each runs in the image of its own name; the library is baked in, nothing is installed at run time."""

from functools import partial
from typing import Any

from kfp import dsl
from kfp.dsl import HTML, Artifact, ClassificationMetrics, Dataset, Input, Markdown, Metrics, Model, Output


def stage(name: str) -> Any:
    """The decorator of a stage's component: its own image, and no package installed when it runs.

    Registry and tag are the platform's business: they are put to the name where a pipeline is compiled or executed.
    In a stage's image KFP's executor loads this file, and wants the function as it is.
    """
    if not hasattr(dsl, "component"):  # kfp.dsl without its compiler
        return lambda function: function
    return partial(dsl.component, base_image=f"guardloop/{name}", install_kfp_package=False)()


@stage("prepare-data")
def prepare_data(
    dataset: dict, seed: int, shards: int, traffic: Output[Dataset], test_set: Output[Dataset], metrics: Output[Metrics]
) -> list[int]:
    """Read, clean and deduplicate the traffic; keep it apart from the test set. Returns the numbers of the shards."""
    from guardloop.stages import prepare_data

    for name, value in prepare_data(dataset, traffic.path, test_set.path, int(seed)).items():
        metrics.log_metric(name, value)
    return list(range(int(shards)))


@stage("screen")
def screen(
    conversations: Input[Dataset],
    guard: dict,
    verdicts: Output[Dataset],
    metrics: Output[Metrics],
    what: str = "screen",
    shard: int = 0,
    shards: int = 1,
):
    """Score conversations, or one shard of them, with the baseline."""
    from guardloop.stages import screen

    figures = screen(conversations.path, verdicts.path, guard, shard=int(shard), shards=int(shards), what=what)
    for name, value in figures.items():
        metrics.log_metric(name, value)


@stage("screen")
def screen_candidate(
    conversations: Input[Dataset],
    training_set: Input[Dataset],
    guard: dict,
    adapter: Input[Model],
    verdicts: Output[Dataset],
    held_out: Output[Dataset],
    metrics: Output[Metrics],
    what: str = "screen",
):
    """Score the test set and the held-out prompts with the candidate: the adapter on the baseline."""
    from guardloop.stages import screen_candidate

    tables = conversations.path, training_set.path, verdicts.path, held_out.path
    for name, value in screen_candidate(*tables, guard, adapter.path, what).items():
        metrics.log_metric(name, value)


@stage("screen")
def score_benchmarks(
    training_set: Input[Dataset],
    adapter: Input[Model],
    guard: dict,
    evaluation: dict,
    scores: Output[Dataset],
    metrics: Output[Metrics],
):
    """Score both guards on the public benchmarks that the evaluation names; an empty table where it names none."""
    from guardloop.stages import score_benchmarks

    for name, value in score_benchmarks(training_set.path, adapter.path, guard, evaluation, scores.path).items():
        metrics.log_metric(name, value)


@stage("generate-responses")
def generate_responses(
    screened: Input[Dataset],
    responders: list,
    seed: int,
    max_error_share: float,
    responses: Output[Dataset],
    metrics: Output[Metrics],
    shard: int = 0,
):
    """Sample responses to the prompts that passed."""
    from guardloop.stages import generate_responses

    settings = responders, int(seed), float(max_error_share)
    for name, value in generate_responses(screened.path, responses.path, *settings, shard=int(shard)).items():
        metrics.log_metric(name, value)


@stage("mine-feedback")
def mine_feedback(
    screened: Input[list[Dataset]],
    judged: Input[list[Dataset]],
    traffic: Input[Dataset],
    mining: dict,
    seed: int,
    training_set: Output[Dataset],
    report: Output[HTML],
    metrics: Output[Metrics],
) -> bool:
    """Turn blocked responses into training examples. Returns whether there are enough to train on.

    `traffic` is not read, but must stay an input. KFP's launcher opens the storage of an earlier run only for single
    artifacts and for the first of a list; cached shards come from the run that cached `traffic`, and naming it opens
    that storage for all of them.
    """
    from guardloop.stages import MINING_PAGE, copy_file, mine_feedback

    figures, enough = mine_feedback(
        [table.path for table in screened], [table.path for table in judged], training_set.path, mining, int(seed)
    )
    copy_file(f"{training_set.path}/{MINING_PAGE}", report.path)
    for name, value in figures.items():
        metrics.log_metric(name, value)
    return enough


@stage("train-guard")
def train_guard(
    training_set: Input[Dataset],
    guard: dict,
    training: dict,
    registry: dict,
    seed: int,
    adapter: Output[Model],
    metrics: Output[Metrics],
):
    """Train the LoRA adapter of the candidate."""
    from guardloop.stages import train_guard

    for name, value in train_guard(training_set.path, adapter.path, guard, training, registry, int(seed)).items():
        metrics.log_metric(name, value)


@stage("evaluate")
def evaluate(
    baseline_scores: Input[Dataset],
    candidate_scores: Input[Dataset],
    held_out: Input[Dataset],
    benchmarks: Input[Dataset],
    training_set: Input[Dataset],
    adapter: Input[Model],
    evaluation: dict,
    gate: dict,
    seed: int,
    evaluated: Output[Artifact],
    report: Output[HTML],
    summary: Output[Markdown],
    metrics: Output[Metrics],
    baseline_curves: Output[ClassificationMetrics],
    candidate_curves: Output[ClassificationMetrics],
) -> bool:
    """Compare both guards on the locked test set. Returns whether the gate says to promote."""
    from guardloop.stages import REPORT, SCORE_TABLE, SUMMARY, copy_file, curves_of, evaluate

    tables = baseline_scores.path, candidate_scores.path, training_set.path, adapter.path, evaluated.path
    result = evaluate(*tables, evaluation, gate, int(seed), held_out=held_out.path, benchmarks=benchmarks.path)
    copy_file(f"{evaluated.path}/{REPORT}", report.path)
    copy_file(f"{evaluated.path}/{SUMMARY}", summary.path)
    for name, both in result.metrics.items():
        metrics.log_metric(f"change_{name}", both.change.value)
    for guard, curves in ((result.baseline, baseline_curves), (result.candidate, candidate_curves)):
        metrics.log_metric(f"{guard.name}_auprc", getattr(result.metrics["auprc"], guard.name).value)
        curves.log_confusion_matrix(["safe", "unsafe"], guard.confusion)
        curves.log_roc_curve(*curves_of(f"{evaluated.path}/{SCORE_TABLE}", guard.name))
    return result.decision.promote


@stage("register-model")
def register_model(
    adapter: Input[Model],
    evaluated: Input[Artifact],
    training_set: Input[Dataset],
    run_id: str,
    registry: dict,
    guard: dict,
    evaluation: dict,
    gate: dict,
    dataset: dict = {},  # noqa: B006  (KFP takes the default into the pipeline's YAML)
    responders: list = [],  # noqa: B006
    mining: dict = {},  # noqa: B006
    training: dict = {},  # noqa: B006
    seed: int = 0,
) -> int:
    """Record the run in MLflow and register the adapter as the candidate. Returns its version."""
    import os

    from guardloop.stages import register_model

    sections = {
        "seed": int(seed),
        "dataset": dataset,
        "guard": guard,
        "responders": responders,
        "mining": mining,
        "training": training,
        "evaluation": evaluation,
        "gate": gate,
        "registry": registry,
    }
    run_id = os.environ.get("GUARDLOOP_RUN_ID") or run_id  # kfp.local does not know what a local run is called
    return register_model(adapter.path, evaluated.path, training_set.path, run_id, sections)


@stage("register-model")
def record_mining(
    training_set: Input[Dataset],
    run_id: str,
    registry: dict,
    guard: dict,
    dataset: dict = {},  # noqa: B006  (KFP takes the default into the pipeline's YAML)
    responders: list = [],  # noqa: B006
    mining: dict = {},  # noqa: B006
    seed: int = 0,
):
    """Record in MLflow a run that found too few examples to train on."""
    import os

    from guardloop.stages import record_mining

    sections: dict = {"dataset": dataset, "guard": guard, "responders": responders, "mining": mining}
    sections |= {"registry": registry, "seed": int(seed)}
    run_id = os.environ.get("GUARDLOOP_RUN_ID") or run_id  # kfp.local does not know what a local run is called
    record_mining(training_set.path, run_id, sections)


@stage("register-model")
def promote_model(version: int, registry: dict):
    """Make the version the champion."""
    from guardloop.stages import promote_model

    promote_model(int(version), registry)
