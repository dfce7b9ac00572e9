"""What is checked before anything runs, so that a run does not fail an hour later."""

import os
import shutil
from pathlib import Path

from guardloop.config import Settings
from guardloop.core.errors import GuardLoopError
from guardloop.data.files import list_files
from guardloop.data.settings import SourceSettings
from guardloop.demo import SAMPLE
from guardloop.guard.prompt.family import family_of
from guardloop.guard.prompt.policy import read_policy

FREE_GIB = 2.0


def check(settings: Settings, home: Path) -> None:
    """Raises GuardLoopError for whatever can be seen to fail already: files, family, policy, keys, disk."""
    for where, source in settings.sources():
        _check_source(source, where)
    if settings.guard.family != "auto":
        family_of(settings.guard.family, settings.guard.base)
    elif not settings.guard.base.startswith("embedded:") and not Path(settings.guard.base).is_dir():
        family_of("auto", settings.guard.base)
    if settings.guard.policy:
        read_policy(settings.guard.policy)
    for one in settings.responders:
        if missing := [name for name in one.variables() if not os.environ.get(name)]:
            raise GuardLoopError(
                f"responder {one.tag}: {missing[0]} is not set", f"export {missing[0]} with the endpoint's key"
            )
    check_disk(home)


def _check_source(source: SourceSettings, where: str) -> None:
    if source.kind == "file" and not source.path.startswith("s3://"):
        list_files(source.path, where)
    if source.kind == "sample" and not (SAMPLE / f"{source.path}.jsonl").is_file():
        known = ", ".join(sorted(p.stem for p in SAMPLE.glob("*.jsonl")))
        raise GuardLoopError(f"{where}: the sample has no part {source.path!r}", f"parts: {known}")


def check_disk(home: Path) -> None:
    """Raises GuardLoopError if runs cannot be written to `home`, or there is too little room."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(home).free / 2**30
    except OSError as error:
        raise GuardLoopError(f"cannot write {home}: {error.strerror}", "set GUARDLOOP_HOME to another folder") from None
    if free < FREE_GIB:
        raise GuardLoopError(
            f"{free:.1f} GiB of disk are free at {home}, and a run needs about {FREE_GIB:.0f}",
            "free some, or set GUARDLOOP_HOME to another folder",
        )
