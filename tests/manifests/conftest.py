import pytest
from support.overlays import PLATFORM_OF, Overlay


@pytest.fixture(params=PLATFORM_OF, scope="session")
def overlay(request: pytest.FixtureRequest) -> Overlay:
    return Overlay(request.param)
