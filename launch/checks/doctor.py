"""What `guardloop doctor` looks at: this machine, what is installed on it, and what a configuration needs."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from guardloop.config import PlatformSettings, Settings
from guardloop.core.errors import GuardLoopError
from guardloop.core.places import tracking_uri
from guardloop.core.text import without_secrets
from guardloop.data.files import list_files
from launch.checks import preflight
from launch.checks.check import (
    Check,
    Verdict,
    failed,
    hub_models,
    hub_repositories,
    kubeflow,
    look,
    mlflow_server,
    s3_object,
)
from launch.kubeflow.cluster import Cluster
from launch.kubeflow.target import HOST, find_target

GIB = 2**30
MEMORY_GIB = 3.0
"""What the smallest configuration needs: the largest process of configs/demo.yaml took 2.6 GiB (two cores)."""
LOCK = Path("requirements/lock.txt")
SETUP = "make setup"


def examine(settings: Settings, where: PlatformSettings, home: Path) -> list[Check]:
    """Look at everything that a run on this machine will need. Nothing is raised: every finding is a Check."""
    gpus = find_gpus()
    needs = needs_gpu(settings)
    return look(
        [
            lambda: [_machine(), _python(), _packages(settings)],
            lambda: [_memory(), _disk(home), _disk_of_models()],
            lambda: [_driver(gpus, needs), _torch(gpus, needs), *_compiler(gpus)],
            lambda: [_configuration(settings, home)],
            lambda: [_hub_token(settings)],
            lambda: hub_models(settings),
            lambda: _s3(settings),
            lambda: [_mlflow()],
            lambda: _kubeflow(where),
        ]
    )


def _machine() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = f"{platform.system()} {platform.release()}, {platform.machine()}, {cores} cores"
    if platform.system() != "Linux":
        return Check("machine", "not checked", f"{found}: runs are tested on Linux only", "use Linux, or a container")
    return Check("machine", "ok", found)


def _python() -> Check:
    return Check("Python", "ok", f"{platform.python_version()} at {sys.executable}")  # an older one does not get here


def _packages(settings: Settings) -> Check:
    """What is declared, what the configuration needs beside it, and whether versions are those of the lock."""
    name = "packages"
    try:
        declared = importlib.metadata.requires("guardloop") or []
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "failed", "guardloop itself is not installed", SETUP)
    wanted = {re.split(r"[\s;<>=\[]", line)[0] for line in declared if "extra ==" not in line}
    if settings.guard.quantization in ("int8", "nf4"):
        wanted.add("bitsandbytes")
    if any(one.kind == "vllm" for one in settings.responders):
        wanted.add("vllm")
    versions = {package: _version(package) for package in wanted}
    if missing := sorted(package for package, version in versions.items() if version is None):
        remedy = "serve the model and set kind: openai, or: .venv/bin/pip install vllm"
        remedy = remedy if missing == ["vllm"] else SETUP
        return Check(name, "failed", f"not installed: {', '.join(missing)}", remedy)
    locked = dict(re.findall(r"^([\w.-]+)==([^\s;\\]+)", LOCK.read_text("utf-8"), re.M)) if LOCK.is_file() else {}
    differing = [f"{p} {v} (lock: {locked[p]})" for p, v in sorted(versions.items()) if locked.get(p, v) != v]
    if differing:
        return Check(name, "failed", f"other versions than the tests run on: {', '.join(differing)}", SETUP)
    return Check(name, "ok", f"{len(versions)}, in the versions of the lock" if locked else f"{len(versions)}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory() -> Check:
    free = _free_memory()
    if free is None:
        return Check("memory", "not checked", "this system does not say how much is free")
    found = f"{free / GIB:.1f} GiB free"
    if free < MEMORY_GIB * GIB:
        return Check(
            "memory", "failed", f"{found}: the smallest configuration needs {MEMORY_GIB:.0f}", "end other programs"
        )
    return Check("memory", "ok", found)


def _free_memory(proc: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that a new process may take: the machine's, or what a container's limit leaves of them."""
    try:
        available = re.search(r"^MemAvailable:\s+(\d+) kB", proc.read_text("utf-8"), re.M)
    except OSError:
        return None
    free = int(available[1]) * 1024 if available else None
    try:
        limit, used = ((group / name).read_text("utf-8").strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    if limit == "max":
        return free
    left = max(0, int(limit) - int(used))
    return left if free is None else min(free, left)


def _disk(home: Path) -> Check:
    try:
        preflight.check_disk(home)
    except GuardLoopError as error:
        return failed("disk", error)
    return Check("disk", "ok", f"{shutil.disk_usage(home).free / GIB:.1f} GiB free for runs, in {home}")


def _disk_of_models() -> Check:
    """Room where models are kept. How much they need is the hub's business: an 8B model in bfloat16 takes 16 GB."""
    from huggingface_hub.constants import HF_HUB_CACHE  # noqa: PLC0415

    folder = Path(HF_HUB_CACHE).expanduser()
    there = next(place for place in (folder, *folder.parents) if place.is_dir())
    free = shutil.disk_usage(there).free / GIB
    found = f"{free:.1f} GiB free for models of the hub, in {folder}"
    if not os.access(there, os.W_OK):
        return Check("model cache", "failed", f"{there} cannot be written", "set HF_HOME to a folder of yours")
    if free < preflight.FREE_GIB:
        return Check("model cache", "failed", found, "free some, or set HF_HOME to another folder")
    return Check("model cache", "ok", found)


def find_gpus() -> list[dict[str, str]] | None:
    """Name, driver and memory of each GPU, as the driver tells; None where there is no driver that answers."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        printed = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [[part.strip() for part in line.split(",")] for line in printed.splitlines() if line.strip()]
    return [dict(zip(("name", "driver", "memory"), row, strict=False)) for row in rows]


def needs_gpu(settings: Settings) -> list[str]:
    """The settings that cannot be met without a GPU."""
    needs = ["guard.quantization: fp8"] * (settings.guard.quantization == "fp8")
    for one in settings.responders:
        needs += ["kind: vllm"] * (one.kind == "vllm")
    return list(dict.fromkeys(needs))


def _driver(gpus: list[dict[str, str]] | None, needs: list[str]) -> Check:
    if gpus:
        kinds = ", ".join(f"{gpu['name']} ({gpu['memory']})" for gpu in gpus)
        return Check("GPU", "ok", f"{len(gpus)}: {kinds}; driver {gpus[0]['driver']}")
    found = "none: nvidia-smi finds no GPU" if gpus is not None or shutil.which("nvidia-smi") else "none"
    if needs:
        remedy = "use a machine with one (`guardloop submit` runs on a cluster), or another configuration"
        return Check("GPU", "failed", f"{found}, and {', '.join(needs)} needs one", remedy)
    return Check("GPU", "ok", f"{found}; this configuration runs on the processor")


def _torch(gpus: list[dict[str, str]] | None, needs: list[str]) -> Check:
    try:
        import torch  # noqa: PLC0415  (loads for seconds)
    except (ImportError, OSError) as error:
        return Check("torch", "failed", f"cannot be loaded: {str(error).splitlines()[0]}", "make clean setup")
    built = torch.version.cuda or torch.version.hip
    found = f"{torch.__version__}, built for {f'CUDA {built}' if built else 'processors'}"
    if gpus and not built:
        remedy = "make setup TORCH_INDEX=... with the index of a CUDA build"
        return Check("torch", "failed", f"{found}: it cannot use the GPU", remedy)
    if gpus and not torch.cuda.is_available():
        remedy = f"renew the driver ({gpus[0]['driver']}), or take torch for an older CUDA: make setup TORCH_INDEX=..."
        return Check("torch", "failed", f"{found}: it finds no GPU that the driver lets it use", remedy)
    if needs and not gpus:
        return Check("torch", "not checked", f"{found}: there is no GPU to try it on")
    return Check("torch", "ok", found)


def _compiler(gpus: list[dict[str, str]] | None) -> list[Check]:
    """Where there is a GPU: Triton, which runs the guard's compiled layers, builds a small module in C at its start."""
    if not gpus:
        return []
    name, compiler = "C compiler", os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not compiler:
        return [Check(name, "failed", "none: code for the GPU cannot be built", "install gcc, or set CC")]
    if not header.is_file():
        return [Check(name, "failed", f"{compiler}, but no {header}", "install Python's headers: python3-dev")]
    return [Check(name, "ok", compiler)]


def _configuration(settings: Settings, home: Path) -> Check:
    """The files, keys and names that a run looks at before it starts."""
    try:
        preflight.check(settings, home)
    except GuardLoopError as error:
        return failed("configuration", error)
    return Check("configuration", "ok", "its files, policy and keys are there")


def _hub_token(settings: Settings) -> Check:
    """Whether the hub knows this machine's token. Without models of the hub none is needed."""
    from huggingface_hub import get_token  # noqa: PLC0415  (takes a second to import)

    name, used = "hub token", any(hub_repositories(settings))
    if not used:
        return Check(name, "ok", "none is needed")
    if not get_token():
        remedy = "make one at huggingface.co/settings/tokens, then: export HF_TOKEN=..."
        return Check(name, "not checked", "none: only what is public can be read", remedy)
    return Check(name, *_hub_account())


def _hub_account() -> tuple[Verdict, str, str]:
    from httpx2 import HTTPError, InvalidURL  # noqa: PLC0415
    from huggingface_hub import HfApi  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

    try:
        account = HfApi(endpoint=os.environ.get("HF_ENDPOINT")).whoami().get("name", "an account without a name")
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no status"
        if status == 401:
            remedy = "make a new one at huggingface.co/settings/tokens, then: export HF_TOKEN=..."
            return "failed", "the hub does not know it: it is mistyped, or expired", remedy
        return "not checked", f"the hub answered {status}", "try again later"
    except (HTTPError, InvalidURL, OSError) as error:
        found = f"the hub cannot be reached ({type(error).__name__})"
        return "not checked", found, "check the network and HF_ENDPOINT"
    return "ok", f"of {account}", ""


def _s3(settings: Settings) -> list[Check]:
    sources = [(where, source.path) for where, source in settings.sources() if source.path.startswith("s3://")]
    found = [s3_object(f"S3, {where}", path, partial(list_files, where=where)) for where, path in sources]
    if settings.guard.adapter and settings.guard.adapter.startswith("s3://"):
        found.append(s3_object("S3, guard.adapter", settings.guard.adapter))
    return found or [Check("S3", "ok", "no s3:// address is used")]


def _mlflow() -> Check:
    uri = tracking_uri()
    kind = urlsplit(uri).scheme
    if kind in ("http", "https"):
        return mlflow_server(uri)
    if kind != "sqlite":
        return Check("MLflow", "not checked", f"{without_secrets(uri)}: only servers and SQLite files can be looked at")
    file = Path(uri.removeprefix("sqlite:///"))
    place = next(place for place in (file.absolute(), *file.absolute().parents) if place.exists())
    if not os.access(place, os.W_OK):
        return Check("MLflow", "failed", f"{place} cannot be written", "set GUARDLOOP_HOME, or MLFLOW_TRACKING_URI")
    return Check("MLflow", "ok", f"a file of this machine, {file}{'' if file.exists() else ' (made by the first run)'}")


def _kubeflow(where: PlatformSettings) -> list[Check]:
    """Kubeflow Pipelines, where an address is set."""
    if not (os.environ.get(HOST) or where.kubeflow.host):
        return [Check("Kubeflow Pipelines", "ok", f"not used: {HOST} is not set")]
    try:
        return kubeflow(Cluster(find_target(where), say=lambda _: None))
    except GuardLoopError as error:
        return [failed("Kubeflow Pipelines", error)]
