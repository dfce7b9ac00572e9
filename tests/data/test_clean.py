import json
import random
import re
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import cases

from guardloop.core.errors import GuardLoopError
from guardloop.core.records import CONVERSATION, read_metadata, read_table
from guardloop.data.clean import KEPT_PER_GROUP, fingerprint, normalise, prepare
from guardloop.data.near import WORD, NearIndex
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
    st.fixed_dictionaries({"prompt": prompts, "id": ids, "label": st.sampled_from(["safe", "unsafe"])}), max_size=8
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
    assert all(len({r["id"] for r in rows}) == len(rows) for rows in (kept, tested))
    assert {r["group"] for r in tested} <= {r["id"] for r in tested}


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
    kept, _, _ = prepare(dataset([{"prompt": " ".join(text)}, {"prompt": " ".join(changed)}], LABELLED))
    assert len(kept) == 2 and kept[0]["group"] == kept[1]["group"]


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
    assert [r["prompt"] for r in kept] == [one, other] and kept[0]["group"] != kept[1]["group"]


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
    kept, _, _ = prepare(dataset(rows, LABELLED))
    assert len({r["id"] for r in kept}) == len(kept) == 3 and len({r["group"] for r in kept}) == 2


def on_a_template(count: int, seed: int = 0) -> list[dict]:
    """So many prompts that differ in one word of sixty, none twice."""
    text = words(60, seed)
    return [{"prompt": " ".join([*text[:30], f"payload{n}", *text[31:]])} for n in range(count)]


def test_several_of_each_group_are_kept_whoever_came_first(dataset):
    harmless, later = on_a_template(KEPT_PER_GROUP), on_a_template(200)[KEPT_PER_GROUP:]
    kept, _, report = prepare(dataset([*harmless, *later, {"prompt": "alone"}], LABELLED))
    assert len(kept) == KEPT_PER_GROUP + 1 and report.near_duplicates == 200 - KEPT_PER_GROUP
    assert any(row["prompt"] in {r["prompt"] for r in later} for row in kept)
    assert len({row["group"] for row in kept}) == 2


