"""What a guard says of itself in the file beside its weights."""

import json
from math import isfinite
from pathlib import Path
from typing import Any

from guardloop.errors import GuardLoopError


def guard_facts(folder: str | Path) -> dict[str, Any]:
    """The `guard.json` beside a guard's or adapter's weights: family, threshold, temperature, base; {} where absent."""
    path = Path(folder) / "guard.json"
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise GuardLoopError(f"{path} is not readable JSON: {error}", "restore or delete the file") from None
    if not isinstance(facts, dict):
        raise GuardLoopError(f"{path} must hold a JSON object", "restore or delete the file")
    for name, wanted, fits in (
        ("threshold", "a finite number", _is_finite),
        ("temperature", "a finite number above 0", lambda value: _is_finite(value) and value > 0),
        ("family", "text", lambda value: isinstance(value, str)),
        ("adapter_sha256", "text", lambda value: isinstance(value, str)),
    ):
        if facts.get(name) is not None and not fits(facts[name]):  # a threshold of NaN lets everything pass
            raise GuardLoopError(
                f"{path}: {name} is {str(facts[name])[:80]!r}, not {wanted}", "restore or delete the file"
            )
    return {name: value for name, value in facts.items() if value is not None}


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 and isfinite(value)
