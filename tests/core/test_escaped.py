"""Strings arrive in the stages as they were written."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardloop.core.escaped import escape, unescape
from guardloop.core.settings import read_section
from guardloop.responses.settings import ResponderSettings

VARIABLES = {"HOME": "/root", "PATH": "/bin", "x": "y"}
DIFFICULT = [
    *("$", "$$", "$(HOME)", "$$(HOME)", "$(PATH", "a$$(x)b$", "{{x}}", "{{$}}", "{{$.inputs.parameters['x']}}"),
    *("{{workflow.name}}", "}}", "%:", "%:%24", "100 %", '"', "\\", "\\\\$", "\n\t", "'", "😀 $ 😀", "$(HOME)" * 2900),
]


def expanded(text: str) -> str:
    """What the kubelet makes of a pod's argument: `$$` is `$`, `$(NAME)` a variable's value where there is one."""
    return re.sub(
        r"\$\$|\$\(([^)]*)\)",
        lambda found: "$" if found[0] == "$$" else VARIABLES.get(found[1], found[0]),
        text,
    )


def replaced(text: str) -> str:
    """What Argo and Kubeflow Pipelines make of placeholders."""
    return re.sub(r"\{\{.*?\}\}", "replaced", text, flags=re.DOTALL)


@pytest.mark.parametrize("text", DIFFICULT)
def test_difficult_strings_survive(text: str) -> None:
    arrived = replaced(expanded(escape(text)))

    assert unescape(arrived) == text and "$" not in escape(text) and "{{" not in escape(text)


@given(st.recursive(st.text() | st.integers(), lambda part: st.lists(part) | st.dictionaries(st.text(), part)))
def test_any_value_survives(value: object) -> None:
    assert unescape(escape(value)) == value


def test_plain_strings_stay_readable() -> None:
    plain = {"path": "s3://bucket/a%20b {x}", "list": ["Sure, here is", 1, None, True]}
    assert escape(plain) == plain


def test_sections_are_read_as_they_were_written() -> None:
    settings = ResponderSettings(prefill="Sure, $$here $(HOME) {{x}}", system_prompt="%:")
    assert read_section(ResponderSettings, escape(settings.plain()), "responders") == settings
