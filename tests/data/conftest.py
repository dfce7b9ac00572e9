"""Tables on disk in every form that is read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.data_tables import as_bytes

from guardloop.data.settings import DatasetSettings, SourceSettings

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows, or bytes as they are, as a file of the kind that its name tells."""

    def write(content: list[dict[str, Any]] | bytes, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else as_bytes(content, name[name.index(".") :]))
        return path

    return write


@pytest.fixture
def dataset(write: Write) -> Callable[..., DatasetSettings]:
    """Settings of a data set of these traffic and test rows."""

    def dataset(
        traffic: list[dict[str, Any]],
        test: list[dict[str, Any]],
        responses: list[dict[str, Any]] | None = None,
        **more: Any,
    ) -> DatasetSettings:
        tables = {"traffic": traffic, "test": test} | ({"response_test": responses} if responses else {})
        sources = {n: SourceSettings(kind="file", path=str(write(rows, f"{n}.jsonl"))) for n, rows in tables.items()}
        return DatasetSettings(**sources, **more)

    return dataset
