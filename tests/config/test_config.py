import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.cases import cases
from support.root import ROOT

from guardloop.config import PlatformSettings, Settings, describe_fields, load_platform, load_settings
from guardloop.core.errors import GuardLoopError
from guardloop.core.settings import OLD, Section, read_list, read_section
from guardloop.responses.settings import ResponderSettings

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PLATFORMS = sorted((ROOT / "configs" / "platform").glob("*.yaml"))
SECRET = "hunter2hunter2"
LOOKS_SECRET = re.compile(  # a Secret's key may be followed by the variable that it becomes
    r"hf_\w{20}|sk-\w{16}|AKIA\w{16}|-----BEGIN|://[^/\s]*@|(?i:password|secret|token|api_key)\s*:(?!\s*[A-Z_]+\b)"
)

many = hypothesis_settings(max_examples=cases(80), deadline=None, derandomize=True)


def nested(annotation: Any) -> type[Section] | None:
    """The settings class in a field's annotation, if it is one; lists of settings are one setting."""
    if get_origin(annotation) is list:
        return None
    options = [annotation, *get_args(annotation)]
    return next((o for o in options if isinstance(o, type) and issubclass(o, Section)), None)


def walk(model: type[Section], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], type[Section], str]]:
    """(path to the class, the class, field name) of every field at every level."""
    for name, field in model.model_fields.items():
        yield path, model, name
        if inner := nested(field.annotation):
            yield from walk(inner, (*path, name, "0") if get_origin(field.annotation) is list else (*path, name))


FIELDS = [*walk(Settings), *walk(PlatformSettings, ("platform",))]
FIELDS_OF_LISTS = set(ResponderSettings.model_fields)
PLACES = [(path, name) for path, model, name in walk(Settings)]


def under(path: tuple[str, ...], values: Any) -> Any:
    for name in reversed(path):
        values = [values] if name == "0" else {name: values}
    return values


def refusal(values: Any, model: type[Section] = Settings) -> GuardLoopError:
    with pytest.raises(GuardLoopError) as caught:
        read_section(model, values, "my.yaml")
    assert "guardloop config fields" in caught.value.remedy
    return caught.value


# The configurations that ship


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_loads_and_survives_the_trip_through_the_pipeline(path):
    settings = load_settings(path)
    assert set(settings.sections()) == set(Settings.model_fields)
    assert read_section(Settings, settings.sections(), "") == settings
    for name, values in settings.sections().items():
        section = getattr(settings, name)
        if isinstance(section, Section):
            assert read_section(type(section), values, name) == section
    assert read_list(ResponderSettings, settings.sections()["responders"], "responders") == settings.responders


