"""One undisturbed round of the loop on tiny models, stage by stage: what every drill starts from and must end with."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.registry_examples import evaluation, origin
from support.workshop import Workshop

from guardloop import stages
from guardloop.config import Settings
from guardloop.core.records import read_table
from guardloop.core.settings import read_section
from guardloop.registry.registry import Registry
from guardloop.registry.settings import RegistrySettings
from guardloop.training import fit

torch.set_num_threads(1)  # as in the processes that drills start

TIMED = {"report.html", "summary.md", "MLmodel", "mlflow.db", "mlflow.db.lock"}
"""Files that tell the time at which they were made, or nothing."""


@dataclass(frozen=True)
class Loop:
    """The folder of a finished round, and the settings that made it."""

    folder: Path
    sections: dict[str, Any]

    def stages(self) -> dict[str, Callable[[Path], object]]:
        """Each stage on the finished round's tables, with its outputs below the folder that it is given."""
        done, s = self.folder, self.sections
        tables = [done / "verdicts"], [done / "judged"]
        return {
            "prepare_data": lambda o: stages.prepare_data(s["dataset"], o / "traffic", o / "test"),
            "screen": lambda o: stages.screen(done / "traffic", o / "verdicts", s["guard"]),
            "generate_responses": lambda o: stages.generate_responses(
                done / "verdicts", o / "responses", s["responders"], max_error_share=1.0
            ),
            "screen responses": lambda o: stages.screen(done / "responses", o / "judged", s["guard"]),
            "mine_feedback": lambda o: stages.mine_feedback(*tables, o / "training_set", s["mining"]),
            "train_guard": lambda o: stages.train_guard(
                done / "training_set", o / "adapter", s["guard"], s["training"], s["registry"]
            ),
            "screen test": lambda o: stages.screen(done / "test", o / "default", s["guard"]),
            "screen_candidate": lambda o: stages.screen_candidate(
                *(done / "test", done / "training_set", o / "candidate", o / "held_out", s["guard"], done / "adapter")
            ),
            "score_benchmarks": lambda o: stages.score_benchmarks(
                done / "training_set", done / "adapter", s["guard"], s["evaluation"], o / "benchmarks"
            ),
            "evaluate": lambda o: stages.evaluate(
                *(done / "default", done / "candidate", done / "training_set", done / "adapter", o / "evaluated"),
                *(s["evaluation"], s["gate"]),
                held_out=done / "held_out",
                benchmarks=done / "benchmarks",
            ),
            "register_model": lambda o: stages.register_model(
                done / "adapter", done / "evaluated", done / "training_set", "a-run", s
            ),
            "record_mining": lambda o: stages.record_mining(done / "training_set", "a-run", s),
            "promote_model": lambda o: stages.promote_model(1, s["registry"]),
        }

    def prepare(self, stage: str, folder: Path) -> None:
        """What has to be in the folder before the stage runs there."""
        folder.mkdir(parents=True, exist_ok=True)
        if stage == "promote_model":
            registry = Registry(RegistrySettings(), database(folder))
            registry.register_adapter(self.folder / "adapter", origin(), evaluation("passed"))


def database(folder: Path) -> str:
    """MLflow's address of a drill."""
    return f"sqlite:///{folder / 'mlflow.db'}"


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, by name; names of MLflow's own making are left out of the names."""
    found: dict[str, str] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in TIMED):
        if any(part.startswith(".partial-") for part in path.parts):  # a folder that a kill left behind
            continue
        name = path.relative_to(folder).as_posix()
        if name.startswith("artifacts/"):
            name = f"artifacts/{path.parent.name}/{path.name}"
        assert name not in found, f"{name} is there twice"
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture(scope="session")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Loop:
    folder = tmp_path_factory.mktemp("loop")
    shop = Workshop(folder / "workshop")
    plain = shop.settings
    settings = read_section(Settings, plain | {"guard": plain["guard"] | {"threshold": 10.0}}, "drill")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GUARDLOOP_CACHE", str(folder / "cache"))
        patch.setattr(fit, "CHECKPOINT_STEPS", 1)
        first = Loop(folder / "first", settings.sections())
        (folder / "first").mkdir()
        for stage in ("prepare_data", "screen", "generate_responses", "screen responses"):
            first.stages()[stage](first.folder)
        tables = (first.folder / "verdicts", first.folder / "judged")
        scores = sorted(row["score"] for table in tables for row in read_table(table))
        guard = plain["guard"] | {"threshold": scores[len(scores) // 2]}  # half of everything passes
        training = plain["training"] | {"epochs": 4, "batch_size": 4}
        sections = read_section(Settings, plain | {"guard": guard, "training": training}, "drill").sections()
        done = Loop(folder / "done", sections)
        (folder / "done").mkdir()
        for name, stage in done.stages().items():
            if name not in ("register_model", "record_mining", "promote_model"):
                stage(done.folder)
    return done
