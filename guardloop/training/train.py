"""From examples to an adapter: split, train, choose seed, strength and thresholds on the validation examples, save."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from guardloop.core.records import Row
from guardloop.guard.adapter_files import CHECKSUM, CONFIG, WEIGHTS, checksum, file_checksum
from guardloop.guard.engine import Guard
from guardloop.guard.inference.forward import is_sharded
from guardloop.guard.loading import attach_adapter, load_renderer
from guardloop.guard.metadata import guard_metadata, thresholds
from guardloop.guard.prompt.renderer import Renderer
from guardloop.guard.prompt.verdict import label_tokens
from guardloop.guard.settings import GuardSettings
from guardloop.models.loading import load_causal_lm, pick_device, pick_dtype
from guardloop.models.locate import fetch_adapter, locate
from guardloop.training.adapter import fresh_adapter, put_back, restart, save_adapter, scaled, trained_tensors
from guardloop.training.calibrate import benign_fpr, ranking, same_share, stricter_point, temperature
from guardloop.training.card import model_card
from guardloop.training.checkpoint import Checkpoints, checkpoint_place
from guardloop.training.examples import Encoded, check_examples, encode, is_replay, split, unsafe_count
from guardloop.training.fit import fit, step_counts
from guardloop.training.settings import TrainingSettings
from guardloop.training.sharding import shard
from guardloop.training.trainer import ValidationResult
from guardloop.training.watch import Step

log = logging.getLogger("guardloop")
CARD, METADATA = "README.md", "guard.json"
OnStep = Callable[[int, Step], None]


@dataclass(frozen=True)
class Trial:
    """One adapter that was tried: a seed, at one strength."""

    seed: int
    scale: float
    validation_auprc: float | None
    benign_fpr: float | None
    chosen: bool = False


@dataclass(frozen=True)
class Trained:
    """What training made, beside the adapter itself."""

    examples: int
    validation_examples: int
    steps: int
    first_loss: float
    last_loss: float
    seed: int
    scale: float
    threshold: float
    response_threshold: float
    temperature: float
    validation_auprc_baseline: float | None
    validation_auprc: float | None
    trials: list[Trial]


@dataclass(frozen=True)
class Choice:
    """One adapter that may be kept."""

    trial: Trial
    scores: np.ndarray
    """Of the validation examples, `float32[N]`."""
    adapter: dict[str, torch.Tensor]
    losses: list[float]


@dataclass
class TrainingRun:
    """The baseline with a trainable adapter, what it is trained and validated on, and how the baseline does there."""

    guard: GuardSettings
    settings: TrainingSettings
    training: list[Row]
    validation: list[Row]
    processes: PartialState
    renderer: Renderer
    model: Any
    metadata: Row
    own_adapter: Path | None
    thresholds: tuple[float, float]
    """The baseline's, of prompts and of responses."""
    encoded: list[Encoded] = field(init=False)
    """The training examples as tokens."""
    baseline_scores: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.encoded = encode(self.training, self.renderer)
        self.baseline_scores = self.scores(self.validation)

    def scores(self, rows: Sequence[Row]) -> np.ndarray:
        """Scores of `rows` with the adapter as it is, `float32[N]`, in order; each process scores its share."""
        self.model.eval()
        guard = Guard(self.model, self.renderer, min_label_mass=0.0)
        rank, count = self.processes.process_index, self.processes.num_processes
        mine = slice(rank, None, count)
        whole = is_sharded(self.model)  # then each process has to make every pass
        verdicts = list(guard.score(rows))[mine] if whole else list(guard.score(rows[mine]))
        numbered = [(rank + n * count, v.score if v.score is not None else 0.0) for n, v in enumerate(verdicts)]
        everyone = sorted(gather_object(numbered)) if count > 1 else numbered
        return np.array([score for _, score in everyone], dtype=np.float32)

    def judged(self, scores: np.ndarray) -> tuple[float | None, float | None]:
        """AUPRC on the validation examples, and the flagged share of the safe ones at the baseline's threshold."""
        return ranking(self.validation, scores), benign_fpr(self.validation, scores, self.thresholds[0])


