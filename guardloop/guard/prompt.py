"""The one place that turns a conversation into a guard's prompt, as tokens.

The text around the messages is the guard's own chat template, byte for byte. The messages are hostile: a special
token written in one stays plain text, and a block end written in one is broken up, so that no message can change
the structure. Only messages are ever truncated.
"""

import re
from dataclasses import dataclass
from typing import Any

import jinja2

from guardloop.errors import GuardLoopError
from guardloop.guard.family import FOLDER as FAMILY_FOLDER
from guardloop.guard.family import Family
from guardloop.guard.policy import Policy, read_policy

TEMPLATES = FAMILY_FOLDER.parent / "templates"
SLOTS = ("\ue000q\ue001", "\ue000a\ue001")  # private-use characters stand in for the two messages
PROBES = ("a", "Zeta 9", "été", "?", "(x)", "\n0")


@dataclass(frozen=True)
class GuardPrompt:
    """A conversation as the guard reads it: `tokens: int[T]`, ending where the label is to be predicted."""

    tokens: list[int]
    truncated: bool


class Renderer:
    """Renders conversations for one guard: its tokenizer, its family's form, its policy."""

    def __init__(
        self,
        tokenizer: Any,
        family: Family,
        policy: Policy | None = None,
        excluded: list[str] | None = None,
        max_text_tokens: int = 1024,
    ) -> None:
        self.tokenizer = tokenizer
        self.family = family
        self.max_text_tokens = max_text_tokens
        self.excluded = excluded or []
        if (policy or self.excluded) and not (family.template or family.accepts_categories):
            raise GuardLoopError(
                f"guard.policy: {family.name} has its policy built in", "leave guard.policy and excluded_categories out"
            )
        self.policy = policy if policy is not None else read_policy(family.policy) if family.policy else None
        self.codes = [c for c in (self.policy or family.categories) if c not in self.excluded]
        if family.template is None and not getattr(tokenizer, "chat_template", None):
            raise GuardLoopError(
                f"guard.family: the tokenizer has no chat template, which {family.name} needs",
                "use the guard's own tokenizer, or family `guardloop`",
            )
        self._special = self._special_pattern()
        self._skeletons = {turns: self._skeleton(turns) for turns in (1, 2)}
        self._check_exact()

    def render(self, prompt: str, response: str | None = None) -> GuardPrompt:
        """The guard's prompt for the User's message, or, with `response`, for the Agent's."""
        messages, truncated = [], False
        for text in [prompt] if response is None else [prompt, response]:
            clean, cut = self._clean(text)
            messages.append(clean)
            truncated |= cut
        return GuardPrompt(self._encode(self._skeletons[len(messages)], messages), truncated)

    def answer(self, answer: str) -> list[int]:
        """Tokens of `answer` as they follow a prompt. Raises GuardLoopError if the answer would change the prompt."""
        skeleton = self._skeletons[1]
        before = self._encode(skeleton, ["a"])
        after = self._encode([*skeleton[:-1], skeleton[-1] + self.family.answer_lead + answer], ["a"])
        if after[: len(before)] != before:
            raise GuardLoopError(
                f"guard.family: with {self.family.name}, the answer {answer!r} merges with the end of the prompt",
                "check the family's answer_lead against the model's own generations",
            )
        return after[len(before) :]

    def shared_prefix(self) -> list[int]:
        """Tokens that every prompt of this guard starts with, whatever the messages: `int[P]`."""
        prompts = [self._encode(self._skeletons[1], [probe]) for probe in PROBES]
        prompts.append(self._encode(self._skeletons[2], ["a", "a"]))
        shortest = min(len(p) for p in prompts)
        same = next((i for i in range(shortest) if len({p[i] for p in prompts}) > 1), shortest - 1)
        return prompts[0][:same]

    def _skeleton(self, turns: int) -> list[str]:
        """The template's text before, between and after `turns` messages: `turns + 1` pieces."""
        text = self._template(list(SLOTS[:turns]))
        pieces = re.split("|".join(map(re.escape, SLOTS[:turns])), text)
        if len(pieces) != turns + 1:
            raise GuardLoopError(
                f"guard.family: the chat template does not show each message once as {self.family.name} should",
                "choose the family that fits the model",
            )
        return pieces

    def _template(self, contents: list[str]) -> str:
        """The guard's own template, filled with `contents` in turn: User, Agent."""
        roles = ("user", "assistant")
        if self.family.template:
            environment = jinja2.Environment(
                loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined, autoescape=False
            )
            environment.tests["odd"] = lambda n: n % 2 == 1
            messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
            policy = {code: c for code, c in (self.policy or {}).items() if code not in self.excluded}
            return environment.get_template(self.family.template).render(messages=messages, categories=policy)
        options: dict[str, Any] = {}
        if self.family.accepts_categories and self.policy is not None:
            options["categories"] = {code: f"{c.name}." for code, c in self.policy.items()}
        if self.family.accepts_categories and self.excluded:
            options["excluded_category_keys"] = self.excluded
        parts = self.family.content == "parts"
        chat = [
            {"role": r, "content": [{"type": "text", "text": c}] if parts else c}
            for r, c in zip(roles, contents, strict=False)
        ]
        try:
            return str(self.tokenizer.apply_chat_template(chat, tokenize=False, **options))
        except (jinja2.TemplateError, TypeError) as error:
            raise GuardLoopError(f"guard.family: the chat template refused a conversation: {error}") from error

    def _encode(self, skeleton: list[str], messages: list[str]) -> list[int]:
        """Tokens of the filled skeleton: special tokens are parsed in the template's text only.

        Plain text is tokenised in one piece across the edge of template and message, as the guard saw it in training.
        """
        tokens: list[int] = []
        plain = ""
        for index, piece in enumerate(skeleton):
            position = 0
            for match in self._special.finditer(piece) if self._special else ():
                tokens += self._plain(plain + piece[position : match.start()])
                tokens.append(self.tokenizer.convert_tokens_to_ids(match.group()))
                plain, position = "", match.end()
            plain += piece[position:]
            if index < len(messages):
                plain += messages[index]
        return tokens + self._plain(plain)

    def _plain(self, text: str) -> list[int]:
        if not text:
            return []
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def _clean(self, text: str) -> tuple[str, bool]:
        """A message without structure of its own, cut to the token limit: head and tail are kept."""
        text = text.encode("utf-8", "replace").decode("utf-8")
        for slot in "\ue000\ue001":
            text = text.replace(slot, "")
        text = text.strip()
        for marker in self.family.markers:
            text = re.sub(re.escape(marker), f"{marker[0]} {marker[1:]}", text, flags=re.IGNORECASE)
        encoded = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )["offset_mapping"]
        if len(encoded) <= self.max_text_tokens:
            return text, False
        half = (self.max_text_tokens - 2) // 2
        return f"{text[: encoded[half][0]].rstrip()} ... {text[encoded[-half][0] :].lstrip()}", True

    def _special_pattern(self) -> re.Pattern[str] | None:
        added = self.tokenizer.added_tokens_decoder.values()  # `all_special_tokens` lacks those without a name
        special = sorted({str(token) for token in added if token.special}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, special))) if special else None

    def _check_exact(self) -> None:
        """For harmless text, our tokens must be what the tokenizer itself makes of the rendered prompt."""
        for messages in (["How are you?"], ["How are you?", "Fine, thanks."]):
            native = list(self.tokenizer(self._template(messages), add_special_tokens=False)["input_ids"])
            if self._encode(self._skeletons[len(messages)], messages) != native:
                raise GuardLoopError(
                    f"guard.family: {self.family.name}'s prompt is not tokenised as the model's own tokenizer does",
                    "choose the family that fits the model, or report this tokenizer",
                )
