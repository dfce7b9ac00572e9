"""The train stage in several processes of one machine, one for each GPU: started by torchrun, in step by accelerate."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from guardloop.errors import GuardLoopError

MODULE = "guardloop.training.processes"


def is_child() -> bool:
    """Whether torchrun started this process."""
    return "LOCAL_RANK" in os.environ


def train_in_processes(count: int, arguments: dict[str, Any]) -> dict[str, float]:
    """Call the train stage with `arguments` in `count` processes at once; returns the figures of the first.

    Raises GuardLoopError if one of them fails, which has said why by then.
    """
    with TemporaryDirectory() as folder:
        call, figures = Path(folder) / "call.json", Path(folder) / "figures.json"
        call.write_text(json.dumps(arguments), "utf-8")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        ended = subprocess.run([*torchrun, "-m", MODULE, str(call), str(figures)], check=False)
        if ended.returncode or not figures.is_file():
            raise GuardLoopError(
                f"train_guard: one of {count} processes failed",
                "read the lines above; training.processes needs as many GPUs",
            )
        found: dict[str, float] = json.loads(figures.read_text("utf-8"))
    return found


def main(call: Path, figures: Path) -> None:
    """One of the processes: the first one speaks for all."""
    from guardloop.stages import train_guard  # noqa: PLC0415  (it calls this module)

    first = os.environ["RANK"] == "0"
    if not first:
        logging.disable(logging.ERROR)
        for name in ("GUARDLOOP_EVENTS", "GUARDLOOP_RUN_ID"):
            os.environ.pop(name, None)
    found = train_guard(**json.loads(call.read_text("utf-8")))
    if first:
        figures.write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except GuardLoopError as error:
        sys.exit(f"{error}")
