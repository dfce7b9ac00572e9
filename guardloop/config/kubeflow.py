"""Settings of the Kubeflow Pipelines that a platform submits its runs to."""

from guardloop.core.settings import Section


class KubeflowSettings(Section):
    """Where runs are submitted. Options of the command line and the environment come before these."""

    host: str | None = None
    """Address of Kubeflow Pipelines, such as https://kubeflow.example.org/pipeline."""
    ui_host: str | None = None
    """Address of its pages, for links, where that is not the host."""
    namespace: str | None = None
    """Namespace of the runs, of their secrets and volumes."""
    experiment: str = "guardloop"
    """Experiment that the runs are put into; made where there is none."""
    pipeline_root: str | None = None
    """Where artifacts go, such as s3://bucket/runs; by default the cluster's own (ConfigMap kfp-launcher)."""
    token_file: str | None = None
    """File with a token for Kubeflow Pipelines; it is read for every request, since tokens are renewed."""
    ca_file: str | None = None
    """Certificate of the authority that signed the host's TLS certificate."""
