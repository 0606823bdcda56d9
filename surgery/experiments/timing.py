"""What a step of a model takes: seconds, and bytes at its peak; and models made to run side by side.

Takes something to call and a device; gives numbers. Promises: the clock stops when the device is done; bytes are those
that the call itself allocates, over what was there before it; models side by side share their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from time import perf_counter
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_Model = TypeVar("_Model", bound=nn.Module)


def training_device() -> torch.device:
    """Where the Trainer trains: the accelerator, where one is."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """How long one call takes, until the device is done."""
    _wait(device)  # a device works on what earlier calls asked for
    start = perf_counter()
    call()
    _wait(device)
    return perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The most memory that a call holds at one time, over what was allocated before it.

    On CUDA that is what the allocator says. Elsewhere it is the sum of the tensors that are alive after each operation,
    counted by storage (`Allocations`): what an operation allocates and frees within itself is not in it, and neither
    are the buffers of a library that torch calls.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with Allocations() as counted:
        call()
    return counted.peak


class Allocations(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside, while they live: `live` now, and `peak`, the most so far.

    A storage counts once, however many tensors view it, from the operation that makes it until nothing refers to it
    (what autograd saves does). Tensors from before, and their views, do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, ref] = {}

    def __torch_dispatch__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for tensor in plain_tensors((args, kwargs)):
            self._note(tensor.untyped_storage(), 0)  # one that was not made inside
        results = function(*args, **kwargs or {})
        for tensor in plain_tensors(results):
            self._note(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        return results

    def _note(self, storage: torch.UntypedStorage, size: int) -> None:
        key = id(storage)
        if key in self._known:
            return

        def gone(_: ref) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


def plain_tensors(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors that have a storage; a sparse one has those of its indices and values."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor) and leaf.layout is torch.sparse_coo:
            yield from (leaf._indices(), leaf._values())
        elif isinstance(leaf, torch.Tensor):
            yield leaf


# ------------------------------------------------------------------------------------------------------ side by side


def turned(items: list, number: int) -> list:
    """The items from another one on in each round, so that none always follows the same."""
    at = number % len(items)
    return items[at:] + items[:at]


def sharing(model: _Model, apart: Sequence[str] = ()) -> _Model:
    """A copy of the model's structure with the same tensors in it; the parameters named are copied."""
    own = {id(model.get_parameter(name)) for name in apart}
    # deepcopy takes what its memo holds for copied already
    shared = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in own}
    return deepcopy(model, shared)
