import pytest
from support.tiny_responder import tiny_settings

from guardloop.config import Settings
from guardloop.core.errors import GuardLoopError
from guardloop.core.settings import read_list, read_section
from guardloop.responses.build import build_responder
from guardloop.responses.engine import sample_seed
from guardloop.responses.settings import ResponderSettings, without_prefill

ENDPOINT = {"kind": "openai", "model": "m", "base_url": "http://localhost:1/v1"}


def test_every_field_is_described() -> None:
    assert [name for name, field in ResponderSettings.model_fields.items() if not field.description] == []


def test_defaults_are_valid() -> None:
    assert read_section(ResponderSettings, {}, "responder").plain()["samples"] == 4


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"sample": 4}, "did you mean `samples`?"),
        ({"kind": "openai", "model": "m"}, "needs base_url"),
        ({"kind": "openai", "base_url": "http://localhost:1/v1"}, "needs model"),
        ({"base_url": "http://localhost:1/v1"}, "only for kind openai"),
        ({**ENDPOINT, "base_url": "localhost:1"}, "http://"),
        ({**ENDPOINT, "base_url": "http://me:secret@host/v1"}, "holds a password or a key"),
        ({**ENDPOINT, "base_url": "http://host/v1?api-key=abcdefgh"}, "holds a password or a key"),
        ({**ENDPOINT, "api_key_env": "abcdef0123456789"}, "not the key itself"),
        ({**ENDPOINT, "api_key_env": "AKIAIOSFODNN7EXAMPLE"}, "holds a password or a key"),
        ({**ENDPOINT, "extra_headers": {"api-key": "abcdefgh"}}, "name the environment variable"),
        ({**ENDPOINT, "extra_headers": {"X-Team": "a\nb: c"}}, "plain characters"),
        ({**ENDPOINT, "extra_headers": {"X-Key": "$key"}}, "in capitals"),
        ({**ENDPOINT, "extra_body": {"model": "x"}}, "model: set by GuardLoop itself"),
        ({"extra_body": {"x": 1}}, "only for kind openai"),
        ({**ENDPOINT, "api_key_env": "sk-abc.123"}, "not the key itself"),
        ({"temperature": -1}, "responder.temperature"),
        ({"samples": 0}, "responder.samples"),
    ],
)
def test_wrong_settings_are_refused(values: dict[str, object], told: str) -> None:
    with pytest.raises(GuardLoopError, match=told.replace("?", r"\?")):
        read_section(ResponderSettings, values, "responder")


def test_seeds_differ_and_stay() -> None:
    seeds = {sample_seed(0, f"p{i}", sample) for i in range(100) for sample in range(4)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert sample_seed(0, "a", 1) == 739548743 != sample_seed(1, "a", 1)
    assert sample_seed(0, "\ud800", 0) >= 0


def test_a_missing_folder_is_told() -> None:
    with pytest.raises(GuardLoopError, match="no model folder"):
        build_responder(tiny_settings(model="./nowhere"))


def test_several_responders_have_settings_of_their_own() -> None:
    both = read_section(Settings, {"responders": [{"samples": 2}, {**ENDPOINT, "samples": 1}]}, "")
    assert [(one.tag, one.samples) for one in both.responders] == [("embedded:smollm2", 2), ("m", 1)]
    assert read_list(ResponderSettings, both.sections()["responders"], "responders") == both.responders
    for responders, told in (
        ([{"modell": "m"}], r"responders.0.modell: unknown setting; did you mean `model`"),
        ([{}, {}], "two responders are called embedded:smollm2"),
        ([{}, {"kind": "openai", "model": "m"}], r"responders.1: kind openai needs base_url"),
        ([], "responders"),
        ({"name": "alone"}, "responders"),
    ):
        with pytest.raises(GuardLoopError, match=told):
            read_section(Settings, {"responders": responders}, "my.yaml")
    for responders in ([], {"name": "alone"}, "text", None):
        with pytest.raises(GuardLoopError, match="responders must be a list"):
            read_list(ResponderSettings, responders, "responders")


def test_the_default_is_the_measured_recipe() -> None:
    prefilled, agreed = Settings().responders
    assert (prefilled.name, prefilled.samples, prefilled.prefill) == ("prefilled", 4, "Sure, here is")
    assert (agreed.name, agreed.samples, agreed.max_new_tokens) == ("agreed", 1, 1)
    assert agreed.prefill.startswith(prefilled.prefill)


def test_an_endpoint_takes_no_prefill_and_what_is_lost_is_said() -> None:
    endpoint = read_section(ResponderSettings, ENDPOINT, "")
    assert endpoint.prefill == "" and read_section(ResponderSettings, endpoint.plain(), "") == endpoint
    assert without_prefill(Settings().responders) is None
    assert "m: an endpoint cannot be told how a response begins" in str(without_prefill([endpoint]))
    with pytest.raises(GuardLoopError, match="cannot be told how to begin"):
        read_section(ResponderSettings, {**ENDPOINT, "prefill": "Sure"}, "")
