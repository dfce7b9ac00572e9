import json
import random
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.cases import cases

from guardloop.core import records
from guardloop.core.errors import GuardLoopError
from guardloop.core.records import (
    CONVERSATION,
    EXAMPLE,
    JUDGED,
    RESPONSE,
    ROW_GROUP,
    SCORES,
    SCREENED,
    chunks,
    count_rows,
    judged_schema,
    read_metadata,
    read_table,
    read_tables,
    write_jsonl,
    write_table,
)

SCHEMAS = {
    "conversation": CONVERSATION,
    "screened": SCREENED,
    "response": RESPONSE,
    "judged": JUDGED,
    "example": EXAMPLE,
    "scores": SCORES,
}
VALUES = {
    pa.string(): st.text(max_size=8),
    pa.bool_(): st.booleans(),
    pa.float32(): st.floats(width=32, allow_nan=False),
    pa.int32(): st.integers(-(2**31), 2**31 - 1),
}
SMALL = pa.schema([pa.field("id", pa.int32(), nullable=False), pa.field("text", pa.string())])

few = hypothesis_settings(max_examples=cases(30), deadline=None, derandomize=True)


def rows_of(schema: pa.Schema) -> st.SearchStrategy:
    values = {f.name: (st.none() | VALUES[f.type]) if f.nullable else VALUES[f.type] for f in schema}
    return st.lists(st.fixed_dictionaries(values), max_size=5)


def small(count: int) -> Iterator[dict]:
    return ({"id": i, "text": f"text {i}"} for i in range(count))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("tables") / "rows.parquet"


# There and back


@pytest.mark.parametrize("name", SCHEMAS)
@few
@given(data=st.data())
def test_every_kind_of_row_survives_the_trip(scratch, name, data):
    rows = data.draw(rows_of(SCHEMAS[name]))
    assert write_table(rows, SCHEMAS[name], scratch) == len(rows) == count_rows(scratch)
    assert list(read_table(scratch, SCHEMAS[name])) == rows


def test_a_stage_adds_columns_and_keeps_those_that_are_there():
    for schema, wider in (
        (CONVERSATION, SCREENED),
        (CONVERSATION, RESPONSE),
        (RESPONSE, JUDGED),
        (CONVERSATION, SCORES),
    ):
        assert list(wider)[: len(schema)] == list(schema)


def test_missing_values_become_null_and_unknown_ones_are_left_out(tmp_path):
    write_table([{"id": 1, "unknown": 2}], SMALL, tmp_path / "t.parquet")
    assert list(read_table(tmp_path / "t.parquet")) == [{"id": 1, "text": None}]


def test_metadata_is_asked_for_once_all_rows_are_written(tmp_path):
    seen = []
    rows = (seen.append(row) or row for row in small(3))
    write_table(rows, SMALL, tmp_path / "t.parquet", lambda: {"rows": len(seen), "nested": {"ä": [1, None]}})
    assert read_metadata(tmp_path / "t.parquet") == {"rows": 3, "nested": {"ä": [1, None]}}


def test_a_table_without_metadata_has_none(tmp_path):
    write_table([], SMALL, tmp_path / "ours.parquet")
    pq.write_table(pa.table({"id": [1]}), tmp_path / "foreign.parquet")
    assert read_metadata(tmp_path / "ours.parquet") == read_metadata(tmp_path / "foreign.parquet") == {}


def test_an_empty_table_keeps_its_columns(tmp_path):
    assert write_table([], JUDGED, tmp_path / "t.parquet") == 0
    assert list(read_table(tmp_path / "t.parquet", JUDGED)) == [] and count_rows(tmp_path / "t.parquet") == 0


