"""A guard whose layers are split among the processes' GPUs (FSDP), for guards too large to be trained on one."""

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from guardloop.core.errors import GuardLoopError
from guardloop.guard.inference.forward import decoder_of


def shard(model: Any, device: torch.device) -> None:
    """Split the decoder's layers among the processes, in place, and put all else on `device`, whole in each process.

    A layer is gathered where it computes, forward and backward, while the one before it computes; so each process has
    to make as many passes as the others. Whole are the adapter, which is trained as it is elsewhere, and embeddings,
    last norm and head, whose weights are read outside of forward passes, too. `model` may lie on the CPU: its layers go
    to the device one at a time.
    Raises GuardLoopError for a quantized guard.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise GuardLoopError(
            "training.sharded: the weights of a quantized guard cannot be split",
            "leave training.sharded off: a quantized guard fits one GPU; or set guard.quantization to none",
        )
    decoder = decoder_of(model)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in decoder.layers:
        adapter = {parameter for name, parameter in layer.named_parameters() if "lora_" in name}
        fully_shard(layer, mesh=mesh, ignored_params=adapter)
    for layer, following in pairwise(decoder.layers):
        layer.set_modules_to_forward_prefetch([following])
    fully_shard(decoder, mesh=mesh, ignored_params={p for p in decoder.parameters() if not isinstance(p, DTensor)})
    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device)
    with torch.no_grad():  # the first pass makes the tensors that are gathered into: inference mode's have no gradient
        decoder(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device))
