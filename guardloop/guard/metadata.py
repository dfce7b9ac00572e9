"""What a guard says of itself in the file beside its weights."""

import json
from math import isnan
from pathlib import Path
from typing import Any

from guardloop.core.errors import GuardLoopError

MAX_THRESHOLD = 60.0
"""A score beyond it is none that a guard gives: such a threshold would flag nothing, or all."""
TEMPERATURES = (0.01, 100.0)


def guard_metadata(folder: str | Path) -> dict[str, Any]:
    """The `guard.json` beside a guard's or adapter's weights (family, thresholds, temperature); {} where absent."""
    path = Path(folder) / "guard.json"
    if not path.is_file():
        return {}
    try:
        metadata = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise GuardLoopError(f"{path} is not readable JSON: {error}", "restore or delete the file") from None
    if not isinstance(metadata, dict):
        raise GuardLoopError(f"{path} must hold a JSON object", "restore or delete the file")
    for name, wanted, fits in (
        ("threshold", f"a number from -{MAX_THRESHOLD:g} to {MAX_THRESHOLD:g}", _is_threshold),
        ("response_threshold", f"a number from -{MAX_THRESHOLD:g} to {MAX_THRESHOLD:g}", _is_threshold),
        ("temperature", "a number from {:g} to {:g}".format(*TEMPERATURES), _is_temperature),
        ("family", "text", lambda value: isinstance(value, str)),
        ("checksum", "text", lambda value: isinstance(value, str)),
    ):
        if metadata.get(name) is not None and not fits(metadata[name]):  # one of NaN or 1e9 lets everything pass
            raise GuardLoopError(
                f"{path}: {name} is {str(metadata[name])[:80]!r}, not {wanted}", "restore or delete the file"
            )
    return {name: value for name, value in metadata.items() if value is not None}


def thresholds(
    metadata: dict[str, Any], threshold: float | None = None, response_threshold: float | None = None
) -> tuple[float, float]:
    """The scores above which a prompt and a response are flagged: as they are set, else as guard.json tells.

    Where neither tells a response's, it is the prompt's, as in guards whose one boundary is for both.
    """
    prompt = float(metadata.get("threshold", 0.0)) if threshold is None else threshold
    response = float(metadata.get("response_threshold", prompt)) if response_threshold is None else response_threshold
    return prompt, response


def _is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and not isnan(value))


def _is_threshold(value: Any) -> bool:
    return _is_number(value) and -MAX_THRESHOLD <= value <= MAX_THRESHOLD


def _is_temperature(value: Any) -> bool:
    return _is_number(value) and TEMPERATURES[0] <= value <= TEMPERATURES[1]
