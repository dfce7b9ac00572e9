"""Files from strangers: what is planted in a model, a tokenizer or an adapter is refused, and never runs."""

import ast
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.models import save_guard, tiny_llama, with_lora
from support.root import ROOT

from guardloop.core.errors import GuardLoopError
from guardloop.guard.engine import Guard
from guardloop.guard.loading import attach_adapter, load_renderer
from guardloop.guard.settings import GuardSettings
from guardloop.models.loading import load_causal_lm, load_tokenizer
from guardloop.registry.package import package

OURS = sorted(p for folder in ("guardloop", "launch", "components") for p in (ROOT / folder).rglob("*.py"))


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that planted code makes where it runs."""
    monkeypatch.setenv("PLANTED", str(tmp_path / "it-ran"))
    return tmp_path / "it-ran"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_guard(tmp_path / "model", threshold=0.0)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    with_lora(tiny_llama()).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


class Bomb:
    """Leaves a trace where it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., int], tuple[str]]:
        return os.system, ('touch "$PLANTED"',)


CODE = "import os\nopen(os.environ['PLANTED'], 'w').close()\nclass Evil: pass\n"


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def load(folder: Path) -> object:
    return load_causal_lm(str(folder), None, torch.float32, torch.device("cpu"))


def test_the_bomb_is_real(trace: Path) -> None:
    pickle.loads(pickle.dumps(Bomb()))
    assert trace.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_not_read(model: Path, trace: Path, name: str) -> None:
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(GuardLoopError, match="not a loadable model"):
        load(model)
    assert not trace.exists()


def test_weights_with_the_name_of_safetensors_and_a_pickle_inside_are_refused(model: Path, trace: Path) -> None:
    (model / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(GuardLoopError, match="not a loadable model"):
        load(model)
    assert not trace.exists()


def test_pickles_beside_safetensors_are_left_alone(model: Path, trace: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    load(model)
    assert not trace.exists()


@pytest.mark.parametrize("kind", ["evil", "llama"])
def test_code_of_a_model_is_not_run(model: Path, trace: Path, kind: str) -> None:
    (model / "modeling_evil.py").write_text(CODE)
    names = ("AutoConfig", "AutoModelForCausalLM")
    change(model / "config.json", model_type=kind, auto_map=dict.fromkeys(names, "modeling_evil.Evil"))
    if kind == "llama":  # a class of transformers stands in for it
        load(model)
    else:
        with pytest.raises(GuardLoopError, match="not a loadable model"):
            load(model)
    assert not trace.exists()


@pytest.mark.parametrize("kind", ["attn_implementation", "experts_implementation"])
def test_kernels_of_the_hub_are_not_fetched(model: Path, kind: str) -> None:
    change(model / "config.json", **{kind: "somebody/kernel:attention"})
    with pytest.raises(GuardLoopError, match=r"somebody/kernel"):
        load(model)


def test_code_of_a_tokenizer_is_not_run(model: Path, trace: Path) -> None:
    (model / "tokenization_evil.py").write_text(CODE)
    auto = {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
    change(model / "tokenizer_config.json", tokenizer_class="Evil", auto_map=auto)
    try:
        load_tokenizer(str(model))
    except GuardLoopError as error:
        assert "not a loadable model" in error.what
    assert not trace.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch \"$PLANTED\"') }}",
        "{{ self.__init__.__globals__ }}",
        "{% for i in range(99999999999) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ messages.append(messages) }}",
    ],
)
def test_a_chat_template_stays_in_its_sandbox(tmp_path: Path, trace: Path, template: str) -> None:
    folder = save_guard(tmp_path / "model", "llama-guard-3")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(GuardLoopError):
        load_renderer(GuardSettings(base=str(folder), min_label_mass=0))
    assert not trace.exists()


def test_pickled_adapters_are_not_read(adapter: Path, trace: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(GuardLoopError, match=r"adapter_model\.safetensors is missing"):
        attach_adapter(tiny_llama(), adapter)
    (adapter / "adapter_model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(GuardLoopError, match="is not readable"):
        attach_adapter(tiny_llama(), adapter)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "PROMPT_TUNING"),
        ("auto_mapping", {"parent_library": "evil", "base_model_class": "Evil"}),
        ("megatron_config", {"a": 1}),
        ("megatron_core", "evil"),
        ("corda_config", {"cache_file": "/tmp/x.pt"}),
        ("eva_config", {"rho": 1}),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("target_modules", ["q_proj", "(a|a)*b"]),
        ("layers_pattern", "(.*)*x"),
        ("rank_pattern", {"(a+)+$": 3}),
        ("rank_pattern", {"q_proj": 10**9}),
        ("r", 10**9),
        ("r", -1),
        ("r", "8"),
        ("lora_alpha", float("nan")),
        ("lora_dropout", 2),
        ("something_new", "x"),
    ],
)
def test_an_adapter_that_is_more_than_a_plain_lora_is_refused(adapter: Path, key: str, value: object) -> None:
    change(adapter / "adapter_config.json", **{key: value})
    with pytest.raises(GuardLoopError, match=re.escape(key)) as caught:
        attach_adapter(tiny_llama(), adapter)
    assert "someone you trust" in caught.value.remedy


