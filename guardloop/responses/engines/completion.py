"""What an OpenAI-compatible endpoint answered: the text that a user would have seen, or why there is none.

Endpoints differ in where they put a text, a refusal, thoughts, a tool call and a filter's verdict. Nothing here waits,
sends or raises anything but `BrokenAnswer` and `ProviderError`, whatever the bytes are.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from guardloop.responses.engine import FinishReason

FILTERS = re.compile(
    r"content[ _-]?(management[ _-])?(filter|policy)|responsible ?ai|safety (system|polic|filter|setting)|moderation"
    r"|data_inspection_failed|inappropriate content|(input|prompt) (was |has been |is )?(flagged|blocked)"
    r"|(flagged|blocked|rejected) (by|due to|as a result of) .{0,40}(filter|guard|polic|safety)",
    re.IGNORECASE,
)
FILTER_ENDS = ("content_filter", "safety", "prohibited_content", "blocklist", "spii", "guardrail_intervened")
CHANNELS = re.compile(r"<\|channel\|>|analysis(?=[A-Z\s]).*assistantfinal|analysis(?=[A-Z])", re.DOTALL)
"""How an answer of the harmony format begins where its server hands its channels on, with its marks or without."""
FINAL = re.compile(r".*(?:<\|channel\|>final(?:<\|constrain\|>\w+)?<\|message\|>|assistantfinal)", re.DOTALL)
THOUGHTS = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("[THINK]", "[/THINK]"), ("◁think▷", "◁/think▷"))
REASONING = ("reasoning_content", "reasoning", "reasoning_details", "thinking")
OPTIONAL = ("max_tokens", "max_completion_tokens", "temperature", "top_p", "seed")
"""Parameters that some endpoints refuse."""
UNSUPPORTED = re.compile(
    r"unsupported|not supported|n't supported|does not support|unrecognized|unrecognised|unknown|extra|not permitted"
    r"|not allowed|(is|are) allowed|cannot both|can only|only one|deprecated|unexpected|instead|cannot find field"
    r"|no longer|incompatible",
    re.IGNORECASE,
)


class BrokenAnswer(ValueError):  # noqa: N818
    """The bytes are no chat completion."""


@dataclass(eq=False)
class ProviderError(Exception):
    """An endpoint said no. `status` is the HTTP status, or the one that a body of status 200 names."""

    status: int
    message: str
    code: str = ""
    parameter: str = ""
    """The parameter that was refused, where this is what was wrong."""
    filtered: bool = False
    """Whether a filter of the provider refused the prompt."""

    def __str__(self) -> str:
        return f"the endpoint answered {self.status}: {self.message}" if self.message else f"status {self.status}"


@dataclass(frozen=True)
class Answer:
    """What came of one request."""

    text: str
    kind: FinishReason
    tokens: int = 0
    refused: bool = False
    """Whether the endpoint itself calls the text a refusal."""


def read_completion(content: bytes) -> Answer:
    """The answer in the body of a 200. Raises BrokenAnswer, and ProviderError where the body is an error's."""
    body = _json(content)
    if not isinstance(body, dict):
        raise BrokenAnswer("the endpoint's answer is not a chat completion")
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if body.get("error") and not (isinstance(choice, dict) and choice.get("message")):
        raise read_error(200, content)
    tokens = _tokens(body.get("usage"))
    if choice is None:
        if "choices" not in body:
            raise BrokenAnswer("the endpoint's answer is not a chat completion")
        blocked = _is_filtered(body.get("prompt_filter_results")) or _is_filtered(body.get("promptFeedback"))
        return Answer("", "prompt_filtered" if blocked else "empty", tokens)
    if isinstance(choice, dict) and choice.get("error"):
        raise read_error(200, json.dumps({"error": choice["error"]}).encode())
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise BrokenAnswer("the endpoint's answer is not a chat completion")
    return _answer(choice, message, tokens, _reasoned(body.get("usage")))


def read_error(status: int, content: bytes) -> ProviderError:
    """An error's status, words and kind, from whatever body it came with."""
    try:
        body = _json(content)
    except BrokenAnswer:
        text = " ".join(content.decode("utf-8", "replace").split())
        return ProviderError(status, text[:300], filtered=_refuses_prompt(status, text))
    error = body.get("error", body) if isinstance(body, dict) else body
    fields = error if isinstance(error, dict) else {}
    message = next((text for key in ("message", "detail", "msg", "error") if (text := _words(fields.get(key)))), "")
    message = message or _words(error)
    code = " ".join(str(fields[key]) for key in ("code", "type", "status") if isinstance(fields.get(key), str | int))
    number = fields.get("code")
    filtered = _is_filtered(body) or _refuses_prompt(status, f"{code} {message}")
    if status == 200:  # the true status is in the body, or none is
        status = number if isinstance(number, int) and 400 <= number < 600 else 502
    return ProviderError(status, message[:300], code[:100], "" if filtered else _parameter(status, body), filtered)


