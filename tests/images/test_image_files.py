"""What every image is made from: pinned, hashed, for nobody, and one for each stage of the pipelines."""

import re
import subprocess
from pathlib import Path

import pytest
from support.root import ROOT

from guardloop.config.docker import DockerSettings
from guardloop.core.errors import GuardLoopError
from launch import images
from launch.images import MODEL_STAGES, STAGES, checkout_tag, image_of, stage_of, use_images
from launch.version import code_state
from pipeline import PIPELINES

FOLDERS = sorted(path.parent for path in (ROOT / "images").glob("*/Dockerfile"))
LOCKS = sorted((ROOT / "images").glob("*/*.txt"))
BY_DIGEST = re.compile(r"\w+_IMAGE=[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}")
PINNED = re.compile(r"^([A-Za-z0-9_.-]+)==([^ ;\\]+)", re.MULTILINE)


def test_every_stage_has_an_image_and_every_image_a_stage() -> None:
    named = {stage_of(image) for image in images_of_pipelines()}

    assert named == set(STAGES)
    assert {folder.name for folder in FOLDERS} == {
        *STAGES, "base-cpu", "base-torch", "base-gpu", "generate-responses-vllm",
    }  # fmt: skip


def test_public_images_are_named_by_digest() -> None:
    lines = (ROOT / "images/public.env").read_text().splitlines()

    assert [line for line in lines if not line.startswith("#") and not BY_DIGEST.fullmatch(line)] == []


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_dockerfile_ends_as_nobody_and_names_no_image_itself(folder: Path) -> None:
    lines = [line.strip() for line in (folder / "Dockerfile").read_text().splitlines()]

    assert [line for line in lines if line.startswith("USER")][-1] == "USER 10001:10001"
    assert all(line.startswith("FROM ${") for line in lines if line.startswith("FROM"))
    assert not [line for line in lines if re.search(r"curl|wget|\bADD\b|latest|\bpip install (?!.*--no-deps)", line)]
    assert all("--require-hashes" in line for line in lines if "/locks/requirements.txt" in line and "-r " in line)


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: f"{lock.parent.name}-{lock.stem}")
def test_a_lock_has_hashes_and_the_versions_that_the_tests_run_on(lock: Path) -> None:
    text = lock.read_text()
    tested = dict(PINNED.findall((ROOT / "requirements/runtime.txt").read_text()))
    pins = dict(PINNED.findall(text))

    assert pins
    assert all("--hash=sha256:" in part for part in re.split(r"\n(?=\S+==)", text)[1:])
    assert {name: version for name, version in pins.items() if tested.get(name, version) != version} == {}


def test_images_for_a_gpu_have_what_those_for_a_cpu_have() -> None:
    def asked(folder: str) -> set[str]:
        lines = (ROOT / "images" / folder / "requirements.in").read_text().splitlines()
        return {line.partition("=")[0] for line in lines if re.match(r"\w", line)}

    of_torch = {"fsspec", "networkx", "setuptools", "sympy", "typing-extensions"}  # torch itself brings them
    assert asked("base-torch") - of_torch <= asked("base-gpu")
    assert asked("generate-responses") <= asked("generate-responses-vllm")
    assert " gcc " in (ROOT / "images/base-gpu/Dockerfile").read_text()  # without it Triton does not start


def test_stages_without_a_model_carry_no_torch() -> None:
    for stage in set(STAGES) - MODEL_STAGES:
        names = {name for name, _ in PINNED.findall((ROOT / "images" / stage / "requirements.txt").read_text())}
        assert not names & {"torch", "transformers", "peft"}
        assert f"{stage}=base-cpu" in (ROOT / "scripts/images.sh").read_text()


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


def images_of_pipelines() -> set[str]:
    executors = [e for p in PIPELINES.values() for e in p.pipeline_spec.deployment_spec["executors"].values()]
    return {executor["container"]["image"] for executor in executors if "container" in executor}


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout
