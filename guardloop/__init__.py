"""GuardLoop: output-feedback training for LLM safeguard models."""

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guardloop.guard.engine import Guard

__version__ = "0.1.0"
__all__ = ["Guard", "__version__"]

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # warns on import of a kernel nobody needs


def __getattr__(name: str) -> Any:
    if name == "Guard":
        from guardloop.guard.engine import Guard  # noqa: PLC0415  (torch loads for seconds; the command line need not)

        return Guard
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
