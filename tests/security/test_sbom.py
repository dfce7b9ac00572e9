"""`make sbom` names what the library and its pipelines run on, in the versions of the lock."""

import json
import subprocess
import sys
from importlib.metadata import requires

from support.root import ROOT

from scripts.locked import package_of, read_lock


def test_the_sbom_lists_what_is_declared_in_the_versions_of_the_lock() -> None:
    subprocess.run([sys.executable, "-m", "scripts.sbom"], cwd=ROOT, check=True, capture_output=True)

    versions = {one["name"]: one["version"] for one in json.loads((ROOT / "build/sbom.json").read_text())["components"]}
    locked = {package.name: package.version for package in read_lock()}
    assert {package_of(requirement) for requirement in requires("guardloop") or []} <= versions.keys()
    assert versions.items() - {("torch", versions["torch"])} <= locked.items()
    assert "pytest" not in versions
