"""docs/contracts.md: what each stage reads and writes, and the schema of every file, from the code."""

import ast
import inspect
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from pydantic import BaseModel

import components
import components.stages
from guardloop import stages
from guardloop.config import type_name
from guardloop.core import records
from guardloop.evaluation import result
from guardloop.report import story
from scripts.docs.markdown import NOTE, code, first_words, table

INTRODUCTION = f"""# Contracts

{NOTE}

Look up what a stage reads and writes. Tables are Parquet, written in row groups; their metadata (where the data came
from, which guard judged it) is JSON in the file, under the key
`{records.METADATA}` (`guardloop.core.records.read_metadata`).
"""
CONTENTS = {
    "traffic": "[CONVERSATION](#conversation)",
    "test_set": "[CONVERSATION](#conversation), labelled",
    "conversations": "any table with the columns of [CONVERSATION](#conversation)",
    "verdicts": "the table that was judged, with the verdict's columns: [SCREENED](#screened), [JUDGED](#judged)",
    "screened": "[SCREENED](#screened), one table for each shard",
    "responses": "[RESPONSE](#response)",
    "judged": "[JUDGED](#judged), one table for each shard",
    "training_set": f"a folder: `{stages.EXAMPLES}` ([EXAMPLE](#example)), `{stages.HELD_OUT}` "
    f"([HELD_OUT_PROMPT](#held_out_prompt)), `{stages.MINING}` ([MiningSummary](#miningsummary)), "
    f"`{stages.MINING_PAGE}`, and `{stages.BLOCKED_INPUTS}`, the finds for people to read",
    "held_out": "[HELD_OUT_PROMPT](#held_out_prompt) with the verdict's columns",
    "scores": "[BENCHMARKED](#benchmarked)",
    "benchmarks": "[BENCHMARKED](#benchmarked)",
    "baseline_scores": "[SCREENED](#screened), the test set judged by the baseline",
    "candidate_scores": "[SCREENED](#screened), the test set judged by the candidate",
    "adapter": "a folder: the LoRA adapter and its guard.json ([training](training.md#what-is-chosen-afterwards))",
    "evaluated": f"a folder: `{stages.EVALUATION}` ([Evaluation](#evaluation)), `{stages.SCORE_TABLE}` "
    f"([SCORES](#scores)), `{stages.REPORT}`, `{stages.SUMMARY}`",
    "report": "a page for people (HTML)",
    "summary": "the decision in brief (Markdown)",
    "metrics": "figures for Kubeflow's page of the run",
    "baseline_curves": "ROC curve and confusion matrix for Kubeflow's page",
    "candidate_curves": "ROC curve and confusion matrix for Kubeflow's page",
}
"""What is in an artifact of each name; a name that a component uses and that is missing here is refused."""
TABLES = ("CONVERSATION", "SCREENED", "RESPONSE", "JUDGED", "EXAMPLE", "HELD_OUT_PROMPT", "SCORES", "BENCHMARKED")
MODELS: tuple[type[BaseModel], ...] = (
    *(result.Evaluation, result.EvaluatedGuard, result.Comparison, result.Estimate, result.SliceResult),
    *(result.Decision, result.GateCheck, result.HeldOutResult, result.BenchmarkResult),
    *(story.MiningSummary, story.MinedExample),
)


def contracts_page() -> str:
    """The whole page."""
    parts = [INTRODUCTION, "## Stages\n\n" + _stages(), "## Artifacts\n\n" + _artifacts()]
    parts.append("## Tables\n")
    parts += [_schema(name, note) for name, note in _schema_notes().items() if name in TABLES]
    parts.append("## JSON files\n")
    parts += [_model(model) for model in MODELS]
    return "\n".join(parts).rstrip() + "\n"


def artifact_names() -> dict[str, tuple[list[str], list[str]]]:
    """For each component the names of the artifacts that it reads, and of those that it writes."""
    found = {}
    for name in (name for name in vars(components.stages) if name in components.__all__):  # in the file's order
        spec = getattr(components, name).component_spec
        ends = []
        for side in (spec.inputs, spec.outputs):
            ends.append([key for key, one in (side or {}).items() if one.type.startswith("system.")])
        found[name] = (ends[0], ends[1])
    return found


def _stages() -> str:
    rows = []
    for name, (read, written) in artifact_names().items():
        image = getattr(components, name).component_spec.implementation.container.image.removeprefix("guardloop/")
        rows.append((code(name), code(image), ", ".join(map(code, read)), ", ".join(map(code, written))))
    return table(("stage", "image", "reads", "writes"), rows) + "\n"


def _artifacts() -> str:
    used = dict.fromkeys(name for ends in artifact_names().values() for side in ends for name in side)
    if missing := [name for name in used if name not in CONTENTS]:
        raise ValueError(f"scripts/docs/contracts.py: CONTENTS does not say what is in {', '.join(missing)}")
    return table(("artifact", "content"), [(code(name), CONTENTS[name]) for name in used]) + "\n"


def _schema_notes() -> dict[str, tuple[str, list[str], dict[str, str]]]:
    """For each schema of core.records its docstring, the schemas it begins with, and its columns' comments."""
    source = inspect.getsource(records)
    lines, found = source.splitlines(), {}
    body = ast.parse(source).body
    for node, following in zip(body, [*body[1:], None], strict=True):
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
            continue
        starred = [ast.unparse(inner.value) for inner in ast.walk(node.value) if isinstance(inner, ast.Starred)]
        comments = {
            ast.literal_eval(call.args[0]): lines[call.lineno - 1].partition("  # ")[2]
            for call in ast.walk(node.value)
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "pa.field"
        }
        found[node.targets[0].id] = (_docstring(following), starred, comments)
    return found


def _schema(name: str, note: tuple[str, list[str], dict[str, str]]) -> str:
    words, starred, comments = note
    for base in starred:
        if base == "VERDICT_FIELDS":
            comments = {**_schema_notes()[base][2], **comments}
    bases = [base for base in starred if base != "VERDICT_FIELDS"]
    begins = f"\n\nThe columns of {', '.join(f'[{b}](#{b.lower()})' for b in bases)}, and:" if bases else ""
    schema: pa.Schema = getattr(records, name)
    inherited = {column for base in bases for column in getattr(records, base).names}
    rows = [_column(field, comments) for field in schema if field.name not in inherited]
    return f"### {name}\n\n{words}{begins}\n\n{table(('column', 'type', 'null', 'meaning'), rows)}\n"


def _column(field: pa.Field, comments: dict[str, str]) -> tuple[str, str, str, str]:
    return code(field.name), str(field.type), "may be" if field.nullable else "never", comments.get(field.name, "")


def _model(model: type[BaseModel]) -> str:
    words = dict(_attribute_words(model))
    rows = [
        (code(name), type_name(field.annotation), words.get(name, "")) for name, field in model.model_fields.items()
    ]
    return f"### {model.__name__}\n\n{first_words(model)}\n\n{table(('field', 'type', 'meaning'), rows)}\n"


def _attribute_words(model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """(name, docstring) of the attributes of a model that have one."""
    (definition,) = ast.parse(inspect.getsource(model)).body
    body: list[Any] = definition.body  # type: ignore[attr-defined]
    for node, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and (words := _docstring(following)):
            yield ast.unparse(node.target), words


def _docstring(node: ast.stmt | None) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return " ".join(node.value.value.split())
    return ""
