"""Submitting a run to Kubeflow Pipelines: one pipeline, a version for each commit, a run with the settings."""

import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from guardloop.config import PlatformSettings, Settings
from guardloop.core.errors import GuardLoopError
from guardloop.core.escaped import escape
from launch import pipelines
from launch.kubeflow.cluster import Cluster
from launch.kubeflow.compile import compile_all
from launch.kubeflow.package import Package
from launch.version import Code, code_state


@dataclass(frozen=True)
class Order:
    """All that a run is made of, before anything is sent."""

    pipeline: str
    configuration: str
    package_text: str
    package: Package
    version_name: str
    arguments: dict[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of the compiled pipeline."""
        return hashlib.sha256(self.package_text.encode()).hexdigest()

    @property
    def description(self) -> str:
        """What is written to the version; its digest tells later whether it is the same one."""
        return f"GuardLoop {self.pipeline}, package sha256:{self.digest}"


def prepare(
    pipeline: str,
    settings: Settings,
    platform: PlatformSettings,
    configuration: str,
    platform_name: str,
    artifacts: Mapping[str, str],
    fresh: bool = False,
) -> Order:
    """Compile the pipeline for the platform and gather the run's parameters: a dict for each section of the settings.

    `artifacts` are the addresses of earlier outputs that train and evaluate start from. A `fresh` run takes nothing
    from Kubeflow's cache.
    Raises GuardLoopError for an unknown pipeline, and for artifacts that lack or are too many.
    """
    needed = pipelines.artifacts(pipeline)
    for name in artifacts.keys() ^ set(needed):
        if name in needed:
            raise GuardLoopError(
                f"{pipeline} starts from {name} of an earlier run",
                f"give --artifact {name}=URI, unchanged, as its page shows it",
            )
        raise GuardLoopError(
            f"--artifact {name}: not an input of {pipeline}", f"its inputs: {', '.join(needed) or 'none'}"
        )
    given = {**escape(settings.sections()), "shards": platform.shards}
    arguments = {name: given[name] for name in pipelines.parameters(pipeline)}
    arguments |= {f"{name}_uri": uri for name, uri in artifacts.items()}
    code = code_state()
    with TemporaryDirectory() as folder:
        (compiled,) = compile_all(Path(folder), platform, code.tag, settings, configuration, fresh, pipeline)
        text, package = compiled.read_text("utf-8"), Package.read(compiled)
    order = Order(pipeline, configuration, text, package, "", arguments)
    situation = f"{platform_name}-{Path(configuration).stem}{'-fresh' if fresh else ''}"
    name = _version_name(code, situation, order.digest)
    return replace(order, version_name=name)


def upload(cluster: Cluster, order: Order) -> tuple[Any, bool]:
    """The order's pipeline version, uploaded unless it is there; and whether it was.

    What is there is never replaced: where another package has the name, this one gets its digest after it.
    Raises GuardLoopError if that name is taken, too.
    """
    description = str(order.package.spec["pipelineInfo"].get("description", ""))
    pipeline_id = cluster.pipeline(order.package.name, description)
    with TemporaryDirectory() as folder:
        path = Path(folder, "pipeline.yaml")
        path.write_text(order.package_text, "utf-8")
        for name in (order.version_name, f"{order.version_name}-{order.digest[:8]}"):
            version, reused = cluster.version(pipeline_id, name, path, order.description)
            if not reused or f"sha256:{order.digest}" in (version.description or ""):
                return version, reused
    raise GuardLoopError(
        f"the version {name} of {order.package.name} exists, and was not made from this package",
        "delete it, if no run needs it",
    )


def start(cluster: Cluster, order: Order, version: Any) -> Any:
    """Start a run of the version, in the target's experiment. Returns the run."""
    experiment_id = cluster.experiment(cluster.target.experiment)
    stamp = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    name = f"{order.pipeline}-{Path(order.configuration).stem}-{stamp}"
    described = f"{order.configuration}, version {version.display_name}"
    return cluster.start(name, experiment_id, version, order.arguments, described)


def _version_name(code: Code, situation: str, digest: str) -> str:
    """COMMIT-PLATFORM-CONFIGURATION; with the package's digest where the commit does not say what was compiled."""
    commit = code.commit[:12] or "no-commit"
    unclear = f"-{'changed' if code.commit else 'package'}-{digest[:8]}" if code.changes or not code.commit else ""
    return f"{commit}-{re.sub(r'[^a-z0-9]+', '-', situation.lower()).strip('-')}{unclear}"
