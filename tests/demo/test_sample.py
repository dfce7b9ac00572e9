"""The sample that ships: what the demo and its report rest on."""

import json
from collections import Counter, defaultdict

import pytest

from guardloop.data.clean import normalise, prepare
from guardloop.data.near import NearIndex
from guardloop.data.settings import DatasetSettings, SourceSettings
from guardloop.data.sources import read_conversations
from guardloop.demo import SAMPLE

PARTS = ["traffic", "test", "judge", "seed_prompts"]
PROMPTS = ["traffic", "test"]
STYLES = {
    "everyday": {"safe"},
    "look-alike": {"safe"},
    "direct": {"unsafe"},
    "indirect": {"unsafe"},
    "role-play": {"unsafe"},
}


@pytest.fixture(scope="module")
def parts():
    return {part: list(read_conversations(SourceSettings(path=part))) for part in PARTS}


def raw(part):
    with (SAMPLE / f"{part}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_there_are_enough_prompts(parts):
    assert len(parts["traffic"]) + len(parts["test"]) >= 600
    assert Counter(r["unsafe"] for r in parts["test"]).keys() == {True, False}


@pytest.mark.parametrize("part", PARTS)
def test_every_row_is_clean_and_has_an_id_of_its_own(parts, part):
    rows = parts[part]
    assert len({r["id"] for r in rows}) == len(rows)
    assert all(r["prompt"] == normalise(r["prompt"]) and r["unsafe"] is not None for r in rows)
    assert all((r["response"] is not None) == (part == "judge") for r in rows)


@pytest.mark.parametrize("part", PROMPTS)
def test_every_category_has_safe_and_unsafe_prompts(part):
    labels = defaultdict(Counter)
    for row in raw(part):
        labels[row["category"]][row["label"]] += 1
    assert len(labels) > 8 and set(labels.pop(None)) == {"safe"}  # everyday prompts have no category
    assert all(min(count["safe"], count["unsafe"]) >= 10 for count in labels.values())


@pytest.mark.parametrize("part", PROMPTS)
def test_every_style_is_there_in_traffic_and_test(part):
    labels = defaultdict(set)
    for row in raw(part):
        labels[row["style"]].add(row["label"])
    assert labels == STYLES


def test_no_prompt_is_in_two_parts_not_even_nearly(parts):
    index = NearIndex(threshold=0.6)
    for row in parts["test"]:
        assert index.find(row["prompt"]) is None, row
        index.add(row["id"], row["prompt"])
    tested = NearIndex(threshold=0.6)
    for row in parts["test"]:
        tested.add(row["id"], row["prompt"])
    for part in ("traffic", "judge", "seed_prompts"):
        assert [r["prompt"] for r in parts[part] if tested.find(r["prompt"])] == []


def test_cleaning_drops_nothing():
    traffic, test, report = prepare(DatasetSettings())
    assert report.read == report.kept == len(traffic) and len(test) == report.test
