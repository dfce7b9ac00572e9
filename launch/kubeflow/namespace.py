"""A namespace of the Kubernetes cluster, as far as this machine's credentials reach."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

from urllib3.exceptions import HTTPError

from guardloop.core.errors import GuardLoopError

TIMEOUT = (5, 20)
RUN_LABEL = "pipeline/runid"
NODE_NAME = "workflows.argoproj.io/node-name"
T = TypeVar("T")


class NoAccessError(GuardLoopError):
    """Kubernetes cannot be asked from here: nothing is known, good or bad."""


class Namespace:
    """The objects of one namespace. Methods raise NoAccessError where Kubernetes cannot be asked."""

    def __init__(self, name: str) -> None:
        from kubernetes import client, config  # noqa: PLC0415  (takes a second to import)
        from kubernetes.client.exceptions import ApiException  # noqa: PLC0415

        self.name = name
        self._refusal = ApiException
        settings = client.Configuration()
        try:
            if "KUBERNETES_SERVICE_HOST" in os.environ:
                config.load_incluster_config(client_configuration=settings)
                self.context = "this pod's service account"
            else:
                files = os.environ.get("KUBECONFIG")
                config.load_kube_config(files, client_configuration=settings)
                self.context = f"kubectl's context {config.list_kube_config_contexts(files)[1]['name']}"
        except (config.ConfigException, OSError, ValueError, TypeError, KeyError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise NoAccessError(f"no Kubernetes credentials here ({reason})", "set KUBECONFIG") from None
        settings.retries = 0
        self._core = client.CoreV1Api(client.ApiClient(settings))

    def keys(self, kind: str, name: str) -> set[str] | None:
        """The keys of the `secret` or `config map` called `name`, or None where there is none."""
        read = {"secret": self._core.read_namespaced_secret, "config map": self._core.read_namespaced_config_map}[kind]
        kept = self._ask(lambda: read(name, self.name, _request_timeout=TIMEOUT))
        return None if kept is None else set(kept.data or {})

    def config_map(self, name: str) -> dict[str, str]:
        """The contents of a config map; {} where there is none."""
        kept = self._ask(lambda: self._core.read_namespaced_config_map(name, self.name, _request_timeout=TIMEOUT))
        return dict(kept.data or {}) if kept is not None else {}

    def claim_phase(self, name: str) -> str | None:
        """The phase of a persistent volume claim (Bound, Pending, Lost), or None where there is none."""
        claim = self._ask(
            lambda: self._core.read_namespaced_persistent_volume_claim(name, self.name, _request_timeout=TIMEOUT)
        )
        return None if claim is None else str(claim.status.phase)

    def has_service_account(self, name: str) -> bool:
        """Whether there is such a service account."""
        read = self._core.read_namespaced_service_account
        return self._ask(lambda: read(name, self.name, _request_timeout=TIMEOUT)) is not None

    def pods(self, label: str) -> list[Any]:
        """The pods with a label, oldest first."""
        listing = self._core.list_namespaced_pod
        pods = self._ask(lambda: listing(self.name, label_selector=label, _request_timeout=TIMEOUT))
        return sorted(pods.items if pods else [], key=lambda pod: str(pod.metadata.creation_timestamp))

    def log(self, pod: str, container: str = "main") -> str | None:
        """What a container has printed; None where it has not started or is gone."""
        read = self._core.read_namespaced_pod_log
        return self._ask(lambda: read(pod, self.name, container=container, _request_timeout=TIMEOUT), absent=(400, 404))

    def why_waiting(self, run_id: str) -> dict[str, str]:
        """For each pod of a run that cannot start, why not, by the full name of its node in the run's graph."""
        pending = [pod for pod in self.pods(f"{RUN_LABEL}={run_id}") if pod.status.phase == "Pending"]
        warnings = self._warnings() if pending else {}
        reasons = {}
        for pod in pending:
            node = (pod.metadata.annotations or {}).get(NODE_NAME, "")
            if reason := _reason(pod.status) or warnings.get(pod.metadata.name, ""):
                reasons[node] = reason
        return reasons

    def _warnings(self) -> dict[str, str]:
        """What Kubernetes last warned of, such as a volume that is not there, by the name of the object."""
        listing = self._core.list_namespaced_event
        try:
            events = self._ask(lambda: listing(self.name, field_selector="type=Warning", _request_timeout=TIMEOUT))
        except NoAccessError:
            return {}
        listed = events.items if events else []
        return {event.involved_object.name: f"{event.reason}: {event.message}" for event in listed}

    def _ask(self, question: Callable[[], T], absent: tuple[int, ...] = (404,)) -> T | None:
        try:
            return question()
        except self._refusal as error:
            if error.status in absent:
                return None
            raise NoAccessError(
                f"Kubernetes ({self.context}) answered {error.status} {error.reason}",
                f"check that you may read namespace {self.name}",
            ) from None
        except HTTPError:
            raise NoAccessError(
                f"Kubernetes ({self.context}) does not answer", "check the network and kubectl's context"
            ) from None


def _reason(status: Any) -> str:
    """What keeps a pod from starting: no node for it, an image, a secret, a volume; empty while it is just slow."""
    for condition in status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            return f"{condition.reason}: {condition.message}"
    for container in [*(status.init_container_statuses or []), *(status.container_statuses or [])]:
        waiting = container.state.waiting if container.state else None
        if waiting and waiting.reason not in (None, "PodInitializing", "ContainerCreating"):
            return f"{waiting.reason}: {waiting.message or container.image}"
    return ""
