"""The transformers engine, made for CPUs: continuous batching in its simplest form.

A prompt is read once for all of its samples. Then every step makes one token for each active row; rows that are done
leave at once, and new prompts are read in as soon as enough places are free. Each row draws its own random numbers,
so in float32 a response does not depend on the rows beside it; in bfloat16 the rounding of a batched matrix product
can, now and then, tip a token.
"""

import gc
import inspect
import logging
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import DynamicCache

from guardloop.core.errors import GuardLoopError, first_line
from guardloop.models.loading import is_out_of_memory, load_causal_lm, load_tokenizer, pick_device, pick_dtype
from guardloop.responses.chat import ChatRenderer, PromptError
from guardloop.responses.engine import TOP_P, FinishReason, Reply, Request, failure
from guardloop.responses.engines.slots import Slots, width_for
from guardloop.responses.sampling import choose_tokens, uniforms
from guardloop.responses.settings import ResponderSettings

log = logging.getLogger("guardloop")
BATCH_ROWS = 64  # responses made at the same time
BATCH_TOKENS = 16384  # kept in the cache at the same time, prompts included
WINDOW_BATCHES = 8  # batches of requests that are read ahead and sorted by length
REFILL_SHARE = 0.25  # share of places that must be free before new prompts are read in, so that they come in batches
PREFILL_TOKENS = 4096
STOP_TOKENS = 8  # the stop text lies within this many last tokens
ENGINE_ERRORS = (RuntimeError, ValueError, IndexError)
NEEDED = ("position_ids", "attention_mask", "past_key_values", "logits_to_keep")


@dataclass
class Group:
    """One prompt's tokens, and the samples wanted of it."""

    tokens: list[int]
    requests: list[Request]


