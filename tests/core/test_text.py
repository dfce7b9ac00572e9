"""Text on its way out holds no credentials, and nothing that a terminal would act on."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.cases import cases

from guardloop.core.errors import GuardLoopError
from guardloop.core.text import clean, holds_secret, indented, one_line, visible, without_secrets

many = hypothesis_settings(max_examples=cases(150), deadline=None, derandomize=True)
SECRET = "hunter2/hunter'2+Zz9="
HOLDING = [
    "https://me:{}@host.example.org/v1",
    "see https://me:{}@host.example.org/v1, or https://other.example.org",
    "postgresql+psycopg2://me:{}@db:5432/mlflow",
    "s3://KEYID:{}@bucket/key.parquet",
    "redis://:{}@cache",
    "https://host/v1?api-version=1&token={}",
    "https://host/v1?api-key={}&api-version=1",
    "https://host/v1?password={}",
    "https://host/v1?sig={}",
    "https://bucket.s3.amazonaws.com/x?X-Amz-Signature={}&X-Amz-Date=2026",
    "https://host/#access_token={}",
    "Authorization: Bearer {}",
    "{{'x-api-key': '{}'}}",
]
KEYS = [
    "sk-proj-abcdefghijklmnop",
    "hf_abcdefghijklmnopqrstuv",
    "AKIAIOSFODNN7EXAMPLE",
    "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    "xoxb-1234567890-abcdef",
    "AIzaSyA1234567890abcdefghijklmnopqrstuv",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.sflKxwRJSMeKKF2QT4fw",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----",
]
HARMLESS = [
    "https://host.example.org:8443/v1?api-version=2024-06-01&limit=4",
    "s3://bucket/prefix/part-0001.parquet",
    "models:/guardloop-guard@champion",
    "meta-llama/Llama-Guard-3-1B at commit 4ee3c13f0a",
    "mail me@example.org about max_tokens=96",
    "the key of the column is `prompt`, its token count 12",
    "sqlite:///home/me/guardloop.db",
    "A task-oriented risk-assessment of sk-learn",
]


@pytest.mark.parametrize("text", HOLDING)
def test_credentials_of_addresses_and_headers_are_left_out(text):
    secret = SECRET if "://me:" in text or "://:" in text or "KEYID" in text else "hunter2hunter2"
    shown = without_secrets(text.format(secret))
    assert "hunter2" not in shown and "KEYID" not in shown
    assert holds_secret(text.format(secret))
    assert without_secrets(shown) == shown


@pytest.mark.parametrize("key", KEYS)
def test_keys_are_known_by_their_form(key):
    assert without_secrets(f"got {key}, which is wrong") == "got ***, which is wrong"


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret_stays(text):
    assert without_secrets(text) == text and not holds_secret(text)


def test_keys_of_the_environment_are_left_out(monkeypatch):
    monkeypatch.setenv("OUR_API_KEY", "correct horse battery staple")
    monkeypatch.setenv("SHORT_TOKEN", "token")
    assert without_secrets("it said: correct horse battery staple, token") == "it said: ***, token"


@many
@given(password=st.text("abcXYZ0189/'+=&?#:@%-._~!$", min_size=6, max_size=30), port=st.integers(1, 65535))
def test_no_password_of_an_address_is_shown(password, port):
    shown = without_secrets(f"cannot reach https://user:{password}@host:{port}/v1 today")
    assert password not in shown and "today" in shown


@many
@given(text=st.text(max_size=60) | st.text("\x1b[]\x07\x9b\u202e\u2066\r\n\u2028\u200b\U000e0041ab", max_size=30))
def test_whatever_is_shown_is_visible(text):
    shown = visible(text)
    assert not any((ord(c) < 32 and c not in "\t\n") or 127 <= ord(c) < 160 for c in shown)
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200b\u2028\u2029\ufeff")
    shown.encode("utf-8")
    assert len(one_line(text).splitlines()) <= 1 and len(one_line("x" * 999)) == 300


@many
@given(
    secret=st.text("abcdef0123456789", min_size=8, max_size=20),
    unseen=st.sampled_from("\x00\x0b\x1b\x1f\x85\u200b\u202e\u2028"),
    place=st.integers(0, 20),
)
def test_unseen_characters_hide_no_secret(secret, unseen, place):
    split = secret[:place] + unseen + secret[place:]
    for text in (f"https://me:{split}@host", f"https://host?token={split}", f"s3://key:{split}@bucket"):
        shown = clean(text)
        assert not any(part in shown for part in (secret[:place], secret[place:]) if len(part) > 3)


def test_further_lines_cannot_pass_for_ours():
    assert indented("no\nPromoted: all checks passed") == "no\n  Promoted: all checks passed"
    assert indented("what\n  -> remedy") == "what\n  -> remedy"


def test_an_error_says_nothing_secret_and_nothing_that_acts():
    error = GuardLoopError("https://me:pa/ss@host said \x1b[2J\x9b1m", "ask \u202ethem")
    assert str(error) == "https://host said \\x1b[2J\\x9b1m\n  -> ask \\u202ethem"
    assert (error.what, error.remedy) == tuple(str(error).split("\n  -> "))


CODE = r"""
import logging
from guardloop.core.progress import Stage
with Stage("x"):
    logging.getLogger("other").warning("%s says %s", "https://me:hunter2@host", "\x1b[2Jhi\nforged line")
    raise ValueError("https://me:hunter2@host \x1b[2J")
"""


def test_a_stage_writes_clean_lines_and_tracebacks():
    ended = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and "Traceback" in ended.stderr
    assert "hunter2" not in ended.stderr.replace(CODE, "") and "\x1b" not in ended.stderr
    assert "https://host says \\x1b[2Jhi\n  forged line" in ended.stderr


def test_the_terminal_shows_clean_text_in_its_own_styles(capsys):
    from rich.table import Table

    from guardloop.cli.terminal import Terminal

    table = Table("category")
    table.add_row("S1\x1b]52;c;Zm9v\x07 \u202eevil")
    terminal = Terminal(force_terminal=True, width=80)
    terminal.print("[red]no[/] https://me:hunter2@host \x1b[2J")
    terminal.print(table)
    shown = capsys.readouterr().out
    assert "\x1b[31mno" in shown and "\x1b[2J" not in shown and "hunter2" not in shown
    assert "\x1b]52" not in shown and "\u202e" not in shown and "\\x1b]52;c;Zm9v\\x07 \\u202eevil" in shown
