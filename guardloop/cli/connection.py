"""What the commands for a cluster begin with: the connection, the order, the checks."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from guardloop.cli.checkout import use_checkout
from guardloop.cli.terminal import Terminal
from guardloop.config import PlatformSettings, load_platform, load_settings
from guardloop.core.errors import GuardLoopError

if TYPE_CHECKING:
    from launch.checks.check import Check
    from launch.kubeflow.cluster import Cluster
    from launch.kubeflow.submit import Order


def make_order(
    config: Path, pipeline: str, platform: str, where: PlatformSettings, artifacts: list[str] | None, fresh: bool
) -> "Order":
    """All that a run is made of. Raises GuardLoopError for a platform that is no cluster, and for wrong artifacts."""
    use_checkout()
    from launch.kubeflow.submit import prepare

    if not where.cluster:
        clusters = "minikube, gpu-cluster, or a file of yours"
        raise GuardLoopError(f"{platform} is no cluster: it runs on this machine", f"--platform {clusters}")
    given = {}
    for artifact in artifacts or []:
        name, equals, uri = artifact.partition("=")
        if not (name and equals and "://" in uri):
            raise GuardLoopError(f"--artifact {artifact}: not NAME=URI", "for example training_set=s3://bucket/path")
        given[name] = uri
    return prepare(pipeline, load_settings(config), where, config.name, Path(platform).stem, given, fresh)


def platform_of(platform: str | None) -> PlatformSettings:
    """The platform of this name; without one, the defaults."""
    return load_platform(platform) if platform else PlatformSettings()


def connect(
    platform: PlatformSettings, host: str | None, namespace: str | None, experiment: str | None = None
) -> "Cluster":
    """The Kubeflow Pipelines that options, environment and platform name."""
    use_checkout()
    from launch.kubeflow.cluster import Cluster
    from launch.kubeflow.target import find_target

    warnings = Terminal(stderr=True)
    return Cluster(
        find_target(platform, host, namespace, experiment),
        say=lambda words: warnings.print(f"[yellow]{escape(words)}[/]", soft_wrap=True),
    )


def check_needs(cluster: "Cluster", order: "Order", config: Path, force: bool, console: Terminal) -> "list[Check]":
    """Check what the run needs, and say it. Raises GuardLoopError where a check failed, unless it is forced."""
    from launch.checks.check import failures, table
    from launch.checks.cluster import check_all

    checks = check_all(cluster, order.package, load_settings(config))
    console.print(table(checks))
    console.print()
    if failed := failures(checks):
        needless = not set(failed) & {"Kubeflow Pipelines", "access"}
        if force and needless:
            console.print(f"[yellow]going on, although these failed: {escape(', '.join(failed))}[/]", soft_wrap=True)
            return checks
        raise GuardLoopError(
            f"nothing was submitted: {', '.join(failed)}",
            "mend what the table names" + ("; --force submits nevertheless" if needless else ""),
        )
    return checks
