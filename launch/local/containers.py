"""The stages as containers of this machine: what they see of it, how they end, and how they are stopped.

Every folder that a container sees has its own path there, too, so that paths mean the same inside and outside.
"""

import os
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from guardloop.config.docker import DockerSettings
from guardloop.core.errors import GuardLoopError
from guardloop.core.settings import read_section
from guardloop.responses.settings import ResponderSettings
from launch.images import STAGES, checkout_tag, image_of

LABEL = "io.guardloop.run"
PASSED_ON = re.compile(
    r"(GUARDLOOP|MLFLOW|AWS|HF|OMP)_.+|TOKENIZERS_PARALLELISM|(HTTPS?|NO)_PROXY", re.IGNORECASE
)  # variables that stages know; PATH and PYTHONPATH are the image's own
FILES_NAMED_BY = (
    *("AWS_CA_BUNDLE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_WEB_IDENTITY_TOKEN_FILE"),
    *("CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "MLFLOW_TRACKING_SERVER_CERT_PATH"),
)
SQLITE = re.compile(r"sqlite(?:\+\w+)?:///(.+)")
ENGINE_SECONDS = 20.0


def ready(settings: DockerSettings) -> DockerSettings:
    """`settings` with the tag that a run will use. Raises GuardLoopError if the engine or an image is missing."""
    import docker  # noqa: PLC0415  (for this platform only)
    from docker.errors import DockerException, ImageNotFound  # noqa: PLC0415

    tag = settings.tag or checkout_tag()
    missing = []
    try:
        client = docker.from_env()
        for stage in STAGES:
            image = image_of(stage, settings.registry, tag, gpu=settings.gpus != 0)
            try:
                client.images.get(image)
            except ImageNotFound:
                missing.append(image)
        client.close()
    except DockerException as error:
        raise GuardLoopError(
            f"no Docker engine answers: {error}", "start it and see that you may use it, or run with PLATFORM=local"
        ) from None
    if missing:
        remedy = "`make images` builds them from this checkout; platform files name others with docker.tag"
        raise GuardLoopError(f"images are missing on this machine: {', '.join(missing)}", remedy)
    return settings.model_copy(update={"tag": tag})


def docker_runner(run_id: str, home: Path, arguments: Mapping[str, Any], settings: DockerSettings) -> Any:
    """kfp.local's runner for the run `run_id` with the pipeline's `arguments`; `home` is GuardLoop's folder."""
    from docker.types import DeviceRequest, Mount  # noqa: PLC0415
    from kfp import local  # noqa: PLC0415  (kfp takes a second to import)

    environment = _environment(arguments)
    places = dict.fromkeys(_writable(home, environment), False)
    places |= {path: True for path in _readable(environment, arguments) if path not in places}
    mounts = [Mount(str(path), str(path), type="bind", read_only=only) for path, only in places.items()]
    gpus = [DeviceRequest(count=settings.gpus, capabilities=[["gpu"]])] if settings.gpus else []
    return local.DockerRunner(
        environment=environment,
        mounts=mounts,
        user=settings.user or f"{os.getuid()}:{os.getgid()}",
        working_dir=str(Path.cwd()),
        network_mode=settings.network,
        shm_size=settings.shared_memory,
        device_requests=gpus,
        labels={LABEL: run_id},
        init=True,
        # as on a cluster: nothing writes to the image, and no stage gains a right
        read_only=True,
        tmpfs={"/tmp": "exec,mode=1777"},
        cap_drop=["ALL"],
        security_opt=["no-new-privileges:true"],
    )


class Watch:
    """Watches the containers of a run, as a context: KFP takes some that failed for successes, and stops none.

    Raises GuardLoopError at the end for a container that failed; on the way out of an error, ends those that run.
    """

    def __init__(self, run_id: str) -> None:
        import docker  # noqa: PLC0415

        self._client = docker.from_env()
        self._mine = {"label": f"{LABEL}={run_id}"}
        self._failed: list[str] = []
        self._alive: set[str] = set()
        self._events = self._client.events(filters={**self._mine, "type": "container"}, decode=True)
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._check()
            else:
                self.stop()
        finally:
            self._events.close()
            self._client.close()

    def stop(self) -> None:
        """End the containers that run."""
        from docker.errors import APIError  # noqa: PLC0415

        for container in self._client.containers.list(filters=self._mine):
            with suppress(APIError):  # it ended by itself
                container.kill()

    def _follow(self) -> None:
        for event in self._events:
            container = event["Actor"]["ID"]
            if event["Action"] == "start":
                self._alive.add(container)
            elif event["Action"] == "die":
                self._alive.discard(container)
                attributes = event["Actor"]["Attributes"]
                if attributes["exitCode"] != "0":
                    self._failed.append(f"{attributes['image']} ended with {attributes['exitCode']}")

    def _check(self) -> None:
        deadline = time.monotonic() + ENGINE_SECONDS
        while self._alive and time.monotonic() < deadline:
            time.sleep(0.05)
        if self._failed:
            raise GuardLoopError("; ".join(self._failed), "the lines above are the stage's own")


def _environment(arguments: Mapping[str, Any]) -> dict[str, str]:
    responders = [read_section(ResponderSettings, one, "responders") for one in arguments.get("responders") or []]
    keys = {name for one in responders for name in one.variables()}
    names = {name for name in os.environ if PASSED_ON.fullmatch(name) or name in FILES_NAMED_BY or name in keys}
    return {**{name: os.environ[name] for name in names}, "HOME": str(Path.home())}  # ~ means the same, too


def _writable(home: Path, environment: Mapping[str, str]) -> Iterator[Path]:
    """Folders that stages write to: runs, the cache with unfinished work, downloaded models, MLflow's database."""
    yield home
    yield _made(Path(environment.get("GUARDLOOP_CACHE") or Path.home() / ".cache/guardloop").absolute())
    yield _made(Path(environment.get("HF_HOME") or Path.home() / ".cache/huggingface").absolute())
    if found := SQLITE.fullmatch(environment.get("MLFLOW_TRACKING_URI") or ""):
        yield _made(Path(found[1]).absolute().parent)


def _readable(environment: Mapping[str, str], arguments: Mapping[str, Any]) -> Iterator[Path]:
    """What the configuration and the environment name on this machine."""
    yield from _existing(environment[name] for name in FILES_NAMED_BY if name in environment)
    yield from _existing(["~/.aws"])
    dataset, guard = arguments.get("dataset") or {}, arguments.get("guard") or {}
    tables = [dataset.get(name) or {} for name in ("traffic", "test", "response_test")]
    tables += [one["source"] for one in (arguments.get("evaluation") or {}).get("benchmarks") or []]
    yield from _existing(table["path"] for table in tables if table.get("kind") == "file")
    yield from _existing(guard.get(name) for name in ("base", "adapter", "policy"))
    yield from _existing(one.get("model") for one in arguments.get("responders") or [])


def _existing(names: Iterable[str | None]) -> Iterator[Path]:
    for name in names:
        if name and (path := Path(name).expanduser().absolute()).exists():
            yield path


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)  # Docker would make it, for root
    return folder
