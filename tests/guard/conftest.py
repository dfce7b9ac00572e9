import pytest
import torch
from support.models import FAMILIES

torch.set_num_threads(1)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each guard family in turn."""
    return request.param
