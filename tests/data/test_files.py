"""Files as other programs write them: folders of parts, globs, stores, packings, encodings and shapes."""

import bz2
import gzip
import json
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.data_tables import as_bytes
from support.services import S3Server

from guardloop.core.errors import GuardLoopError
from guardloop.core.storage import put
from guardloop.data.files import list_files
from guardloop.data.settings import SourceSettings
from guardloop.data.sources import read_conversations
from launch.checks.preflight import _check_source as preflight


def read(path: Path | str, **more) -> list[dict]:
    return list(read_conversations(SourceSettings(kind="file", path=str(path), **more), where="dataset.traffic"))


def texts(path: Path | str, **more) -> list[str]:
    return [row["prompt"] for row in read(path, **more)]


def refusal(path: Path | str, **more) -> GuardLoopError:
    with pytest.raises(GuardLoopError) as caught:
        read(path, **more)
    assert caught.value.what and caught.value.remedy
    return caught.value


def parts(folder: Path, names: list[str], *ignored: str) -> Path:
    """A folder of parts, each with a prompt that is its name."""
    for name in [*names, *ignored]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        suffix = "." + name.rpartition("/")[2].partition(".")[2] if name in names else ""
        (folder / name).write_bytes(as_bytes([{"prompt": name}], suffix) if suffix else b"not data")
    return folder


SPARK = ["part-00000.parquet", "part-00001.parquet", "part-00010.parquet"]
SPARK_EXTRAS = ("_SUCCESS", "_metadata", ".part-00000.parquet.crc", "_delta_log/00000.json")


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("store")) as running:
        yield running


@pytest.fixture(params=["local", "s3"])
def placed(request, server, monkeypatch):
    """The address of a folder: where it is, or its copy in a store."""

    def place(folder: Path) -> str:
        if request.param == "local":
            return str(folder)
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        for name, value in {"AWS_EC2_METADATA_DISABLED": "true", **server.client_environment}.items():
            monkeypatch.setenv(name, value)
        uri = f"s3://{server.bucket}/{folder.parent.name}/{folder.name}"
        put(folder, uri)
        return uri

    return place


# Several files


@pytest.mark.slow
def test_a_folder_of_parts_is_one_table_in_a_fixed_order(placed, tmp_path):
    place = placed(parts(tmp_path / "table", SPARK[::-1], *SPARK_EXTRAS))
    assert texts(place) == texts(f"{place}/") == SPARK


@pytest.mark.slow
def test_a_glob_is_one_table(placed, tmp_path):
    names = ["2026/a.jsonl", "2026/b.jsonl", "2027/a.jsonl"]
    place = placed(parts(tmp_path / "logs", names, "2026/notes.txt"))
    assert texts(f"{place}/2026/*.jsonl") == names[:2]
    assert texts(f"{place}/*/a.jsonl") == [names[0], names[2]]
    assert "no" in refusal(f"{place}/2026/*.csv").what


def test_a_folder_of_several_kinds_is_refused_with_them(placed, tmp_path):
    place = placed(parts(tmp_path / "mixed", ["a.csv", "a.parquet"]))
    error = refusal(place)
    assert "csv, parquet" in error.what and "*.parquet" in error.remedy


def test_an_empty_folder_or_prefix_is_named(placed, tmp_path):
    place = placed(parts(tmp_path / "empty", [], "_SUCCESS"))
    assert place in refusal(place).what


def test_preflight_says_what_the_reader_says(tmp_path):
    good = parts(tmp_path / "good", SPARK, *SPARK_EXTRAS)
    for path in (good, f"{good}/*.parquet", good / SPARK[0]):
        preflight(SourceSettings(kind="file", path=str(path)), "dataset.traffic")
    bad = parts(tmp_path / "bad", ["a.csv", "a.parquet"])
    for path in (bad, tmp_path / "none", tmp_path, f"{good}/*.csv", parts(tmp_path / "other", [], "a.txt")):
        with pytest.raises(GuardLoopError) as caught:
            preflight(SourceSettings(kind="file", path=str(path)), "dataset.traffic")
        assert caught.value.what == refusal(path).what


@pytest.mark.slow
def test_folders_named_as_partitions_give_columns(placed, tmp_path):
    """A hive layout: the column may be in the path only, or in the files too, which then decide."""
    folder = tmp_path / "hive"
    for day, rows in {"2026-01-01": [{"prompt": "a"}], "2026-01-02": [{"prompt": "b", "dt": "file's own"}]}.items():
        (folder / f"dt={day}").mkdir(parents=True)
        (folder / f"dt={day}" / "part.parquet").write_bytes(as_bytes(rows, ".parquet"))
    rows = read(placed(folder), columns={"category": "dt"})
    assert [row["category"] for row in rows] == ["2026-01-01", "file's own"]
    assert texts(folder, where={"dt": "2026-01-01"}) == ["a"]


