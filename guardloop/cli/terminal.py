"""The terminal: whatever is printed passes one function, so that no text of others acts on it or holds a secret."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from guardloop.core.text import clean


class Terminal(Console):
    """A rich console whose texts are clean; its own styles and bars are kept apart from them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """`text` as rich reads it, cleaned before its width is measured."""
        return super().render_str(clean(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Segments of `renderable`, as rich makes them, with clean texts."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(clean(segment.text), segment.style)
