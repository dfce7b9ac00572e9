"""The train stage in several processes of one machine, one for each GPU: started by torchrun, in step by accelerate."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from guardloop.core.errors import GuardLoopError


def is_child() -> bool:
    """Whether torchrun started this process."""
    return "LOCAL_RANK" in os.environ


def train_in_processes(count: int, module: str, arguments: dict[str, Any]) -> dict[str, float]:
    """Run `module`, which calls `child`, in `count` processes at once; returns the figures of the first.

    Raises GuardLoopError if one of them fails, which has said why by then.
    """
    with TemporaryDirectory() as folder:
        call, figures = Path(folder) / "call.json", Path(folder) / "figures.json"
        call.write_text(json.dumps(arguments), "utf-8")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        ended = subprocess.run([*torchrun, "-m", module, str(call), str(figures)], check=False)
        if ended.returncode or not figures.is_file():
            raise GuardLoopError(
                f"train_guard: one of {count} processes failed",
                "read the lines above; training.processes needs as many GPUs",
            )
        result: dict[str, float] = json.loads(figures.read_text("utf-8"))
    return result


def child(train: Callable[..., dict[str, float]]) -> None:
    """One of the processes: calls `train` with the arguments of all. The first one speaks for all."""
    call, figures = map(Path, sys.argv[1:])
    first = os.environ["RANK"] == "0"
    if not first:
        logging.disable(logging.ERROR)
        for name in ("GUARDLOOP_EVENTS", "GUARDLOOP_RUN_ID"):
            os.environ.pop(name, None)
    try:
        result = train(**json.loads(call.read_text("utf-8")))
    except GuardLoopError as error:
        sys.exit(f"{error}")
    if first:
        figures.write_text(json.dumps(result), "utf-8")