def test_a_column_that_older_parts_lack_is_missing_there(tmp_path, caplog):
    folder = tmp_path / "grown"
    folder.mkdir()
    (folder / "1.parquet").write_bytes(as_bytes([{"prompt": "a"}], ".parquet"))
    (folder / "2.parquet").write_bytes(as_bytes([{"prompt": "b", "lang": "de", "unused": 1}], ".parquet"))
    rows = read(folder, columns={"language": "lang"})
    assert [row["language"] for row in rows] == [None, "de"]
    assert "1.parquet has no column lang" in caplog.text and "unused" not in caplog.text
    assert "no column 'speech'; there are prompt, lang, unused" in refusal(folder, columns={"language": "speech"}).what


# One file


@pytest.mark.parametrize("pack", ["bz2", "zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".csv"])
def test_packed_files_are_read_and_a_cut_off_one_is_refused(tmp_path, pack, kind):
    rows = [{"prompt": f"prompt {n} {os.urandom(40).hex()}"} for n in range(300)]
    plain = as_bytes(rows, kind)
    packed = bz2.compress(plain) if pack == "bz2" else pa.compress(plain, codec="zstd", asbytes=True)
    path = tmp_path / f"rows{kind}.{pack}"
    path.write_bytes(packed)
    assert texts(path) == [row["prompt"] for row in rows]
    path.write_bytes(packed[: len(packed) // 2])
    assert path.name in refusal(path).what


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".json"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_named(tmp_path, kind, encoding):
    path = tmp_path / f"rows{kind}"
    path.write_bytes(as_bytes([{"prompt": "a"}], ".csv" if kind == ".csv" else ".jsonl").decode().encode(encoding))
    error = refusal(path)
    assert "UTF-16" in error.what and "iconv" in error.remedy


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".json.gz"])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_file_may_be_one_array(tmp_path, suffix, indent):
    text = "\n  " + json.dumps([{"prompt": "a"}, {"prompt": "b"}], indent=indent)
    path = tmp_path / f"rows{suffix}"
    if suffix.endswith(".gz"):
        path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + text.encode()))
    else:
        path.write_text("\ufeff" + text)
    assert texts(path) == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "row"), [('[{"prompt": "a"}, 7]', 2), ('[{"prompt": "a"}', 1), ('[{"prompt": 7}]', 1)]
)
def test_a_malformed_array_is_named_by_its_row(tmp_path, text, row):
    path = tmp_path / "rows.json"
    path.write_text(text)
    assert f"row {row}" in refusal(path).what


def test_json_lines_of_other_programs_are_read(tmp_path):
    path = tmp_path / "rows.ndjson"
    path.write_bytes('{"prompt": "a\u2028b"}\r\n\r\n{"prompt": "c", "label": NaN}\r\n'.encode())
    rows = read(path)
    assert [row["prompt"] for row in rows] == ["a\u2028b", "c"] and rows[1]["unsafe"] is None


CHAT = {
    "request": {"id": 7, "body": {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]}},
    "flags": {"unsafe": True},
    "user.name": "ada",
}
NESTED = {
    "id": "request.id",
    "prompt": "request.body.messages[?role=='user'].content | [-1]",
    "label": "flags.unsafe",
    "category": "user.name",  # a name that is a column is taken as it is
}


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_nested_fields_are_reached_by_an_expression(tmp_path, kind):
    path = tmp_path / f"rows{kind}"
    path.write_bytes(as_bytes([CHAT], kind))
    (row,) = read(path, columns=NESTED)
    assert (row["id"], row["prompt"], row["unsafe"], row["category"]) == ("7", "hi", True, "ada")
    assert "no column 'answer.text'" in refusal(path, columns={**NESTED, "response": "answer.text"}).what
    assert "is NoneType, not text" in refusal(path, columns={"prompt": "request.nothing"}).what


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_found_from_the_header(tmp_path, delimiter):
    path = tmp_path / "rows.csv"
    path.write_text(f'id{delimiter}text\n1{delimiter}"one; two, three"\n')
    assert texts(path, columns={"prompt": "text"}) == ["one; two, three"]


