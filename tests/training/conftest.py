import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from models import save_guard

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random guard in our own form with a policy of one category, as a local folder."""
    folder = save_guard(tmp_path_factory.mktemp("base"), threshold=0.0)
    (folder / "policy.yaml").write_text("S1: {name: Weapons, description: a bomb}")
    return folder