def train(
    examples: Sequence[Row],
    guard: GuardSettings,
    settings: TrainingSettings,
    folder: Path,
    on_step: OnStep = lambda seed, step: None,
    *,
    seed: int = 0,
    checked: bool = True,
) -> Trained:
    """Train a LoRA adapter for the baseline on `examples` and save it in `folder`.

    The adapter's seed (`seed` and those after it), strength, thresholds and temperature are chosen on validation
    examples. `on_step` gets the seed and the step. Where torchrun started several processes, each calls this, and the
    first one saves.
    Raises GuardLoopError if there are no examples, or of one kind only, unless not `checked`: experiments train on such
    sets to show what becomes of it.
    """
    training, validation = split(examples, settings.validation, seed)
    if checked:
        check_examples(training)
    run = _prepare(training, validation, guard, settings)
    _tell_plan(run)
    data_hash = _hash([dict(row) for row in examples])
    key = _key(run, data_hash)
    initial = trained_tensors(run.model)
    best, trials, stores = None, list[Trial](), list[Checkpoints]()
    for number in range(seed, seed + settings.seeds):
        stores.append(Checkpoints(checkpoint_place(), _hash([*key, number])))
        restart(run.model, initial, number)
        for choice in _train_seed(run, number, stores[-1], on_step):
            trials.append(choice.trial)
            if best is None or (choice.trial.validation_auprc or 0.0) > (best.trial.validation_auprc or 0.0):
                best = choice
    assert best is not None  # there is a seed, and a scale
    trained = _operating_point(run, best, trials)
    if run.processes.is_main_process:
        save_adapter(run.model, trained.scale, folder)
        _describe(run, trained, data_hash, folder)
        for store in stores:
            store.clear()
    run.processes.wait_for_everyone()
    _tell_outcome(run, trained)
    return trained


def _prepare(
    training: list[Row], validation: list[Row], guard: GuardSettings, settings: TrainingSettings
) -> TrainingRun:
    device = pick_device()
    processes = PartialState(cpu=device.type == "cpu")
    base = locate(guard.base)
    own_adapter = fetch_adapter(guard.adapter)
    metadata = {**guard_metadata(base), **(guard_metadata(own_adapter) if own_adapter else {})}
    return TrainingRun(
        guard,
        settings,
        training,
        validation,
        processes,
        load_renderer(guard),
        _load(base, own_adapter, guard, settings, device),
        metadata,
        own_adapter,
        thresholds(metadata, guard.threshold, guard.response_threshold),
    )


def _load(
    base: str, own_adapter: Path | None, guard: GuardSettings, settings: TrainingSettings, device: torch.device
) -> Any:
    """The baseline with a new adapter over its own one, as it is trained."""
    place = torch.device("cpu") if settings.sharded else device  # no GPU has to hold the whole guard
    model = load_causal_lm(base, guard.revision, pick_dtype(device), place, guard.quantization)
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


def _key(run: TrainingRun, data_hash: str) -> list[Any]:
    """All that decides how a training goes, but for its seed."""
    decisive = run.settings.model_dump(mode="json", exclude={"processes", "sharded"})
    tokens = _hash([example.tokens for example in run.encoded])  # show the policy's text, too
    return [data_hash, tokens, run.guard.plain(), *run.thresholds, _digest(run.own_adapter), decisive]


def _train_seed(run: TrainingRun, seed: int, checkpoints: Checkpoints, on_step: OnStep) -> Iterator[Choice]:
    """Train one adapter; it is a choice at each of the strengths."""
    last_validation: tuple[int, np.ndarray] | None = None  # step and scores: spares one pass of scoring at scale 1

    def validate(step: int) -> ValidationResult:
        nonlocal last_validation
        last_validation = step, run.scores(run.validation)
        auprc, fpr = run.judged(last_validation[1])
        log.info("after step %d: AUPRC %s on the validation examples", step, _shown(auprc))
        return ValidationResult(step, auprc, fpr)

    fitted = fit(
        run.model,
        run.renderer.prefixes,
        label_tokens(run.renderer),
        run.encoded,
        run.settings,
        seed,
        on_step=lambda step: on_step(seed, step),
        validate=validate,
        checkpoints=checkpoints,
    )
    adapter, losses = trained_tensors(run.model), [step.loss for step in fitted.steps]
    for scale in run.settings.scales:
        if scale == 1.0 and fitted.best and last_validation and fitted.best.step == last_validation[0]:
            scores = last_validation[1]
        else:
            with scaled(run.model, scale):
                scores = run.scores(run.validation)
        yield Choice(Trial(seed, scale, *run.judged(scores)), scores, adapter, losses)


