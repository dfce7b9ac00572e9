"""An MLflow database that is ready to use: MLflow makes one in some ten seconds, and a copy takes none."""

import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

_TEMPLATE = Path(tempfile.gettempdir()) / f"guardloop-mlflow-{version('mlflow')}.db"


def mlflow_database(path: Path) -> str:
    """Put an empty database at `path`; its address."""
    with FileLock(f"{_TEMPLATE}.lock"):
        if not _TEMPLATE.is_file():
            from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

            with tempfile.TemporaryDirectory() as folder:
                made = Path(folder) / "mlflow.db"
                SqlAlchemyStore(f"sqlite:///{made}", f"{folder}/artifacts")
                shutil.move(made, _TEMPLATE)
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(_TEMPLATE, path)
    return f"sqlite:///{path}"