@pytest.mark.parametrize("path", PLATFORMS, ids=lambda path: path.stem)
def test_every_platform_loads_by_its_name(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert load_platform(path.stem) == load_platform(str(path))


@pytest.mark.parametrize("path", CONFIGS + PLATFORMS, ids=lambda path: path.stem)
def test_no_configuration_holds_a_secret(path):
    assert not LOOKS_SECRET.search(path.read_text("utf-8"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_says_how_it_is_run(path):
    assert f"configs/{path.name}" in path.read_text("utf-8").partition("dataset:")[0]


def test_the_defaults_are_the_demo_without_a_hub_or_a_key():
    assert load_settings(ROOT / "configs" / "demo.yaml").guard == Settings().guard
    assert Settings().dataset.traffic.kind == "sample" and not any(one.base_url for one in Settings().responders)


def test_an_empty_file_and_empty_sections_mean_the_defaults(tmp_path):
    for text in ("", "# nothing yet\n", "dataset:\n  traffic: {}\n"):
        (tmp_path / "c.yaml").write_text(text)
        loaded = load_settings(tmp_path / "c.yaml")
        assert loaded == Settings()


# Every setting explains itself


@pytest.mark.parametrize(("path", "model", "name"), FIELDS, ids=str)
def test_every_setting_has_a_description(path, model, name):
    assert len((model.model_fields[name].description or model.__doc__ or "").split()) >= 2
    if not nested(model.model_fields[name].annotation):
        assert model.model_fields[name].description


def test_the_list_of_settings_is_complete():
    rows = {row[0]: row for row in describe_fields()}
    leaves = {
        ".".join((*path, name))
        for path, model, name in walk(Settings)
        if not nested(model.model_fields[name].annotation)
    }
    again = {
        name for name in leaves if name.startswith("dataset.response_test.")
    }  # a source like the two others, or none
    assert set(rows) == (leaves - again) | {"dataset.response_test"}
    assert all(kind and default and meaning for _, kind, default, meaning in rows.values())


# Wrong keys and values


@pytest.mark.parametrize(("path", "name"), PLACES, ids=str)
def test_a_misspelt_key_is_answered_with_the_right_one(path, name):
    what = refusal(under(path, {name + "x": 1})).what
    assert ".".join(("my.yaml", *path, name + "x")) in what and f"did you mean `{name}`?" in what


def test_a_misspelt_key_in_a_list_is_answered_with_the_right_one():
    published = {"metric": "auprc", "value": 0.5, "tolerance": 0.1, "sorce": "a paper"}
    what = refusal({"gate": {"published": [published]}}).what
    assert "gate.published.0.sorce: unknown setting; did you mean `source`?" in what
    benchmark = {"name": "x", "kind": "mixed", "source": {"pth": "a"}}
    assert "did you mean `path`?" in refusal({"evaluation": {"benchmarks": [benchmark]}}).what


def test_benchmarks_are_named_and_travel_whole(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    settings = read_section(Settings, {"evaluation": {"benchmarks": ["xstest", "configs/benchmarks/aegis.yaml"]}}, "")
    assert [b.name for b in settings.evaluation.benchmarks] == ["xstest", "aegis"]
    monkeypatch.chdir(tmp_path)  # a stage has no configs folder
    assert read_section(Settings, settings.sections(), "") == settings
    monkeypatch.chdir(ROOT)
    with pytest.raises(GuardLoopError, match=r"no benchmark 'xtest'(.|\n)*xstest"):
        read_section(Settings, {"evaluation": {"benchmarks": ["xtest"]}}, "")
    assert "named twice: xstest" in refusal({"evaluation": {"benchmarks": ["xstest", "xstest"]}}).what


def test_a_key_like_no_other_is_answered_with_the_valid_ones():
    assert "valid keys: dataset, evaluation, gate, guard, max_error_share, mining" in refusal({"zzzz": 1}).what
    assert "max_overlap" in refusal({"dataset": {"zzzz": 1}}).what


@pytest.mark.parametrize(("path", "name"), PLACES, ids=str)
def test_a_value_of_the_wrong_type_is_named(path, name):
    assert ".".join(("my.yaml", *path, name)) in refusal(under(path, {name: {"odd": ["value"]}})).what


def test_all_problems_are_told_at_once():
    what = refusal({"seed": "x", "gard": {}, "training": {"rank": 0, "epoch": 1}}).what
    assert all(place in what for place in ("my.yaml.seed", "gard", "training.rank", "training.epoch"))


@pytest.mark.parametrize("values", [["dataset"], "dataset", 7, {"dataset": ["a"]}, {"dataset": None}])
def test_sections_must_be_mappings(values):
    assert "my.yaml" in refusal(values).what


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("dataset", "max_overlap", -0.1),
        ("dataset", "max_overlap", "lots"),
        ("guard", "quantization", "int3"),
        ("mining", "replay", 1.0),
        ("mining", "min_blocked_share", 0),
        ("training", "learning_rate", 0),
        ("training", "learning_rate", float("inf")),
        ("training", "scales", [float("inf")]),
        ("guard", "threshold", float("nan")),
        ("guard", "threshold", float("inf")),
        ("gate", "mode", "off"),
        ("registry", "model", "a/b"),
    ],
)
def test_values_out_of_range_are_refused(section, key, value):
    assert f"{section}.{key}" in refusal({section: {key: value}}).what


@pytest.mark.parametrize(
    ("key", "value"),
    [("samples", 0), ("kind", "ollama"), ("timeout_seconds", float("inf")), ("temperature", float("nan"))],
)
def test_a_responders_values_out_of_range_are_refused(key, value):
    assert f"my.yaml.responders.1.{key}" in refusal({"responders": [{}, {key: value}]}).what


@pytest.mark.parametrize(("key", "value"), [("seed", -1), ("max_error_share", 1.1), ("responders", [])])
def test_values_of_the_top_level_out_of_range_are_refused(key, value):
    assert f"my.yaml.{key}" in refusal({key: value}).what


# Settings of earlier versions


@pytest.mark.parametrize("name", OLD)
def test_an_old_setting_is_refused_with_what_became_of_it(name):
    section, _, key = name.partition(".")
    places = {
        "job": (),
        "source": ("dataset", "traffic"),
        "responder": ("responders", "0"),
        "benchmark": ("evaluation", "benchmarks", "0"),
        "published": ("gate", "published", "0"),
    }
    where = places.get(section, (section,))
    assert f"{'.'.join(('my.yaml', *where, key))}: {OLD[name]}" in refusal(under(where, {key: 1})).what


def test_what_an_old_setting_is_called_now_is_a_setting():
    for told in OLD.values():
        if renamed := re.match(r"it is called `(\w+)`", told):
            assert any(renamed[1] in model.model_fields for _, model, _ in FIELDS) or renamed[1] in FIELDS_OF_LISTS


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_quantized_guard_is_not_split_among_gpus(quantization):
    values = {"guard": {"quantization": quantization}, "training": {"processes": 2, "sharded": True}}
    assert f"my.yaml: training.sharded: the weights of guard.quantization {quantization} " in refusal(values).what
    assert read_section(Settings, {**values, "guard": {"quantization": "fp8"}}, "").training.sharded


def test_a_platform_needs_a_shard():
    assert "shards" in refusal({"shards": 0}, PlatformSettings).what
    assert "did you mean `shards`?" in refusal({"shard": 2}, PlatformSettings).what


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Settings().seed = 1


@pytest.mark.parametrize(
    "values",
    [
        {"responders": [{"kind": "openai", "model": "m", "base_url": f"https://me:{SECRET}@host/v1"}]},
        {
            "responders": [
                {"kind": "openai", "model": "m", "base_url": "https://host/v1", "api_key_env": f"sk-{SECRET}"}
            ]
        },
        {"responders": [{"kind": "openai", "model": "m", "base_url": "https://host/v1", "api_key": SECRET}]},
        {"registry": {"tracking_uri": f"https://me:{SECRET}@host"}},
        {"registry": {"password": SECRET}},
        {"responders": [{"samples": SECRET}]},
        {"gate": {"mode": SECRET}},
        {"training": SECRET},
        {"seed": [SECRET]},
    ],
)
def test_a_secret_in_the_settings_is_refused_and_not_repeated(values):
    with pytest.raises(GuardLoopError) as caught:
        read_section(Settings, values, "my.yaml")
    assert SECRET not in str(caught.value)


# Files


def test_a_missing_file_is_answered_with_a_near_one(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(GuardLoopError, match=r"did you mean configs/demo\.yaml\?"):
        load_settings("configs/dmo.yaml")
    with pytest.raises(GuardLoopError, match=r"configs/own-data\.yaml"):
        load_settings("qqqqqqqqqq")
    with pytest.raises(GuardLoopError, match=r"did you mean configs/platform/local\.yaml\?"):
        load_platform("locl")


def test_a_missing_file_where_there_is_none_like_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GuardLoopError, match="files here: none"):
        load_settings("demo.yaml")


def test_a_folder_or_a_binary_file_is_refused(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "binary.yaml"):
        with pytest.raises(GuardLoopError, match="cannot read"):
            load_settings(path)


@pytest.mark.parametrize("text", ["a: b: c", "a: [1", "\tdataset: x", "dataset: *nothing", "!!python/object:os.x {}"])
def test_malformed_yaml_is_refused_with_its_place(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(GuardLoopError, match=r"c\.yaml is not valid YAML: .*line 1"):
        load_settings(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    "text",
    ["!!bool x", "!!int ''", "!!timestamp x", "2024-13-45", "!!float x", "[" * 5000, "&a {dataset: *a}", "{1: 2}"],
)
def test_odd_yaml_is_refused_too(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(GuardLoopError, match=r"c\.yaml"):
        load_settings(tmp_path / "c.yaml")


LEVELS = 30
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, LEVELS))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, LEVELS))


