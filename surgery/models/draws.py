"""Draws that are the same each time, and of which nobody else sees anything."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@contextmanager
def same_draws(seed: int = 0, devices: Collection[torch.device] = ()) -> Iterator[None]:
    """Inside, what is drawn on the CPU and on these CUDA devices follows from the seed; afterwards all goes on as if
    nothing had been drawn.

    `torch.manual_seed` would do more: it seeds every device, one that no process has used yet as soon as it is used,
    and a user's own seed for it is lost.
    """
    import torch

    with torch.random.fork_rng(devices=[*devices]):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device.index].manual_seed(seed)
        yield
