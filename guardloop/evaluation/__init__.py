"""Compare the candidate with the baseline on scores alone, and decide on promotion.

What computes is imported on first use: scipy takes seconds to import, and settings alone do not need it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from guardloop.evaluation.result import Evaluation
from guardloop.evaluation.settings import EvaluationSettings, GateSettings

if TYPE_CHECKING:
    from guardloop.evaluation.compare import evaluate
    from guardloop.evaluation.paired import GuardRun

__all__ = ["Evaluation", "EvaluationSettings", "GateSettings", "GuardRun", "evaluate"]

MODULES = {"GuardRun": "paired", "evaluate": "compare"}


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
