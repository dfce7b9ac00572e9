"""What a benchmark ran on, in one line."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def machine() -> str:
    """Processor or GPU, cores, and the versions that matter."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        device = f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"
    found = {"Python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "bitsandbytes", "vllm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return f"{device}; " + ", ".join(f"{name} {number}" for name, number in found.items()) + "."
