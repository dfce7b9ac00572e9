"""From raw data to the traffic and the locked test set."""

from pathlib import Path

from guardloop.core.progress import Stage
from guardloop.core.records import CONVERSATION, write_table
from guardloop.core.settings import read_section
from guardloop.data.settings import DatasetSettings
from guardloop.stages.files import Sections


def prepare_data(dataset: Sections, traffic: str | Path, test: str | Path, seed: int = 0) -> dict[str, float]:
    """Write the cleaned traffic and the locked test set. Returns the counts of what was kept and dropped."""
    from guardloop.data.clean import fingerprint, prepare

    settings = read_section(DatasetSettings, dataset, "dataset")
    with Stage("prepare_data") as stage:
        stage.say(f"reading {settings.traffic.name}")
        rows, test_rows, report = prepare(settings, seed)
        notes = [f"labels of {where}: {counts.sentence()}" for where, counts in report.labels.items()] + report.notes
        for note in notes:
            stage.say(note)
        metadata = {
            "dataset": settings.traffic.name,
            "revision": settings.traffic.revision or "",
            "hash": fingerprint([*rows, *test_rows]),
            "salt": report.salt,
            "counts": report.plain(),
            "labels": {where: counts.plain() for where, counts in report.labels.items()},
            "notes": notes,
        }
        write_table(rows, CONVERSATION, traffic, lambda: metadata)
        write_table(test_rows, CONVERSATION, test, lambda: metadata)
        dropped = report.read - report.kept
        stage.done(report.read, f"{report.kept} prompts to screen, {dropped} dropped; {len(test_rows)} test rows")
    return {name: float(value) for name, value in report.plain().items()}