def test_the_delimiter_may_be_given(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("id^prompt\n1^a, b; c\n")
    assert texts(path, delimiter="^") == ["a, b; c"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("prompt,id\n" + '"' + "x" * 200_000 + '",1\n', ["x" * 200_000]),  # longer than csv's own limit
        ('prompt,id\n"line one\nline two",1\n', ["line one\nline two"]),
        ("prompt,id,\na,1,\n", ["a"]),
        ("prompt,id\na,1,\nb,2,,\n", ["a", "b"]),
        ("prompt,id\n\na,1\n\n", ["a"]),
        ("sep=;\nid;prompt\n1;a, b\n", ["a, b"]),  # Excel
        ("id, prompt ,x\n1,a,2\n", ["a"]),
        ('"id";"prompt"\n"1";"a;b,c,d,e"\n', ["a;b,c,d,e"]),
        ("prompt,id\ra,1\rb,2\r", ["a", "b"]),  # old Macs
        ("prompt\n", []),
    ],
)
def test_csv_of_other_programs_is_read(tmp_path, content, expected):
    (tmp_path / "rows.csv").write_text(content)
    assert texts(tmp_path / "rows.csv") == expected


def test_a_column_that_the_header_names_twice_is_refused_where_it_is_needed(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,note,note\na,1,2\n")
    assert texts(path) == ["a"]
    path.write_text("prompt,note,prompt\na,1,2\n")
    assert "prompt twice" in refusal(path).what


def test_parquet_reads_only_the_columns_that_are_needed(tmp_path, monkeypatch):
    wide = pa.table({"prompt": [f"p{n}" for n in range(2000)], "embedding": [[0.5] * 1000] * 2000})
    pq.write_table(wide, tmp_path / "rows.parquet", row_group_size=500)
    asked: list[list[str]] = []
    batches = pq.ParquetFile.iter_batches

    def watched(self, batch_size, columns):
        asked.append(columns)
        return batches(self, batch_size=batch_size, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    tracemalloc.start()
    assert len(texts(tmp_path / "rows.parquet")) == 2000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert asked == [["prompt"]] and peak < 8 * 2**20


def test_text_that_is_stored_as_bytes_is_text(tmp_path):
    rows = pa.table({"prompt": pa.array([b"gr\xc3\xb6\xc3\x9fe"]), "label": pa.array([b"unsafe"])})
    pq.write_table(rows, tmp_path / "rows.parquet")
    (row,) = read(tmp_path / "rows.parquet")
    assert (row["prompt"], row["unsafe"]) == ("größe", True)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst", ".parquet"])
def test_a_file_under_a_wrong_name_is_named(tmp_path, suffix):
    content = as_bytes([{"prompt": "a"}], suffix if suffix == ".parquet" else ".jsonl")
    packers = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": lambda b: pa.compress(b, codec="zstd", asbytes=True)}
    (tmp_path / "rows.jsonl").write_bytes(packers.get(suffix, bytes)(content))
    assert suffix in refusal(tmp_path / "rows.jsonl").remedy


def test_a_suffix_may_be_in_capitals(tmp_path):
    (tmp_path / "ROWS.CSV").write_text("prompt\na\n")
    assert texts(tmp_path / "ROWS.CSV") == ["a"]


# What is not used


@pytest.mark.parametrize("response", [{"a": 1}, ["a"], None, 7])
def test_a_response_that_is_not_used_is_not_refused(tmp_path, response):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "response": response}))
    settings = SourceSettings(kind="file", path=str(path))
    (row,) = read_conversations(settings, with_response=False)
    assert row["response"] is None
    if response is not None:
        assert type(response).__name__ in refusal(path).what


def test_a_file_that_is_named_is_read_whatever_its_name(placed, tmp_path):
    folder = parts(tmp_path / "x.csv", ["_rows.jsonl", "x.csv"])
    place = placed(folder)
    assert texts(f"{place}/_rows.jsonl") == ["_rows.jsonl"] and texts(place) == ["x.csv"]


@pytest.mark.parametrize("expression", ["join(' ', parts[])", "parts[0]", '"parts"[0]', "nothing || parts[1]"])
def test_an_expression_may_call_and_choose(tmp_path, expression):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"parts": ["a", "b"], "nothing": None}))
    assert texts(path, columns={"prompt": expression})[0] in {"a b", "a", "b"}


def test_a_file_with_an_odd_name_is_just_a_file(tmp_path):
    folder = parts(tmp_path / "with space and ümlaut", ["größe [1].jsonl"])
    assert texts(folder / "größe [1].jsonl") == texts(folder) == ["größe [1].jsonl"]
    assert [file.kind for file in list_files(str(folder), "x")] == ["json"]