@pytest.mark.parametrize("text", [LAUGHS, MERGES, "&a [*a]", "x: &a {<<: *a}", "a: &a [&b [*a]]"])
def test_aliases_are_followed_within_bounds(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    started = time.monotonic()
    with pytest.raises(
        GuardLoopError, match=r"c\.yaml is not valid YAML: (it stands for more|an alias leads back|while)"
    ):
        load_settings(tmp_path / "c.yaml")
    assert time.monotonic() - started < 5


def test_aliases_may_spare_repetition(tmp_path):
    shared = "responders:\n  - &one {name: a, model: m}\n  - {<<: *one, name: b}\n"
    (tmp_path / "c.yaml").write_text(shared)
    assert [(one.name, one.model) for one in load_settings(tmp_path / "c.yaml").responders] == [("a", "m"), ("b", "m")]


@pytest.mark.parametrize("text", ["- dataset", "dataset", "7", "1: 2"])
def test_a_file_that_holds_no_sections_is_refused(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(GuardLoopError, match="must hold sections"):
        load_settings(tmp_path / "c.yaml")


# Whatever is in a file, it loads or is refused

DEMO = (ROOT / "configs" / "demo.yaml").read_text("utf-8")
names = st.sampled_from([name for _, _, name in walk(Settings)]) | st.text(max_size=4)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.dates()
trees = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4))
pieces = st.sampled_from(
    [": ", "- ", "\n", "  ", "{", "}", "[", "&a ", "*a", "<<: ", "!!int ", "!!set ", '"', "#", "|", "\0"]
)


def loads_or_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        load_settings(path)
    except GuardLoopError as error:
        assert path.name in str(error)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "scratch.yaml"


@many
@given(content=st.dictionaries(names, trees, max_size=4))
def test_any_tree_loads_or_is_refused(scratch, content):
    loads_or_is_refused(scratch, yaml.safe_dump(content).encode())


@many
@given(content=st.lists(pieces | names, max_size=30).map("".join))
def test_any_text_loads_or_is_refused(scratch, content):
    loads_or_is_refused(scratch, content.encode())


@many
@given(place=st.integers(0, len(DEMO)), cut=st.integers(0, 12), insert=pieces | st.text(max_size=3))
def test_any_change_to_a_configuration_loads_or_is_refused(scratch, place, cut, insert):
    loads_or_is_refused(scratch, (DEMO[:place] + insert + DEMO[place + cut :]).encode())


@many
@given(content=st.binary(max_size=60))
def test_any_bytes_load_or_are_refused(scratch, content):
    loads_or_is_refused(scratch, content)
