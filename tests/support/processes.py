"""Processes that tests start, and kill. Never by fork: after a backward pass, a forked process can make none."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import cloudpickle

PRELOADED = [
    "guardloop.stages",
    "guardloop.training.train",
    "guardloop.responses.resume",
    "support.training_examples",
    "pytest",
]
_context = multiprocessing.get_context("forkserver")  # of a server that has imported what is needed and never computed
_context.set_forkserver_preload(PRELOADED)


def start(work: Callable[..., object], *arguments: Any) -> BaseProcess:
    """Call `work`, which may be a closure, in a process of its own with this one's environment."""
    call = cloudpickle.dumps((work, arguments))
    process = _context.Process(target=_run, args=(dict(os.environ), call))
    process.start()
    return process


def _run(environment: dict[str, str], call: bytes) -> None:
    import torch

    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    work, arguments = cloudpickle.loads(call)
    work(*arguments)
