"""The command `serve`: the moderation service."""

from pathlib import Path
from typing import Annotated

import typer

from guardloop.cli.terminal import Terminal
from guardloop.core.errors import GuardLoopError

app = typer.Typer()
console = Terminal()


@app.command()
def serve(
    guard: Annotated[
        str, typer.Option(help="What answers: models:/name@alias, an adapter's folder, or `baseline`.")
    ] = "models:/guardloop-guard@champion",
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Configuration whose baseline the adapter is for.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8100,
    log: Annotated[str | None, typer.Option(help="Folder or s3:// prefix that keeps the requests.")] = None,
    log_share: Annotated[float, typer.Option(help="Share of the requests that is kept.")] = 1.0,
    log_text: Annotated[bool, typer.Option(help="Keep the messages, or only their hashes.")] = True,
    keys: Annotated[str | None, typer.Option(help="File of API keys, a line each: NAME KEY.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="Requests that one key may make.")] = None,
    fail_open: Annotated[bool, typer.Option("--fail-open", help="Let pass what could not be judged.")] = False,
) -> None:
    """Answer moderation requests with the champion, and log them for the next round."""
    import uvicorn

    from guardloop.config import Settings, load_settings
    from guardloop.core.settings import read_section
    from guardloop.guard.engine import Guard
    from guardloop.models.locate import fetch_adapter
    from guardloop.serving.app import Service, create_app
    from guardloop.serving.champion import Champion
    from guardloop.serving.settings import ServingSettings

    values = {
        "log": log,
        "log_share": log_share,
        "log_text": log_text,
        "keys": keys,
        "requests_per_minute": requests_per_minute,
        "fail_open": fail_open,
    }
    settings = read_section(ServingSettings, values, "serve")
    baseline = (load_settings(config) if config else read_section(Settings, {}, "")).guard

    def fetch(uri: str) -> Path:
        folder = fetch_adapter(uri)
        if folder is None:
            raise GuardLoopError("no guard was named", "give --guard")
        return folder

    champion = Champion(
        baseline,
        None if guard == "baseline" else guard,
        fetch,
        lambda folder: Guard.load(baseline, folder),
    )
    service = Service(champion, settings)
    version, _ = champion.current()
    address = f"http://{host}:{port}"
    console.print(f"{version} answers at {address} (what can be asked: {address}/docs; Ctrl-C ends it)", soft_wrap=True)
    uvicorn.run(create_app(service), host=host, port=port, log_level="warning", timeout_graceful_shutdown=30)
