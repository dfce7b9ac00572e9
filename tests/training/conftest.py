from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.models import save_guard

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Checkpoints that are kept by default are kept for these tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GUARDLOOP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random guard in our own form with a policy of one category, as a local folder."""
    folder = save_guard(tmp_path_factory.mktemp("base"), threshold=0.0)
    (folder / "policy.yaml").write_text("S1: {name: Weapons, description: a bomb}")
    return folder
