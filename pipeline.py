"""GuardLoop as a pipeline: full = process -> train -> evaluate, each of which also runs alone.

What they share are plain functions, so that the loop over shards and the conditions are the only graphs within a graph:
on a cluster each of those costs a pod, some seconds, and size.
"""

from typing import Any, NamedTuple

from kfp import dsl
from kfp.dsl import Dataset, Model

import components as stage

# Kubeflow fills this in where it is a task's own constant, and not where it comes from a pipeline's default.
RUN_ID = dsl.PIPELINE_JOB_ID_PLACEHOLDER


class Processed(NamedTuple):
    """What `process` hands on."""

    training_set: Dataset
    test_set: Dataset
    Output: bool
    """Whether there are enough examples to train on; kfp.local's conditions know an output of this name only."""


def screen_and_mine(
    dataset: Any, guard: Any, responders: Any, mining: Any, seed: Any, max_error_share: Any, shards: Any
) -> Processed:
    """The tasks from raw prompts to a training set."""
    prepared = stage.prepare_data(dataset=dataset, seed=seed, shards=shards)
    with dsl.ParallelFor(prepared.outputs["Output"]) as shard:
        screened = stage.screen(
            conversations=prepared.outputs["traffic"], guard=guard, what="screen prompts", shard=shard, shards=shards
        )
        answered = stage.generate_responses(
            screened=screened.outputs["verdicts"],
            responders=responders,
            seed=seed,
            max_error_share=max_error_share,
            shard=shard,
        )
        judged = stage.screen(conversations=answered.outputs["responses"], guard=guard, what="screen responses")
    mined = stage.mine_feedback(
        screened=dsl.Collected(screened.outputs["verdicts"]),
        judged=dsl.Collected(judged.outputs["verdicts"]),
        traffic=prepared.outputs["traffic"],
        mining=mining,
        seed=seed,
    )
    return Processed(mined.outputs["training_set"], prepared.outputs["test_set"], mined.outputs["Output"])


@dsl.pipeline(name="guardloop-process", description="Screen prompts, answer them, judge the responses, mine.")
def process(
    dataset: dict,
    guard: dict,
    responders: list,
    mining: dict,
    seed: int = 0,
    max_error_share: float = 0.05,
    shards: int = 1,
) -> Processed:
    """From raw prompts to a training set."""
    return screen_and_mine(dataset, guard, responders, mining, seed, max_error_share, shards)


@dsl.pipeline(name="guardloop-train", description="Train the candidate on a mined training set.")
def train(training_set_uri: str, guard: dict, training: dict, registry: dict, seed: int = 0) -> Model:
    """From the training set of an earlier run to an adapter."""
    training_set = dsl.importer(artifact_uri=training_set_uri, artifact_class=Dataset)
    trained = stage.train_guard(
        training_set=training_set.output, guard=guard, training=training, registry=registry, seed=seed
    )
    return trained.outputs["adapter"]


def evaluate_guards(
    test_set: Any,
    training_set: Any,
    adapter: Any,
    guard: Any,
    evaluation: Any,
    gate: Any,
    registry: Any,
    seed: Any,
    **recorded: Any,
) -> None:
    """The tasks from an adapter to a decision. `recorded` are further sections that the registry keeps."""
    baseline = stage.screen(conversations=test_set, guard=guard, what="screen test (baseline)")
    candidate = stage.screen_candidate(
        conversations=test_set,
        training_set=training_set,
        guard=guard,
        adapter=adapter,
        what="screen test (candidate)",
    )
    benchmarked = stage.score_benchmarks(training_set=training_set, adapter=adapter, guard=guard, evaluation=evaluation)
    compared = stage.evaluate(
        baseline_scores=baseline.outputs["verdicts"],
        candidate_scores=candidate.outputs["verdicts"],
        held_out=candidate.outputs["held_out"],
        benchmarks=benchmarked.outputs["scores"],
        training_set=training_set,
        adapter=adapter,
        evaluation=evaluation,
        gate=gate,
        seed=seed,
    )
    registered = stage.register_model(
        adapter=adapter,
        evaluated=compared.outputs["evaluated"],
        training_set=training_set,
        run_id=RUN_ID,
        registry=registry,
        guard=guard,
        evaluation=evaluation,
        gate=gate,
        seed=seed,
        **recorded,
    )
    with dsl.If(compared.outputs["Output"] == True, name="promote"):  # noqa: E712  (a KFP expression)
        promoted = stage.promote_model(version=registered.outputs["Output"], registry=registry)
        promoted.set_caching_options(False)  # a registry that starts anew gives the same numbers again


@dsl.pipeline(name="guardloop-evaluate", description="Evaluate and register an adapter of an earlier run.")
def evaluate(
    test_set_uri: str,
    training_set_uri: str,
    adapter_uri: str,
    guard: dict,
    evaluation: dict,
    gate: dict,
    registry: dict,
    seed: int = 0,
):
    """From the adapter of an earlier run to a decision."""
    evaluate_guards(
        test_set=dsl.importer(artifact_uri=test_set_uri, artifact_class=Dataset).output,
        training_set=dsl.importer(artifact_uri=training_set_uri, artifact_class=Dataset).output,
        adapter=dsl.importer(artifact_uri=adapter_uri, artifact_class=Model).output,
        guard=guard,
        evaluation=evaluation,
        gate=gate,
        registry=registry,
        seed=seed,
    )


@dsl.pipeline(name="guardloop", description="Output-feedback training of a safeguard model, promoted only if it wins.")
def full(
    dataset: dict,
    guard: dict,
    responders: list,
    mining: dict,
    training: dict,
    evaluation: dict,
    gate: dict,
    registry: dict,
    seed: int = 0,
    max_error_share: float = 0.05,
    shards: int = 1,
):
    """The whole loop. Too few examples to train on end it early, with a report that says so."""
    processed = screen_and_mine(dataset, guard, responders, mining, seed, max_error_share, shards)
    with dsl.If(processed.Output == True, name="enough to train on"):  # noqa: E712
        trained = stage.train_guard(
            training_set=processed.training_set, guard=guard, training=training, registry=registry, seed=seed
        )
        evaluate_guards(
            test_set=processed.test_set,
            training_set=processed.training_set,
            adapter=trained.outputs["adapter"],
            guard=guard,
            evaluation=evaluation,
            gate=gate,
            registry=registry,
            seed=seed,
            dataset=dataset,
            responders=responders,
            mining=mining,
            training=training,
        )
    with dsl.If(processed.Output == False, name="too little to train on"):  # noqa: E712
        stage.record_mining(
            training_set=processed.training_set,
            run_id=RUN_ID,
            registry=registry,
            guard=guard,
            dataset=dataset,
            responders=responders,
            mining=mining,
            seed=seed,
        )


PIPELINES = {"process": process, "train": train, "evaluate": evaluate, "full": full}
