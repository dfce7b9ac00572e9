"""What a run made, recorded and registered; the champion."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from guardloop.core.escaped import unescape
from guardloop.core.progress import Stage
from guardloop.core.records import read_json, read_metadata
from guardloop.core.settings import read_section
from guardloop.evaluation.result import Evaluation
from guardloop.guard.settings import GuardSettings
from guardloop.registry.settings import RegistrySettings
from guardloop.stages.files import (
    BLOCKED_INPUTS,
    EVALUATION,
    EXAMPLES,
    MINING,
    MINING_PAGE,
    REPORT,
    SUMMARY,
    Sections,
)


def record_mining(training_set: str | Path, run_id: str, sections: Sections) -> None:
    """Record in MLflow a run that ended early, as it found too little to train on."""
    from guardloop.registry.registry import Registry

    sections = unescape(sections)
    settings = read_section(RegistrySettings, sections["registry"], "registry")
    with Stage("record_mining") as stage:
        training_set = Path(training_set)
        origin, data = _origin(training_set, run_id, sections)
        Registry(settings).record_run(
            origin, sections, files=_mining_files(training_set), data=data, figures=_figures(training_set)
        )
        stage.done(1, "recorded a run that trained nothing")


def register_model(
    adapter: str | Path, evaluated: str | Path, training_set: str | Path, run_id: str, sections: Sections
) -> int:
    """Record the run in MLflow and register the adapter as the `candidate`. Returns its version."""
    from guardloop.evaluation.wording import use_of_test_set
    from guardloop.registry.registry import Registry
    from guardloop.report.summary import USES

    sections = unescape(sections)
    settings = read_section(RegistrySettings, sections["registry"], "registry")
    with Stage("register_model") as stage:
        stage.say("recording the run")
        evaluated, training_set, adapter = Path(evaluated), Path(training_set), Path(adapter)
        evaluation = read_json(evaluated / EVALUATION, Evaluation)
        origin, data = _origin(training_set, run_id, sections)
        registry = Registry(settings)
        evaluation.test_set_uses = registry.count_uses(evaluation)
        use = use_of_test_set(evaluation.test_set_uses)
        with TemporaryDirectory() as folder:
            report = Path(folder) / REPORT  # the stage that made it cannot ask MLflow
            report.write_text((evaluated / REPORT).read_text("utf-8").replace(USES, f" {use}"), "utf-8")
            files = {REPORT: report, SUMMARY: evaluated / SUMMARY} | _mining_files(training_set)
            registry.record_run(origin, sections, evaluation, files=files, data=data, figures=_figures(training_set))
        guard = read_section(GuardSettings, sections["guard"], "guard")
        version = registry.register_adapter(adapter, origin, evaluation, guard)
        stage.done(1, f"registered as {settings.model} version {version}. {use}")
    return version


def promote_model(version: int, registry: Sections) -> None:
    """Make the version the champion; the one before is kept as `previous`."""
    from guardloop.registry.registry import Registry

    settings = read_section(RegistrySettings, registry, "registry")
    with Stage("promote_model") as stage:
        before = Registry(settings).promote(version)
        was = f"; version {before} is kept as previous" if before else ""
        stage.done(1, f"{settings.model} version {version} is the champion{was}")


def _origin(training_set: Path, run_id: str, sections: Sections) -> tuple[Any, list[Any]]:
    """What a run was made from, and the data that it read."""
    from guardloop.registry.contents import DataSource, Origin

    metadata = read_metadata(training_set / EXAMPLES).get("screened", {})
    data = metadata.get("data", {})
    origin = Origin(
        run_id=run_id,
        git_sha=os.environ.get("GUARDLOOP_GIT_SHA", ""),
        data_hash=data.get("hash", ""),
        base_model=metadata.get("guard", ""),
        base_revision=metadata.get("revision", ""),
    )
    sources = []
    for role in ("traffic", "test") if data else ():
        source = sections.get("dataset", {}).get(role, {})
        uri = ":".join(filter(None, (source.get("kind"), source.get("path"), source.get("revision"))))
        sources.append(DataSource(name=f"{data['dataset']} {role}", digest=data["hash"], role=role, uri=uri))
    return origin, sources


def _mining_files(training_set: Path) -> dict[str, Path]:
    return {name: training_set / name for name in (BLOCKED_INPUTS, MINING, MINING_PAGE)}


def _figures(training_set: Path) -> dict[str, float]:
    from guardloop.report.story import MiningSummary

    mined = read_json(training_set / MINING, MiningSummary)
    names = ("screened", "passed", "responses", "refusals", "blocked")
    figures = {f"mining_{name}": float(getattr(mined, name)) for name in names}
    return figures | {f"examples_{kind}": float(n) for kind, n in mined.counts.items()}
