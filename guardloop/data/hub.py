"""Rows of a Hugging Face dataset."""

import re
from collections.abc import Iterator

from guardloop.core.errors import GuardLoopError, first_line
from guardloop.core.records import Row
from guardloop.data.settings import SourceSettings

SPLITS = re.compile(r"[Aa]vailable splits: (\[.*?\])")
SHOWN = 12


def hub_rows(source: SourceSettings, where: str) -> Iterator[Row]:
    """Stream the rows. Raises GuardLoopError where the dataset, its configuration or its split cannot be read."""
    from datasets import load_dataset  # noqa: PLC0415  (slow to import; files do not need it)
    from httpx2 import HTTPError  # noqa: PLC0415  (what the hub's client raises where it has no answer)

    try:
        yield from load_dataset(
            source.path, source.config, split=source.split, revision=source.revision, streaming=True
        )
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        raise _explained(error, source, where) from error


def _explained(error: Exception, source: SourceSettings, where: str) -> GuardLoopError:
    text = str(error)
    if "gated" in text.lower():
        return GuardLoopError(
            f"{where}: access to the gated dataset {source.path} was refused",
            f"accept its terms at huggingface.co/datasets/{source.path}, then set HF_TOKEN",
        )
    if splits := SPLITS.search(text):
        return GuardLoopError(
            f"{where}: {source.path} has no split {source.split!r}; it has {_listed(splits[1])}",
            "choose one of them with `split`",
        )
    if "Config name is missing" in text or "BuilderConfig" in text:
        names = ", ".join(_configurations(source)) or first_line(error)
        missing = f"no configuration {source.config!r}; it has" if source.config else "several configurations:"
        return GuardLoopError(f"{where}: {source.path} has {missing} {names}", "choose one of them with `config`")
    return GuardLoopError(
        f"{where}: cannot read {source.path} from the hub: {first_line(error)}",
        "check the id, configuration, split and network; a local file works too (kind: file)",
    )


def _configurations(source: SourceSettings) -> list[str]:
    from datasets import get_dataset_config_names  # noqa: PLC0415

    try:
        return list(get_dataset_config_names(source.path, revision=source.revision))
    except Exception:  # noqa: BLE001  (the first error is what is reported)
        return []


def _listed(text: str) -> str:
    names = re.findall(r"'([^']*)'", text)
    return ", ".join(names[:SHOWN]) + (" and more" if len(names) > SHOWN else "")
