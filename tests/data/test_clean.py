import json
import random
import re
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import cases

from guardloop.core.errors import GuardLoopError
from guardloop.core.records import CONVERSATION, read_metadata, read_table
from guardloop.data.clean import WORD, NearIndex, fingerprint, normalise, prepare
from guardloop.data.settings import DatasetSettings, SourceSettings
from guardloop.stages import prepare_data

few = settings(max_examples=cases(60), deadline=None, derandomize=True)

LABELLED = [{"prompt": "something vile", "label": "unsafe"}, {"prompt": "something kind", "label": "safe"}]
WORDS = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("ake", "old", "ist", "orn", "um")]


def words(count: int, seed: int = 0) -> list[str]:
    return random.Random(seed).choices(WORDS, k=count)


def folded(text: str) -> str:
    return " ".join(normalise(text).casefold().split())


def grams(text: str) -> set[tuple[str, ...]]:
    found = re.findall(r"\w+", text)
    return {tuple(found[i : i + 3]) for i in range(len(found) - 2)}


def similarity(a: str, b: str) -> float:
    return len(grams(a) & grams(b)) / len(grams(a) | grams(b))


def refusal(dataset: DatasetSettings) -> GuardLoopError:
    with pytest.raises(GuardLoopError) as caught:
        prepare(dataset)
    assert caught.value.remedy
    return caught.value


# Invariants over any traffic and test set

short = st.sampled_from(
    ["kill the process", "kill a process", "C", "!?", "! ?", "ß", "SS", "é", "e\u0301", "", " ", "🙂"]
)
shouted = st.builds(
    lambda text, change: change(text), short, st.sampled_from([str, str.upper, str.title, "  {}\n".format])
)
prompts = st.one_of(
    shouted, st.text(max_size=12), st.builds(lambda n, s: " ".join(words(n, s)), st.integers(1, 6), st.integers(0, 3))
)
ids = st.one_of(st.none(), st.sampled_from(["a", "b", "a-1", "a-2", "b-2"]))
traffic_rows = st.lists(st.fixed_dictionaries({"prompt": prompts, "id": ids}), min_size=1, max_size=12)
test_rows = st.lists(
    st.fixed_dictionaries({"prompt": prompts, "id": ids, "label": st.sampled_from(["safe", "unsafe", ""])}), max_size=8
)


def cleaned(traffic, test):
    """What `prepare` makes of the rows; None where nothing is left of the traffic."""
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in (("traffic", traffic), ("test", test + LABELLED)):
            Path(folder, f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources = {name: SourceSettings(kind="file", path=f"{folder}/{name}.jsonl") for name in ("traffic", "test")}
        try:
            return prepare(DatasetSettings(**sources, max_overlap=1))
        except GuardLoopError as error:
            assert "no prompt is left" in error.what
            return None


@pytest.mark.slow
@few
@given(traffic_rows, test_rows)
def test_what_is_kept_is_distinct_and_apart_from_the_test_set(traffic, test):
    if (made := cleaned(traffic, test)) is None:
        return
    kept, tested, _ = made
    texts = [folded(r["prompt"]) for r in kept]
    tests = [folded(r["prompt"]) for r in tested]
    assert len(set(texts)) == len(texts) and len(set(tests)) == len(tests)
    assert not set(texts) & set(tests)
    assert set(texts) <= {folded(r["prompt"]) for r in traffic}
    assert all(r["prompt"] == normalise(r["prompt"]) != "" for r in kept + tested)
    for rows in (kept, tested):
        assert len({r["id"] for r in rows}) == len(rows)
        assert {r["group"] for r in rows} <= {r["id"] for r in rows}


@few
@given(traffic_rows, test_rows)
def test_the_counts_add_up(traffic, test):
    if (made := cleaned(traffic, test)) is None:
        return
    kept, tested, report = made
    dropped = report.empty + report.too_long + report.exact_duplicates + report.near_duplicates
    assert report.read == len(traffic) == report.kept + dropped + report.overlap_with_test
    assert report.kept == len(kept) and report.test == len(tested)
    assert report.test_unsafe == sum(r["unsafe"] for r in tested)
    assert report.empty == sum(not normalise(r["prompt"]) for r in traffic)


@few
@given(st.lists(st.fixed_dictionaries({"id": st.text(), "prompt": st.text(), "unsafe": st.booleans()})), st.randoms())
def test_the_fingerprint_does_not_depend_on_the_order(rows, draw):
    assert fingerprint(rows) == fingerprint(draw.sample(rows, len(rows)))


@pytest.mark.parametrize("change", [{"id": "2"}, {"prompt": "other"}, {"unsafe": True}, {"response": "yes"}])
def test_the_fingerprint_depends_on_ids_texts_and_labels(change):
    row = {"id": "1", "prompt": "a", "unsafe": False, "response": None}
    assert fingerprint([row]) != fingerprint([row | change])
    assert fingerprint([row]) != fingerprint([row, row])


@few
@given(st.text())
def test_normalising_twice_changes_nothing_more(text):
    assert normalise(normalise(text)) == normalise(text)


def test_normalising_composes_and_removes_control_characters():
    assert normalise(" e\u0301\x00te\x1b[31m\n") == "\u00e9te[31m"
    assert normalise("e\x00\u0301") == "\u00e9"
    assert normalise("line\n\tnext") == "line\n\tnext"


# Near-duplicates


def test_a_long_prompt_with_one_other_word_is_a_near_duplicate(dataset):
    text = words(60)
    changed = [*text[:30], "zebra", *text[31:]]
    kept, _, report = prepare(dataset([{"prompt": " ".join(text)}, {"prompt": " ".join(changed)}], LABELLED))
    assert [r["prompt"] for r in kept] == [" ".join(text)] and report.near_duplicates == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("How do I kill a Python process?", "How do I kill my python?"),
        ("How can I pick the lock of my own door?", "How can I pick the lock of a neighbour's door?"),
        ("Write a poem about spring.", "Write a poem about autumn."),
        ("怎样更换厨房的水龙头", "怎样更换汽车的轮胎"),
        (" ".join(words(40, 1)), " ".join(words(20, 1) + words(20, 2))),
    ],
)
def test_look_alikes_stay(dataset, one, other):
    kept, _, _ = prepare(dataset([{"prompt": one}, {"prompt": other}], LABELLED))
    assert [r["prompt"] for r in kept] == [one, other]


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9, 0.99])
def test_the_threshold_means_what_it_says(threshold):
    draw = random.Random(0)
    above = found = 0
    for seed in range(300):
        text = words(draw.randint(20, 150), seed)
        other = [draw.choice(WORDS) if draw.random() < draw.choice([0.002, 0.02, 0.1]) else word for word in text]
        index = NearIndex(threshold)
        index.add("one", " ".join(text))
        twin = index.find(" ".join(other)) is not None
        if similarity(" ".join(text), " ".join(other)) >= threshold:
            above += 1
            found += twin
        else:
            assert not twin
    assert above >= 15 and found >= 0.98 * above


def test_near_duplicates_of_every_row_are_found_though_ids_repeat(dataset):
    one, two = words(60, 1), words(60, 2)
    rows = [{"id": "turn", "prompt": " ".join(text)} for text in (one, two, [*two[:-1], "zebra"])]
    kept, _, report = prepare(dataset(rows, LABELLED))
    assert len(kept) == 2 and report.near_duplicates == 1 and len({r["group"] for r in kept}) == 2


@pytest.mark.parametrize(
    ("text", "suffix"),
    [
        ("安全地更换厨房水龙头的垫圈需要准备哪些工具", "谢谢"),
        ("自宅の台所の蛇口のパッキンを安全に交換する方法と必要な工具を教えて", "下さい"),
        ("ช่วยอธิบายการทำงานของตลาดหลักทรัพย์และการลงทุนระยะยาว", "ครับ"),
        ("ວິທີເຮັດເຂົ້າໜຽວໃຫ້ນຸ່ມ", "ແດ່"),
        ("សូមប្រាប់ពីរបៀបធ្វើនំខេក", "បាទ"),
    ],
)
def test_near_duplicates_are_found_without_spaces_between_words(dataset, text, suffix):
    test = [*LABELLED, {"prompt": text, "label": "safe"}]
    kept, _, report = prepare(dataset([{"prompt": text + suffix}, {"prompt": "other"}], test, max_overlap=1))
    assert report.overlap_with_test == 1 and [r["prompt"] for r in kept] == ["other"]


