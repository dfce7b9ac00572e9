"""From a training set to an adapter."""

import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from guardloop.core.progress import Stage
from guardloop.core.records import EXAMPLE, read_table
from guardloop.core.settings import read_section
from guardloop.guard.settings import GuardSettings
from guardloop.registry.settings import RegistrySettings
from guardloop.stages.files import EXAMPLES, Sections
from guardloop.training.processes import is_child, train_in_processes
from guardloop.training.settings import TrainingSettings


def train_guard(
    training_set: str | Path,
    adapter: str | Path,
    guard: Sections,
    training: Sections,
    registry: Sections,
    seed: int = 0,
) -> dict[str, float]:
    """Train the candidate: a LoRA adapter folder with its own guard.json. Returns figures.

    Its curves go to MLflow while it trains, where MLFLOW_TRACKING_URI and GUARDLOOP_RUN_ID say where.
    """
    settings = read_section(TrainingSettings, training, "training")
    if settings.processes > 1 and not is_child():
        arguments = {"training_set": str(training_set), "adapter": str(adapter), "seed": seed}
        sections = {"guard": guard, "training": training, "registry": registry}
        return train_in_processes(settings.processes, "guardloop.stages", arguments | sections)
    from guardloop.core.mlflow_server import refuse_old_server
    from guardloop.registry.training_log import TrainingLog
    from guardloop.training.train import train

    examples = list(read_table(Path(training_set) / EXAMPLES, EXAMPLE))
    refuse_old_server(os.environ.get("MLFLOW_TRACKING_URI", ""))  # an hour later it would refuse the adapter
    run_id = os.environ.get("GUARDLOOP_RUN_ID", "")
    curves = TrainingLog(run_id, read_section(RegistrySettings, registry, "registry")) if run_id else None
    with Stage("train_guard") as stage, curves or nullcontext():
        stage.say("loading the baseline, and scoring the validation examples with it")
        started = time.monotonic()

        def watch(number: int, step: Any) -> None:
            metrics = step.metrics()
            name = "" if settings.seeds == 1 else f"seed_{number}/"
            if curves:
                curves.log(step.number, {f"{name}{metric}": value for metric, value in metrics.items()})
            note = f"loss {step.loss:.3f}, {metrics['examples_per_second']:.1f} examples/s"
            stage.report(f"{name}step", step.number, step.total, started, note)

        given = read_section(GuardSettings, guard, "guard")
        trained = train(examples, given, settings, Path(adapter), on_step=watch, seed=seed)
        stage.done(trained.examples, f"{trained.steps} steps, loss {trained.first_loss:.3f} -> {trained.last_loss:.3f}")
    figures = {
        "examples": trained.examples,
        "steps": trained.steps,
        "first_loss": trained.first_loss,
        "last_loss": trained.last_loss,
        "scale": trained.scale,
        "threshold": trained.threshold,
        "response_threshold": trained.response_threshold,
        "temperature": trained.temperature,
        "validation_auprc": trained.validation_auprc or 0.0,
    }
    return {k: float(v) for k, v in figures.items()}
