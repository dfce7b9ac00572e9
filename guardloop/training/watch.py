"""What one step of training did, and how well it used the machine."""

import resource
from dataclasses import asdict, dataclass
from typing import Any

import torch

from guardloop.guard.inference.forward import decoder_of

PEAK_FLOPS = {  # dense bfloat16 (V100: float16), from the makers' data sheets
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "V100": 125e12,
}
GIB = 2**30


@dataclass(frozen=True)
class Step:
    """What one optimizer step did, over all processes."""

    number: int
    total: int
    loss: float
    gradient_norm: float
    learning_rate: float
    examples: int
    tokens: int
    seconds: float
    memory_gib: float = 0.0
    """Peak so far: allocated on the GPU, or resident without one."""
    mfu: float | None = None
    """Share of the device's peak; None where that is unknown."""
    validation_auprc: float | None = None
    benign_fpr: float | None = None

    def metrics(self) -> dict[str, float]:
        """The figures that are drawn as curves."""
        rates = {"examples_per_second": self.examples / self.seconds, "tokens_per_second": self.tokens / self.seconds}
        left_out = ("number", "total", "loss", "examples", "tokens", "seconds")
        figures = {name: value for name, value in asdict(self).items() if name not in left_out and value is not None}
        return {"train_loss": self.loss, **figures, **rates}


def flops_per_token(model: Any, top_layers: float) -> float:
    """FLOP that LoRA training spends on one token: 2 N forward, 2 N backward down to the lowest adapter.

    N counts the decoder's weights without embeddings (the head runs at the answers only). The gradients of frozen
    weights are not computed; attention over keys and the adapter itself are left out, as is usual. Activations that
    are computed again (gradient checkpointing) do not count as use.
    """
    decoder = decoder_of(model)
    embeddings = {id(p) for p in decoder.get_input_embeddings().parameters()}
    weights = sum(_size(p) for name, p in decoder.named_parameters() if id(p) not in embeddings and "lora_" not in name)
    return 2 * weights * (1 + top_layers)


def peak_flops(device: torch.device) -> float | None:
    """The device's peak in FLOP per second for 16-bit matrix products; None if it is not in the table."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    return next((peak for name, peak in PEAK_FLOPS.items() if set(name.split()) <= set(words)), None)


def memory_gib(device: torch.device) -> float:
    """Peak memory so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def _size(parameter: Any) -> int:
    """Number of weights, also where several are packed into one byte."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return int(torch.Size(shape).numel()) if shape is not None else int(parameter.numel())
