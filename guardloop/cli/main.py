"""The command line."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from guardloop import __version__
from guardloop.cli import choices
from guardloop.cli.before import app as before_app
from guardloop.cli.cluster import ConfigArgument, ConfigOption, PipelineOption, PlatformOption
from guardloop.cli.cluster import app as cluster_app
from guardloop.config import Settings, describe_fields, load_platform, load_settings
from guardloop.core.errors import GuardLoopError
from guardloop.core.places import home, tracking_uri
from guardloop.core.settings import read_section

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Find prompts that slip past a safeguard model, train it on them, and promote it only if it got better.",
)
config_app = typer.Typer(no_args_is_help=True, help="Look at the settings.")
app.add_typer(config_app, name="config")
app.add_typer(before_app)
app.add_typer(cluster_app)
console = Console(highlight=False)

DEMO = Path("configs/demo.yaml")
STOPPED = 130


@app.command()
def run(
    config: ConfigOption = DEMO,
    pipeline: PipelineOption = "full",
    platform: PlatformOption = "local",
    earlier: Annotated[
        str,
        typer.Option("--from", help="The run whose artifacts train and evaluate use.", autocompletion=choices.runs),
    ] = "latest",
    as_json: Annotated[bool, typer.Option("--json", help="The summary as JSON; the rest goes to stderr.")] = False,
) -> None:
    """Run the pipeline on this machine."""
    from launch.checks import preflight
    from launch.local import run as local
    from launch.local.summary import conclude

    console = Console(highlight=False, stderr=as_json)
    settings, where = load_settings(config), load_platform(platform)
    if where.cluster:
        raise GuardLoopError(
            f"{platform} is a cluster", f"`guardloop submit --platform {platform}` runs the pipeline there"
        )
    if pipeline not in local.PARAMETERS:
        raise GuardLoopError(f"no pipeline {pipeline!r}", f"pipelines: {', '.join(local.PARAMETERS)}")
    preflight.check(settings, home())
    before = local.find_run(earlier) if pipeline in local.NEEDS else None
    console.print(f"[bold]GuardLoop[/] {pipeline} on {config.name} ({where.runner}, {where.shards} shard(s))")
    try:
        done = local.run_local(pipeline, settings, where, config.name, console, before)
    except KeyboardInterrupt:
        console.print("nothing was promoted; run the same again: responses and training go on from where they were")
        raise
    summary = conclude(done, console)
    if as_json:
        typer.echo(json.dumps(summary, indent=2))


@app.command()
def reproduce(
    run: Annotated[
        str, typer.Argument(help="A run of this machine, or `latest`.", autocompletion=choices.runs)
    ] = "latest",
    as_json: Annotated[bool, typer.Option("--json", help="The artifacts as JSON; the rest goes to stderr.")] = False,
) -> None:
    """Run an earlier run again, and compare the artifacts; exit code 1 if one differs."""
    from launch.local.reproduce import reproduce as run_and_compare
    from launch.local.run import find_run

    found = run_and_compare(find_run(run), Console(highlight=False, stderr=as_json))
    if as_json:
        typer.echo(json.dumps([{**vars(one), "same": one.same} for one in found], indent=2))
    if not found or not all(one.same for one in found):
        raise typer.Exit(1)


@app.command(name="compile")
def compile_(
    platform: PlatformOption = "local",
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", "-c", help="Settings that KFP's form starts with.", autocompletion=choices.configurations
        ),
    ] = None,
    folder: Annotated[Path, typer.Option("--out", help="Where the YAML files go.")] = Path("build/pipelines"),
) -> None:
    """Compile every pipeline to KFP's IR YAML."""
    from launch.kubeflow.compile import compile_all

    settings = load_settings(config) if config else None
    where = load_platform(platform)
    try:
        paths = compile_all(folder, where, None, settings, config.name if config else "")
    except OSError as error:
        raise GuardLoopError(
            f"cannot write {folder}: {error.strerror or error}", "choose another place: --out"
        ) from None
    for path in paths:
        console.print(f"  [green]✓[/] {path}")


