"""The commands that ask a guard: check and benchmark."""

import json
import os
import sys
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from guardloop.cli import choices
from guardloop.cli.options import DEMO, ConfigOption, JsonOption, console, settings_of
from guardloop.core.errors import GuardLoopError
from guardloop.core.places import tracking_uri
from guardloop.core.settings import read_section

app = typer.Typer()
ADAPTER_FILE = "adapter_config.json"
COLOURS = {"safe": "green", "unsafe": "red", "unreadable": "yellow"}
AdapterOption = Annotated[str | None, typer.Option(help="An adapter: a folder, s3:// or models:/name@alias.")]


@app.command()
def check(
    texts: Annotated[
        list[str] | None, typer.Argument(help="Prompts to judge; by default the lines that a pipe brings.")
    ] = None,
    response: Annotated[
        list[str] | None, typer.Option(help="A response to judge, one for each prompt: repeat it.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="JSON lines with `prompt` and perhaps `response`.")] = None,
    config: ConfigOption = DEMO,
    adapter: AdapterOption = None,
    against: Annotated[
        str | None, typer.Option(help="A second guard: an adapter of the same base, or another base model.")
    ] = None,
    categories: Annotated[bool, typer.Option(help="Also read the categories of what is flagged.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Judge a prompt, a response, or a file of them with the guard, or with two side by side."""
    rows = _rows_of(texts or [], response or [], file)
    settings = settings_of(config).guard
    from guardloop.guard.engine import Guard  # torch loads for seconds; wrong input is told before
    from guardloop.models.locate import fetch_adapter

    os.environ.setdefault("MLFLOW_TRACKING_URI", tracking_uri())
    verdicts = [list(Guard.load(settings, fetch_adapter(adapter), categories=categories).score(rows))]
    if against is not None:
        other, other_adapter = _second_guard(settings, against)
        verdicts.append(list(Guard.load(other, fetch_adapter(other_adapter), categories=categories).score(rows)))
        if not as_json:
            console.print(f"first: {adapter or settings.base}; second: {against}", soft_wrap=True, markup=False)
    for row, *judged in zip(rows, *verdicts, strict=True):
        if as_json:
            first, *second = [{"verdict": _word(verdict), **verdict.__dict__} for verdict in judged]
            typer.echo(json.dumps({"id": row["id"], **first} | ({"against": second[0]} if second else {})))
        else:
            console.print("  ".join(map(_shown, judged)) + f"  {escape(row['prompt'][:100])}")


def _rows_of(texts: list[str], responses: list[str], file: Path | None) -> list[dict[str, Any]]:
    """The conversations to judge: of a file, of the command line, or of a pipe."""
    from guardloop.data.settings import SourceSettings
    from guardloop.data.sources import read_conversations

    if file is not None:
        if texts or responses:
            raise GuardLoopError("check: --file goes alone", "write prompts and responses into the rows of the file")
        return list(read_conversations(SourceSettings(kind="file", path=str(file)), where="--file"))
    if not texts and not sys.stdin.isatty():
        texts = [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    if not texts:
        raise GuardLoopError("check: give a text, a pipe or --file", 'for example: guardloop check "How do I ...?"')
    if responses and len(responses) != len(texts):
        raise GuardLoopError(
            f"check: {len(texts)} prompts and {len(responses)} responses", "give each prompt its own --response"
        )
    return [
        {"id": str(number), "prompt": text, "response": response}
        for number, (text, response) in enumerate(zip_longest(texts, responses), start=1)
    ]


def _second_guard(settings: Any, name: str) -> tuple[Any, str | None]:
    """(settings, adapter) of the guard to check against."""
    if name.startswith(("models:/", "s3://")) or (Path(name).expanduser() / ADAPTER_FILE).is_file():
        return settings, name
    return settings.model_copy(update={"base": name, "adapter": None, "revision": None, "family": "auto"}), None


def _word(verdict: Any) -> str:
    return "unreadable" if verdict.score is None else "unsafe" if verdict.flagged else "safe"


def _shown(verdict: Any) -> str:
    word = _word(verdict)
    score = "" if verdict.score is None else f"{verdict.score:+.2f}"
    codes = f"  {verdict.categories}" if verdict.categories else ""
    return f"[{COLOURS[word]}]{word:<10}[/] {score:>7}{escape(codes)}"


@app.command()
def benchmark(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Names in configs/benchmarks, or files.", autocompletion=choices.benchmarks),
    ] = None,
    config: ConfigOption = DEMO,
    adapter: AdapterOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score the guard, and with --adapter also the one that it makes, on public benchmarks."""
    from guardloop.evaluation.settings import EvaluationSettings, benchmark_names
    from guardloop.evaluation.wording import METRICS, with_interval
    from guardloop.stages import benchmark_guards

    settings = settings_of(config)
    values = settings.evaluation.plain() | ({"benchmarks": names} if names else {})
    evaluation = read_section(EvaluationSettings, values, "evaluation")
    if not evaluation.benchmarks:
        raise GuardLoopError("benchmark: name at least one", f"benchmarks: {', '.join(benchmark_names())}")
    os.environ.setdefault("MLFLOW_TRACKING_URI", tracking_uri())
    results = benchmark_guards(settings.guard, adapter, evaluation, settings.seed)
    if as_json:
        typer.echo(json.dumps([result.model_dump(mode="json") for result in results], indent=2))
        return
    table = Table("benchmark", "rows", "unsafe", "metric", "baseline", box=None, pad_edge=False, header_style="bold")
    for column in ("candidate", "change") if adapter else ():
        table.add_column(column)
    for result in results:
        for metric, both in result.metrics.items():
            figures = [with_interval(both.baseline, signed=False)]
            if adapter:
                figures += [with_interval(both.candidate, signed=False), with_interval(both.change)]
            table.add_row(result.name, f"{result.rows:,}", f"{result.unsafe:,}", METRICS[metric].name, *figures)
    console.print(table)
