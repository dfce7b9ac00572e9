"""The guard: conversations in, verdicts out, in order and in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import exp, isfinite
from pathlib import Path
from statistics import median
from typing import Any

import torch

from guardloop.core.errors import GuardLoopError
from guardloop.core.records import Row, chunks
from guardloop.guard.inference.float8 import to_float8
from guardloop.guard.inference.scorer import PACK_TOKENS, Scored, Scorer
from guardloop.guard.loading import attach_adapter, load_renderer
from guardloop.guard.metadata import guard_metadata, thresholds
from guardloop.guard.prompt.renderer import MAX_WINDOWS, Renderer
from guardloop.guard.prompt.verdict import UNSAFE, LabelTokens, label_tokens, parse_verdict
from guardloop.guard.settings import GuardSettings
from guardloop.models.loading import load_causal_lm, pick_device, pick_dtype
from guardloop.models.locate import fetch_adapter, locate

WINDOW = 4096  # conversations sorted into packs or batches at a time
MASS_SAMPLE = 256  # conversations before the label mass is judged
MAX_ANSWER_TOKENS = 24  # tokens of `unsafe` and its codes


@dataclass(frozen=True)
class Verdict:
    """What the guard says of one conversation."""

    score: float | None
    """logit(unsafe) - logit(safe), float32; None where the row could not be judged."""
    label_mass: float | None
    """P(safe) + P(unsafe) at the label position."""
    flagged: bool
    """The score is above the threshold, or there is none: what could not be judged never passes."""
    truncated: bool
    """A message was longer than `max_text_tokens`: the verdict is the worst of its windows'."""
    error: str | None = None
    probability: float | None = None
    """P(unsafe) of the two labels, after the guard's calibrated temperature."""
    categories: str | None = None
    """Codes of a flagged message, with commas, where they were asked for."""


