"""Writes build/sbom.json: the packages that the library and its pipelines run on, as CycloneDX (`make sbom`)."""

import json
import re
import sys
import tomllib
from pathlib import Path

from scripts.locked import ROOT, Package, members, package_of, read_lock, select


def main() -> None:
    """Write the file and print its place."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    declared = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    torch = Package(re.findall(r"^torch==.*", (ROOT / "requirements/torch.txt").read_text("utf-8"), re.MULTILINE)[0])
    names = {package_of(requirement) for requirement in declared} - {torch.name}
    packages = [*select(read_lock(), names | members(["kubeflow", "torch-needs"])), torch]
    sbom = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {"type": "library", "name": project["name"], "version": project["version"]}},
        "components": [component(package) for package in sorted(packages, key=lambda package: package.name)],
    }
    path = Path("build/sbom.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(sbom, indent=2) + "\n", "utf-8")
    sys.stdout.write(f"{path}\n")


def component(package: Package) -> dict[str, object]:
    """A package as CycloneDX lists it."""
    return {
        "type": "library",
        "name": package.name,
        "version": package.version,
        "purl": f"pkg:pypi/{package.name}@{package.version}",
    }


if __name__ == "__main__":
    main()
