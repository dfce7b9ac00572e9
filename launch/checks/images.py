"""Whether the stages' images exist, asked of their registries by this machine's Docker engine and its logins."""

import re

from launch.checks.check import Check

TIMEOUT_SECONDS = 20
Verdicts = dict[str, tuple[str, str]]
"""(why an image is not checked, what to do) by image."""


def check_images(images: list[str]) -> list[Check]:
    """What is in the registries, what is not, and what could not be looked up."""
    there, missing, unknown = _look_up(images)
    checks = [Check("images", "ok", f"{len(there)} in the registry")] if there else []
    if missing:
        remedy = "`make images`, then `make push REGISTRY=...`, from the commit that is submitted"
        checks.append(Check("images", "failed", f"not in the registry: {_in_short(missing)}", remedy))
    for reason in dict.fromkeys(unknown.values()):
        alike = [image for image, its_reason in unknown.items() if its_reason == reason]
        checks.append(Check("images", "not checked", f"{reason[0]}: {_in_short(alike)}", reason[1]))
    return checks


def _look_up(images: list[str]) -> tuple[list[str], list[str], Verdicts]:
    import docker  # noqa: PLC0415
    from docker.errors import APIError, DockerException, NotFound  # noqa: PLC0415

    there, missing, unknown = list[str](), list[str](), Verdicts()
    client = None
    for image in images:
        registry = registry_of(image)
        if not registry:
            unknown[image] = "no registry is named: it must be on the cluster's nodes", "`make load`, or push it"
            continue
        try:
            client = client or docker.from_env(timeout=TIMEOUT_SECONDS)
            client.images.get_registry_data(image)
            there.append(image)
        except NotFound:
            missing.append(image)
        except APIError as error:
            status = error.response.status_code if error.response is not None else 0
            refused = status in (401, 403)
            what = f"{registry} refuses access" if refused else f"{registry} cannot be asked ({error.explanation})"
            unknown[image] = what, f"docker login {registry}" if refused else "check the network and the registry"
        except (AttributeError, TypeError, ValueError):  # docker's own reader, of a file that holds something else
            unknown[image] = "Docker's file of logins cannot be read", "mend config.json in ~/.docker or DOCKER_CONFIG"
        except DockerException:
            remedy = "start Docker, or look into the registry yourself"
            unknown[image] = "no Docker engine is here that could ask the registry", remedy
    return there, missing, unknown


def registry_of(image: str) -> str:
    """The registry that an image's name begins with; empty where it names none."""
    first, slash, _ = image.partition("/")
    return first if slash and ("." in first or ":" in first or first == "localhost") else ""


def _in_short(images: list[str]) -> str:
    """registry/{one,another}:tag where registry and tag are the same for all."""
    parts = [re.fullmatch(r"(.*/)([^/:@]+)(.*)", image) for image in images]
    alike = {(part[1], part[3]) for part in parts if part}
    if len(images) < 2 or not all(parts) or len(alike) > 1:
        return ", ".join(images)
    ((registry, tag),) = alike
    return f"{registry}{{{','.join(part[2] for part in parts if part)}}}{tag}"
