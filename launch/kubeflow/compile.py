"""Compiling the pipelines to KFP's IR YAML, plain or for one platform."""

from pathlib import Path
from typing import Any

from guardloop.config import PlatformSettings, Settings
from guardloop.core.escaped import escape
from launch.images import use_images
from launch.pipelines import Spec, pipelines, tasks_of
from launch.version import code_state


def compile_all(
    folder: Path,
    platform: PlatformSettings | None = None,
    version: str | None = None,
    settings: Settings | None = None,
    configuration: str = "",
    fresh: bool = False,
    only: str | None = None,
) -> list[Path]:
    """Compile each pipeline, or `only` one, into `folder`, for `platform` if it is a cluster. Returns the files.

    `version` is what the stages record and, where the platform names none, the images' tag; by default this checkout's.
    `settings` become the defaults of the pipelines' parameters, and `configuration` is their name in reports.
    `fresh` keeps Kubeflow from taking results out of its cache.
    Raises GuardLoopError if images would have no immutable tag, or a run would grow larger than KFP can show.
    """
    from google.protobuf import json_format  # noqa: PLC0415  (kfp takes a second to import)
    from kfp.compiler import pipeline_spec_builder  # noqa: PLC0415
    from kfp.pipeline_spec import pipeline_spec_pb2  # noqa: PLC0415

    from launch.kubeflow.platform import apply_cluster  # noqa: PLC0415
    from launch.kubeflow.size import check_size  # noqa: PLC0415

    folder.mkdir(parents=True, exist_ok=True)
    defaults: dict[str, Any] = escape(settings.sections()) if settings else {}
    platform = platform or PlatformSettings()
    cluster = platform.cluster
    version = code_state().tag if version is None else version
    docker = platform.docker.model_copy(update={"tag": platform.docker.tag or version})
    paths = []
    for name, pipeline in pipelines().items():
        if only not in (None, name):
            continue
        path = folder / f"{name}.yaml"
        spec = json_format.MessageToDict(pipeline.pipeline_spec)
        pods: Spec = {}
        if cluster:
            pods = apply_cluster(spec, cluster, version, configuration)
            check_size(spec, pods, defaults, platform.shards)
        else:
            use_images(spec["deploymentSpec"]["executors"], docker)
        if fresh:
            for _, _, task in tasks_of(spec):
                task["cachingOptions"] = {}
        _set_defaults(spec, {**defaults, "shards": platform.shards})
        pipeline_spec_builder.write_pipeline_spec_to_file(
            pipeline_spec=json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec()),
            pipeline_description=pipeline.description,
            platform_spec=json_format.ParseDict(pods, pipeline_spec_pb2.PlatformSpec()),
            package_path=str(path),
        )
        paths.append(path)
    return paths


def _set_defaults(spec: Spec, values: dict[str, Any]) -> None:
    """Fill the form that KFP shows of the pipeline."""
    inputs = spec["root"]["inputDefinitions"]["parameters"]
    for name in inputs.keys() & values.keys():
        inputs[name] |= {"defaultValue": values[name], "isOptional": True}
