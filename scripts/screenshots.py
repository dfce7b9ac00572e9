"""The pictures in docs/pictures, made from a run of this machine: what people see at the end of `make run`.

python -m scripts.screenshots [RUN]     needs Chromium; RUN is `latest` if not given
"""

import io
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from mlflow import MlflowClient
from PIL import Image
from rich.console import Console

from guardloop.core.errors import GuardLoopError
from guardloop.core.places import home
from guardloop.stages import REPORT
from launch.local.runs import Run, find_run
from launch.local.summary import conclude

PICTURES = Path(__file__).absolute().parents[1] / "docs/pictures"
TERMINAL, REPORT_PAGE, REGISTRY_PAGE = "terminal.svg", "report.webp", "registry.webp"
COLUMNS, WIDTH = 116, 1200
ASSISTANT = 420
"""Pixels of a panel that MLflow opens at the right, which is cut off."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
START_SECONDS = 90


def main() -> None:
    """Make every picture anew, and name it."""
    run = find_run(sys.argv[1] if len(sys.argv) > 1 else "latest")
    evaluated = run.artifact("evaluated")
    if evaluated is None:
        raise GuardLoopError(f"the run {run.id} compared no guards", "name one that did, or `make run` first")
    PICTURES.mkdir(exist_ok=True)
    (PICTURES / TERMINAL).write_text(terminal(run), "utf-8")
    browse((evaluated / REPORT).as_uri(), PICTURES / REPORT_PAGE, height=1100)
    with mlflow_on_a_copy(home() / "mlflow.db") as address:
        model = json.loads((run.folder / "run.json").read_text("utf-8"))["arguments"]["registry"]["model"]
        found = MlflowClient(address).get_model_version_by_alias(model, "candidate")
        browse(
            f"{address}/#/models/{model}/versions/{found.version}", PICTURES / REGISTRY_PAGE, height=900, cut=ASSISTANT
        )
    for name in (TERMINAL, REPORT_PAGE, REGISTRY_PAGE):
        path = PICTURES / name
        sys.stdout.write(f"  {path.relative_to(Path.cwd())}  {path.stat().st_size / 1000:.0f} kB\n")


def terminal(run: Run) -> str:
    """What the terminal showed at the end of `run`, as SVG that loads nothing from elsewhere."""
    told = [json.loads(line) for line in (run.folder / "events.jsonl").read_text("utf-8").splitlines()]
    run.stages = [event for event in told if event["event"] == "done"]
    run.seconds = json.loads((run.folder / "summary.json").read_text("utf-8"))["seconds"]
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, highlight=False)
    conclude(run, console)
    return re.sub(r"@font-face {.*?}\s*", "", console.export_svg(title="make run", unique_id="run"), flags=re.DOTALL)


def browse(address: str, picture: Path, height: int, cut: int = 0) -> None:
    """The top of the page at `address`, as WebP, without `cut` pixels at its right."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise GuardLoopError("no Chromium or Chrome on the PATH", "Debian, Ubuntu: apt install chromium")
    with tempfile.TemporaryDirectory() as folder:
        seen = Path(folder, "seen.png")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-color-profile=srgb"]
        flags += ["--blink-settings=preferredColorScheme=1", "--virtual-time-budget=20000"]
        flags += [f"--user-data-dir={folder}/profile", f"--window-size={WIDTH + cut},{height}", f"--screenshot={seen}"]
        subprocess.run([browser, *flags, address], check=True, capture_output=True, timeout=180)
        with Image.open(seen) as image:
            image.convert("RGB").crop((0, 0, WIDTH, height)).save(picture, "WEBP", quality=80, method=6)


@contextmanager
def mlflow_on_a_copy(database: Path) -> Iterator[str]:
    """The address of `guardloop ui` on a copy, so that looking changes nothing."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "mlflow.db")
        with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
        with Path(folder, "log").open("wb") as log:
            server = subprocess.Popen(
                [sys.executable, "-m", "guardloop.cli.main", "ui", "--port", str(port)],
                env=os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{copy}"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            _wait(server, f"{address}/health")
            yield address
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _wait(server: "subprocess.Popen[bytes]", address: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        with suppress(URLError, ConnectionError), urlopen(address, timeout=5):
            return
        time.sleep(0.5)
    raise GuardLoopError("MLflow did not start", "`make ui` shows why")


if __name__ == "__main__":
    try:
        main()
    except GuardLoopError as error:
        sys.exit(f"error: {error}")