def test_which_are_kept_and_their_group_depend_on_all_rows(dataset):
    rows = on_a_template(200)
    first, again, other = (prepare(dataset([*rows, {"prompt": last}], LABELLED))[0] for last in ("one", "one", "two"))
    assert first == again
    assert {r["prompt"] for r in first[:-1]} != {r["prompt"] for r in other[:-1]}
    assert {r["group"] for r in first}.isdisjoint(r["group"] for r in other)
    assert {r["group"] for r in first}.isdisjoint(r["group"] for r in prepare(dataset(rows, LABELLED), seed=1)[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["template", "ids"])
def test_the_time_grows_with_the_rows_whatever_they_hold(dataset, kind):
    def seconds(count: int) -> float:
        rows = on_a_template(count)
        if kind == "ids":
            half = count // 2
            rows = [{"id": f"a-{n}", "prompt": f"one {n}"} for n in range(half)]
            rows += [{"id": "a", "prompt": f"two {n}"} for n in range(half)]
        started = time.process_time()
        prepare(dataset(rows, LABELLED))
        return time.process_time() - started

    assert seconds(2400) < 6 * seconds(600)


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


def test_a_large_overlap_is_removed_too_and_told(dataset):
    kept, _, report = prepare(overlapping(dataset, 3))
    assert len(kept) == 1 and report.overlap_with_test == 3 and "15% of the test prompts" in report.notes[0]
    _, _, allowed = prepare(overlapping(dataset, 3, max_overlap=0.15))
    assert not allowed.notes


def test_whoever_knows_the_test_set_cannot_stop_a_run(dataset):
    kept, _, report = prepare(overlapping(dataset, 20))
    assert [r["prompt"] for r in kept] == ["only in the traffic"] and report.overlap_with_test == 20


def test_the_overlap_counts_groups_of_near_duplicates_once(dataset):
    """One row of the test set stands for all like it, so that counting rows would miss most of the overlap."""
    texts = [words(60, seed) for seed in range(5)]
    test = [{"prompt": " ".join([*t, f"end{i}"]), "label": i % 2} for t in texts for i in range(20)]
    traffic = [{"prompt": " ".join(t)} for t in texts] + [{"prompt": "only in the traffic"}]
    assert "100% of the test prompts" in prepare(dataset(traffic, test))[2].notes[0]
    apart = [{"prompt": " ".join(words(60, seed)), "label": "safe"} for seed in range(10, 20)]
    kept, tested, report = prepare(dataset([traffic[0], traffic[-1]], [*test[:20], *apart]))
    assert len(kept) == 1 and len(tested) == 30 and not report.notes  # one of eleven groups


@pytest.mark.parametrize("text", ["! ?", "?!  🙂", "C", "ß", "的"])
def test_prompts_without_words_are_kept_apart_too(dataset, text):
    test = [*LABELLED, {"prompt": text, "label": "safe"}]
    kept, _, _ = prepare(dataset([{"prompt": text.replace(" ", "  ").upper()}, {"prompt": "x"}], test, max_overlap=1))
    assert [r["prompt"] for r in kept] == ["x"]


def test_the_same_file_for_traffic_and_test_is_refused(dataset):
    same = dataset(LABELLED, LABELLED)
    assert "2 of 2 rows are in the test set too" in refusal(same.model_copy(update={"traffic": same.test})).what


def test_official_splits_are_never_mixed(dataset):
    traffic = [{"prompt": f"train prompt {i}", "label": "unsafe"} for i in range(9)]
    kept, tested, _ = prepare(dataset(traffic, LABELLED))
    assert {r["prompt"] for r in kept} == {r["prompt"] for r in traffic}
    assert [r["prompt"] for r in tested] == [r["prompt"] for r in LABELLED]


# Labels that contradict each other, and rows without one

ANNOTATED = {"one": "uus", "tie": "us", "agreed": "sss", "single": "u"}
"""Labels of several annotators by text: u unsafe, s safe."""


def annotated() -> list[dict]:
    """One row per annotator."""
    words_of = {"u": "unsafe", "s": "safe"}
    return [
        {"id": f"{text}{n}", "prompt": change(text), "label": words_of[label]}
        for text, labels in ANNOTATED.items()
        for n, (label, change) in enumerate(zip(labels, (str, str.upper, "  {} ".format), strict=False))
    ]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("majority", {"one": True, "agreed": False, "single": True}),
        ("any", {"one": True, "tie": True, "agreed": False, "single": True}),
    ],
)
def test_contradicting_labels_of_a_test_set(dataset, policy, expected):
    _, tested, report = prepare(dataset([{"prompt": "x"}], annotated(), contradictions=policy))
    assert {row["prompt"]: row["unsafe"] for row in tested} == expected
    assert (report.labelled_again, report.contradictions, report.ties) == (3, 2, policy == "majority")
    (note,) = report.notes
    assert "dataset.test: 1 of 3 texts that are labelled more than once agree" in note
    assert ("'tie0'" in note) == (policy == "majority")


def test_contradictions_can_be_refused(dataset):
    error = refusal(dataset([{"prompt": "x"}], annotated(), contradictions="refuse"))
    assert "2 texts have labels that contradict each other: 'one0', 'tie0'" in error.what
    assert "contradictions" in error.remedy


def test_contradicting_labels_of_the_traffic_and_across_both_sets(dataset):
    traffic = [{"prompt": "a", "label": label} for label in ("safe", "safe", "unsafe")]
    traffic += [{"prompt": "b", "label": label} for label in ("safe", "unsafe")]
    traffic += [{"prompt": "something kind", "label": label} for label in ("unsafe", "safe", None)]
    kept, _, report = prepare(dataset(traffic, LABELLED, max_overlap=1))
    assert {row["prompt"]: row["unsafe"] for row in kept} == {"a": False, "b": None}
    assert (report.overlap_with_test, report.overlap_contradictions, report.ties) == (3, 1, 0)
    assert "dataset.traffic: 0 of 2 texts" in report.notes[0]
    assert "1 rows of the traffic are labelled otherwise" in report.notes[1]


