import pytest
from support.models import renderer_of

from guardloop.core.errors import GuardLoopError
from guardloop.guard.prompt.family import families, family_of
from guardloop.guard.prompt.policy import parse_codes, read_policy


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("meta-llama/LlamaGuard-7b", "llama-guard-1"),
        ("meta-llama/Meta-Llama-Guard-2-8B", "llama-guard-2"),
        ("meta-llama/Llama-Guard-3-8B", "llama-guard-3"),
        ("meta-llama/Llama-Guard-3-8B-INT8", "llama-guard-3"),
        ("meta-llama/Llama-Guard-3-1B", "llama-guard-3-1b"),
        ("/models/llama-guard-3-1b", "llama-guard-3-1b"),
    ],
)
def test_auto_knows_the_published_guards_by_name(model, family):
    assert family_of("auto", model).name == family


def test_auto_refuses_a_name_that_says_nothing():
    with pytest.raises(GuardLoopError, match="cannot tell the family") as error:
        family_of("auto", "acme/our-model")
    assert "llama-guard-3-1b" in error.value.remedy


def test_an_unknown_family_is_named_with_the_nearest_known():
    with pytest.raises(GuardLoopError, match="unknown family 'llama-gard-3'") as error:
        family_of("llama-gard-3", "")
    assert error.value.remedy == "did you mean `llama-guard-3`?"


def test_a_family_named_outright_is_taken_whatever_the_model_is_called():
    assert family_of("llama-guard-1", "meta-llama/Llama-Guard-3-8B").name == "llama-guard-1"


def test_every_family_has_codes_and_markers():
    for family in families().values():
        assert family.categories or family.policy
        assert family.markers


def test_codes_are_read_only_if_the_policy_has_them():
    assert parse_codes("S1, S2", ["S1", "S2"]) == ["S1", "S2"]
    with pytest.raises(ValueError, match="S9"):
        parse_codes("S1,S9", ["S1", "S2"])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no categories"),
        ("[S1, S2]", "no categories"),
        ("s1: {name: a, description: b}", "'s1' is not a category code"),
        ("1: {name: a, description: b}", "1 is not a category code"),
        ("S1: {name: a}", "S1.description: Field required"),
        ("S1: {name: a, descripton: b}", "did you mean `description`"),
        ("S1: {", "not readable YAML"),
    ],
)
def test_a_malformed_policy_is_refused(tmp_path, text, problem):
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(GuardLoopError, match=problem):
        read_policy(path)


@pytest.mark.parametrize("name", ["nowhere.yaml", "guardloop.yaml"])
def test_a_missing_policy_is_named_and_none_of_ours_taken_for_it(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GuardLoopError, match=f"no such file: {name}"):
        read_policy(name)


def test_a_file_with_our_policys_name_is_not_taken_for_it(tmp_path, monkeypatch):
    expected = renderer_of("guardloop").policy
    monkeypatch.chdir(tmp_path)
    (tmp_path / "guardloop.yaml").write_text("guard: {base: a-model}")
    assert renderer_of("guardloop").policy == expected
