"""The model card that goes with an adapter, for whoever finds it."""

from pathlib import Path
from typing import Any

import jinja2

TEMPLATES = Path(__file__).parent / "templates"


def model_card(metadata: dict[str, Any]) -> str:
    """README.md of an adapter, from what its guard.json says."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    base = str(metadata["base"])
    return environment.get_template("card.md.jinja").render(
        metadata=metadata,
        trained=metadata["training"],
        settings=metadata["training"]["settings"],
        hub_base=":" not in base and base.count("/") == 1 and not base.startswith((".", "/", "~")),
        number=lambda value: "not known" if value is None else f"{value:.3f}",
    )
