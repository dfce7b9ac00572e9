"""Where things are kept on this machine."""

import os
from pathlib import Path


def home() -> Path:
    """Runs, logs and the local registry: $GUARDLOOP_HOME, or .guardloop here."""
    return Path(os.environ.get("GUARDLOOP_HOME", ".guardloop")).absolute()


def cache_folder() -> Path:
    """Embedded models, fetched adapters, unfinished work: $GUARDLOOP_CACHE, or ~/.cache/guardloop."""
    return Path(os.environ.get("GUARDLOOP_CACHE") or Path.home() / ".cache" / "guardloop").absolute()


def tracking_uri() -> str:
    """MLflow's address: MLFLOW_TRACKING_URI, or a database in the home folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"
