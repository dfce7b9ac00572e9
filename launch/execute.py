"""The process in which kfp.local executes a pipeline; what it prints goes to the run's log."""

import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path


def execute(folder: Path) -> None:
    """Run the pipeline that `folder`/run.json describes, with its artifacts under `folder`/artifacts."""
    from kfp import local  # noqa: PLC0415  (kfp takes a second to import)

    from pipeline import PIPELINES  # noqa: PLC0415

    warnings.filterwarnings("ignore", message=".*base image.*", category=RuntimeWarning)
    logging.getLogger().setLevel(logging.INFO)
    run = json.loads((folder / "run.json").read_text("utf-8"))
    names = [part["base"] for part in (run["arguments"].get("guard"),) if part]
    responder = run["arguments"].get("responder")
    names += [one["model"] for one in (responder, *responder["others"])] if responder else []
    if embedded := sorted({name for name in names if name.startswith("embedded:")}):
        # in a process of its own, which gives its memory back
        subprocess.run([sys.executable, "-m", "guardloop.embedded", *embedded], check=True)
    local.init(
        runner=local.SubprocessRunner(use_venv=False),
        pipeline_root=str(folder / "artifacts"),
        workspace_root=str(folder / "workspace"),
        raise_on_error=True,
    )
    PIPELINES[run["pipeline"]](**run["arguments"])


if __name__ == "__main__":
    execute(Path(sys.argv[1]).absolute())
