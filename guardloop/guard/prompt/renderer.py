"""The one place that turns a conversation into a guard's prompt, as tokens.

The text around the messages is the guard's own chat template, byte for byte. The messages are hostile: a special
token written in one stays plain text, and what else reads as structure is broken up (guardloop.models.untrusted), so
that no message can change the structure. Only messages are ever cut.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from guardloop.core.errors import GuardLoopError
from guardloop.guard.prompt.family import FOLDER as FAMILY_FOLDER
from guardloop.guard.prompt.family import Family
from guardloop.guard.prompt.policy import FOLDER as POLICIES
from guardloop.guard.prompt.policy import Policy, read_policy
from guardloop.models.untrusted import Disarmer, Plain

TEMPLATES = FAMILY_FOLDER.parent / "templates"
SLOTS = ("\ue000q\ue001", "\ue000a\ue001")  # private-use characters stand in for the two messages
TEMPLATE_ERRORS = (
    *(jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError),
)
"""What a chat template, which is a program of its own, can fail with."""
MAX_WINDOWS = 128
WINDOW = 8  # a long message is judged in windows of the 8th part of the limit: in larger ones, a sentence drowns
OVERLAP = 4  # each shares the 4th part of its tokens with the next
MAX_RESYNC = 4  # tokens after a cut that may differ until both tokenisations agree
PROBES = ("a", "Zeta 9", "été", "?", "(x)", "\n0", "日本", "[c]", "<b>", "'s", "- x")


@dataclass(frozen=True)
class GuardPrompt:
    """A conversation as the guard reads it: `tokens: int[T]`, ending where the label is to be predicted."""

    tokens: list[int]
    truncated: bool


@dataclass(frozen=True)
class OpenText:
    """Plain text between two special tokens with messages in it: `texts` stand before, between and after them.

    `head` are the tokens of text that no message can change; the rest of that text is tokenised with the messages,
    and the first `skip` tokens of the result are dropped, as `head` has them already.
    """

    texts: list[str]
    head: list[int]
    skip: int


Plan = list["list[int] | OpenText"]
"""A template ready to be filled: tokens that never change, and text that is tokenised with the messages."""


class Renderer:
    """Renders conversations for one guard: its tokenizer, its family's form, its policy."""

    def __init__(
        self,
        tokenizer: Any,
        family: Family,
        policy: Policy | None = None,
        max_text_tokens: int = 1024,
    ) -> None:
        self.tokenizer = tokenizer
        self.family = family
        self.max_text_tokens = max_text_tokens
        if policy and not (family.template or family.accepts_categories):
            raise GuardLoopError(f"guard.policy: {family.name} has its policy built in", "leave guard.policy out")
        own = read_policy(POLICIES / family.policy) if family.policy and policy is None else None
        self.policy = policy if policy is not None else own
        self.codes = list(self.policy or family.categories)
        if family.template is None and not getattr(tokenizer, "chat_template", None):
            raise GuardLoopError(
                f"guard.family: the tokenizer has no chat template, which {family.name} needs",
                "use the guard's own tokenizer, or family `guardloop`",
            )
        ends = ("eos_token_id", "eot_token_id")
        self.ends = {i for name in ends if (i := getattr(tokenizer, name, None)) is not None}
        self.ends |= {i for i, t in tokenizer.added_tokens_decoder.items() if str(t) in ("<|eot_id|>", "<|im_end|>")}
        self._special = self._special_pattern()
        self._disarm = Disarmer(tokenizer, family.markers, family.roles)
        self._start = starting_tokens(tokenizer) if family.template else []  # a chat template writes its own
        self._skeletons = {turns: self._skeleton(turns) for turns in (1, 2)}
        self._plans = {turns: self._plan(skeleton) for turns, skeleton in self._skeletons.items()}
        self._check_exact()
        self.prefixes = [self._prefix(turns) for turns in (1, 2)]

    def render(self, prompt: str, response: str | None = None) -> GuardPrompt:
        """The guard's prompt for the User's message, or, with `response`, for the Agent's."""
        return self.render_all([(prompt, response)])[0]

    def render_all(self, conversations: Sequence[tuple[str, str | None]]) -> list[GuardPrompt]:
        """The guard's prompts for many conversations, tokenised together (on all cores, with a fast tokenizer)."""
        messages = [[self._cut(plain) for plain in turns] for turns in self._by_conversation(conversations)]
        return self._prompts([([text for text, _ in m], any(cut for _, cut in m)) for m in messages])

    def render_windows(self, conversations: Sequence[tuple[str, str | None]]) -> list[list[GuardPrompt]]:
        """For each conversation the guard's prompts, one for each window of the last message: the worst counts.

        What is before that message is cut to the token limit. None where it would take more than MAX_WINDOWS.
        """
        windows = []
        for *before, last in self._by_conversation(conversations):
            context = [self._cut(plain) for plain in before]
            texts = self._windows(last)
            cut = len(texts) != 1 or any(cut for _, cut in context)
            windows.append([([*(text for text, _ in context), text], cut) for text in texts])
        prompts = iter(self._prompts([window for group in windows for window in group]))
        return [[next(prompts) for _ in group] for group in windows]

    def _by_conversation(self, conversations: Sequence[tuple[str, str | None]]) -> list[list[Plain]]:
        plain = iter(self._plain_messages([text for pair in conversations for text in pair if text is not None]))
        return [[next(plain) for text in pair if text is not None] for pair in conversations]

    def _prompts(self, filled: Sequence[tuple[list[str], bool]]) -> list[GuardPrompt]:
        """Prompts of harmless messages, with whether these were cut."""
        tokens = self._encode_all([(self._plans[len(messages)], messages) for messages, _ in filled])
        return [GuardPrompt(ids, cut) for ids, (_, cut) in zip(tokens, filled, strict=True)]

    def answer(self, answer: str) -> list[int]:
        """Tokens of `answer` as they follow a prompt. Raises GuardLoopError if the answer would change the prompt."""
        skeleton = self._skeletons[1]
        before = self._tokens(skeleton, ["a"])
        after = self._tokens([*skeleton[:-1], skeleton[-1] + self.family.answer_lead + answer], ["a"])
        if after[: len(before)] != before:
            raise GuardLoopError(
                f"guard.family: with {self.family.name}, the answer {answer!r} merges with the end of the prompt",
                "check the family's answer_lead against the model's own generations",
            )
        return after[len(before) :]

    def _prefix(self, turns: int) -> list[int]:
        """Tokens that every prompt of `turns` messages starts with, whatever the messages: `int[P]`."""
        prompts = [self._tokens(self._skeletons[turns], [probe] * turns) for probe in PROBES]
        shortest = min(len(p) for p in prompts)
        same = next((i for i in range(shortest) if len({p[i] for p in prompts}) > 1), shortest - 1)
        return prompts[0][:same]

    def _skeleton(self, turns: int) -> list[str]:
        """The template's text before, between and after `turns` messages: `turns + 1` texts."""
        text = self._template(list(SLOTS[:turns]))
        texts = re.split("|".join(map(re.escape, SLOTS[:turns])), text)
        if len(texts) != turns + 1:
            raise GuardLoopError(
                f"guard.family: the chat template does not show each message once as {self.family.name} should",
                "choose the family that fits the model",
            )
        return texts

    def _template(self, contents: list[str]) -> str:
        """The guard's own template, filled with `contents` in turn: User, Agent."""
        roles = ("user", "assistant")
        if self.family.template:
            environment = jinja2.Environment(
                loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined, autoescape=False
            )
            environment.tests["odd"] = lambda n: n % 2 == 1
            messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
            return environment.get_template(self.family.template).render(
                messages=messages, categories=self.policy or {}
            )
        options: dict[str, Any] = {}
        if self.family.accepts_categories and self.policy is not None:
            options["categories"] = {code: f"{c.name}." for code, c in self.policy.items()}
        parts = self.family.content == "parts"
        chat = [
            {"role": r, "content": [{"type": "text", "text": c}] if parts else c}
            for r, c in zip(roles, contents, strict=False)
        ]
        try:
            return str(self.tokenizer.apply_chat_template(chat, tokenize=False, **options))
        except TEMPLATE_ERRORS as error:
            raise GuardLoopError(
                f"guard.family: the chat template refused a conversation: {error}",
                "use the guard's own tokenizer and the family that fits it",
            ) from error

    def _plan(self, skeleton: list[str]) -> Plan:
        """What `_tokens` does for any messages, done as far as it can be: only open text is left to tokenise."""
        plan: Plan = [self._start] if self._start else []
        for part in self._parts(skeleton):
            if isinstance(part, int):
                plan.append([part])
            elif len(part) == 1:
                plan.append(self._plain(part[0]))
            else:
                plan.append(self._open_text(part))
        return plan

    def _open_text(self, texts: list[str]) -> OpenText:
        """Cut the text before the first message at its last line break, if tokens then come out the same."""
        line = texts[0].rfind("\n")
        if line > 0:
            short = [texts[0][line:], *texts[1:]]
            agreed = set()  # what the probes show: all must agree
            for probe in PROBES:
                messages = [probe] * (len(texts) - 1)
                full_ids, tail_ids = self._plain(_fill(texts, messages)), self._plain(_fill(short, messages))
                cut = len(full_ids) - len(tail_ids)
                same = (i for i in range(min(MAX_RESYNC, len(tail_ids))) if full_ids[cut + i :] == tail_ids[i:])
                skip = next(same, None)
                agreed.add((skip, tuple(full_ids[: cut + (skip or 0)])))
            if len(agreed) == 1:
                skip, head = agreed.pop()
                if skip is not None:
                    return OpenText(short, list(head), skip)
        return OpenText(texts, [], 0)

    def _encode_all(self, prompts: Sequence[tuple[Plan, list[str]]]) -> list[list[int]]:
        """Tokens of filled plans; all texts go to the tokenizer at once."""
        texts = []
        for plan, messages in prompts:
            left = list(messages)
            for part in plan:
                if isinstance(part, OpenText):
                    texts.append(_fill(part.texts, [left.pop(0) for _ in part.texts[1:]]))
        encoded = iter(self._plain_all(texts))
        prompts_tokens = []
        for plan, _ in prompts:
            tokens: list[int] = []
            for part in plan:
                tokens += [*part.head, *next(encoded)[part.skip :]] if isinstance(part, OpenText) else part
            prompts_tokens.append(tokens)
        return prompts_tokens

    def _tokens(self, skeleton: list[str], messages: list[str]) -> list[int]:
        """Tokens of the filled skeleton: special tokens are parsed in the template's text only.

        Plain text is tokenised in one piece across the edge of template and message, as the guard saw it in training.
        """
        tokens = list(self._start)
        left = list(messages)
        for part in self._parts(skeleton):
            if isinstance(part, int):
                tokens.append(part)
            else:
                tokens += self._plain(_fill(part, [left.pop(0) for _ in part[1:]]))
        return tokens

    def _parts(self, skeleton: list[str]) -> list[int | list[str]]:
        """The skeleton as special tokens and the plain text between them, the latter open where messages go."""
        parts: list[int | list[str]] = []
        plain = [""]
        for index, text in enumerate(skeleton):
            plain += [""] if index else []
            position = 0
            for match in self._special.finditer(text) if self._special else ():
                plain[-1] += text[position : match.start()]
                parts += [plain, self.tokenizer.convert_tokens_to_ids(match.group())]
                plain, position = [""], match.end()
            plain[-1] += text[position:]
        return [part for part in [*parts, plain] if part != [""]]

    def _plain(self, text: str) -> list[int]:
        return self._plain_all([text])[0]

    def _plain_all(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return list(self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def _plain_messages(self, texts: Sequence[str]) -> list[Plain]:
        """Messages without structure of their own."""
        return self._disarm([_valid(text) for text in texts])

    def _cut(self, plain: Plain) -> tuple[str, bool]:
        """A message within the token limit: of a longer one, head and tail are kept."""
        text, offsets = plain
        if len(offsets) <= self.max_text_tokens:
            return text, False
        half = (self.max_text_tokens - 2) // 2
        return f"{text[: offsets[half][0]].rstrip()} ... {text[offsets[-half][0] :].lstrip()}", True

    def _windows(self, plain: Plain) -> list[str]:
        """A message within the token limit, or its overlapping windows; none where these are more than MAX_WINDOWS."""
        text, offsets = plain
        if len(offsets) <= self.max_text_tokens:
            return [text]
        size = max(1, self.max_text_tokens // WINDOW)
        overlap = size // OVERLAP
        starts = range(0, len(offsets) - overlap, size - overlap)
        if len(starts) > MAX_WINDOWS:
            return []
        return [text[offsets[s][0] : offsets[min(s + size, len(offsets)) - 1][1]].strip() for s in starts]

    def _special_pattern(self) -> re.Pattern[str] | None:
        added = self.tokenizer.added_tokens_decoder.values()  # `all_special_tokens` lacks those without a name
        special = sorted({str(token) for token in added if token.special}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, special))) if special else None

    def _check_exact(self) -> None:
        """For harmless text, our tokens must be what the tokenizer itself makes of the rendered prompt."""
        for messages in (["How are you?"], ["How are you?", "Fine, thanks."]):
            text = self._template(messages)
            native = [*self._start, *self.tokenizer(text, add_special_tokens=False)["input_ids"]]
            ours = self._encode_all([(self._plans[len(messages)], messages)])[0]
            if ours != native:
                raise GuardLoopError(
                    f"guard.family: {self.family.name}'s prompt is not tokenised as the model's own tokenizer does",
                    "choose the family that fits the model, or report this tokenizer",
                )


def starting_tokens(tokenizer: Any) -> list[int]:
    """What a tokenizer puts before any text, such as <bos>, without which some base models read it badly."""
    whole, plain = (list(tokenizer("a", add_special_tokens=added)["input_ids"]) for added in (True, False))
    return whole[: next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)]


def _fill(texts: list[str], messages: list[str]) -> str:
    """`texts` with the messages between them."""
    return texts[0] + "".join(m + t for m, t in zip(messages, texts[1:], strict=True))


def _valid(text: str) -> str:
    """The text as valid Unicode, without what stands in for messages, and stripped as templates strip it."""
    return text.encode("utf-8", "replace").decode("utf-8").replace("\ue000", "").replace("\ue001", "").strip()
