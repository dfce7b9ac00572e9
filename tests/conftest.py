"""What holds for every test."""

import os
import re
from pathlib import Path

import pytest

# Models compute in float32, as on a processor without bfloat16: figures are then compared closely everywhere. Torch
# reads it when it is first imported, also in processes that tests start.
os.environ["ATEN_CPU_CAPABILITY"] = "avx2"
# Tests run side by side, on tiny models: more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]
SHOWN = set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs/security.md").read_text("utf-8")))
"""(file, test) of what docs/security.md says that an attack is tried in; no test: the whole file."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        file, test = str(item.path.relative_to(ROOT)), getattr(item, "originalname", item.name)
        if {(file, ""), (file, test)} & SHOWN:
            item.add_marker("security")
