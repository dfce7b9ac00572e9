"""From examples to an adapter: split, train, choose seed, strength and threshold on what was held out, save."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from guardloop.core.errors import GuardLoopError
from guardloop.core.places import cache_folder
from guardloop.core.records import Row
from guardloop.guard.adapter_files import CHECKSUM, CONFIG, WEIGHTS, checksum
from guardloop.guard.engine import Guard
from guardloop.guard.inference.forward import is_sharded
from guardloop.guard.loading import attach_adapter, fetch_adapter, load_renderer
from guardloop.guard.metadata import guard_metadata, thresholds
from guardloop.guard.prompt.renderer import Renderer
from guardloop.guard.prompt.verdict import UNSAFE, label_tokens
from guardloop.guard.settings import GuardSettings
from guardloop.models.loading import load_causal_lm, pick_device, pick_dtype
from guardloop.models.locate import locate
from guardloop.training.adapter import fresh_adapter, put_back, restart, save_adapter, scaled, trained_tensors
from guardloop.training.calibrate import CONTRAST, benign_fpr, ranking, same_share, stricter_point, temperature
from guardloop.training.card import model_card
from guardloop.training.checkpoint import Checkpoints
from guardloop.training.fit import Fitted, Look, fit
from guardloop.training.loss import Encoded
from guardloop.training.settings import TrainingSettings
from guardloop.training.sharding import shard
from guardloop.training.watch import Step

CARD, METADATA = "README.md", "guard.json"


@dataclass(frozen=True)
class Trial:
    """One adapter that was tried: a seed, at one strength."""

    seed: int
    scale: float
    held_out_auprc: float | None
    benign_fpr: float | None
    chosen: bool = False


@dataclass(frozen=True)
class Trained:
    """What training made, beside the adapter itself."""

    examples: int
    held_out: int
    steps: int
    first_loss: float
    last_loss: float
    seed: int
    scale: float
    threshold: float
    response_threshold: float
    temperature: float
    held_out_auprc_baseline: float | None
    held_out_auprc: float | None
    trials: list[Trial]


@dataclass(frozen=True)
class Choice:
    """The best adapter so far."""

    trial: Trial
    scores: np.ndarray
    adapter: dict[str, torch.Tensor]
    fitted: Fitted


def train(
    examples: Sequence[Row],
    guard: GuardSettings,
    settings: TrainingSettings,
    folder: Path,
    on_step: Callable[[int, Step], None] = lambda seed, step: None,
    *,
    checked: bool = True,
) -> Trained:
    """Train a LoRA adapter for the baseline on `examples` and save it in `folder`.

    The adapter's seed, strength, threshold and temperature are chosen on held-out examples. `on_step` is told the
    seed and the step. Where torchrun started several processes, each calls this, and the first one saves.
    Raises GuardLoopError if there are too few examples, or one kind only, unless not `checked`: experiments train
    on such sets to show what becomes of it.
    """
    training, held_out = split(examples, settings.validation, settings.seed)
    _check(training, settings, checked)
    device = pick_device(guard.device)
    processes = PartialState(cpu=device.type == "cpu")
    base = locate(guard.base)
    own_adapter = fetch_adapter(guard.adapter, guard.tracking_uri)
    metadata = {**guard_metadata(base), **(guard_metadata(own_adapter) if own_adapter else {})}
    renderer = load_renderer(guard)
    model = _load(base, own_adapter, guard, settings, device)
    baseline_threshold, default_for_responses = thresholds(metadata, guard.threshold, guard.response_threshold)
    baseline_scores = _scores(model, renderer, held_out, guard, processes)
    encoded = [encode(row, renderer) for row in training]
    data_hash = _hash([dict(row) for row in examples])
    decisive = settings.model_dump(mode="json", exclude={"checkpoints", "processes", "sharded"})
    key = [
        *(data_hash, _hash([example.tokens for example in encoded])),  # the tokens show the policy's content, too
        *(guard.plain(), baseline_threshold, default_for_responses, _digest(own_adapter), decisive),
    ]

    def judged(scores: np.ndarray) -> tuple[float | None, float | None]:
        return ranking(held_out, scores), benign_fpr(held_out, scores, baseline_threshold)

    initial, trials, best = trained_tensors(model), list[Trial](), None
    stores = []
    for seed in range(settings.seed, settings.seed + settings.seeds):
        restart(model, initial, seed)
        looks: dict[int, np.ndarray] = {}

        def look(step: int, looks: dict[int, np.ndarray] = looks) -> Look:
            looks.clear()
            model.eval()
            looks[step] = _scores(model, renderer, held_out, guard, processes)
            return Look(step, *judged(looks[step]))

        stores.append(Checkpoints(settings.checkpoints or str(cache_folder() / "checkpoints"), _hash([*key, seed])))
        fitted = fit(
            model,
            renderer.prefixes,
            label_tokens(renderer),
            encoded,
            settings.model_copy(update={"seed": seed}),
            on_step=lambda step, seed=seed: on_step(seed, step),  # type: ignore[misc]
            look=look,
            checkpoints=stores[-1],
        )
        for scale in settings.scales:
            scores = looks.get(fitted.best.step) if scale == 1.0 and fitted.best else None
            if scores is None:
                with scaled(model, scale):
                    scores = _scores(model, renderer, held_out, guard, processes)
            trials.append(Trial(seed, scale, *judged(scores)))
            if best is None or _rank(trials[-1], settings) > _rank(best.trial, settings):
                best = Choice(trials[-1], scores, trained_tensors(model), fitted)
    assert best is not None  # there is a seed, and a scale
    put_back(model, best.adapter)
    taught = [row for row in training if not row["kind"].startswith("replay")]
    with scaled(model, best.trial.scale):
        taught_scores = _scores(model, renderer, taught, guard, processes)
    responses = np.array([row["response"] is not None for row in held_out], dtype=bool)
    losses = [step.loss for step in best.fitted.steps]
    tenth = max(1, len(losses) // 10)
    trained = Trained(
        examples=len(training),
        held_out=len(held_out),
        steps=len(losses),
        first_loss=float(np.mean(losses[:tenth])),
        last_loss=float(np.mean(losses[-tenth:])),
        seed=best.trial.seed,
        scale=best.trial.scale,
        threshold=stricter_point(
            held_out,
            best.scores,
            baseline_scores,
            taught,
            taught_scores,
            baseline_threshold,
            settings.max_newly_blocked,
        ),
        response_threshold=same_share(baseline_scores[responses], best.scores[responses], default_for_responses),
        temperature=temperature(held_out, best.scores),
        held_out_auprc_baseline=ranking(held_out, baseline_scores),
        held_out_auprc=best.trial.held_out_auprc,
        trials=[Trial(**asdict(trial) | {"chosen": trial is best.trial}) for trial in trials],
    )
    if processes.is_main_process:
        save_adapter(model, trained.scale, folder)
        revision = guard.revision or getattr(model.config, "_commit_hash", None)
        origin = {"family": metadata.get("family", guard.family), "base": guard.base, "base_revision": revision}
        _describe({**origin, "baseline_adapter": guard.adapter, "data_hash": data_hash}, trained, settings, folder)
        for store in stores:
            store.clear()
    processes.wait_for_everyone()
    return trained


def encode(row: Row, renderer: Renderer) -> Encoded:
    """A training example as tokens. Trusted categories are in an optional column `codes`, such as `S1,S9`.

    The baseline's label mass on a replayed row is in an optional column `label_mass`, 1 where it is missing.
    """
    answer: tuple[int, ...] = ()
    if row.get("codes") and row["target"] > CONTRAST:
        written = renderer.answer(f"{UNSAFE}\n{row['codes']}")
        answer = (*written[len(label_tokens(renderer).lead) :], renderer.tokenizer.eos_token_id)
    replayed = row["kind"].startswith("replay")
    mass = row.get("label_mass")
    return Encoded(
        id=row["id"],
        tokens=renderer.render(row["prompt"], row["response"]).tokens,
        target=row["target"],
        weight=row["weight"],
        answer=answer,
        replayed_mass=min(1.0, 1.0 if mass is None else mass) if replayed else None,  # rounding may take it above 1
    )


def split(examples: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Training and held-out examples; a group falls wholly on one side, by a hash of its key and the seed."""

    def held(row: Row) -> bool:
        digest = hashlib.sha256(f"{seed}/{row['group']}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64 < share

    return [r for r in examples if not held(r)], [r for r in examples if held(r)]


def _check(examples: Sequence[Row], settings: TrainingSettings, checked: bool) -> None:
    if not checked:
        return
    if len(examples) < settings.min_examples:
        raise GuardLoopError(
            f"training: {len(examples)} examples are too few (training.min_examples is {settings.min_examples})",
            "screen more traffic, or sample more responses per prompt",
        )
    unsafe = sum(row["target"] > CONTRAST for row in examples)
    if unsafe in (0, len(examples)):
        kind = "safe" if unsafe == 0 else "unsafe"
        raise GuardLoopError(
            f"training: every example is {kind}; such a training set makes a guard that says {kind} to everything",
            "mine both positives and negatives, with replay",
        )


def _load(
    base: str, own_adapter: Path | None, guard: GuardSettings, settings: TrainingSettings, device: torch.device
) -> Any:
    """The baseline with a new adapter over its own one, as it is trained."""
    place = torch.device("cpu") if settings.sharded else device  # no GPU has to hold the whole guard
    model = load_causal_lm(base, guard.revision, pick_dtype(guard.dtype, device), place, guard.quantization)
    _keep_differentiable(model)
    model = fresh_adapter(attach_adapter(model, own_adapter) if own_adapter else model, settings)
    if settings.sharded:
        shard(model, device)
    if settings.gradient_checkpointing:
        model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _keep_differentiable(model: Any) -> None:
    """Keep bitsandbytes from packing 4-bit weights for inference on a CPU, which has no backward pass, when scoring."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _rank(trial: Trial, settings: TrainingSettings) -> tuple[bool, float]:
    return Look(0, trial.held_out_auprc, trial.benign_fpr).rank(settings.fpr_limit)


def _scores(
    model: Any, renderer: Renderer, rows: Sequence[Row], settings: GuardSettings, processes: PartialState
) -> np.ndarray:
    """Scores of `rows`, `float32[N]`, in order; each process scores its share, or all where the model is sharded."""
    rank, count = processes.process_index, processes.num_processes
    guard = Guard(model, renderer, batch_tokens=settings.batch_tokens, pack_tokens=settings.pack_tokens, is_guard=False)
    scored, own = slice(rank, None, count), slice(None)
    if is_sharded(model):  # every process has to make as many passes as the others
        scored, own = own, scored
    verdicts = list(guard.score(rows[scored]))[own]
    mine = [(rank + i * count, v.score if v.score is not None else 0.0) for i, v in enumerate(verdicts)]
    found = sorted(gather_object(mine)) if count > 1 else mine
    return np.array([score for _, score in found], dtype=np.float32)


def _describe(origin: Row, trained: Trained, settings: TrainingSettings, folder: Path) -> None:
    """Write what is to be known of the adapter: guard.json for the guard, README.md for people."""
    point = {name: getattr(trained, name) for name in ("threshold", "response_threshold", "temperature")}
    metadata = {**origin, **point, CHECKSUM: checksum(folder / WEIGHTS)}
    metadata["training"] = {**asdict(trained), "settings": settings.plain()}
    (folder / METADATA).write_text(json.dumps(metadata, indent=2) + "\n", "utf-8")
    (folder / CARD).write_text(model_card(metadata), "utf-8")


def _digest(adapter: Path | None) -> list[str]:
    return [checksum(adapter / name) for name in (CONFIG, WEIGHTS)] if adapter else []


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