@pytest.mark.parametrize(
    "text",
    [
        "How do I bake 2 cakes?",
        "Wie heißt der Fluß?",
        "Как дела, друг?",
        "كيف حالك",
        "कैसे हो",
        "안녕하세요 여러분",
        "snake_case",
    ],
)
def test_spaced_scripts_have_the_words_that_they_had(text):
    assert WORD.findall(text) == re.findall(r"\w+", text)


def test_near_duplicates_in_the_test_set_share_a_group_through_chains(dataset):
    first = words(60)
    second = [*first[:10], "zebra", *first[11:20], "okapi", *first[21:]]
    third = [*second[:30], "tapir", *second[31:40], "lemur", *second[41:]]
    apart = words(60, 9)
    assert similarity(" ".join(first), " ".join(third)) < 0.8
    test = [{"id": i, "prompt": " ".join(t), "label": i % 2} for i, t in enumerate((first, second, third, apart))]
    _, tested, report = prepare(dataset([{"prompt": "traffic"}], test))
    groups = [r["group"] for r in tested]
    assert report.test == 4 and groups[0] == groups[1] == groups[2] != groups[3]


def test_test_and_response_rows_with_the_same_ids_are_told_apart(dataset):
    responses = [{"id": i, "prompt": f"responses {i}", "response": "answer", "label": "unsafe"} for i in (1, 2)]
    test = [{"id": i, **row} for i, row in enumerate(LABELLED, start=1)]
    _, tested, report = prepare(dataset([{"prompt": "traffic"}], test, responses))
    assert len({r["id"] for r in tested}) == len({r["group"] for r in tested}) == 4
    assert (report.test, report.response_test, report.test_unsafe) == (2, 2, 1)
    assert [r["response"] for r in tested] == [None, None, "answer", "answer"]


# Traffic and test apart


def overlapping(dataset, shared: int, **more) -> DatasetSettings:
    test = [{"prompt": f"Test prompt number {i}", "label": i % 2} for i in range(20)]
    traffic = [{"prompt": f"  TEST prompt  number {i}"} for i in range(shared)]
    return dataset([*traffic, {"prompt": "only in the traffic"}], test, **more)


def test_a_small_overlap_is_removed_from_the_traffic(dataset):
    kept, tested, report = prepare(overlapping(dataset, 2))
    assert [r["prompt"] for r in kept] == ["only in the traffic"]
    assert report.overlap_with_test == 2 and len(tested) == 20


def test_a_large_overlap_is_refused_unless_it_is_allowed(dataset):
    error = refusal(overlapping(dataset, 3))
    assert "15%" in error.what and "max_overlap" in error.remedy
    kept, _, report = prepare(overlapping(dataset, 3, max_overlap=0.15))
    assert len(kept) == 1 and report.overlap_with_test == 3


def test_the_overlap_counts_groups_of_near_duplicates_once(dataset):
    """One row of the test set stands for all like it, so that counting rows would miss most of the overlap."""
    texts = [words(60, seed) for seed in range(5)]
    test = [{"prompt": " ".join([*t, f"end{i}"]), "label": i % 2} for t in texts for i in range(20)]
    traffic = [{"prompt": " ".join(t)} for t in texts] + [{"prompt": "only in the traffic"}]
    assert "100%" in refusal(dataset(traffic, test)).what
    apart = [{"prompt": " ".join(words(60, seed)), "label": "safe"} for seed in range(10, 20)]
    kept, tested, _ = prepare(dataset([traffic[0], traffic[-1]], [*test[:20], *apart]))
    assert len(kept) == 1 and len(tested) == 30  # one of eleven groups


