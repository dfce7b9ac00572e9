"""The command line as a process, with nothing of it replaced."""

import os
import subprocess
import sys
from pathlib import Path

from kubeflow_server import KubeflowServer

ROOT = Path(__file__).parents[2]


def test_submit_as_a_process(server: KubeflowServer) -> None:
    server.fail("GET", "/healthz", 500)
    server.fail("POST", "/runs", 503, after=True)
    server.plays("SUCCEEDED")

    ended = subprocess.run(
        [sys.executable, "-m", "guardloop.cli", "submit", "--platform", "local", "--host", server.url],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert len(server.runs) == len(server.versions) == 1 and "succeeded" in ended.stdout
    assert "Warning" not in ended.stderr and ended.stderr.count("trying again") == 2


def test_the_command_line_starts_without_what_only_a_cluster_needs() -> None:
    program = "import sys, guardloop.cli; print(*{'kfp', 'kfp_server_api', 'kubernetes', 'torch'} & sys.modules.keys())"

    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)

    assert told.stdout.strip() == ""
