"""Text on its way out: without credentials, and without characters that a terminal or a log would act on.

Every message, log line and page of a terminal passes `clean`: what users, files and endpoints wrote is in them.
"""

import os
import re

CREDENTIAL = (
    r"(?:(?:x-amz-)?(?:signature|sig|credential)|pass(?:word|wd|phrase)?|pwd|(?:client)?[-_]?secret|code"
    r"|(?:x-amz-)?(?:security|access|auth|id|refresh)?[-_]?token|(?:api|access|auth)?[-_]?key)"
)
"""Names of parameters in a query that hold one."""
HEADER = r"(?i)\b(x-api-key|api-key|authorization)(['\"]?\s*[:=]\s*['\"]?)(?!\s|bearer|basic)[^\s'\",]{8,}"
SECRETS = (
    # who logs in: `user@`, `user:password@` with any characters in the password, `KEY:SECRET@` of a store
    (re.compile(r"(\w://)(?:[^\s@/?#:]{0,256}:\S{0,1024}|[^\s/?#]{0,512})@"), r"\1"),
    (re.compile(rf"([?&;#]{CREDENTIAL}=)[^&\s'\"#]+", re.IGNORECASE), r"\1***"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w+/=.~-]{8,}"), r"\1 ***"),
    (
        re.compile(r"(?i)\b(x-api-key|api-key|authorization)(['\"]?\s*[:=]\s*['\"]?)(?!\s|bearer|basic)[^\s'\",]{8,}"),
        r"\1\2***",
    ),
    # keys by their form: OpenAI, Hugging Face, AWS, GitHub, GitLab, Slack, Google, JSON Web Tokens
    (re.compile(r"\b(?:sk|pk|rk)-[\w-]{16,}|\bhf_\w{16,}|\b(?:AKIA|ASIA)[A-Z0-9]{12,}|\bgh[pousr]_\w{16,}"), "***"),
    (re.compile(r"\bgithub_pat_\w{16,}|\bglpat-[\w-]{16,}|\bxox[a-z]-[\w-]{10,}|\bAIza[\w-]{30,}"), "***"),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"), "***"),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*-----|\Z)", re.DOTALL), "***"),
)
SECRET_VARIABLE = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|API_KEY|SECRET_ACCESS_KEY|_KEY)$")
SHORTEST_SECRET = 12  # a shorter value of such a variable may be an ordinary word
# C0 but tab and newline, DEL and C1, and what turns, joins or hides text: bidi marks, separators, zero widths, tags
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e0fff]"
)


def without_secrets(text: str) -> str:
    """`text` without passwords and keys: of URLs and their queries, of known forms, and those of the environment."""
    for pattern, instead in SECRETS:
        text = pattern.sub(instead, text)
    for name, value in os.environ.items():
        if len(value) >= SHORTEST_SECRET and SECRET_VARIABLE.search(name):
            text = text.replace(value, "***")
    return text


def holds_secret(text: str) -> bool:
    """Whether `text` has a password or key in it."""
    return without_secrets(text) != text


def visible(text: str) -> str:
    """`text` with what a terminal would act on, or not show, written out: an escape as `\\x1b`. Newlines stay."""
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)


def clean(text: str) -> str:
    """`text` as it may be shown: first visible, as unseen characters may split a secret, then without secrets."""
    return without_secrets(visible(text))


def indented(text: str) -> str:
    """`text`, clean, with its further lines indented, so that none can pass for a line of ours."""
    return clean(text).replace("\n", "\n  ").replace("\n    ->", "\n  ->")


def one_line(text: str, limit: int = 300) -> str:
    """`text` of others as one clean line of at most `limit` characters."""
    line = clean(" ".join(text.split()))
    return line if len(line) <= limit else f"{line[: limit - 3]}..."
