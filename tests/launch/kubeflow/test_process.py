"""The command line as a process, with nothing of it replaced."""

import os
import subprocess
import sys

import pytest
from support.kubeflow_server import KubeflowServer
from support.root import ROOT

ONLY_FOR_A_CLUSTER = {"kfp", "kfp_server_api", "kubernetes", "huggingface_hub"}
PROGRAM = f"import sys, guardloop.cli.main; print({ONLY_FOR_A_CLUSTER} & sys.modules.keys()); guardloop.cli.main.main()"


@pytest.mark.slow
def test_submit_as_a_process(server: KubeflowServer) -> None:
    server.fail("GET", "/healthz", 500)
    server.fail("POST", "/runs", 503, after=True)

    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, "submit", "--platform", "minikube", "--host", server.url],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.startswith("set()\n") and "succeeded" in ended.stdout
    assert len(server.runs) == len(server.versions) == 1
    assert "Warning" not in ended.stderr and ended.stderr.count("trying again") == 2
