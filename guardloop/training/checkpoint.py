"""Checkpoints of a training: one safetensors file each, with the rest as JSON in its header. No pickle.

A training is known by the hash of its inputs and settings, so that only the same training goes on from a checkpoint.
"""

import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from guardloop.core.errors import GuardLoopError
from guardloop.core.places import cache_folder
from guardloop.core.storage import exists, fetch, put

log = logging.getLogger("guardloop")
STATE = "state"
BEST, ADAPTER, OPTIMIZER = "best/", "adapter/", "optimizer/"


def checkpoint_place() -> str:
    """Where unfinished trainings are kept: $GUARDLOOP_WORK, a folder or an `s3://` prefix, or the cache folder."""
    return os.environ.get("GUARDLOOP_WORK") or str(cache_folder() / "checkpoints")


@dataclass(frozen=True)
class Checkpoints:
    """The newest checkpoint of the training `key`, in the folder or `s3://` prefix `place`."""

    place: str
    key: str

    @property
    def uri(self) -> str:
        """Where the checkpoint is."""
        return f"{self.place.rstrip('/')}/{self.key}.safetensors"

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Tensors and state of the newest checkpoint; None if there is none, or if it is broken.

        Raises GuardLoopError if the place cannot be read.
        """
        if not exists(self.uri):
            return None
        with TemporaryDirectory() as folder:
            path = fetch(self.uri, Path(folder))
            try:
                with safe_open(path, "pt") as file:
                    tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
                    state = json.loads(file.metadata()[STATE])
            except (SafetensorError, OSError, ValueError, KeyError, TypeError):
                log.warning("the checkpoint %s is broken: training begins anew", self.uri)
                return None
        return tensors, state

    def save(self, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """Put a checkpoint in place of the one before, whole or not at all. Where that fails, training goes on."""
        try:
            with TemporaryDirectory() as folder:
                path = Path(folder) / "state"
                plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
                save_file(plain, path, {STATE: json.dumps(state)})
                put(path, self.uri)
        except (GuardLoopError, OSError, SafetensorError) as error:
            log.warning("no checkpoint was kept; training goes on: %s", error)

    def clear(self) -> None:
        """Remove a local checkpoint once its adapter is saved; a store has rules of its own for old objects."""
        if "://" not in self.uri:
            with suppress(OSError):
                Path(self.uri).expanduser().unlink(missing_ok=True)


def part(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as tensors by `number of the parameter/name`."""
    state = optimizer.state_dict()["state"]
    return {f"{number}/{name}": tensor for number, values in state.items() for name, tensor in values.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, key = name.partition("/")
        state.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