def test_the_same_rows_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_table(small(3000), SMALL, tmp_path / name, lambda: {"fact": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_shards_are_read_one_after_another(tmp_path):
    paths = [tmp_path / "new" / f"{shard}.parquet" for shard in range(3)]
    for shard, path in enumerate(paths):
        write_table(list(small(9))[shard * 3 : shard * 3 + 3], SMALL, path)
    assert list(read_tables(paths, SMALL)) == list(small(9))


# Streaming


def test_rows_are_written_in_groups_and_never_held_all(tmp_path):
    count = 3 * ROW_GROUP + 5
    partial = tmp_path / "t.parquet.partial"
    sizes = []

    def rows() -> Iterator[dict]:
        for row in small(count):
            sizes.append(partial.stat().st_size)
            yield row

    write_table(rows(), SMALL, tmp_path / "t.parquet")
    meta = pq.read_metadata(tmp_path / "t.parquet")
    assert [meta.row_group(i).num_rows for i in range(meta.num_row_groups)] == [ROW_GROUP] * 3 + [5]
    assert sizes[-1] > sizes[ROW_GROUP + 1] > sizes[0]  # on disk before the last row was asked for


def test_reading_starts_without_reading_all(tmp_path):
    write_table(small(5 * ROW_GROUP), SMALL, tmp_path / "t.parquet")
    rows = read_table(tmp_path / "t.parquet")
    assert next(rows) == {"id": 0, "text": "text 0"}
    rows.close()


@pytest.mark.parametrize(("count", "sizes"), [(0, []), (1, [1]), (3, [3]), (7, [3, 3, 1])])
def test_chunks_hold_all_rows_in_order(count, sizes):
    found = list(chunks(small(count), 3))
    assert [len(chunk) for chunk in found] == sizes
    assert [row for chunk in found for row in chunk] == list(small(count))


# All or nothing


@pytest.mark.parametrize(
    "error", [RuntimeError("stopped"), ConnectionError("the endpoint is away"), KeyboardInterrupt()]
)
@pytest.mark.parametrize("after", [0, 10, 2 * ROW_GROUP + 1])
def test_a_writer_that_is_stopped_leaves_nothing_and_tells_its_own_error(tmp_path, error, after):
    def rows() -> Iterator[dict]:
        yield from small(after)
        raise error

    with pytest.raises(type(error)) as caught:
        write_table(rows(), SMALL, tmp_path / "t.parquet")
    assert caught.value is error and list(tmp_path.iterdir()) == []


def test_an_earlier_table_stays_when_writing_fails(tmp_path):
    write_table(small(3), SMALL, tmp_path / "t.parquet")
    with pytest.raises(ZeroDivisionError):
        write_table(({"id": 1 // (5 - i)} for i in range(9)), SMALL, tmp_path / "t.parquet")
    with pytest.raises(ZeroDivisionError):
        write_table(small(5), SMALL, tmp_path / "t.parquet", lambda: {"share": 1 / 0})
    assert list(read_table(tmp_path / "t.parquet")) == list(small(3))
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]


def test_a_null_where_none_is_allowed_leaves_nothing(tmp_path):
    with pytest.raises(pa.ArrowInvalid):
        write_table([{"text": "no id"}], SMALL, tmp_path / "t.parquet")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GuardLoopError, match=r"cannot write .*t\.parquet.*\n.*folder"):
        write_table(small(1), SMALL, tmp_path / "file" / "t.parquet")


# Damaged tables


def test_a_missing_file_or_column_is_named(tmp_path):
    for read in (lambda path: list(read_table(path)), read_metadata, count_rows):
        with pytest.raises(GuardLoopError, match=r"no such file: .*nothing\.parquet"):
            read(tmp_path / "nothing.parquet")
    write_table(small(1), SMALL, tmp_path / "t.parquet")
    with pytest.raises(GuardLoopError, match=r"t\.parquet lacks the columns group, kind"):
        list(read_table(tmp_path / "t.parquet", EXAMPLE))


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not a table", b"PAR1" + bytes(100) + b"PAR1"])
def test_what_is_no_table_is_refused(tmp_path, content):
    (tmp_path / "t.parquet").write_bytes(content)
    for read in (lambda path: list(read_table(path)), read_metadata, count_rows):
        with pytest.raises(GuardLoopError, match=r"t\.parquet is not a readable Parquet file"):
            read(tmp_path / "t.parquet")


def test_a_table_that_is_cut_off_is_refused(tmp_path):
    write_table(small(3000), SMALL, tmp_path / "t.parquet")
    whole = (tmp_path / "t.parquet").read_bytes()
    for share in (0.1, 0.5, 0.9, 0.999):
        (tmp_path / "t.parquet").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(GuardLoopError, match="run the stage that writes it again"):
            list(read_table(tmp_path / "t.parquet"))


def test_a_table_with_changed_bytes_is_read_or_refused(tmp_path):
    draw, path = random.Random(0), tmp_path / "t.parquet"
    write_table(small(300), SMALL, path, lambda: {"fact": 1})
    whole, refused = path.read_bytes(), 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 20)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged)
        for read in (lambda path: list(read_table(path)), read_metadata, count_rows):
            try:
                read(path)
            except GuardLoopError:
                refused += 1
    assert refused > 30


def test_a_table_of_another_version_is_refused_in_words(tmp_path, monkeypatch):
    path = tmp_path / "t.parquet"
    with monkeypatch.context() as earlier:
        earlier.setattr(records, "VERSION_KEY", records.OLD_KEY)
        write_table(small(3), SMALL, path)
    for read in (lambda path: list(read_table(path)), read_metadata, count_rows, judged_schema):
        with pytest.raises(GuardLoopError, match=r"t\.parquet is a table of version 1, and .* reads version 2\n"):
            read(path)
    monkeypatch.setattr(records, "VERSION", "9")
    write_table(small(3), SMALL, path)
    monkeypatch.undo()
    with pytest.raises(GuardLoopError, match="version 9"):
        count_rows(path)


# JSON lines


@few
@given(rows=st.lists(st.dictionaries(st.text(max_size=4), st.text(max_size=9) | st.integers() | st.none())))
def test_json_lines_are_valid_and_one_a_row(scratch, rows):
    path = scratch.with_name("rows.jsonl")
    assert write_jsonl(rows, path) == len(rows)
    with path.open(encoding="utf-8") as lines:
        assert [json.loads(line) for line in lines] == rows


def test_json_lines_are_replaced_and_folders_made(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    write_jsonl(small(3), path)
    write_jsonl([{"größe": "ü"}], path)
    assert path.read_text("utf-8") == '{"größe": "ü"}\n'