class Guard:
    """A guard model with its renderer, label tokens and operating point."""

    def __init__(
        self,
        model: Any,
        renderer: Renderer,
        *,
        threshold: float = 0.0,
        response_threshold: float | None = None,
        temperature: float = 1.0,
        batch_tokens: int | None = None,
        pack_tokens: int = PACK_TOKENS,
        packed: bool | None = None,
        categories: bool = False,
        min_label_mass: float = 0.95,
        name: str = "guard",
    ) -> None:
        """`response_threshold`: by default that of prompts. `packed`: whether conversations are packed; by default on a
        GPU, for models that can be. `categories`: also read those of flagged messages, in a second pass over these.
        """
        self.model = model
        self.renderer = renderer
        self.threshold = threshold
        self.response_threshold = threshold if response_threshold is None else response_threshold
        self.temperature = temperature
        self.categories = categories
        self.min_label_mass = min_label_mass
        self.name = name
        self.labels: LabelTokens = label_tokens(renderer)
        self.scorer = Scorer(
            model,
            renderer.prefixes,
            self.labels,
            batch_tokens=batch_tokens,
            pack_tokens=pack_tokens,
            packed=packed,
        )

    @classmethod
    def load(
        cls,
        settings: GuardSettings | str,
        adapter: str | Path | None = None,
        *,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Guard:
        """Load the guard that `settings` names (or the base model of that id), with `adapter` (a local folder) in
        place of its own adapter. `device` and `dtype` are by default the best that the machine has; `options` are
        `categories`, `packed`, `batch_tokens` and `pack_tokens`, as above.

        Raises GuardLoopError for a missing, gated or unfitting model.
        """
        if isinstance(settings, str):
            settings = GuardSettings(base=settings)
        place = torch.device(device) if device else pick_device()
        location = locate(settings.base)
        adapter_folder = Path(adapter) if adapter else fetch_adapter(settings.adapter)
        metadata = {**guard_metadata(location), **(guard_metadata(adapter_folder) if adapter_folder else {})}
        renderer = load_renderer(settings)
        model = load_causal_lm(location, settings.revision, dtype or pick_dtype(place), place, settings.quantization)
        if adapter_folder:
            model = attach_adapter(model, adapter_folder)
            if settings.quantization in ("none", "fp8"):
                model = model.merge_and_unload()
        if settings.quantization == "fp8":
            model = to_float8(model)
        own = (settings.threshold, settings.response_threshold) if adapter is None else ()
        threshold, response_threshold = thresholds(metadata, *own)
        return cls(
            model,
            renderer,
            threshold=threshold,
            response_threshold=response_threshold,
            temperature=float(metadata.get("temperature", 1.0)),
            min_label_mass=settings.min_label_mass,
            name=settings.base if adapter_folder is None else f"{settings.base} + {adapter_folder.name}",
            **options,
        )

    def score(self, conversations: Iterable[Row]) -> Iterator[Verdict]:
        """Verdicts for rows with `prompt` and (to judge the response) `response`, in order, in bounded memory.

        The last message is judged whole: a long one in up to MAX_WINDOWS overlapping windows, each a forward pass, of
        which the worst counts. A row that cannot be judged has an `error`, is flagged, and fails no other row.
        Raises GuardLoopError once the median label mass shows that this is not a guard's answer.
        """
        masses: list[float] = []
        started: Started | None = None
        for window in chunks(conversations, WINDOW):
            ahead = self._start(window)  # a GPU computes these while the last window's verdicts are used
            if started:
                yield from self._finish(started, masses)
            started = ahead
        if started:
            yield from self._finish(started, masses)

    def _start(self, rows: Sequence[Row]) -> Started:
        """Render a window of rows and send it through the model; nothing is waited for."""
        verdicts = [Verdict(None, None, True, False, _problem(row)) for row in rows]
        judged = [i for i, verdict in enumerate(verdicts) if verdict.error is None]
        conversations = [(rows[i]["prompt"] or "", rows[i].get("response")) for i in judged]
        passes: list[Pass] = []
        for row, (_, response), prompts in zip(
            judged, conversations, self.renderer.render_windows(conversations), strict=True
        ):
            limit = self.threshold if response is None else self.response_threshold
            passes += [Pass(row, [*p.tokens, *self.labels.before], limit, p.truncated) for p in prompts]
            if not prompts:
                verdicts[row] = Verdict(None, None, True, True, f"too long: more than {MAX_WINDOWS} windows")
        return Started(verdicts, passes, self.scorer.score([p.tokens for p in passes]))

    def _finish(self, started: Started, masses: list[float]) -> list[Verdict]:
        verdicts = started.verdicts
        worst: dict[int, int] = {}  # the pass whose verdict is the row's
        for indices, scores, label_masses in started.scored:
            for index, score, mass in zip(indices, scores.tolist(), label_masses.tolist(), strict=True):
                one = started.passes[index]
                verdict, so_far = self._verdict(score, mass, one.limit, one.truncated), verdicts[one.row]
                if one.row not in worst or _is_worse(verdict, so_far):
                    verdicts[one.row], worst[one.row] = verdict, index
        if len(masses) < MASS_SAMPLE:
            masses += [v.label_mass for v in verdicts if v.label_mass is not None]
            self._check_mass(masses)
        if self.categories:
            self._add_categories(verdicts, {row: started.passes[index].tokens for row, index in worst.items()})
        return verdicts

    def _verdict(self, score: float, mass: float, limit: float, truncated: bool) -> Verdict:
        if not (isfinite(score) and isfinite(mass)):
            # overflow in half precision, or broken weights; it counts as no label mass at all
            return Verdict(None, 0.0, True, truncated, "the guard's answer is not a number")
        probability = 1 / (1 + exp(min(-score / self.temperature, 700.0)))
        return Verdict(score, mass, score > limit, truncated, None, probability)

    def _add_categories(self, verdicts: list[Verdict], tokens: dict[int, list[int]]) -> None:
        """A second pass over the flagged rows, given their prompts: what the guard writes after `unsafe`."""
        unsafe = self.renderer.answer(UNSAFE)[len(self.labels.before) :]
        open_rows = sorted(row for row in tokens if verdicts[row].flagged and verdicts[row].error is None)
        written = {row: list(unsafe) for row in open_rows}
        while open_rows and len(written[open_rows[0]]) < MAX_ANSWER_TOKENS:
            prompts = [[*tokens[row], *written[row]] for row in open_rows]
            for row, token in zip(open_rows, self.scorer.next_tokens(prompts), strict=True):
                written[row].append(token)
            open_rows = [row for row in open_rows if written[row][-1] not in self.renderer.ends]
        for row, answer in written.items():
            text = self.renderer.tokenizer.decode(answer, skip_special_tokens=True)
            read = parse_verdict(text, self.renderer.codes)
            verdicts[row] = (
                replace(verdicts[row], categories=",".join(read.categories))
                if read and read.label == "unsafe"
                else replace(verdicts[row], error=f"unreadable categories: {text[:40]!r}")
            )

    def _check_mass(self, masses: list[float]) -> None:
        if masses and median(masses) < self.min_label_mass:
            raise GuardLoopError(
                f"{self.name}: the median label mass is {median(masses):.2f}, under {self.min_label_mass}: "
                "the model does not answer `safe` or `unsafe` here, so its scores mean nothing",
                "check guard.family; for a base model that is not a guard yet set guard.min_label_mass: 0",
            )


@dataclass(frozen=True)
class Pass:
    """One prompt on its way through the model: a row's, or a window's of a row with a long message."""

    row: int
    tokens: list[int]
    limit: float
    """The score above which it is flagged."""
    truncated: bool


@dataclass(frozen=True)
class Started:
    """A window of rows on its way through the model."""

    verdicts: list[Verdict]
    """Those of rows that are not judged; the others' are not known yet."""
    passes: list[Pass]
    scored: list[Scored]


def _problem(row: Row) -> str | None:
    """Why a row cannot be judged."""
    prompt, response = row.get("prompt"), row.get("response")
    for name, text in (("prompt", prompt), ("response", response)):
        if text is not None and not isinstance(text, str):
            return f"{name} is {type(text).__name__}, not text"
    return None if (prompt or "").strip() or (response or "").strip() else "empty prompt"


def _is_worse(verdict: Verdict, other: Verdict) -> bool:
    """Whether a window's verdict takes the place of another's: one that is none counts most, then the highest score."""
    if verdict.score is None or other.score is None:
        return other.score is not None
    return verdict.score > other.score
