"""What a guard says of itself in the file beside its weights."""

import json
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
    except (OSError, ValueError) as error:
        raise GuardLoopError(f"{path} is not readable JSON: {error}", "restore or delete the file") from None
    if not isinstance(facts, dict):
        raise GuardLoopError(f"{path} must hold a JSON object", "restore or delete the file")
    return facts
