"""Simulated test sets, from the same source as the benchmark of the gate."""

import importlib.util
import sys
from types import ModuleType

import pytest
from support.root import ROOT

BENCH = ROOT / "bench" / "gate_simulation.py"


@pytest.fixture(scope="session")
def simulation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gate_simulation", BENCH)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def drawn(simulation):
    """A cached test set: `drawn(candidate_auprc=.7)` gives (rows, (baseline, candidate)); do not change the rows."""
    cache = {}

    def draw(seed=0, **world):
        key = (seed, *sorted(world.items()))
        if key not in cache:
            cache[key] = simulation.draw(simulation.World(**{"rows": 2500, **world}), seed)
        return cache[key]

    return draw
