"""A moderation service on a tiny guard, on a real port."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from support.models import tiny_guard

from guardloop.guard.settings import GuardSettings
from guardloop.serving.app import Service, create_app
from guardloop.serving.champion import Champion
from guardloop.serving.settings import ServingSettings

SETTINGS = GuardSettings(min_label_mass=0.0)  # a random model answers anything


class Registry:
    """Versions of a tiny guard, and the one that the alias names."""

    def __init__(self, **guards: Any) -> None:
        self.guards = guards or {"one": tiny_guard()}
        self.alias = next(iter(self.guards))
        self.loads: list[str] = []

    def fetch(self, uri: str) -> Path:
        return Path(f"/registry/{self.alias}")

    def load(self, folder: Path | None) -> Any:
        name = folder.name if folder else "baseline"
        self.loads.append(name)
        return self.guards[name]


class Slow:
    """A guard that takes its time for each pass, and counts the passes."""

    def __init__(self, guard: Any, seconds: float) -> None:
        self.guard, self.seconds, self.passes = guard, seconds, 0
        self.threshold, self.response_threshold = guard.threshold, guard.response_threshold

    def score(self, rows: Any) -> Any:
        self.passes += 1
        time.sleep(self.seconds)
        return self.guard.score(rows)


class Brittle(Slow):
    """A guard that breaks on one text, as a bug or a broken kernel would."""

    def score(self, rows: Any) -> Any:
        if any("BREAK" in row["prompt"] for row in rows):
            raise RuntimeError("broken")
        return self.guard.score(rows)


@contextmanager
def serving(registry: Registry | None = None, **settings: Any) -> Iterator[tuple[str, Service, Champion]]:
    """The address of a running service, the service itself and its champion."""
    registry = registry or Registry()
    champion = Champion(SETTINGS, "models:/guard@champion", registry.fetch, registry.load)
    service = Service(champion, ServingSettings(**settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(create_app(service), port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}", service, champion
    finally:
        server.should_exit = True
        thread.join(timeout=10)
