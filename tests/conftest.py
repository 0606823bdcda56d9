"""What all tests share: no network, and one thread each, since two workers run side by side."""

import os


def pytest_configure() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    import torch

    torch.set_num_threads(1)
