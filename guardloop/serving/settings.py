"""Settings of the moderation service."""

from pydantic import Field

from guardloop.core.settings import Section

MAX_BODY_BYTES = 1 << 20
MAX_MESSAGES = 64
MAX_BATCH = 64
"""Messages in one pass of the guard: more only make the first of them wait for the last."""


class ServingSettings(Section):
    """How requests are answered and logged."""

    log: str | None = None
    """Folder or `s3://` prefix that gets a JSON line for each request, by date; by default none is kept."""
    log_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the requests that are logged, chosen by conversation; flagged and failed ones always are."""
    log_text: bool = True
    """Whether the messages are logged; else only their SHA-256."""
    keys: str | None = None
    """File of API keys, a line each: `NAME KEY`. By default everyone who reaches the port may ask."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Requests that one key may make; by default as many as it likes."""
    fail_open: bool = False
    """Whether a message that could not be judged passes. By default it is flagged."""
    max_waiting: int = Field(default=1024, ge=1)
    """Messages that may wait for the guard; beyond that requests are answered with 429."""
    timeout_seconds: float = Field(default=10.0, gt=0)
    """A request that waits longer is answered with 503."""
    reload_seconds: float = Field(default=30.0, gt=0)
    """How often the registry is asked whether the champion moved."""
