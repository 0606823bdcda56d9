"""What all tests share: no network, one thread each since two workers run side by side, and a terminal of one width."""

import os
from collections.abc import Iterator

import pytest


def pytest_configure() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _width() -> Iterator[None]:
    """What a command shows is as wide as COLUMNS says. (Set while tests run and not before: what pytest itself shows is
    as wide as the terminal.)"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        yield
