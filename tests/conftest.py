"""What holds for every test."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _float32_on_cpus() -> Iterator[None]:
    """Models compute in float32, as on a processor without bfloat16: figures are then compared closely everywhere."""
    from guardloop.models import loading

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "_cpu_has_bf16", lambda: False)
        yield
