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
from guardloop.guard.prompt.renderer import Renderer
from guardloop.guard.prompt.verdict import UNSAFE, LabelTokens, label_tokens, parse_verdict
from guardloop.guard.settings import GuardSettings
from guardloop.models.loading import load_causal_lm, pick_device, pick_dtype
from guardloop.models.locate import fetch_adapter, locate

WINDOW = 4096  # conversations sorted into packs or batches at a time
MASS_SAMPLE = 256  # conversations before the label mass is judged
LONGEST_ANSWER = 24  # tokens of `unsafe` and its codes


@dataclass(frozen=True)
class Verdict:
    """What the guard says of one conversation."""

    score: float | None
    """logit(unsafe) - logit(safe), float32; None where the row could not be judged."""
    label_mass: float | None
    """P(safe) + P(unsafe) at the label position."""
    flagged: bool
    truncated: bool
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
        """Render a window and send it through the model; nothing is waited for."""
        judged = [i for i, row in enumerate(rows) if (row["prompt"] or "").strip()]
        prompts = self.renderer.render_all([(rows[i]["prompt"], rows[i].get("response")) for i in judged])
        tokens = [[*prompt.tokens, *self.labels.before] for prompt in prompts]
        limits = [self.threshold if rows[i].get("response") is None else self.response_threshold for i in judged]
        return Started(len(rows), judged, tokens, limits, [p.truncated for p in prompts], self.scorer.score(tokens))

    def _finish(self, started: Started, masses: list[float]) -> list[Verdict]:
        verdicts = [Verdict(None, None, False, False, "empty prompt")] * started.rows
        for indices, scores, label_masses in started.scored:
            for index, score, mass in zip(indices, scores.tolist(), label_masses.tolist(), strict=True):
                limit, truncated = started.limits[index], started.truncated[index]
                verdicts[started.judged[index]] = self._verdict(score, mass, limit, truncated)
        if len(masses) < MASS_SAMPLE:
            masses += [v.label_mass for v in verdicts if v.label_mass is not None]
            self._check_mass(masses)
        if self.categories:
            self._add_categories(verdicts, started)
        return verdicts

    def _verdict(self, score: float, mass: float, limit: float, truncated: bool) -> Verdict:
        if not (isfinite(score) and isfinite(mass)):
            # overflow in half precision, or broken weights; it counts as no label mass at all
            return Verdict(None, 0.0, False, truncated, "the guard's answer is not a number")
        probability = 1 / (1 + exp(min(-score / self.temperature, 700.0)))
        return Verdict(score, mass, score > limit, truncated, None, probability)

    def _add_categories(self, verdicts: list[Verdict], started: Started) -> None:
        """A second pass over the flagged rows: what the guard writes after `unsafe`, token by token."""
        flagged = {index for index, row in enumerate(started.judged) if verdicts[row].flagged}
        unsafe = self.renderer.answer(UNSAFE)[len(self.labels.before) :]
        written = {index: list(unsafe) for index in flagged}
        open_rows = sorted(flagged)
        while open_rows and len(written[open_rows[0]]) < LONGEST_ANSWER:
            prompts = [[*started.tokens[index], *written[index]] for index in open_rows]
            for index, token in zip(open_rows, self.scorer.next_tokens(prompts), strict=True):
                written[index].append(token)
            open_rows = [index for index in open_rows if written[index][-1] not in self.renderer.ends]
        for index in flagged:
            text = self.renderer.tokenizer.decode(written[index], skip_special_tokens=True)
            read = parse_verdict(text, self.renderer.codes)
            row = started.judged[index]
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
class Started:
    """A window on its way through the model."""

    rows: int
    judged: list[int]
    """The rows that are judged; all below is indexed by these."""
    tokens: list[list[int]]
    limits: list[float]
    """Scores above which they are flagged."""
    truncated: list[bool]
    scored: list[Scored]