@dataclass
class Row:
    """One response in the making. `next_token` is its next input: the prompt's last token, then what was made."""

    request: Request
    prompt: list[int]
    next_token: int
    random: npt.NDArray[np.float32]
    tokens: list[int] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Where the next input goes."""
        return len(self.prompt) - 1 + len(self.tokens)


class TransformersResponder:
    """Generates with a transformers model on this machine. Raises GuardLoopError if the model cannot be used so."""

    def __init__(self, settings: ResponderSettings, load: str) -> None:
        device = pick_device()
        revision = None if load != settings.model else settings.revision
        tokenizer = load_tokenizer(load, revision)
        model = load_causal_lm(load, revision, pick_dtype(device), device)
        self._setup(settings, model, tokenizer)

    @classmethod
    def of(cls, settings: ResponderSettings, model: Any, tokenizer: Any, **limits: int) -> "TransformersResponder":
        """A responder of a model that is loaded already; `limits` are batch_size and batch_tokens, as in `_setup`."""
        self = cls.__new__(cls)
        self._setup(settings, model.eval(), tokenizer, **limits)
        return self

    def _setup(
        self,
        settings: ResponderSettings,
        model: Any,
        tokenizer: Any,
        batch_size: int | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        self.name = settings.tag
        self.settings = settings
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size or BATCH_ROWS
        self.batch_tokens = batch_tokens
        self.chat = ChatRenderer(tokenizer, settings.system_prompt, settings.max_prompt_tokens, settings.prefill)
        self.ends = _end_tokens(model, tokenizer)
        _check_supported(model, settings)

    def generate(self, requests: Iterable[Request]) -> Iterator[Reply]:
        """One reply per request, as they are done. Reads ahead WINDOW_BATCHES batches."""
        source, queue = iter(requests), deque[Group]()
        slots, rows, admitted = Slots(), list[Row](), list[Group]()
        more = True
        while more or queue or rows:
            if more and not queue:
                groups, errors = self._read(source)
                more = bool(groups or errors)
                queue.extend(groups)
                yield from errors
            try:
                if len(rows) <= self.batch_size * (1 - REFILL_SHARE):
                    while queue and (admitted := self._next_prompts(rows, queue)):
                        self._prefill(slots, rows, admitted)
                        admitted = []
                replies = self._step(slots, rows) if rows else []
            except ENGINE_ERRORS as error:
                suspects = _groups(rows, admitted)
                slots, rows, admitted = Slots(), [], []
                if is_out_of_memory(error) and self._halve(suspects):
                    queue = deque(part for group in [*suspects, *queue] for part in self._parts(group))
                    replies = []
                else:
                    log.warning("a batch failed; its prompts are answered one by one: %s", first_line(error))
                    replies = [reply for group in suspects for reply in self._alone(group)]
            yield from replies

    def close(self) -> None:
        """Give the model's memory back."""
        del self.model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _halve(self, groups: list[Group]) -> bool:
        """From here on answer fewer rows at once than those of `groups`; False where that was one."""
        count = sum(len(group.requests) for group in groups)
        if count == 1:
            return False
        self.batch_size = min(self.batch_size, count) // 2
        log.warning("out of memory with %d responses at once: from here on at most %d", count, self.batch_size)
        return True

    def _alone(self, group: Group) -> Iterator[Reply]:
        """Answer one prompt in a batch of its own; what it then fails with is its own error."""
        slots, rows = Slots(), list[Row]()
        left = {request.sample: request for request in group.requests}
        try:
            self._prefill(slots, rows, [group])
            while rows:
                for reply in self._step(slots, rows):
                    del left[reply.sample]
                    yield reply
        except ENGINE_ERRORS as error:
            yield from (failure(request, f"the model failed on it: {first_line(error)}") for request in left.values())

    def _read(self, source: Iterator[Request]) -> tuple[list[Group], list[Reply]]:
        """The next window: prompts, shortest first so that rows of like length run together, and unusable requests."""
        groups, errors = list[Group](), list[Reply]()
        window = list(islice(source, WINDOW_BATCHES * self.batch_size))
        for (_, prompt), same in groupby(window, key=lambda request: (request.id, request.prompt)):
            samples = list(same)
            try:
                tokens = self.chat.encode(prompt)
            except PromptError as error:
                errors += [failure(request, str(error)) for request in samples]
                continue
            groups += self._parts(Group(tokens, samples))
        return sorted(groups, key=lambda group: len(group.tokens)), errors

    def _parts(self, group: Group) -> list[Group]:
        """The group in as many as it takes for each to fit into a batch."""
        size = max(1, min(self.batch_size, self.batch_tokens // self._width(len(group.tokens))))
        return [Group(group.tokens, group.requests[i : i + size]) for i in range(0, len(group.requests), size)]

    def _width(self, prompt_tokens: int) -> int:
        return width_for(prompt_tokens + self.settings.max_new_tokens)

    def _next_prompts(self, rows: list[Row], queue: deque[Group]) -> list[Group]:
        """Take the prompts that fit beside the active rows and into one prefill; none if there is no room."""
        admitted = list[Group]()
        count = len(rows)
        longest = max((len(row.prompt) for row in rows), default=0)
        while queue:
            count += len(queue[0].requests)
            longest = max(longest, len(queue[0].tokens))
            fits = count <= self.batch_size and count * self._width(longest) <= self.batch_tokens
            if not fits and (rows or admitted):
                break
            if admitted and (len(admitted) + 1) * len(queue[0].tokens) > PREFILL_TOKENS:
                break
            admitted.append(queue.popleft())
        return admitted

    @torch.inference_mode()
    def _prefill(self, slots: Slots, rows: list[Row], groups: list[Group]) -> None:
        """Read `groups` in one pass, without logits: the first step gives each prompt's last token again."""
        lengths = [len(group.tokens) for group in groups]
        padded = torch.zeros(len(groups), max(lengths), dtype=torch.int64)
        for i, group in enumerate(groups):
            padded[i, : lengths[i]] = torch.tensor(group.tokens)  # padding comes after: causal attention never sees it
        cache = DynamicCache()
        self.model.base_model(input_ids=padded.to(self.model.device), past_key_values=cache, use_cache=True)
        rows += [
            Row(r, g.tokens, g.tokens[-1], uniforms(r.seed, self.settings.max_new_tokens))
            for g in groups
            for r in g.requests
        ]
        longest = max(len(row.prompt) for row in rows) + self.settings.max_new_tokens
        slots.admit(cache, lengths, [len(group.requests) for group in groups], longest)

    @torch.inference_mode()
    def _step(self, slots: Slots, rows: list[Row]) -> list[Reply]:
        """One more token for every row; returns the replies of those that are done, which leave."""
        device = self.model.device
        positions = torch.tensor([row.position for row in rows], device=device)
        slots.place(positions)
        logits: Tensor = self.model(
            input_ids=torch.tensor([[row.next_token] for row in rows], device=device),
            position_ids=positions[:, None],
            attention_mask=slots.mask(self.model.dtype),
            past_key_values=slots,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        uniform = torch.tensor([row.random[len(row.tokens)] for row in rows], dtype=torch.float32, device=device)
        chosen = choose_tokens(logits, uniform, self.settings.temperature, TOP_P).tolist()
        replies, finished = list[Reply](), list[int]()
        for index, (row, token) in enumerate(zip(rows, chosen, strict=True)):
            row.next_token = token
            if reason := self._advance(row):
                replies.append(self._reply(row, reason))
                finished.append(index)
        if finished:
            for source, target in slots.drop(finished):
                rows[target] = rows[source]
            del rows[slots.rows :]
        return replies

    def _advance(self, row: Row) -> FinishReason | None:
        """Take the row's newest token; why the row is done, if it is."""
        if row.next_token in self.ends:
            return "stop"
        row.tokens.append(row.next_token)
        if self.chat.stop and self.chat.stop in self.tokenizer.decode(row.tokens[-STOP_TOKENS:]):
            return "stop"
        return "length" if len(row.tokens) == self.settings.max_new_tokens else None

    def _reply(self, row: Row, reason: FinishReason) -> Reply:
        text = self.tokenizer.decode(row.tokens, skip_special_tokens=True)
        if self.chat.stop:
            text = text.split(self.chat.stop)[0]
        return Reply(row.request.id, row.request.sample, (self.chat.prefill + text).strip(), reason, len(row.tokens))


def _groups(rows: list[Row], admitted: list[Group]) -> list[Group]:
    """What is left to do of the active rows, and of the prompts that were about to join them."""
    groups = [Group(row.prompt, [row.request]) for row in rows]
    started = {row.request for row in rows}
    return groups + [group for group in admitted if group.requests[0] not in started]


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the model's own, and the tokenizer's."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return frozenset(token for token in [*own, tokenizer.eos_token_id] if token is not None)


def _check_supported(model: Any, settings: ResponderSettings) -> None:
    """Refuse models whose cache is not one key and one value per token. Raises GuardLoopError."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    longest = settings.max_prompt_tokens + settings.max_new_tokens
    missing = [name for name in NEEDED if name not in inspect.signature(model.forward).parameters]
    if missing or config.is_encoder_decoder or not kinds <= {"full_attention", "sliding_attention"}:
        raise GuardLoopError(
            f"responder {settings.tag}: the transformers engine cannot run a {config.model_type} model",
            "set its kind to vllm or openai, or choose a model with plain attention, such as Llama or Qwen",
        )
    context = getattr(config, "max_position_embeddings", None)
    for limit, what in ((window, "attention window"), (context, "context")):
        if limit and longest > limit:
            raise GuardLoopError(
                f"{settings.tag}: max_prompt_tokens + max_new_tokens = {longest} is over the model's {what} of {limit}",
                f"lower its max_prompt_tokens to at most {limit - settings.max_new_tokens}",
            )
