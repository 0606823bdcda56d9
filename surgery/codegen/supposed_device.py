"""The type of device that programs are chosen for and kernels run as on, wherever their tensors are.

To count what a device asks for, and to compare what it would run, without one. Promises: outside of `steps_of` it is
where the tensors are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_device: ContextVar[str | None] = ContextVar("the type of device whose steps run", default=None)


@contextmanager
def steps_of(device: str) -> Iterator[None]:
    """Inside, programs are chosen and steps run as on this type of device."""
    token = _device.set(device)
    try:
        yield
    finally:
        _device.reset(token)


def supposed() -> str | None:
    """The type of device of the `steps_of` that this runs in, if it runs in one."""
    # a compiler traces no ContextVar, and traces for where the tensors are
    return None if torch.compiler.is_compiling() else _device.get()


def runs_as_on(device: str) -> str:
    """The type of device whose programs and steps run for tensors that are on `device`."""
    return supposed() or device
