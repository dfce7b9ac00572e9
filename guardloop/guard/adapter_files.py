"""What an adapter's files may say. They come from elsewhere: peft would import, load and match whatever they name."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import SafetensorError, safe_open

from guardloop.core.errors import GuardLoopError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CHECKSUM = "checksum"
"""The key in guard.json under which training leaves the checksum of the adapter and its operating point."""
OLD_CHECKSUM = "adapter_sha256"
OPERATING_POINT = ("family", "threshold", "response_threshold", "temperature")
FREE = frozenset(
    {
        *("r", "lora_alpha", "lora_dropout", "use_rslora", "fan_in_fan_out", "init_lora_weights"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("rank_pattern", "alpha_pattern", "base_model_name_or_path", "revision", "peft_version", "inference_mode"),
    }
)
"""Settings of a LoRA that describe it. Others bring code, files or further models with them."""
NAMES = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")
NAME = re.compile(r"[\w.-]{1,200}")
WEIGHT = re.compile(r"base_model\.model\.(?P<module>[\w.-]{1,300})\.lora_[AB]\.weight")
MAX_RANK = 4096
REMEDY = "use an adapter that GuardLoop trained, or a plain LoRA from someone you trust"


def check_adapter_files(folder: Path, metadata: dict[str, Any]) -> None:
    """Raises GuardLoopError unless `folder` holds a plain LoRA: matrices A and B of some layers, and nothing else.

    Where `metadata` (its guard.json) has a checksum, it must be that of the files and of the operating point.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise GuardLoopError(f"no adapter in {folder}: {name} is missing", f"an adapter has {CONFIG} and {WEIGHTS}")
    for problem in _problems(_read(folder / CONFIG)):
        raise GuardLoopError(f"{folder / CONFIG}: {problem}", REMEDY)
    adapted_modules(folder)
    if OLD_CHECKSUM in metadata:
        raise GuardLoopError(
            f"{folder} is an adapter of an earlier version: its guard.json has {OLD_CHECKSUM}, not {CHECKSUM}",
            "train it again",
        )
    known = metadata.get(CHECKSUM)
    if known and known != checksum(folder, metadata):
        raise GuardLoopError(
            f"{folder} is not as training wrote it: its checksum differs from guard.json's",
            "take the adapter from the registry again, or train it again; to move a threshold set guard.threshold",
        )


def adapted_modules(folder: Path) -> list[str]:
    """The modules that the adapter's weights belong to. Raises GuardLoopError if there are weights of another kind."""
    try:
        with safe_open(folder / WEIGHTS, "np") as file:
            names = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise GuardLoopError(f"the adapter's {folder / WEIGHTS} is not readable: {error}", REMEDY) from None
    matches = {name: WEIGHT.fullmatch(name) for name in names}
    if foreign := [name for name, match in matches.items() if match is None]:
        raise GuardLoopError(
            f"{folder / WEIGHTS}: a plain LoRA has no {_short(foreign[0])} ({len(foreign)} such weights): it would "
            "replace or change what is not the adapter's",
            REMEDY,
        )
    return sorted({match["module"] for match in matches.values() if match})


def checksum(folder: Path, metadata: dict[str, Any]) -> str:
    """SHA-256, in hexadecimal, of an adapter's files and of the operating point in its guard.json."""
    point = {name: metadata[name] for name in OPERATING_POINT if metadata.get(name) is not None}
    parts = [file_checksum(folder / CONFIG), file_checksum(folder / WEIGHTS), json.dumps(point, sort_keys=True)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def file_checksum(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise GuardLoopError(f"{path} is not readable JSON: {error}", REMEDY) from None
    if not isinstance(config, dict):
        raise GuardLoopError(f"{path} must hold a JSON object", REMEDY)
    return config


def _problems(config: dict[str, Any]) -> Iterator[str]:
    if config.get("peft_type") != "LORA":
        yield f"peft_type is {_short(config.get('peft_type'))}, not LORA"
    plain = LoraConfig(task_type="CAUSAL_LM").to_dict() | {"peft_type": "LORA"}
    for key, value in config.items():
        if key not in FREE and value and value != plain.get(key):
            yield f"{_short(key)} is {_short(value)}, which a plain LoRA has not"
    rank, alpha, dropout = (config.get(key, plain[key]) for key in ("r", "lora_alpha", "lora_dropout"))
    if not _is_number(rank, int) or not 1 <= rank <= MAX_RANK:
        yield f"r is {_short(rank)}, not a rank from 1 to {MAX_RANK}"
    if not _is_number(alpha, int, float) or not 0 <= alpha < 1e6:
        yield f"lora_alpha is {_short(alpha)}, not a strength"
    if not _is_number(dropout, int, float) or not 0 <= dropout < 1:
        yield f"lora_dropout is {_short(dropout)}, not a share"
    if config.get("init_lora_weights", True) not in (True, False):  # other words name ways that read files
        yield f"init_lora_weights is {_short(config['init_lora_weights'])}"
    yield from _odd_names(config)


def _odd_names(config: dict[str, Any]) -> Iterator[str]:
    for key in NAMES:
        # peft takes text for a pattern, and a pattern can run for ever
        value = config.get(key) or []
        if key == "target_modules" and isinstance(value, str):
            continue  # the weights' own names are taken in its place
        if not isinstance(value, list | dict) or not all(isinstance(n, str) and NAME.fullmatch(n) for n in value):
            yield f"{key} is {_short(value)}, not a list of names"
    for key in ("rank_pattern", "alpha_pattern"):
        values = config.get(key) or {}
        if not isinstance(values, dict) or not all(_is_number(v, int) and 1 <= v <= MAX_RANK for v in values.values()):
            yield f"{key} is {_short(values)}, not names with numbers"
    layers = config.get("layers_to_transform")
    numbers = layers if isinstance(layers, list) else [layers] * (layers is not None)
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < MAX_RANK for n in numbers):
        yield f"layers_to_transform is {_short(layers)}, not numbers of layers"


def _is_number(value: Any, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _short(value: Any) -> str:
    return repr(value)[:80]
