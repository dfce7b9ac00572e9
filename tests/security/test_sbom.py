"""`make sbom` names all that the runtime lock installs."""

import json
import re
import subprocess

import pytest
from support.root import ROOT


@pytest.mark.slow
def test_the_sbom_lists_the_runtime_lock() -> None:
    subprocess.run(["make", "sbom"], cwd=ROOT, check=True, capture_output=True)

    components = json.loads((ROOT / "build/sbom.json").read_text())["components"]
    locked = re.findall(
        r"^([A-Za-z0-9_.-]+)==([^ ;\\]+)", (ROOT / "requirements/runtime.txt").read_text(), re.MULTILINE
    )
    assert {(one["name"].lower(), one["version"]) for one in components} >= {(n.lower(), v) for n, v in locked}
