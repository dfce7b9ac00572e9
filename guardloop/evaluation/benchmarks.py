"""Public benchmarks: read as published, kept apart from what was taught, and measured by what each can show."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from guardloop.core.errors import GuardLoopError, first_line
from guardloop.core.records import Row
from guardloop.data.sources import read_conversations
from guardloop.evaluation.bootstrap import bootstrap
from guardloop.evaluation.paired import GuardRun, compare_guards, paired_estimate
from guardloop.evaluation.result import BenchmarkResult, Compared
from guardloop.evaluation.settings import BenchmarkSettings, EvaluationSettings
from guardloop.evaluation.slices import flag_rates
from guardloop.evaluation.table import read_scores

MIXED = ("auprc", "auroc", "f1", "precision", "recall", "fpr", "accuracy")
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


def read_benchmark(settings: BenchmarkSettings, taught: Iterable[str] = (), near_duplicate: float = 0.8) -> Benchmark:
    """Read a benchmark, without the rows whose prompt is a near-duplicate of one in `taught`.

    Raises GuardLoopError where it cannot be read, its columns are others, or its labels do not fit its kind.
    """
    where = f"benchmark {settings.name}"
    source = settings.source
    revision = resolve_commit(source.path, source.revision, where) if source.kind == "hub" else ""
    found = Benchmark(settings, revision)
    from guardloop.data.clean import NearIndex, normalise  # noqa: PLC0415  (measuring needs no index of texts)

    known, near = NearIndex(near_duplicate), NearIndex(near_duplicate)
    for number, text in enumerate(taught):
        known.add(str(number), normalise(text))
    groups: dict[str, str] = {}
    pinned = source.model_copy(update={"revision": revision or None})
    for number, row in enumerate(read_conversations(pinned, where=where)):
        text = normalise(row["prompt"])
        response = normalise(row["response"] or "") if settings.judged == "response" else None
        unsafe = {"mixed": row["unsafe"], "unsafe": True, "safe": False}[settings.kind]
        if unsafe is None or not text or response == "":
            found.unlabelled += 1
            continue
        found.labels.add(unsafe)
        if known.find(text) is not None:
            found.left_out += 1
        else:
            identity = f"{settings.name}/{number}"
            twin = near.find(text)
            groups[identity] = groups[twin] if twin else identity
            near.add(identity, text)
            category = row["category"] if "category" in source.columns else None
            found.rows.append(
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
    _check(found, where)
    return found


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
    evaluation: EvaluationSettings,
) -> BenchmarkResult:
    """Both guards on one benchmark's rows of the BENCHMARKED contract.

    A mixed set gives every metric, an all-unsafe one recall, an all-safe one the false-positive rate. So does what
    is left of a mixed set if only one class is; where nothing is left, there are no metrics.
    """
    licence, revision = settings.licence, settings.source.revision or ""
    if not rows:
        return BenchmarkResult(
            name=settings.name, kind=settings.kind, rows=0, unsafe=0, revision=revision, licence=licence, metrics=[]
        )
    table = read_scores(rows)
    baseline, candidate = baseline.judging(settings.judged), candidate.judging(settings.judged)
    if table.unsafe.any() and not table.unsafe.all():
        compared = compare_guards(table, baseline, candidate, evaluation)
        metrics = [compared[name] for name in MIXED]
    else:
        flagged = np.stack([table.baseline > baseline.threshold, table.candidate > candidate.threshold], axis=1)
        statistic = partial(flag_rates, flagged)
        samples = bootstrap(statistic, table.group, table.unsafe, evaluation.resamples, evaluation.seed)
        metrics = [
            _one_class(
                "recall" if table.unsafe.all() else "fpr",
                statistic(np.ones((1, len(table)))),
                samples,
                evaluation,
            )
        ]
    return BenchmarkResult(
        name=settings.name,
        kind=settings.kind,
        rows=len(table),
        unsafe=int(table.unsafe.sum()),
        revision=revision,
        licence=licence,
        metrics=metrics,
    )


def _one_class(metric: str, point: dict[str, Any], samples: dict[str, Any], evaluation: EvaluationSettings) -> Compared:
    def named(values: dict[str, Any]) -> dict[str, Any]:
        return {f"{guard}/{metric}": value for guard, value in values.items()}

    return paired_estimate(metric, named(point), named(samples), evaluation.confidence)


def _check(found: Benchmark, where: str) -> None:
    if not found.labels:
        raise GuardLoopError(
            f"{where}: no row has a label and a text ({found.unlabelled} have not)", "check its columns and labels"
        )
    if found.settings.kind == "mixed" and len(found.labels) == 1:
        only = "unsafe" if True in found.labels else "safe"
        raise GuardLoopError(
            f"{where}: every row is labelled {only}", "check its label column and unsafe_labels, or name its kind"
        )
