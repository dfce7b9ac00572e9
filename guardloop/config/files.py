"""Reading the YAML files of configs/."""

import difflib
from pathlib import Path
from typing import Any

import yaml

from guardloop.core.errors import GuardLoopError
from guardloop.core.yaml_reader import load_yaml


def read_yaml(path: str | Path, what: str, folder: str) -> dict[str, Any]:
    """The mapping in a YAML file. Raises GuardLoopError for a file that is missing, unreadable or not a mapping."""
    path = Path(path)
    try:
        values = load_yaml(path.read_text("utf-8"))
    except FileNotFoundError:
        known = {p.stem: str(p) for p in sorted(Path(folder).glob("*.yaml"))}
        near = difflib.get_close_matches(path.stem, known, n=1)
        here = ", ".join(known.values()) or "none"
        hint = f"did you mean {known[near[0]]}?" if near else f"{what} files here: {here}"
        raise GuardLoopError(f"{what}: no such file: {path}", hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise GuardLoopError(f"{what}: cannot read {path}: {error}", "give a YAML file in UTF-8 text") from None
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError) as error:  # as PyYAML raises them
        raise GuardLoopError(
            f"{what}: {path} is not valid YAML: {' '.join(str(error).split())}", f"compare it with a file in {folder}"
        ) from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise GuardLoopError(
            f"{what}: {path} must hold sections, such as `dataset:`", f"compare it with a file in {folder}"
        )
    return values
