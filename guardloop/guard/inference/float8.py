"""Matrix products in 8-bit floating point (E4M3), for GPUs that have them: about half the time of bfloat16.

Weights are scaled per output, activations per token, so that the largest value of each is the format's largest.
torchao's rowwise float8 is as fast and as close, but its first pack took 264 s on a fresh machine (ours 13 s), and it
computes on GPUs only.
"""

from typing import Any

import torch

from guardloop.core.errors import GuardLoopError
from guardloop.guard.inference.forward import decoder_of

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
HOPPER = (8, 9)  # the first compute capability whose matrix units take E4M3


class Float8Linear(torch.nn.Module):
    """A linear layer `[..., in]` to `[..., out]` with E4M3 operands and the input's format as the result."""

    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        weight, scale = _scaled(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """The product, accumulated in float32."""
        rows, scale = _scaled(states.flatten(0, -2))
        if states.device.type == "cuda":
            product: torch.Tensor = torch._scaled_mm(
                rows, self.weight.t(), scale, self.scale.t(), out_dtype=states.dtype, use_fast_accum=True
            )
        else:
            product = ((rows.float() @ self.weight.float().t()) * scale * self.scale.t()).to(states.dtype)
        product = product.view(*states.shape[:-1], -1)
        return product if self.bias is None else product + self.bias


def to_float8(model: Any) -> Any:
    """Replace the decoder's linear layers in place; the output head and the embeddings stay as they are.

    Raises GuardLoopError on a GPU without 8-bit floating point.
    """
    if model.device.type == "cuda" and torch.cuda.get_device_capability(model.device) < HOPPER:
        raise GuardLoopError(
            "guard.quantization: fp8 needs a GPU with 8-bit floating point (Ada, Hopper or newer)", "use none or int8"
        )
    decoder = decoder_of(model)
    for name, module in list(decoder.named_modules()):
        if type(module) is torch.nn.Linear and not (module.in_features % 16 or module.out_features % 16):
            parent, _, child = name.rpartition(".")
            setattr(decoder.get_submodule(parent), child, Float8Linear(module))
    return model


def _scaled(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in E4M3 and the scales `float32[N, 1]` that bring them back."""
    scale = rows.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (rows.float() / scale).to(E4M3), scale
