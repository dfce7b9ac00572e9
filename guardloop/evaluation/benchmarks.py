"""Public benchmarks: read as published, without what a guard was trained on, and measured by what each can show."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from guardloop.core.errors import GuardLoopError, first_line
from guardloop.core.records import Row
from guardloop.data.labels import LabelCounts
from guardloop.data.sources import read_conversations
from guardloop.evaluation.bootstrap import bootstrap
from guardloop.evaluation.metrics import Floats, Weights
from guardloop.evaluation.paired import GuardRun, compare_guards, paired_estimate
from guardloop.evaluation.result import BenchmarkResult, Comparison
from guardloop.evaluation.settings import BenchmarkSettings
from guardloop.evaluation.slices import flag_rates
from guardloop.evaluation.table import Table, read_scores

MIXED = ("auprc", "auroc", "f1", "precision", "recall", "fpr", "accuracy")
"""Likeness of two prompts that makes one a near-duplicate, as in the data stage."""
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass
class Benchmark:
    """A benchmark as it was read."""

    settings: BenchmarkSettings
    revision: str = ""
    """The commit of the hub repository; empty for files."""
    left_out: int = 0
    """Rows left out because the training set has something like them."""
    unlabelled: int = 0
    labels: set[bool] = field(default_factory=set)
    """The labels that it holds, left-out rows included."""
    rows: list[Row] = field(default_factory=list)
    """Labelled conversations (records.CONVERSATION), in which near-duplicates share a group."""


def read_benchmark(settings: BenchmarkSettings, trained_on: Iterable[str] = ()) -> Benchmark:
    """Read a benchmark, without the rows whose prompt is a near-duplicate of one in `trained_on`.

    Raises GuardLoopError where it cannot be read, its columns are others, or its labels do not fit its kind.
    """
    where = f"benchmark {settings.name}"
    source = settings.source
    revision = resolve_commit(source.path, source.revision, where) if source.kind == "hub" else ""
    benchmark = Benchmark(settings, revision)
    from guardloop.data.clean import normalise  # noqa: PLC0415  (measuring needs no index of texts)
    from guardloop.data.near import NearIndex  # noqa: PLC0415

    known, near = NearIndex(), NearIndex()
    for number, text in enumerate(trained_on):
        known.add(str(number), normalise(text))
    groups: dict[str, str] = {}
    pinned = source.model_copy(update={"revision": revision or None})
    labels, judged = LabelCounts(), settings.judged
    conversations = list(read_conversations(pinned, 0, where, labels, with_response=judged == "response"))
    if settings.kind == "mixed":
        labels.check(source, where)
    for number, row in enumerate(conversations):
        text = normalise(row["prompt"])
        response = normalise(row["response"] or "") if judged == "response" else None
        unsafe = {"mixed": row["unsafe"], "unsafe": True, "safe": False}[settings.kind]
        if unsafe is None or not text or response == "":
            benchmark.unlabelled += 1
            continue
        benchmark.labels.add(unsafe)
        if known.find(text) is not None:
            benchmark.left_out += 1
        else:
            identity = f"{settings.name}/{number}"
            twin = near.find(text)
            groups[identity] = groups[twin] if twin else identity
            near.add(identity, text)
            category = row["category"] if "category" in source.columns else None
            benchmark.rows.append(
                {
                    **row,
                    "id": identity,
                    "prompt": text,
                    "response": response,
                    "unsafe": unsafe,
                    "category": category,
                    "group": groups[identity],
                }
            )
    _check(benchmark, where)
    return benchmark


def resolve_commit(repository: str, revision: str | None, where: str) -> str:
    """The commit that `revision` (a branch, a tag, or None for the newest) of a hub dataset stands for now."""
    if revision and COMMIT.fullmatch(revision):
        return revision
    from httpx2 import HTTPError  # noqa: PLC0415  (of which the hub's own errors are)
    from huggingface_hub import HfApi  # noqa: PLC0415  (slow to import; files and pinned sets do not need it)

    try:
        return str(HfApi().dataset_info(repository, revision=revision).sha)
    except (HTTPError, OSError, ValueError) as error:
        raise GuardLoopError(
            f"{where}: the hub does not tell the commit of {repository}: {first_line(error)}",
            f"check the network, and HF_TOKEN if it is gated (huggingface.co/datasets/{repository}); "
            "or save it as a file and give source: {kind: file, path: ...}",
        ) from error


def measure_benchmark(
    rows: Sequence[Mapping[str, Any]],
    settings: BenchmarkSettings,
    baseline: GuardRun,
    candidate: GuardRun,
    resamples: int,
    seed: int,
) -> BenchmarkResult:
    """Both guards on one benchmark's rows of the BENCHMARKED contract.

    A mixed set gives every metric, an all-unsafe one recall, an all-safe one the false-positive rate. So does what
    is left of a mixed set if only one class is; where nothing is left, there are no metrics.
    """
    metrics: dict[str, Comparison] = {}
    unsafe = 0
    if rows:
        table = read_scores(rows)
        unsafe = int(table.unsafe.sum())
        runs = baseline.judging(settings.judged), candidate.judging(settings.judged)
        if 0 < unsafe < len(table):
            compared = compare_guards(table, *runs, resamples, seed)
            metrics = {name: compared[name] for name in MIXED}
        else:
            metrics = _one_class(table, runs, "recall" if unsafe else "fpr", resamples, seed)
    return BenchmarkResult(
        name=settings.name,
        kind=settings.kind,
        rows=len(rows),
        unsafe=unsafe,
        revision=settings.source.revision or "",
        metrics=metrics,
    )


def _one_class(
    table: Table, runs: tuple[GuardRun, GuardRun], metric: str, resamples: int, seed: int
) -> dict[str, Comparison]:
    """What is flagged of rows that are all safe, or all unsafe."""
    flagged = np.stack([table.baseline > runs[0].threshold, table.candidate > runs[1].threshold], axis=1)

    def statistic(weights: Weights) -> dict[str, Floats]:
        return {f"{guard}/{metric}": values for guard, values in flag_rates(flagged, weights).items()}

    samples = bootstrap(statistic, table.group, table.unsafe, resamples, seed)
    return {metric: paired_estimate(metric, statistic(np.ones((1, len(table)))), samples)}


def _check(benchmark: Benchmark, where: str) -> None:
    if not benchmark.labels:
        raise GuardLoopError(
            f"{where}: no row has a label and a text ({benchmark.unlabelled} have not)", "check its columns and labels"
        )
    if benchmark.settings.kind == "mixed" and len(benchmark.labels) == 1:
        only = "unsafe" if True in benchmark.labels else "safe"
        raise GuardLoopError(
            f"{where}: every row is labelled {only}", "check its label column and unsafe_labels, or name its kind"
        )
