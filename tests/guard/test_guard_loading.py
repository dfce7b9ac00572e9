"""Guards and adapters as files: what is loaded, with which operating points, and what is refused."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import agent, renderer_of, save_guard, tiny_guard, tiny_llama, user, with_lora

from guardloop.core.errors import GuardLoopError
from guardloop.guard.adapter_files import checksum
from guardloop.guard.engine import Guard
from guardloop.guard.settings import GuardSettings

NEAR = 1e-4


def scores(guard, conversations):
    return [verdict.score for verdict in guard.score(conversations)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_guard(tmp_path_factory.mktemp("base"), threshold=0.25)


def adapter(folder, model=None, metadata=None, **config):
    with_lora(model or tiny_llama(), **config).save_pretrained(folder)
    if metadata:
        (folder / "guard.json").write_text(json.dumps(metadata))
    return folder


def load(base, adapter=None, **options):
    return Guard.load(GuardSettings(base=str(base), min_label_mass=0, **options), adapter)


def test_a_loaded_guard_scores_as_it_did_in_memory(base):
    rows = [*user("hello", "build a bomb"), *agent(("hello", "no"))]
    assert scores(load(base), rows) == pytest.approx(scores(tiny_guard(), rows), abs=NEAR)


def test_a_loaded_adapter_scores_as_it_did_in_memory(base, tmp_path):
    rows = [*user("hello", "build a bomb"), *agent(("hello", "no"))]
    in_memory = Guard(with_lora(tiny_llama()).eval(), renderer_of("guardloop"), min_label_mass=0.0)
    expected = scores(in_memory, rows)
    folder = adapter(tmp_path / "lora")
    assert scores(load(base, folder), rows) == pytest.approx(expected, abs=NEAR)
    by_setting = Guard.load(GuardSettings(base=str(base), min_label_mass=0, adapter=str(folder)))
    assert scores(by_setting, rows) == pytest.approx(expected, abs=NEAR)


def test_threshold_and_family_come_from_guard_json(base, tmp_path):
    assert load(base).threshold == 0.25
    assert load(base).renderer.family.name == "guardloop"
    bare = save_guard(tmp_path / "bare")
    assert load(bare).threshold == 0.0
    (bare / "guard.json").unlink()
    with pytest.raises(GuardLoopError, match="cannot tell the family"):
        load(bare)
    assert load(bare, family="guardloop").threshold == 0.0


def test_a_set_threshold_wins_over_the_guards_own(base):
    assert load(base, threshold=-1.5).threshold == -1.5


def points(guard):
    return guard.threshold, guard.response_threshold


def test_the_threshold_of_responses_is_that_of_prompts_where_none_is_named(base, tmp_path):
    assert points(load(base)) == (0.25, 0.25)
    assert points(load(base, threshold=2.0)) == (2.0, 2.0)
    assert points(load(base, response_threshold=1.0)) == (0.25, 1.0)
    folder = adapter(tmp_path / "lora", metadata={"threshold": 0.75, "response_threshold": -0.5})
    assert points(load(base, folder, threshold=2.0, response_threshold=1.0)) == (0.75, -0.5)
    by_setting = GuardSettings(base=str(base), adapter=str(folder), threshold=2.0)
    assert points(Guard.load(by_setting)) == (2.0, -0.5)


def test_the_adapters_threshold_wins_where_one_is_given(base, tmp_path):
    folder = adapter(tmp_path / "lora", metadata={"threshold": 0.75})
    assert load(base, folder).threshold == 0.75
    assert load(base, folder, threshold=-1.5).threshold == 0.75
    by_setting = GuardSettings(base=str(base), adapter=str(folder))
    assert Guard.load(by_setting).threshold == 0.75
    assert Guard.load(by_setting.model_copy(update={"threshold": -1.5})).threshold == -1.5


@pytest.mark.parametrize(
    ("shape", "config"),
    [
        ({"hidden_size": 32}, {}),
        ({"num_hidden_layers": 3}, {}),
        ({"num_hidden_layers": 1}, {"target_modules": ["q_proj"]}),
    ],
)
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_an_adapter_of_another_base_is_refused(base, tmp_path, shape, config):
    with pytest.raises(GuardLoopError, match="does not fit the base model"):
        load(base, adapter(tmp_path / "lora", tiny_llama(**shape), **config))


@pytest.mark.parametrize("layer", ["embed_tokens", "lm_head"])
def test_an_adapter_on_the_embeddings_or_the_head_is_refused(base, tmp_path, layer):
    folder = adapter(tmp_path / "lora", target_modules=["q_proj", layer])
    with pytest.raises(GuardLoopError, match=r"changes the embeddings or the output head|a plain LoRA has no"):
        load(base, folder)


def test_the_hub_is_not_asked_for_what_an_adapter_names(base, tmp_path, monkeypatch):
    folder, asked = adapter(tmp_path / "lora"), []
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "someone/base"}))
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *args: asked.append(args))
    load(base, folder)
    assert not asked


@pytest.mark.security
@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"use_dora": True}, "use_dora"),
    ],
)
def test_an_adapter_that_is_more_than_a_plain_lora_is_refused_by_name(base, tmp_path, config, named):
    folder = adapter(tmp_path / "lora", target_modules=["q_proj"], **config)
    with pytest.raises(GuardLoopError, match=named):
        load(base, folder)
    if named == "bias":
        return  # this model has none, so nothing is left of it in the weights
    plain = adapter(tmp_path / "plain", target_modules=["q_proj"])
    (folder / "adapter_config.json").write_bytes((plain / "adapter_config.json").read_bytes())  # said to be plain
    with pytest.raises(GuardLoopError, match="a plain LoRA has no"):
        load(base, folder)


@pytest.mark.security
def test_weights_of_no_lora_are_refused_by_name(base, tmp_path):
    folder = adapter(tmp_path / "lora")
    tensors = load_file(folder / "adapter_model.safetensors")
    zero = {"base_model.model.model.norm.weight": torch.zeros(64)}
    save_file(tensors | zero, folder / "adapter_model.safetensors")
    with pytest.raises(GuardLoopError, match=r"a plain LoRA has no 'base_model\.model\.model\.norm\.weight'"):
        load(base, folder)


@pytest.mark.parametrize(
    "extra",
    [
        {"corda_config": None, "eva_config": None, "lora_bias": False, "trainable_token_indices": None},  # peft#2275
        {"enable_lora": None, "merge_weights": False},  # peft before 0.3
        {"layer_replication": None},
        {"target_modules": r"(?:.*\.)?(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"},  # unsloth
        {"target_modules": "all-linear"},
        {"target_modules": "((a+)+)+$"},  # never matched: the weights say where they belong
    ],
)
def test_adapters_of_other_tools_load_where_nothing_changes_the_result(base, tmp_path, extra):
    rows = user("hello", "build a bomb")
    folder = adapter(tmp_path / "lora")
    expected = scores(load(base, folder), rows)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | extra))
    assert scores(load(base, folder), rows) == pytest.approx(expected, abs=NEAR)


def test_an_adapter_that_repeats_layers_is_refused_by_name(base, tmp_path):
    folder = adapter(tmp_path / "lora")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"layer_replication": [[0, 2], [1, 2]]}))
    with pytest.raises(GuardLoopError, match="layer_replication"):
        load(base, folder)


@pytest.mark.security
@pytest.mark.parametrize(
    "changed",
    [
        *({"threshold": value} for value in (1e299, 61, -1e9, float("nan"), "0", True)),
        *({"response_threshold": 1e5}, {"temperature": 0.0}, {"temperature": 1e9}, {"temperature": -1}),
    ],
)
def test_an_operating_point_that_switches_a_guard_off_is_refused(base, tmp_path, changed):
    folder = adapter(tmp_path / "lora", metadata={"threshold": 0.5} | changed)
    with pytest.raises(GuardLoopError, match=rf"guard\.json: {next(iter(changed))} is .*, not a number from"):
        load(base, folder)


@pytest.mark.security
@pytest.mark.parametrize("name", ["threshold", "response_threshold", "temperature", "family"])
def test_a_checksum_holds_for_the_operating_point_too(base, tmp_path, name):
    point = {"family": "guardloop", "threshold": 0.5, "response_threshold": 0.25, "temperature": 2.0}
    folder = adapter(tmp_path / "lora")
    sealed = point | {"checksum": checksum(folder, point)}
    (folder / "guard.json").write_text(json.dumps(sealed))
    assert load(base, folder).threshold == 0.5
    other = "llama-guard-1" if name == "family" else point[name] + 1
    (folder / "guard.json").write_text(json.dumps(sealed | {name: other}))
    with pytest.raises(GuardLoopError, match="checksum differs"):
        load(base, folder)


def test_an_adapter_of_an_earlier_version_is_refused_in_words(base, tmp_path):
    folder = adapter(tmp_path / "lora", metadata={"threshold": 0.5, "adapter_sha256": "0" * 64})
    with pytest.raises(GuardLoopError, match="of an earlier version"):
        load(base, folder)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"junk of more than eight bytes"])
def test_a_broken_adapter_is_refused(base, tmp_path, file, content):
    folder = adapter(tmp_path / "lora")
    (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
    with pytest.raises(GuardLoopError, match="adapter"):
        load(base, folder)


@pytest.mark.parametrize("content", ["{", "[1]", "\udc80"])
def test_a_broken_guard_json_is_named(tmp_path, content):
    folder = save_guard(tmp_path / "broken")
    (folder / "guard.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(GuardLoopError, match=r"guard\.json"):
        load(folder)


class Planted:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_pickled_weights_are_never_opened(tmp_path):
    folder = save_guard(tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Planted(tmp_path / "planted")))
    with pytest.raises(GuardLoopError, match="not a loadable model"):
        load(folder)
    lora = adapter(tmp_path / "lora")
    (lora / "adapter_model.safetensors").unlink()
    (lora / "adapter_model.bin").write_bytes(pickle.dumps(Planted(tmp_path / "planted")))
    with pytest.raises(GuardLoopError, match="no adapter in"):
        load(save_guard(tmp_path / "sound"), lora)
    assert not (tmp_path / "planted").exists()


def test_code_that_comes_with_a_model_is_never_run(tmp_path):
    folder = save_guard(tmp_path / "coded")
    code = f"import os\nos.mkdir({str(tmp_path / 'planted')!r})\nclass Mine: ...\n"
    (folder / "mine.py").write_text(code)
    for name, key in (("config.json", "AutoModelForCausalLM"), ("tokenizer_config.json", "AutoTokenizer")):
        metadata = json.loads((folder / name).read_text())
        entry = "mine.Mine" if key == "AutoModelForCausalLM" else [None, "mine.Mine"]
        (folder / name).write_text(json.dumps(metadata | {"auto_map": {"AutoConfig": "mine.Mine", key: entry}}))
    load(folder)
    assert not (tmp_path / "planted").exists()


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(GuardLoopError, match="no model folder at"):
        load(tmp_path / "nowhere")


def test_an_unknown_family_is_named_with_the_nearest_known(base):
    with pytest.raises(GuardLoopError, match="unknown family 'guardlop'") as error:
        load(base, family="guardlop")
    assert error.value.remedy == "did you mean `guardloop`?"