def _operating_point(run: TrainingRun, best: Choice, trials: Sequence[Trial]) -> Trained:
    """Put the chosen adapter back, and set its thresholds and temperature."""
    put_back(run.model, best.adapter)
    mined = [row for row in run.training if not is_replay(row)]
    with scaled(run.model, best.trial.scale):
        mined_scores = run.scores(mined)
    responses = np.array([row["response"] is not None for row in run.validation], dtype=bool)
    prompt_threshold, response_threshold = run.thresholds
    tenth = max(1, len(best.losses) // 10)
    return Trained(
        examples=len(run.training),
        validation_examples=len(run.validation),
        steps=len(best.losses),
        first_loss=float(np.mean(best.losses[:tenth])),
        last_loss=float(np.mean(best.losses[-tenth:])),
        seed=best.trial.seed,
        scale=best.trial.scale,
        threshold=stricter_point(
            run.validation,
            best.scores,
            run.baseline_scores,
            mined,
            mined_scores,
            prompt_threshold,
            run.settings.max_newly_blocked,
        ),
        response_threshold=same_share(run.baseline_scores[responses], best.scores[responses], response_threshold),
        temperature=temperature(run.validation, best.scores),
        validation_auprc_baseline=ranking(run.validation, run.baseline_scores),
        validation_auprc=best.trial.validation_auprc,
        trials=[replace(trial, chosen=trial is best.trial) for trial in trials],
    )


def _describe(run: TrainingRun, trained: Trained, data_hash: str, folder: Path) -> None:
    """Write what is to be known of the adapter: guard.json for the guard, README.md for people."""
    guard = run.guard
    point = {name: getattr(trained, name) for name in ("threshold", "response_threshold", "temperature")}
    metadata = {
        "family": run.metadata.get("family", guard.family),
        "base": guard.base,
        "base_revision": guard.revision or getattr(run.model.config, "_commit_hash", None),
        "baseline_adapter": guard.adapter,
        "data_hash": data_hash,
        **point,
        "training": {**asdict(trained), "settings": run.settings.plain()},
    }
    metadata[CHECKSUM] = checksum(folder, metadata)
    (folder / METADATA).write_text(json.dumps(metadata, indent=2) + "\n", "utf-8")
    (folder / CARD).write_text(model_card(metadata), "utf-8")


def _tell_plan(run: TrainingRun) -> None:
    settings = run.settings
    per_epoch, total = step_counts(len(run.training), settings)
    log.info(
        "training on %d examples (%d unsafe), %d more for validation: %d steps of %d examples%s, validated every %d",
        *(len(run.training), unsafe_count(run.training), len(run.validation), total, settings.batch_size),
        *(f" for each of {settings.seeds} seeds" if settings.seeds > 1 else "", min(per_epoch, total)),
    )


def _tell_outcome(run: TrainingRun, trained: Trained) -> None:
    log.info(
        "AUPRC on the validation examples: %s, the baseline's %s. Threshold for prompts %.3f (was %.3f), for responses "
        "%.3f (was %.3f). Next: the candidate is compared with the baseline on the test set",
        *(_shown(trained.validation_auprc), _shown(trained.validation_auprc_baseline)),
        *(trained.threshold, run.thresholds[0], trained.response_threshold, run.thresholds[1]),
    )


def _shown(value: float | None) -> str:
    return "not known" if value is None else f"{value:.3f}"


def _digest(adapter: Path | None) -> list[str]:
    return [file_checksum(adapter / name) for name in (CONFIG, WEIGHTS)] if adapter else []


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
