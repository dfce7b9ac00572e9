"""Scoring conversations with a guard: one forward pass each, behind the template's keys and values.

The template before the first message is the same for every conversation, so its keys and values are computed once
and expanded per batch. The margin is taken in float32 from the label position's hidden state, so that scores of
half-precision models do not collapse into ties.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import DynamicCache

from guardloop.errors import GuardLoopError
from guardloop.guard.facts import guard_facts
from guardloop.guard.family import family_of
from guardloop.guard.policy import read_policy
from guardloop.guard.prompt import GuardPrompt, Renderer
from guardloop.guard.settings import GuardSettings
from guardloop.guard.verdict import LabelTokens, label_tokens
from guardloop.models import load_causal_lm, load_tokenizer, locate, pick_device, pick_dtype
from guardloop.records import Row, chunks

WINDOW = 1024  # conversations sorted by length at a time
MASS_SAMPLE = 256  # conversations before the label mass is judged


@dataclass(frozen=True)
class Verdict:
    """What the guard says of one conversation."""

    margin: float | None
    """logit(unsafe) - logit(safe), float32; None where the row could not be judged."""
    label_mass: float | None
    """P(safe) + P(unsafe) at the label position."""
    flagged: bool
    truncated: bool
    error: str | None = None


class Guard:
    """A guard model with its renderer, label tokens and operating point."""

    def __init__(
        self,
        model: Any,
        renderer: Renderer,
        *,
        threshold: float = 0.0,
        batch_tokens: int = 4096,
        min_label_mass: float = 0.95,
        is_guard: bool = True,
        name: str = "guard",
    ) -> None:
        self.model = model
        self.renderer = renderer
        self.threshold = threshold
        self.batch_tokens = batch_tokens
        self.min_label_mass = min_label_mass
        self.is_guard = is_guard
        self.name = name
        self.labels: LabelTokens = label_tokens(renderer)
        self.prefix = renderer.shared_prefix()

    @classmethod
    def load(cls, settings: GuardSettings, adapter: str | Path | None = None) -> "Guard":
        """Load the guard that `settings` names, with `adapter` (a local folder) in place of its own adapter.

        Raises GuardLoopError for a missing, gated or unfitting model.
        """
        device = pick_device(settings.device)
        location = locate(settings.base)
        adapter_folder = Path(adapter) if adapter else fetch_adapter(settings.adapter)
        facts = {**guard_facts(location), **(guard_facts(adapter_folder) if adapter_folder else {})}
        renderer = load_renderer(settings)
        model = load_causal_lm(
            location, settings.revision, pick_dtype(settings.dtype, device), device, settings.quantization
        )
        if adapter_folder:
            model = attach_adapter(model, adapter_folder)
            if settings.quantization == "none":
                model = model.merge_and_unload()
        if settings.threshold is not None and adapter is None:
            threshold = settings.threshold
        else:
            threshold = float(facts.get("threshold", 0.0))
        return cls(
            model,
            renderer,
            threshold=threshold,
            batch_tokens=settings.batch_tokens,
            min_label_mass=settings.min_label_mass,
            is_guard=settings.is_guard,
            name=settings.base if adapter_folder is None else f"{settings.base} + {adapter_folder.name}",
        )

    def score(self, conversations: Iterable[Row]) -> Iterator[Verdict]:
        """Verdicts for rows with `prompt` and (for the Agent's message) `response`, in order, in bounded memory.

        Raises GuardLoopError once the median label mass shows that this is not a guard's answer.
        """
        masses: list[float] = []
        for window in chunks(conversations, WINDOW):
            verdicts = self._score_window(window)
            if len(masses) < MASS_SAMPLE:
                masses += [v.label_mass for v in verdicts if v.label_mass is not None]
                self._check_mass(masses)
            yield from verdicts

    def _score_window(self, rows: Sequence[Row]) -> list[Verdict]:
        verdicts: list[Verdict | None] = [None] * len(rows)
        prompts: list[tuple[int, GuardPrompt]] = []
        for index, row in enumerate(rows):
            if not (row["prompt"] or "").strip():
                verdicts[index] = Verdict(None, None, False, False, "empty prompt")
            else:
                prompts.append((index, self.renderer.render(row["prompt"], row.get("response"))))
        for batch in self._batches(prompts):
            margins, masses = self._forward([prompt.tokens for _, prompt in batch])
            for (index, prompt), margin, mass in zip(batch, margins, masses, strict=True):
                if isfinite(margin) and isfinite(mass):
                    verdicts[index] = Verdict(margin, mass, margin > self.threshold, prompt.truncated)
                else:  # overflow in half precision, or broken weights; it counts as no label mass at all
                    verdicts[index] = Verdict(None, 0.0, False, prompt.truncated, "the guard's answer is not a number")
        return [v for v in verdicts if v is not None]

    def _batches(self, prompts: list[tuple[int, GuardPrompt]]) -> Iterator[list[tuple[int, GuardPrompt]]]:
        """Batches of like length, each within the token budget; a prompt off the shared prefix goes alone."""
        size = len(self.prefix)
        shared = [p for p in prompts if p[1].tokens[:size] == self.prefix]
        batch: list[tuple[int, GuardPrompt]] = []
        for item in sorted(shared, key=lambda p: len(p[1].tokens)):
            if batch and (len(batch) + 1) * (len(item[1].tokens) - size) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(item)
        if batch:
            yield batch
        for item in prompts:
            if item[1].tokens[:size] != self.prefix:
                yield [item]

    @torch.inference_mode()
    def _forward(self, prompts: list[list[int]]) -> tuple[list[float], list[float]]:
        """Margins and label masses, `float32[B]` each, of prompts `int[T_i]`."""
        hidden = label_hidden(self.model, self.prefix, [[*p, *self.labels.lead] for p in prompts], self._prefix_cache())
        logits = label_logits(self.model, hidden)
        pair = logits[:, [self.labels.safe, self.labels.unsafe]]
        masses = (pair - logits.logsumexp(-1, keepdim=True)).exp().sum(-1)
        return margins_of(self.model, hidden, self.labels).tolist(), masses.tolist()

    def _prefix_cache(self) -> "PrefixCache":
        if not hasattr(self, "_prefix_kv"):
            self._prefix_kv = PrefixCache(self.model, self.prefix)
        return self._prefix_kv

    def _check_mass(self, masses: list[float]) -> None:
        if self.is_guard and masses and median(masses) < self.min_label_mass:
            raise GuardLoopError(
                f"{self.name}: the median label mass is {median(masses):.2f}, under {self.min_label_mass}: "
                "the model does not answer `safe` or `unsafe` here, so its scores mean nothing",
                "check guard.family; for a base model that is not a guard yet set guard.is_guard: false",
            )


class PrefixCache:
    """Keys and values of the shared template, computed once: one `[1, heads, P, D]` pair per layer."""

    def __init__(self, model: Any, prefix: list[int]) -> None:
        self.length = len(prefix)
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        if prefix:
            cache = DynamicCache()
            trunk(model)(input_ids=torch.tensor([prefix], device=model.device), past_key_values=cache, use_cache=True)
            self.layers = [(layer.keys, layer.values) for layer in cache.layers]

    def expand(self, batch: int) -> DynamicCache:
        """The same keys and values for each of `batch` rows."""
        cache = DynamicCache()
        for index, (keys, values) in enumerate(self.layers):
            cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), index)
        return cache


def label_hidden(
    model: Any, prefix: list[int], prompts: list[list[int]], cache: PrefixCache | None = None
) -> torch.Tensor:
    """Hidden states `float[B, H]` at each prompt's last token; gradients flow, through the prefix too.

    Prompts that do not start with `prefix` are taken whole, one at a time.
    """
    shared = all(p[: len(prefix)] == prefix for p in prompts)
    start = len(prefix) if shared else 0
    if start and cache is None:
        cache = PrefixCache(model, prefix)
    rows = [p[start:] for p in prompts]
    width = max(map(len, rows))
    # right padding: a causal model's real tokens never see what follows them, so no mask is needed
    ids = torch.tensor([r + [0] * (width - len(r)) for r in rows], device=model.device)
    positions = torch.arange(start, start + width, device=model.device).expand(len(rows), -1)
    past = cache.expand(len(rows)) if start and cache else None
    hidden = trunk(model)(
        input_ids=ids, position_ids=positions, past_key_values=past, use_cache=past is not None
    ).last_hidden_state
    last = torch.tensor([len(r) - 1 for r in rows], device=model.device)
    picked: torch.Tensor = hidden[torch.arange(len(rows), device=model.device), last]
    return picked


def label_logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """All logits `float32[B, V]` of hidden states `[B, H]`."""
    head: torch.Tensor = model.get_output_embeddings()(hidden)
    return head.float()


def margins_of(model: Any, hidden: torch.Tensor, labels: LabelTokens) -> torch.Tensor:
    """logit(unsafe) - logit(safe), `float32[B]`: the difference of the two rows of the head, taken before rounding."""
    weight = model.get_output_embeddings().weight
    direction = weight[labels.unsafe].float() - weight[labels.safe].float()
    margins: torch.Tensor = hidden.float() @ direction
    return margins


def trunk(model: Any) -> Any:
    """The decoder without its output head, also inside an adapter."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner.get_decoder() if hasattr(inner, "get_decoder") else inner.model


def load_renderer(settings: GuardSettings) -> Renderer:
    """The renderer of the guard that `settings` names, without its weights."""
    location = locate(settings.base)
    family_name = settings.family
    if family_name == "auto":
        family_name = str(guard_facts(location).get("family", "auto"))
    return Renderer(
        load_tokenizer(location, settings.revision),
        family_of(family_name, settings.base),
        read_policy(settings.policy) if settings.policy else None,
        settings.excluded_categories,
        settings.max_text_tokens,
    )


def fetch_adapter(adapter: str | None) -> Path | None:
    """The local folder of an adapter given as a folder, an `s3://` URI or a `models:/` URI."""
    if adapter is None:
        return None
    if adapter.startswith("models:/"):
        from guardloop.registry import resolve_model  # noqa: PLC0415  (MLflow is slow to import and rarely needed here)

        return resolve_model(adapter)
    if adapter.startswith("s3://"):
        from tempfile import mkdtemp  # noqa: PLC0415

        from guardloop.storage import fetch  # noqa: PLC0415

        return fetch(adapter, Path(mkdtemp(prefix="adapter-")))
    return Path(adapter).expanduser()


def attach_adapter(model: Any, folder: Path, trainable: bool = False) -> Any:
    """`model` with the LoRA adapter in `folder`. Raises GuardLoopError if the folder does not hold one that fits."""
    if not (folder / "adapter_model.safetensors").is_file():
        raise GuardLoopError(
            f"no adapter in {folder}", "an adapter has adapter_config.json and adapter_model.safetensors"
        )
    try:
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            stored = {key for key in file.keys() if "lora_" in key}  # noqa: SIM118  (a file, not a dict)
        # peft itself only warns where the adapter has other layers than the model
        if odd := stored.symmetric_difference(k for k in get_peft_model_state_dict(adapted) if "lora_" in k):
            raise ValueError(f"{len(odd)} weights without counterpart, such as {min(odd)}")
    except (RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise GuardLoopError(
            f"the adapter in {folder} does not fit the base model: {' '.join(str(error).split())[:300]}",
            "use the base that its guard.json names",
        ) from error
    return adapted
