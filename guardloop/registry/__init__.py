"""Runs and adapters in MLflow: what was tried, what it brought, which adapter is champion.

Names are imported on first use, since MLflow takes seconds to import and settings alone do not need it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from guardloop.registry.settings import RegistrySettings

if TYPE_CHECKING:
    from guardloop.registry.contents import DataSource, Origin
    from guardloop.registry.registry import Candidate, Registry
    from guardloop.registry.training_log import TrainingLog

__all__ = ["Candidate", "DataSource", "Origin", "Registry", "RegistrySettings", "TrainingLog"]

MODULES = {
    "Candidate": "registry",
    "DataSource": "contents",
    "Origin": "contents",
    "Registry": "registry",
    "TrainingLog": "training_log",
}


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
