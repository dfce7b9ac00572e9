"""A compiled pipeline, and what it needs of the cluster that it runs on."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Package:
    """What a compiled pipeline needs of the cluster it runs on."""

    spec: dict[str, Any]
    platform: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Package":
        """Read a compiled pipeline, with its platform part where it has one."""
        spec, *rest = yaml.safe_load_all(path.read_text("utf-8"))
        return cls(spec, rest[0] if rest else {})

    @property
    def name(self) -> str:
        """The pipeline's name."""
        return str(self.spec["pipelineInfo"]["name"])

    def images(self) -> list[str]:
        """The images of its stages."""
        containers = [e.get("container", {}) for e in self.spec.get("deploymentSpec", {}).get("executors", {}).values()]
        return sorted({container["image"] for container in containers if container.get("image")})

    def variable(self, name: str) -> str | None:
        """The value of an environment variable of the stages, where it is written in the package."""
        for executor in self.spec.get("deploymentSpec", {}).get("executors", {}).values():
            for variable in executor.get("container", {}).get("env", []):
                if variable["name"] == name and variable.get("value"):
                    return str(variable["value"])
        return None

    def config_key(self, variable: str) -> tuple[str, str] | None:
        """The config map, and its key, that an environment variable of the stages comes from."""
        for executor in self._pods():
            for use in executor.get("configMapAsEnv", []):
                for entry in use.get("keyToEnv", []):
                    if entry.get("envVar") == variable and use.get("configMapName"):
                        return use["configMapName"], entry["configMapKey"]
        return None

    def runs(self, stage: str) -> bool:
        """Whether the stage, such as generate-responses, is a part of it."""
        return f"exec-{stage}" in self.spec.get("deploymentSpec", {}).get("executors", {})

    def gives(self, stage: str, variable: str) -> bool:
        """Whether the stage gets the environment variable: as it is, from a secret, or from a config map."""
        name = f"exec-{stage}"
        container = self.spec.get("deploymentSpec", {}).get("executors", {}).get(name, {}).get("container", {})
        pod = self._executors().get(name, {})
        mapped = [
            e for field in ("secretAsEnv", "configMapAsEnv") for u in pod.get(field, []) for e in u.get("keyToEnv", [])
        ]
        names = {e["name"] for e in container.get("env", [])} | {e.get("envVar") for e in mapped}
        return variable in names

    def objects(self) -> Iterator[tuple[str, str, set[str]]]:
        """(kind, name, keys) of the secrets, config maps and volumes without which a stage does not start."""
        for executor in self._pods():
            for kind, field, given, key in (
                ("secret", "secretAsEnv", "secretName", "secretKey"),
                ("secret", "secretAsVolume", "secretName", ""),
                ("secret", "imagePullSecret", "secretName", ""),
                ("config map", "configMapAsEnv", "configMapName", "configMapKey"),
                ("config map", "configMapAsVolume", "configMapName", ""),
                ("volume claim", "pvcMount", "constant", ""),
            ):
                for use in executor.get(field, []):
                    if use.get(given) and not use.get("optional"):
                        yield kind, use[given], {entry[key] for entry in use.get("keyToEnv", []) if key}

    def _pods(self) -> Iterable[dict[str, Any]]:
        return self._executors().values()

    def _executors(self) -> dict[str, dict[str, Any]]:
        kubernetes = self.platform.get("platforms", {}).get("kubernetes", {})
        executors: dict[str, dict[str, Any]] = kubernetes.get("deploymentSpec", {}).get("executors", {})
        return executors