def test_a_pattern_for_modules_is_never_matched(adapter: Path) -> None:
    """Others' trainers write one; the weights name the modules, so it need not run, however long it would."""
    change(adapter / "adapter_config.json", target_modules="((a+)+)+$")
    attach_adapter(tiny_llama(), adapter)


def test_plain_adapters_of_peft_are_taken(adapter: Path) -> None:
    attach_adapter(tiny_llama(), adapter)


@pytest.mark.parametrize("value", ["NaN", "Infinity", '"low"', "true", "[0]", "1e999"])
@pytest.mark.parametrize("name", ["threshold", "response_threshold"])
def test_a_threshold_that_lets_everything_pass_is_refused(model: Path, name: str, value: str) -> None:
    (model / "guard.json").write_text(f'{{"family": "guardloop", "{name}": {value}}}')
    with pytest.raises(GuardLoopError, match=f": {name} is"):
        Guard.load(GuardSettings(base=str(model), min_label_mass=0))


def test_a_link_in_an_adapter_does_not_take_files_of_this_machine_along(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text("secret")
    (adapter / "README.md").unlink(missing_ok=True)
    (adapter / "README.md").symlink_to(tmp_path / "credentials")
    with pytest.raises(GuardLoopError, match=r"README\.md leads out of"):
        package(adapter, GuardSettings(), tmp_path / "packaged")


def test_a_registered_guard_holds_no_code_and_no_pickle(adapter: Path, tmp_path: Path) -> None:
    package(adapter, GuardSettings(), tmp_path / "packaged")
    names = {path.name for path in (tmp_path / "packaged").rglob("*") if path.is_file()}
    assert "adapter_model.safetensors" in names
    assert not {name for name in names if name.endswith((".py", ".pkl", ".pickle", ".bin", ".pt", ".pth", ".so"))}


FORBIDDEN = {
    *("pickle.load", "pickle.loads", "torch.load", "joblib.load", "dill.load", "cloudpickle.load", "eval", "exec"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "shutil.unpack_archive", "tarfile.open"),
    *("zipfile.ZipFile", "marshal.loads", "shelve.open"),
}


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(ROOT)))
def test_our_code_unpickles_unpacks_and_evaluates_nothing(path: Path) -> None:
    """No archive is ever unpacked, so that none can lead out of its folder."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        assert ast.unparse(node.func) not in FORBIDDEN, f"line {node.lineno}"
        for keyword in node.keywords:
            if keyword.arg in ("trust_remote_code", "allow_pickle", "shell", "allow_all_kernels"):
                assert isinstance(keyword.value, ast.Constant) and keyword.value.value is False, f"line {node.lineno}"
            if keyword.arg in ("use_safetensors", "weights_only"):
                assert isinstance(keyword.value, ast.Constant) and keyword.value.value is True, f"line {node.lineno}"
