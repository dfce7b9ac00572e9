"""Where a run executes: one file in configs/platform."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from guardloop.config.cluster import ClusterSettings
from guardloop.config.docker import DockerSettings
from guardloop.config.files import read_yaml
from guardloop.config.kubeflow import KubeflowSettings
from guardloop.core.settings import Section, read_section


class PlatformSettings(Section):
    """Where a run executes, and how wide."""

    runner: Literal["subprocess", "docker", "kubeflow"] = "subprocess"
    """Every stage is a process of this machine (subprocess), a container (docker), or a pod of a cluster (kubeflow)."""
    shards: int = Field(default=1, ge=1)
    """Parts in which the traffic is screened and answered side by side."""
    stage_threads: int | None = Field(default=None, ge=1)
    """Processor threads of one stage; by default all cores, divided by the shards that run at once."""
    docker: DockerSettings = DockerSettings()
    """The containers (runner docker)."""
    kubeflow: KubeflowSettings = KubeflowSettings()
    """Kubeflow Pipelines, for `guardloop submit`."""
    cluster: ClusterSettings | None = None
    """The pods of a run and what they find (runner kubeflow)."""

    @model_validator(mode="after")
    def _fits_runner(self) -> Self:
        if (self.runner == "kubeflow") != (self.cluster is not None):
            raise ValueError("runner kubeflow needs a `cluster` section, and no other runner takes one")
        return self


def load_platform(name: str) -> PlatformSettings:
    """Read configs/platform/NAME.yaml, or the file that `name` is a path of."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else Path("configs/platform") / f"{name}.yaml"
    return read_section(PlatformSettings, read_yaml(path, "platform", "configs/platform"), path.name)