@config_app.command()
def show(
    config: ConfigArgument = DEMO,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Print every setting of a configuration, defaults included."""
    sections = load_settings(config).model_dump(mode="json")
    typer.echo(json.dumps(sections, indent=2) if as_json else yaml.safe_dump(sections, sort_keys=False).rstrip())


@config_app.command()
def fields(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List every setting with its type, default and meaning."""
    rows = list(describe_fields())
    if as_json:
        names = ("setting", "type", "default", "meaning")
        typer.echo(json.dumps([dict(zip(names, row, strict=True)) for row in rows], indent=2))
        return
    table = Table("setting", "default", "meaning", box=None, pad_edge=False, header_style="bold")
    for name, _, default, meaning in rows:
        table.add_row(escape(name), escape(default), escape(meaning))
    console.print(table)


@app.command()
def check(
    text: Annotated[str | None, typer.Argument(help="A prompt to judge.")] = None,
    response: Annotated[str | None, typer.Option(help="A response to judge; the text is then its prompt.")] = None,
    file: Annotated[Path | None, typer.Option(help="JSON lines with `prompt` and perhaps `response`.")] = None,
    config: ConfigOption = DEMO,
    adapter: Annotated[str | None, typer.Option(help="A folder, s3:// or models:/name@alias.")] = None,
    categories: Annotated[bool, typer.Option(help="Also read the categories of what is flagged.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Judge a prompt, a response, or a file of them with the guard."""
    from guardloop.data.settings import SourceSettings
    from guardloop.data.sources import read_conversations

    if (text is None) == (file is None):
        raise GuardLoopError("check: give either a text or --file", 'for example: guardloop check "How do I ...?"')
    if response is not None and file is not None:
        raise GuardLoopError("check: --response goes with a text", "write `response` into the rows of the file")
    rows: list[dict[str, Any]] = [{"id": "1", "prompt": text, "response": response}]
    if file is not None:
        rows = list(read_conversations(SourceSettings(kind="file", path=str(file)), where="--file"))
    settings = load_settings(config).guard
    if categories:
        settings = settings.model_copy(update={"categories": True})
    from guardloop.guard.engine import Guard  # torch loads for seconds; wrong input is told before
    from guardloop.guard.loading import fetch_adapter

    _use_local_registry()
    guard = Guard.load(settings, fetch_adapter(adapter, settings.tracking_uri))
    for row, verdict in zip(rows, guard.score(rows), strict=True):
        word = "unreadable" if verdict.score is None else "unsafe" if verdict.flagged else "safe"
        if as_json:
            typer.echo(json.dumps({"id": row["id"], "verdict": word, **verdict.__dict__}))
        else:
            colour = {"safe": "green", "unsafe": "red"}.get(word, "yellow")
            score = "" if verdict.score is None else f"{verdict.score:+.2f}"
            found = f"{verdict.categories}  " if verdict.categories else ""
            console.print(f"[{colour}]{word:<10}[/] {score:>7}  {found}{escape(row['prompt'][:100])}")


@app.command()
def benchmark(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Names in configs/benchmarks, or files.", autocompletion=choices.benchmarks),
    ] = None,
    config: ConfigOption = DEMO,
    adapter: Annotated[str | None, typer.Option(help="The candidate: a folder, s3:// or models:/...")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Score the baseline, and with --adapter the candidate one, on public benchmarks."""
    from guardloop.evaluation.settings import EvaluationSettings, benchmark_names
    from guardloop.stages import benchmark_guards

    settings = load_settings(config)
    values = settings.evaluation.plain() | ({"benchmarks": names} if names else {})
    evaluation = read_section(EvaluationSettings, values, "evaluation")
    if not evaluation.benchmarks:
        raise GuardLoopError("benchmark: name at least one", f"benchmarks: {', '.join(benchmark_names())}")
    _use_local_registry()
    found = benchmark_guards(settings.guard, adapter, evaluation)
    if as_json:
        typer.echo(json.dumps([result.model_dump(mode="json") for result in found], indent=2))
        return
    table = Table("benchmark", "rows", "unsafe", "metric", "default", box=None, pad_edge=False, header_style="bold")
    for column in ("candidate", "change") if adapter else ():
        table.add_column(column)
    for result in found:
        for both in result.metrics:
            counts = (f"{result.rows:,}", f"{result.unsafe:,}")
            told = [both.baseline, both.candidate, both.gain] if adapter else [both.baseline]
            table.add_row(result.name, *counts, both.metric, *(_interval(estimate) for estimate in told))
    console.print(table)


def _interval(estimate: Any) -> str:
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"


@app.command(name="demo-report")
def demo_report(
    out: Annotated[Path | None, typer.Option(help="Write the page here, and open nothing.")] = None,
) -> None:
    """Open a sample report: what a run ends with, on data that was made up."""
    import webbrowser

    from guardloop.report.sample import sample_report

    path = out or home() / "demo-report.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(sample_report(), "utf-8")
    except OSError as error:
        raise GuardLoopError(f"cannot write {path}: {error.strerror or error}", "choose another place: --out") from None
    console.print(str(path), soft_wrap=True, markup=False)
    if out is None and not webbrowser.open(path.absolute().as_uri()):
        console.print("no browser was found here: open that file in one")


@app.command()
def review(
    config: ConfigOption = DEMO,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """List the registered guards: what the gate said of each, and which serves."""
    found = _registry(config).list_candidates()
    if as_json:
        typer.echo(json.dumps([{**c.__dict__, "created": c.created.isoformat()} for c in found], indent=2))
        return
    table = Table("version", "created", "aliases", "gate", "AUPRC", "why", box=None, pad_edge=False)
    for c in found:
        change = f"{c.metrics.get('baseline_auprc', 0):.3f} → {c.metrics.get('candidate_auprc', 0):.3f}"
        why = f"{c.headline} Forced: {c.force_reason}" if c.force_reason else c.headline
        created = f"{c.created:%Y-%m-%d %H:%M}"
        table.add_row(str(c.version), created, ", ".join(c.aliases), c.verdict, change, escape(why))
    console.print(table if found else "no guard is registered yet: `make run` trains one")


@app.command()
def promote(
    version: Annotated[int, typer.Argument(help="Version of the registered model.")],
    config: ConfigOption = DEMO,
    force: Annotated[str, typer.Option("--force", help="Promote against the gate, for this reason.")] = "",
) -> None:
    """Make a version the champion; refused where the gate did not pass it."""
    before = _registry(config).promote(version, force)
    console.print(f"version {version} is the champion" + (f"; version {before} is kept as previous" if before else ""))


@app.command()
def rollback(config: ConfigOption = DEMO) -> None:
    """Bring the previous champion back."""
    console.print(f"version {_registry(config).rollback()} is the champion again")


@app.command()
def ui(port: Annotated[int, typer.Option(help="Port of the page.", min=1, max=65535)] = 5000) -> None:
    """Open MLflow on the runs and guards of this machine."""

    address = tracking_uri()
    console.print(f"MLflow on {address}: open http://127.0.0.1:{port} (Ctrl-C ends it)")
    arguments = ["ui", "--backend-store-uri", address, "--host", "127.0.0.1", "--port", str(port)]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", *arguments])


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit()


def _use_local_registry() -> None:

    os.environ.setdefault("MLFLOW_TRACKING_URI", tracking_uri())


def _registry(config: Path) -> Any:
    from guardloop.registry import Registry

    _use_local_registry()
    settings = load_settings(config) if config.is_file() or config != DEMO else read_section(Settings, {}, "")
    return Registry(settings.registry)


def main() -> None:
    """Entry point: problems that the user can mend end with exit code 2 and no traceback."""
    try:
        app()
    except GuardLoopError as error:
        Console(stderr=True, highlight=False).print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise SystemExit(2) from None
    except SystemExit as end:
        if end.code == STOPPED:  # typer's answer to Ctrl-C
            Console(stderr=True, highlight=False).print("stopped")
        raise


if __name__ == "__main__":
    main()
