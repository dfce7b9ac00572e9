"""A guard's verdict on every row of a table."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from guardloop.core.progress import Stage
from guardloop.core.records import (
    HELD_OUT_PROMPT,
    Row,
    count_rows,
    judged_schema,
    read_metadata,
    read_table,
    write_table,
)
from guardloop.core.settings import read_section
from guardloop.guard.metadata import thresholds
from guardloop.guard.settings import GuardSettings
from guardloop.stages.files import HELD_OUT, Sections


def screen(
    conversations: str | Path,
    verdicts: str | Path,
    guard: Sections,
    *,
    adapter: str | Path | None = None,
    shard: int = 0,
    shards: int = 1,
    what: str = "screen",
    load: Callable[[], Any] | None = None,
) -> dict[str, float]:
    """Score a table of conversations, or shard `shard` of `shards` of it, with the guard, or with `adapter` on it.

    The table's own columns stay; the verdict's are added. `load` gives the guard where the caller has it already.
    Returns figures for the run's metrics.
    """
    settings = read_section(GuardSettings, guard, "guard")
    schema = judged_schema(conversations)
    masses: list[float] = []
    counts = {"rows": 0, "flagged": 0, "truncated": 0, "unreadable": 0}
    with Stage(what, shard if shards > 1 else None) as stage:
        total = len(range(shard, count_rows(conversations), shards))
        loaded: dict[str, Any] = {}

        def judged() -> Iterator[Row]:
            if not total:
                return
            stage.say("loading the guard")
            loaded["guard"] = model = load() if load else load_guard(settings, adapter)
            rows, again = _shard(conversations, shard, shards), _shard(conversations, shard, shards)
            for row, verdict in stage.track(zip(rows, model.score(again), strict=True), total, "scoring"):
                counts["rows"] += 1
                counts["flagged"] += verdict.flagged
                counts["truncated"] += verdict.truncated
                counts["unreadable"] += verdict.score is None
                if verdict.label_mass is not None:
                    masses.append(verdict.label_mass)
                yield {**row, **verdict.__dict__}

        def metadata() -> Row:
            model = loaded.get("guard")
            points = thresholds({}, settings.threshold, settings.response_threshold)
            if model:
                points = model.threshold, model.response_threshold
            return {
                "data": read_metadata(conversations),
                "guard": settings.base,
                "revision": _base_revision(settings, model),
                "adapter": settings.adapter or "",
                "threshold": points[0],
                "response_threshold": points[1],
                "temperature": model.temperature if model else 1.0,
                "shards": shards,
                "median_label_mass": median(masses) if masses else 1.0,
                **counts,
            }

        write_table(judged(), schema, verdicts, metadata)
        share = counts["flagged"] / max(1, counts["rows"])
        stage.done(counts["rows"], f"{counts['flagged']} flagged ({share:.0%})")
    return {**{k: float(v) for k, v in counts.items()}, "flagged_share": share}


def screen_candidate(
    conversations: str | Path,
    training_set: str | Path,
    verdicts: str | Path,
    held_out: str | Path,
    guard: Sections,
    adapter: str | Path,
    what: str = "screen",
) -> dict[str, float]:
    """Score the test set, and the prompts that were held out of `training_set`, with the candidate."""
    settings = read_section(GuardSettings, guard, "guard")
    load = cache(lambda: load_guard(settings, adapter))
    kept = Path(training_set) / HELD_OUT
    if kept.is_file():
        screen(kept, held_out, guard, adapter=adapter, what="screen held-out prompts", load=load)
    else:  # a training set from elsewhere
        write_table([], judged_schema(HELD_OUT_PROMPT), held_out)
    return screen(conversations, verdicts, guard, adapter=adapter, what=what, load=load)


def load_guard(settings: GuardSettings, adapter: str | Path | None) -> Any:
    """The guard that `settings` names, with `adapter` in place of its own where one is given."""
    from guardloop.guard.engine import Guard  # torch loads for seconds; an empty shard is free

    return Guard.load(settings, adapter)


def _base_revision(settings: GuardSettings, guard: Any) -> str:
    """The commit of the guard's base: as it was pinned, else as the hub gave it; an embedded model's recipe."""
    from guardloop.models.embedded import EMBEDDED
    from guardloop.models.locate import locate

    if settings.base.startswith(EMBEDDED) and guard is not None:
        return Path(locate(settings.base)).name.rpartition("-")[2]
    config = getattr(getattr(guard, "model", None), "config", None)
    return settings.revision or getattr(config, "_commit_hash", None) or ""


def _shard(path: str | Path, shard: int, shards: int) -> Iterator[Row]:
    return (row for index, row in enumerate(read_table(path)) if index % shards == shard)
