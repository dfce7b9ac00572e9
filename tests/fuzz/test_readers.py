"""Whatever is in a file, its reader ends, with rows or with words and a remedy. `make fuzz` tries more."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from fuzz.corpus import SEEDS, TARGETS, try_case
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.cases import cases

from guardloop.core.errors import GuardLoopError
from guardloop.guard.adapter_files import FREE, WEIGHTS, check_adapter_files
from guardloop.guard.metadata import guard_metadata
from guardloop.guard.prompt.policy import read_policy

CASES = 30
many = hypothesis_settings(max_examples=cases(150), deadline=None, derandomize=True)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
trees = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_read_or_refused(name: str, scratch: Path) -> None:
    outcomes = [try_case(name, number, scratch) for number in (*range(CASES), *SEEDS.get(name, ()))]
    if name not in ("text", "endpoint"):  # whatever is in these is read
        assert "refused" in outcomes  # else nothing was damaged


def refused_or(read: Callable[[], object]) -> None:
    try:
        read()
    except GuardLoopError as error:
        assert error.what and error.remedy


@pytest.mark.slow
@many
@given(config=st.dictionaries(st.sampled_from(sorted(FREE)) | st.text(max_size=5), trees, max_size=6))
def test_any_adapter_configuration_is_judged(scratch: Path, config: dict) -> None:
    folder = scratch / "any_adapter"
    folder.mkdir(exist_ok=True)
    (folder / WEIGHTS).touch()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))
    refused_or(lambda: check_adapter_files(folder, {}))


POINTS = ("threshold", "response_threshold")


@many
@given(metadata=st.dictionaries(st.sampled_from([*POINTS, "temperature", "family", "base"]), trees) | trees)
def test_any_guard_json_is_judged_and_its_numbers_are_finite(scratch: Path, metadata: object) -> None:
    (scratch / "guard.json").write_text(json.dumps(metadata))

    def read() -> None:
        found = guard_metadata(scratch)
        assert all(abs(float(found.get(name, 0.0))) <= 60 for name in POINTS)
        assert float(found.get("temperature", 1.0)) > 0

    refused_or(read)


@many
@given(policy=st.dictionaries(st.sampled_from(["S1", "O2", "x", "ABCD1"]), trees, max_size=3) | trees)
def test_any_policy_is_read_or_refused(scratch: Path, policy: object) -> None:
    (scratch / "any.yaml").write_text(yaml.safe_dump(policy))
    refused_or(lambda: read_policy(scratch / "any.yaml"))