def _answer(choice: dict[str, Any], message: dict[str, Any], tokens: int, reasoned: bool) -> Answer:
    ends = " ".join(str(choice.get(key) or "") for key in ("finish_reason", "native_finish_reason")).lower()
    if any(end in ends for end in FILTER_ENDS) or _is_filtered(choice.get("content_filter_results")):
        return Answer("", "filtered", tokens)
    parts = list(_parts(message.get("content")))
    said = "".join(text for kind, text in parts if kind == "text")
    text, thought = without_thoughts(said)
    refusal = _words(message.get("refusal")) or "".join(text for kind, text in parts if kind == "refusal")
    cut = any(end in ends.split() for end in ("length", "max_tokens"))
    if text or refusal.strip():
        return Answer(text or refusal.strip(), "length" if cut else "stop", tokens, refused=bool(refusal))
    if message.get("tool_calls") or message.get("function_call"):
        return Answer("", "tool_call", tokens)
    thought = thought or reasoned or cut or any(kind == "thought" for kind, _ in parts)
    if thought or any(message.get(key) for key in REASONING):
        return Answer("", "thinking", tokens)
    return Answer("", "empty", tokens)


def without_thoughts(text: str) -> tuple[str, bool]:
    """`text` without the thoughts before it, and whether there were any. What never ends is thought as a whole."""
    text, thought = text.strip(), False
    if CHANNELS.match(text):
        final = FINAL.match(text)
        text, thought = text[final.end() :].split("<|")[0].strip() if final else "", True
    for start, end in THOUGHTS:
        while text.startswith(start):
            text, thought = text.partition(end)[2].strip(), True
        before, found, after = text.partition(end)
        if found and start not in before:  # the chat template had begun the thought
            text, thought = after.strip(), True
    return text, thought


def _parts(content: object) -> Iterator[tuple[str, str]]:
    """(kind, text) of a content that is a text, or a list of parts; kinds are text, refusal and thought."""
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            yield "text", part
        elif isinstance(part, dict):
            kind = str(part.get("type", "text"))
            if kind in ("text", "output_text"):
                text = part.get("text")
                yield "text", _words(text.get("value") if isinstance(text, dict) else text)
            elif kind == "refusal":
                yield "refusal", _words(part.get("refusal"))
            elif kind in ("thinking", "reasoning"):
                yield "thought", ""


def _json(content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8", "replace").removeprefix("\ufeff"))
    except (ValueError, RecursionError):
        raise BrokenAnswer("the endpoint's answer is not JSON") from None


def _words(value: object) -> str:
    """A message in whatever form it is given, on one line."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return next((text for key in ("message", "detail", "msg") if (text := _words(value.get(key)))), "")
    if isinstance(value, list):
        return "; ".join(filter(None, map(_words, value[:5])))
    return ""


def _is_filtered(value: object, depth: int = 6) -> bool:
    """Whether a filter's verdict, somewhere in `value`, is that it filtered."""
    if depth == 0:
        return False
    if isinstance(value, dict):
        if value.get("filtered") is True or value.get("blockReason") or value.get("block_reason"):
            return True
        return any(_is_filtered(inner, depth - 1) for inner in value.values())
    return isinstance(value, list) and any(_is_filtered(inner, depth - 1) for inner in value)


def _refuses_prompt(status: int, text: str) -> bool:
    return status in (200, 400, 403, 422, 451) and bool(FILTERS.search(text))


def _parameter(status: int, body: object) -> str:
    """The optional parameter that a 400 or 422 refuses, or nothing."""
    if status not in (400, 422):
        return ""
    text = json.dumps(body)
    if not UNSUPPORTED.search(text):
        return ""
    if named := re.search(rf'"param": "({"|".join(OPTIONAL)})"', text):
        return named[1]
    places = [match.start() for name in OPTIONAL if (match := re.search(rf"(?<!\w){name}(?!\w)", text))]
    first = min(places, default=None)  # what is named first is refused, what follows is what to use instead
    if first is None:
        return ""
    if "temperature" in text and "top_p" in text and "seed" not in text:
        return "top_p"  # some take only one of the two
    return next(name for name in sorted(OPTIONAL, key=len, reverse=True) if text.startswith(name, first))


def _tokens(usage: object) -> int:
    value = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return value if isinstance(value, int) and 0 <= value < 2**31 else 0


def _reasoned(usage: object) -> bool:
    details = usage.get("completion_tokens_details") if isinstance(usage, dict) else None
    return isinstance(details, dict) and bool(details.get("reasoning_tokens"))
