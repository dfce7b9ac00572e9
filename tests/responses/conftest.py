from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_responder import build_model, build_tokenizer, save


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer: Any) -> Any:
    return build_model(len(tokenizer))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny matrices gain nothing from more, and tests share the machine
