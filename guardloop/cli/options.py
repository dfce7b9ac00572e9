"""What several commands take, and how they print."""

from pathlib import Path
from typing import Annotated

import typer

from guardloop.cli import choices
from guardloop.cli.terminal import Terminal
from guardloop.config import Settings, load_settings
from guardloop.core.settings import read_section

console = Terminal()
FAILED = 1
DEMO = Path("configs/demo.yaml")

ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", help="Configuration file.", autocompletion=choices.configurations)
]
ConfigArgument = Annotated[Path, typer.Argument(help="Configuration file.", autocompletion=choices.configurations)]
PipelineOption = Annotated[
    str, typer.Option(help="process, train, evaluate or full.", autocompletion=choices.pipelines)
]
PlatformOption = Annotated[
    str,
    typer.Option(help="Where to run: a name in configs/platform, or a file.", autocompletion=choices.platforms),
]
KnownPlatform = Annotated[
    str | None,
    typer.Option("--platform", help="Platform whose `kubeflow` section to use.", autocompletion=choices.platforms),
]
HostOption = Annotated[
    str | None, typer.Option(envvar="KF_PIPELINES_ENDPOINT", help="Kubeflow Pipelines, such as https://host/pipeline.")
]
NamespaceOption = Annotated[str | None, typer.Option(envvar="KF_PIPELINES_NAMESPACE", help="Namespace of the runs.")]
ExperimentOption = Annotated[
    str | None, typer.Option(envvar="KF_PIPELINES_DEFAULT_EXPERIMENT_NAME", help="Experiment of the runs.")
]
ArtifactOption = Annotated[
    list[str] | None,
    typer.Option("--artifact", help="NAME=URI of an earlier output, for train and evaluate; repeat for each."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="As JSON; everything else goes to stderr.")]


def settings_of(config: Path) -> Settings:
    """The settings in a file; outside a checkout, where the demo's is not, every setting's default."""
    return load_settings(config) if config.is_file() or config != DEMO else read_section(Settings, {}, "")
