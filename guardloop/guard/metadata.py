"""What a guard says of itself in the file beside its weights."""

import json
from math import isfinite
from pathlib import Path
from typing import Any

from guardloop.core.errors import GuardLoopError


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
        ("threshold", "a finite number", _is_finite),
        ("response_threshold", "a finite number", _is_finite),
        ("temperature", "a finite number above 0", lambda value: _is_finite(value) and value > 0),
        ("family", "text", lambda value: isinstance(value, str)),
        ("adapter_sha256", "text", lambda value: isinstance(value, str)),
    ):
        if metadata.get(name) is not None and not fits(metadata[name]):  # a threshold of NaN lets everything pass
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


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 and isfinite(value)