@pytest.mark.parametrize("text", ["! ?", "?!  🙂", "C", "ß", "的"])
def test_prompts_without_words_are_kept_apart_too(dataset, text):
    test = [*LABELLED, {"prompt": text, "label": "safe"}]
    kept, _, _ = prepare(dataset([{"prompt": text.replace(" ", "  ").upper()}, {"prompt": "x"}], test, max_overlap=1))
    assert [r["prompt"] for r in kept] == ["x"]


def test_the_same_file_for_traffic_and_test_is_refused(dataset):
    same = dataset(LABELLED, LABELLED)
    assert "100%" in refusal(same.model_copy(update={"traffic": same.test})).what


def test_official_splits_are_never_mixed(dataset):
    traffic = [{"prompt": f"train prompt {i}", "label": "unsafe"} for i in range(9)]
    kept, tested, _ = prepare(dataset(traffic, LABELLED))
    assert {r["prompt"] for r in kept} == {r["prompt"] for r in traffic}
    assert [r["prompt"] for r in tested] == [r["prompt"] for r in LABELLED]


# What is refused


def test_an_empty_traffic_or_test_set_is_refused(dataset):
    assert "dataset.traffic" in refusal(dataset([], LABELLED)).what
    assert "dataset.test" in refusal(dataset([{"prompt": "x"}], [])).what


def test_traffic_of_which_nothing_is_left_is_refused(dataset):
    error = refusal(dataset([{"prompt": " "}, {"prompt": "x" * 8001}], LABELLED))
    assert "dataset.traffic" in error.what and "8,000" in error.remedy


@pytest.mark.parametrize("kind", ["safe", "unsafe"])
def test_a_test_set_of_one_label_is_refused(dataset, kind):
    error = refusal(dataset([{"prompt": "x"}], [{"prompt": f"test {i}", "label": kind} for i in range(3)]))
    assert f"labelled {kind}" in error.what and "unsafe_labels" in error.remedy


def test_a_test_set_without_labels_is_refused(dataset):
    error = refusal(dataset([{"prompt": "x"}], [{"prompt": "a"}, {"prompt": "b", "label": ""}]))
    assert "dataset.test" in error.what and "label" in error.remedy


def test_a_response_row_without_a_response_is_refused(dataset):
    error = refusal(dataset([{"prompt": "x"}], LABELLED, [{"id": "r7", "prompt": "a", "label": "safe"}]))
    assert "dataset.response_test" in error.what and "r7" in error.what


# The stage


def test_the_stage_writes_both_tables_and_what_became_of_the_rows(dataset, tmp_path):
    rows = [
        {"prompt": "\ud800 one", "id": "\ud800"},
        {"prompt": "two"},
        {"prompt": "TWO"},
        {"prompt": "something kind"},
    ]
    made = dataset(rows, LABELLED, max_overlap=0.5)
    counts = prepare_data(made.plain(), tmp_path / "traffic.parquet", tmp_path / "test.parquet")
    traffic = list(read_table(tmp_path / "traffic.parquet", CONVERSATION))
    assert Counter(counts) >= Counter(read=4, kept=2, exact_duplicates=1, overlap_with_test=1, test=2, test_unsafe=1)
    assert [r["prompt"] for r in traffic] == ["? one", "two"]
    metadata = read_metadata(tmp_path / "test.parquet")
    assert metadata["dataset"] == "traffic" and metadata["hash"] and metadata["counts"]["kept"] == 2


def test_the_stage_gives_the_same_files_again(dataset, tmp_path):
    made = dataset([{"prompt": f"prompt {' '.join(words(8, i))}"} for i in range(50)], LABELLED)
    made = made.model_copy(update={"traffic": made.traffic.model_copy(update={"limit": 20})})
    for run in ("first", "second"):
        prepare_data(made.plain(), tmp_path / run / "traffic.parquet", tmp_path / run / "test.parquet")
    for name in ("traffic.parquet", "test.parquet"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
