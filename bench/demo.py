"""How often the demo's guard is promoted: its training and evaluation from an earlier run's responses, seed by seed.

`python -m bench.demo --seeds 5`, after `make run`. Works on copies, so that nothing more is registered. Writes its
section of docs/benchmarks.md.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from bench.machine import machine
from bench.write import PAGE, write_section
from guardloop.core.errors import GuardLoopError
from launch.local.runs import find_run

console = Console(highlight=False, soft_wrap=True, markup=False)


def main(
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of training: 0, 1 and so on.")] = 5,
    config: Annotated[Path, typer.Option(help="The configuration.")] = Path("configs/demo.yaml"),
    run: Annotated[str, typer.Option(help="The run whose responses are used.")] = "latest",
    page: Annotated[Path, typer.Option(help="The page that is written.")] = PAGE,
) -> None:
    """Print the gate's decision for each seed of training."""
    rows, promoted = list[str](), 0
    try:
        found = find_run(run)
    except GuardLoopError as error:
        console.print(f"error: {error}")
        raise SystemExit(2) from None
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder, "home")
            shutil.copytree(found.folder, home / "runs" / found.id)
            told = yaml.safe_load(config.read_text("utf-8"))
            told["seed"] = seed
            seeded = Path(folder, config.name)
            seeded.write_text(yaml.safe_dump(told), "utf-8")
            trained = summary(home, seeded, "train", found.id)
            decided = summary(home, seeded, "evaluate", trained["run"])
        promoted += decided["decision"] == "promoted"
        metrics = decided["evaluation"]["metrics"]
        changes = [_change(metrics[name]["change"]) for name in ("auprc", "recall_near_baseline_fpr")]
        rates = " to ".join(f"{metrics['fpr'][guard]['value']:.3f}" for guard in ("baseline", "candidate"))
        rows.append(f"| {seed} | {' | '.join(changes)} | {rates} | {decided['decision']} |")
        console.print(f"{rows[-1]} {decided['headline']}")
        text = [
            "## The demo, seed by seed",
            "",
            f"Promoted with {promoted} of {len(rows)} seeds of training, from the same responses. "
            f"`python -m bench.demo --seeds {seeds}`",
            "",
            "| seed | AUPRC | recall near the baseline's false-positive rate | false-positive rate | decision |",
            "| ---: | --- | --- | --- | --- |",
            *rows,
            "",
            machine(),
        ]
        write_section("demo", "\n".join(text), page)


def summary(home: Path, config: Path, pipeline: str, earlier: str) -> dict[str, Any]:
    """What a run of `pipeline` with `config`, from the run `earlier`, told at its end."""
    command = [sys.executable, "-m", "guardloop.cli.main", "run", "--json", "--config", str(config)]
    command += ["--pipeline", pipeline, "--from", earlier]
    environment = {**os.environ, "GUARDLOOP_HOME": str(home)}
    environment.pop("MLFLOW_TRACKING_URI", None)  # the copy has a registry of its own
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if ended.returncode:  # it has said why
        raise SystemExit(ended.returncode)
    told: dict[str, Any] = json.loads(ended.stdout)
    return told


def _change(change: dict[str, float]) -> str:
    return f"{change['value']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f})"


if __name__ == "__main__":
    typer.run(main)
