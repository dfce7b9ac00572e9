"""Turns a prompt into the tokens that a responder reads: its own chat template, or plain text for a base model.

Prompts are hostile: a special or added token written in one stays plain text, so that none can change the structure.
"""

import re
from collections.abc import Iterable
from typing import Any

from guardloop.core.errors import GuardLoopError
from guardloop.guard.prompt.renderer import TEMPLATE_ERRORS

SLOT = "\ue000prompt\ue001"  # private-use characters stand in for the prompt
PROBES = ("How are you?", "été 9", "(x)")
PLAIN = f"User: {SLOT}\nAssistant:"
PLAIN_STOP = "\nUser:"


class PromptError(ValueError):
    """A prompt that cannot be answered; the message says why."""


class ChatRenderer:
    """Renders prompts for one responder. `stop` is the text at which an answer ends, for models without end token."""

    def __init__(
        self,
        tokenizer: Any,
        system_prompt: str | None = None,
        max_prompt_tokens: int = 2048,
        prefill: str = "",
    ) -> None:
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self.max_prompt_tokens = max_prompt_tokens
        self.prefill = prefill
        self._templated = bool(getattr(tokenizer, "chat_template", None))
        self.stop = None if self._templated else PLAIN_STOP
        special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special} | {
            *tokenizer.all_special_tokens
        }
        self._special = _any_of(special)
        added = {str(token): id for id, token in tokenizer.added_tokens_decoder.items()}
        self._added = _any_of(special | added.keys())
        self._added_ids = frozenset(added.values())
        try:
            self._pieces = self._template(SLOT).split(SLOT)
        except TEMPLATE_ERRORS as error:
            raise GuardLoopError(
                f"responder: the chat template refused a prompt: {error}",
                "leave the responder's system_prompt out, or choose another model",
            ) from error
        # Some templates change the prompt, some tokenizers treat the start of a text differently: then the exact way
        # does not give the tokens that the model knows, and special tokens are taken out of the prompt instead.
        self._controls = self._count_controls(self._native(PROBES[0]))
        self._exact = len(self._pieces) == 2 and all(self._split(probe) == self._native(probe) for probe in PROBES)

    def encode(self, prompt: str) -> list[int]:
        """Tokens of `prompt` as the responder reads it: `int[T]`. Raises PromptError if it cannot be answered."""
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:
            raise PromptError("the prompt is not valid Unicode") from None
        prompt = prompt.strip().replace("\ue000", "").replace("\ue001", "")
        if not prompt:
            raise PromptError("the prompt is empty")
        try:
            tokens = self._split(prompt) if self._exact else self._native(self._without_added(prompt))
        except PromptError:
            raise
        except TEMPLATE_ERRORS as error:
            raise PromptError(f"the chat template refused the prompt: {error}") from error
        if self._count_controls(tokens) > self._controls:  # as a tokenizer's own normalisation may make them
            raise PromptError("the prompt holds control tokens in disguise")
        if len(tokens) > self.max_prompt_tokens:
            raise PromptError(f"the prompt has more than max_prompt_tokens={self.max_prompt_tokens} tokens")
        return tokens

    def _template(self, prompt: str) -> str:
        if not self._templated:
            system = f"{self.system_prompt}\n\n" if self.system_prompt else ""
            return system + PLAIN.replace(SLOT, prompt) + (f" {self.prefill}" if self.prefill else "")
        messages = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        messages.append({"role": "user", "content": prompt})
        return (
            str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)) + self.prefill
        )

    def _native(self, prompt: str) -> list[int]:
        return self._tokens(self._template(prompt), split=False, start=not self._templated)

    def _split(self, prompt: str) -> list[int]:
        """Special tokens are parsed in the template's text only; plain text stays whole across the prompt's edges."""
        before, after = self._pieces
        tokens: list[int] = []
        text, start = "", not self._templated
        for piece, tail in ((before, prompt), (after, "")):
            position = 0
            for match in self._special.finditer(piece):
                tokens += self._tokens(text + piece[position : match.start()], split=True, start=start)
                tokens.append(self.tokenizer.convert_tokens_to_ids(match.group()))
                text, position, start = "", match.end(), False
            first, *rest = self._parts(tail)
            text += piece[position:] + first
            for part in rest:
                tokens += self._tokens(text, split=True, start=start)
                text, start = part, False
        return tokens + self._tokens(text, split=True, start=start)

    def _tokens(self, text: str, split: bool, start: bool) -> list[int]:
        if not text:
            return []
        encoded = self.tokenizer(text, add_special_tokens=start, split_special_tokens=split)
        return list(encoded["input_ids"])

    def _parts(self, prompt: str) -> list[str]:
        """The prompt, cut within each added token, which so is never seen whole."""
        cuts, start = [0], 0
        while match := self._added.search(prompt, start):
            start = match.start() + 1
            cuts.append(start)
        return [prompt[a:b] for a, b in zip(cuts, [*cuts[1:], len(prompt)], strict=True)]

    def _count_controls(self, tokens: list[int]) -> int:
        return sum(token in self._added_ids for token in tokens)

    def _without_added(self, prompt: str) -> str:
        while (shorter := self._added.sub("", prompt)) != prompt:  # taking one out can make another
            prompt = shorter
        if not prompt.strip():
            raise PromptError("the prompt is made of special tokens only")
        return prompt


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Any of `texts`, the longest first; nothing where there is none."""
    return re.compile("|".join(map(re.escape, sorted(filter(None, texts), key=len, reverse=True))) or r"(?!)")
