"""Rendered overlays, and the questions that tests ask of them."""

import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.root import ROOT

from guardloop.config import load_platform

MANIFESTS = ROOT / "manifests"
VERSIONS = ["1.33", "1.34", "1.35"]
PLATFORM_OF = {"minikube": "minikube", "cluster": "gpu-cluster"}
Object = dict[str, Any]


@functools.cache
def render(folder: Path) -> tuple[Object, ...]:
    """What `kubectl apply -k folder` would send, without a cluster and without a network."""
    if not shutil.which("kubectl"):
        if os.environ.get("CI"):
            pytest.fail("kubectl is missing, and CI must render the manifests")
        pytest.skip("kubectl renders the manifests; install it to test them")
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


class Overlay:
    """A rendered overlay, and the platform that runs on it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.objects = render(MANIFESTS / "overlays" / name)
        platform = load_platform(str(ROOT / "configs" / "platform" / f"{PLATFORM_OF[name]}.yaml"))
        assert platform.cluster
        self.platform, self.cluster = platform, platform.cluster
        example = MANIFESTS / "overlays" / name / "secrets.yaml.example"
        self.examples = list(yaml.safe_load_all(example.read_text("utf-8")))

    def all(self, *kinds: str) -> list[Object]:
        return [o for o in self.objects if o["kind"] in kinds]

    def one(self, kind: str, name: str) -> Object:
        (found,) = [o for o in self.all(kind) if o["metadata"]["name"] == name]
        return found

    def namespace_of_runs(self) -> str:
        return self.one("ServiceAccount", self.cluster.service_account)["metadata"]["namespace"]

    def pods(self) -> list[tuple[Object, Object]]:
        """(workload, pod template) of everything that starts pods."""
        return [(o, o["spec"]["template"]) for o in self.all("Deployment", "StatefulSet", "DaemonSet", "Job")]