def test_a_response_set_of_several_annotators(dataset):
    rows = [{"prompt": "p", "response": "r", "label": label} for label in ("unsafe", "unsafe", "safe")]
    _, tested, report = prepare(dataset([{"prompt": "x"}], LABELLED, [*rows, {**rows[2], "response": "other"}]))
    assert [(row["response"], row["unsafe"]) for row in tested[2:]] == [("r", True), ("other", False)]
    assert report.response_test == 2 and report.contradictions == 1


def test_rows_without_a_label_are_refused_or_dropped_and_counted(dataset):
    rows = [*LABELLED, {"id": "seven", "prompt": "c", "label": "n/a"}, {"prompt": "d"}]
    wanted = dataset([{"prompt": "x"}], rows)
    assert "dataset.test: 2 rows have no label; the first: row 3, row 4" in refusal(wanted).what
    dropping = wanted.model_copy(update={"test": wanted.test.model_copy(update={"unlabelled": "drop"})})
    _, tested, report = prepare(dropping)
    assert len(tested) == 2 and report.unlabelled == 2
    assert report.labels["dataset.test"].plain()["missing"] == {"n/a": 1, "(empty)": 1}


@pytest.mark.parametrize("label", ["complaint", None, ["unsafe"]])
def test_what_the_traffic_is_labelled_with_stops_nothing(dataset, label):
    kept, _, _ = prepare(dataset([{"prompt": "x", "label": label}], LABELLED))
    assert [row["unsafe"] for row in kept] == [None]


# What is refused


def test_an_empty_traffic_or_test_set_is_refused(dataset):
    assert "dataset.traffic" in refusal(dataset([], LABELLED)).what
    assert "dataset.test" in refusal(dataset([{"prompt": "x"}], [])).what


def test_traffic_of_which_nothing_is_left_is_refused(dataset):
    error = refusal(dataset([{"prompt": " "}, {"prompt": "x" * 8001}], LABELLED))
    assert "dataset.traffic" in error.what and "8,000" in error.what


def test_one_row_of_traffic_is_enough(dataset):
    kept, tested, _ = prepare(dataset([{"prompt": "x"}], LABELLED))
    assert len(kept) == 1 and len(tested) == 2


def test_a_prompt_column_of_numbers_is_refused_in_words(dataset):
    assert "row 1: prompt is int, not text" in refusal(dataset([{"prompt": 7}], LABELLED)).what


@pytest.mark.parametrize("name", ["with space", "dots.and.more", "größe 日本", "[brackets]", "a*b"])
def test_files_and_folders_of_any_name_are_read(dataset, tmp_path, name):
    plain = dataset([{"prompt": "x"}], LABELLED)
    folder = tmp_path / name
    folder.mkdir()
    (folder / f"{name}.jsonl").write_text(json.dumps({"prompt": "y"}))
    for path in (folder, folder / f"{name}.jsonl"):
        traffic = plain.traffic.model_copy(update={"path": str(path)})
        assert [row["prompt"] for row in prepare(plain.model_copy(update={"traffic": traffic}))[0]] == ["y"]


@pytest.mark.parametrize("kind", ["safe", "unsafe"])
def test_a_test_set_of_one_label_is_refused(dataset, kind):
    error = refusal(dataset([{"prompt": "x"}], [{"prompt": f"test {i}", "label": kind} for i in range(3)]))
    assert f"labelled {kind}" in error.what and "unsafe_labels" in error.remedy


def test_a_test_set_without_labels_is_refused(dataset):
    error = refusal(dataset([{"prompt": "x"}], [{"prompt": "a"}, {"prompt": "b"}]))
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
    assert metadata["labels"]["dataset.test"] == {"unsafe": {"unsafe": 1}, "safe": {"safe": 1}} and metadata["salt"]


def test_the_stage_gives_the_same_files_again(dataset, tmp_path):
    made = dataset([{"prompt": f"prompt {' '.join(words(8, i))}"} for i in range(50)], LABELLED)
    made = made.model_copy(update={"traffic": made.traffic.model_copy(update={"limit": 20})})
    for run in ("first", "second"):
        prepare_data(made.plain(), tmp_path / run / "traffic.parquet", tmp_path / run / "test.parquet")
    for name in ("traffic.parquet", "test.parquet"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
