"""Settings of the docker platform: the containers in which this machine runs the stages."""

from pydantic import Field, field_validator

from guardloop.config.cluster import REGISTRY
from guardloop.core.settings import Section


class DockerSettings(Section):
    """What each stage's container gets. Nothing here changes a result."""

    registry: str = Field(default="guardloop", pattern=REGISTRY)
    """Where the images are, without their names; those of `make images` are under `guardloop`."""
    tag: str | None = None
    """Tag of every image; by default that of this checkout, as `make images` gives it."""
    gpus: int = Field(default=0, ge=-1)
    """GPUs that stages with a model may use, in images made for them; -1 means all."""
    shared_memory: str = Field(default="1g", pattern=r"^[1-9][0-9]*[bkmg]?$")
    """Size of /dev/shm."""
    network: str = "host"
    """Docker network. `host` reaches services of this machine, such as MLflow or your endpoint, at 127.0.0.1."""
    user: str | None = Field(default=None, pattern=r"^[0-9]+:[0-9]+$")
    """`uid:gid` of the stages; by default yours. A rootless engine wants `0:0`, which is you there."""

    @field_validator("tag")
    @classmethod
    def _never_latest(cls, value: str | None) -> str | None:
        if value == "latest":
            raise ValueError("`latest` moves, and results are cached by image; name a commit")
        return value
