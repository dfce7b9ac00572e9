"""Settings of a Kubernetes cluster: what each stage's pod gets, and what it finds there."""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from guardloop.core.settings import Section

StageName = Literal[
    "prepare-data", "screen", "generate-responses", "mine-feedback", "train-guard", "evaluate", "register-model"
]
UNITS = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
UNITS |= {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
DNS_NAME = r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$"
VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*$"
TAG = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$"
REGISTRY = r"^[A-Za-z0-9][A-Za-z0-9._-]*(:[0-9]+)?(/[a-z0-9]([a-z0-9._-]*[a-z0-9])?)*$"
GPU_TYPE = r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$"


def amount(quantity: str) -> float:
    """The number that a Kubernetes quantity such as `500m` or `2Gi` stands for. Raises ValueError for other text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-zA-Z]*)", quantity)
    if not match or match[2] not in UNITS or not float(match[1]):
        raise ValueError(f"{quantity!r} is not a quantity such as 500m, 2 or 16Gi")
    return float(match[1]) * UNITS[match[2]]


def _quantity(value: str) -> str:
    amount(value)
    return value


def _never_latest(tag: str) -> str:
    if tag == "latest":
        raise ValueError("`latest` moves, and results cached for one image would be served for another; name a commit")
    return tag


Quantity = Annotated[str, AfterValidator(_quantity)]
Tag = Annotated[str, Field(pattern=TAG), AfterValidator(_never_latest)]
KubernetesName = Annotated[str, Field(pattern=DNS_NAME)]
Variable = Annotated[str, Field(pattern=VARIABLE)]


class Toleration(Section):
    """A taint that a pod puts up with."""

    key: str = Field(min_length=1)
    """Key of the taint."""
    operator: Literal["Equal", "Exists"] = "Exists"
    """`Exists` accepts every value of the taint, `Equal` the one given."""
    value: str | None = None
    """Value of the taint (Equal)."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; by default all."""

    @model_validator(mode="after")
    def _value_fits(self) -> Self:
        if (self.value is None) != (self.operator == "Exists"):
            raise ValueError("operator Equal needs a value, and Exists takes none")
        return self


class SpotNodes(Section):
    """How this cluster marks nodes that it may take away at any moment."""

    node_selector: dict[str, str] = {}
    """Labels of such nodes."""
    tolerations: list[Toleration] = []
    """Taints of such nodes."""


class Retries(Section):
    """How often a failed stage starts again, and after how long."""

    count: int = Field(default=2, ge=0, le=20)
    """Attempts after the first one."""
    wait_seconds: int = Field(default=30, ge=0)
    """Pause before the first retry."""
    factor: int = Field(default=2, ge=1, le=10)
    """Each further pause is this many times as long; Argo reads whole numbers only."""


class StageSettings(Section):
    """What one stage's pod gets. Requests are what the scheduler keeps free for it, limits what it may take."""

    cpu: Quantity = "500m"
    """Processors kept free for the pod."""
    cpu_limit: Quantity = "2"
    """Processors that the pod may take."""
    memory: Quantity = "1Gi"
    """Memory kept free for the pod."""
    memory_limit: Quantity = "2Gi"
    """Memory beyond which the pod is ended, and retried."""
    gpus: int = Field(default=0, ge=0, le=16)
    """GPUs of the pod; none are shared."""
    gpu_type: str = Field(default="nvidia.com/gpu", pattern=GPU_TYPE)
    """The resource that the cluster's device plugin offers."""
    node_selector: dict[str, str] = {}
    """Labels that the pod's node must have."""
    tolerations: list[Toleration] = []
    """Taints that the pod's node may have."""
    spot: bool = False
    """Run on the nodes of `spot_nodes`."""
    shared_memory: Quantity | None = None
    """Size of /dev/shm, which counts as memory; by default the container runtime's 64Mi."""
    retries: Retries = Retries()
    """What happens after a failure."""
    timeout_seconds: int = Field(default=3600, ge=60)
    """A pod that runs longer is stopped, and retried."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for what in ("cpu", "memory"):
            request, limit = getattr(self, what), getattr(self, f"{what}_limit")
            if amount(request) > amount(limit):
                raise ValueError(f"{what} {request} is above {what}_limit {limit}")
        if self.shared_memory and amount(self.shared_memory) > amount(self.memory_limit):
            raise ValueError(f"shared_memory {self.shared_memory} is above memory_limit {self.memory_limit}")
        return self


class VariablesFrom(Section):
    """A Secret or ConfigMap whose keys become environment variables."""

    name: KubernetesName
    """Its name in the runs' namespace."""
    keys: dict[str, Variable] = Field(min_length=1)
    """Environment variable by key."""
    optional: bool = False
    """Whether a pod starts without it."""
    stages: list[StageName] = []
    """The stages that get it; by default all."""


class Volume(Section):
    """A PersistentVolumeClaim of the runs' namespace, mounted into stages."""

    claim: KubernetesName
    """Name of the claim."""
    path: str = Field(pattern=r"^/[^:]+$")
    """Where the stages find it."""
    stages: list[StageName] = []
    """The stages that get it; by default all."""


class ClusterSettings(Section):
    """Where the pods of a run come from and what they find. Components never see it; nothing here changes a result."""

    registry: str = Field(default="guardloop", pattern=REGISTRY)
    """Where the images are, without their names: `registry.example.com/safety/guardloop`."""
    tag: Tag | None = None
    """Tag of every image, to which stages with a GPU add `-gpu`; by default the commit that is checked out."""
    pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    """When a node pulls an image; tags never move, so once is enough."""
    pull_secrets: list[KubernetesName] = []
    """Secrets of type kubernetes.io/dockerconfigjson for the registry."""
    service_account: KubernetesName = "guardloop-runner"
    """The stages' account, in the runs' namespace."""
    run_as_user: int | None = Field(default=None, ge=1)
    """User id of the stages; by default that of the image, which must be a number other than 0."""
    environment: dict[Variable, str] = {}
    """Plain variables of every stage. Nothing secret: this is readable in the compiled pipeline."""
    config_maps: list[VariablesFrom] = []
    """Addresses that differ from cluster to cluster."""
    secrets: list[VariablesFrom] = []
    """Credentials, each for the stages that need it."""
    volumes: list[Volume] = []
    """Volumes, such as the cache of models."""
    labels: dict[str, str] = {}
    """Labels of the stages' pods."""
    annotations: dict[str, str] = {}
    """Annotations of the stages' pods."""
    spot_nodes: SpotNodes = SpotNodes()
    """Which nodes stages with `spot` run on."""
    keep_finished_seconds: int = Field(default=86_400, ge=3600)
    """A finished Workflow and its pods are kept this long; logs and artifacts stay in the store."""
    defaults: StageSettings = StageSettings()
    """What every stage gets."""
    stages: dict[StageName, StageSettings] = {}
    """What single stages get instead, setting by setting."""

    @model_validator(mode="after")
    def _spot_is_known(self) -> Self:
        asked = [name for name in (*self.stages, "defaults") if self.stage(name).spot]
        if asked and not (self.spot_nodes.node_selector or self.spot_nodes.tolerations):
            raise ValueError(f"{asked[0]} asks for spot nodes, and spot_nodes does not say which these are")
        for name in self.stages:
            try:
                StageSettings.model_validate(self.stage(name).model_dump())
            except ValueError as error:  # a limit of one and a request of the other may not fit
                raise ValueError(f"stages.{name}: {str(error).splitlines()[2].strip()}") from None
        return self

    def stage(self, name: str) -> StageSettings:
        """The settings of stage `name`: the defaults, with what is set for it alone on top."""
        own = next((settings for stage, settings in self.stages.items() if stage == name), StageSettings())
        return self.defaults.model_copy(update={field: getattr(own, field) for field in own.model_fields_set})
