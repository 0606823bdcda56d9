"""What a training step asks of a device, counted: launches, bytes read and written, passes over activations.

Takes a call that is one step; gives a `StepCount`. Counted on a CPU from the operations that torch dispatches, without
a clock, so that two runs give the same figures; what a library does inside of one operation is not seen.

Definitions.

*Launch*: an operation that computes or copies. Free are views (the result shows the memory of an argument, and nothing
is written), changes of a tensor's shape in place, and memory that is asked for and not filled (`empty`).

*Bytes*: every tensor that an operation takes is read once, every tensor that it makes is written once, and what it
changes in place is read and written (of `copy_`, `fill_`, draws of chance and a product added to 0 times what was
there, which do not look at that, and of `out=`, only written), and of what a tensor is made like nothing is read. An
expanded axis is no memory. So `addmm(c, a, b)` reads all three and writes the result, a bias [n] as n numbers, and
`addmm_` writes c. Of what is looked up or changed at places given by indices, the numbers that are named count, and the
indices.

*Pass*: reading or writing, once, a number for every token and feature of a layer. The unit is the mean of the layer's
input and output, summed over the operated layers; so `passes` is a mean over them, and a whole number where a program
is the same in all. Passes are those of activations: tensors computed from the model's input, gradients too, whose
memory holds more than half as many numbers as the smallest input or output of an operated layer, in more than half as
many rows ([tokens, rank] is none, and neither is a buffer for a few rows). The set-up has none. What a wide product
reads and writes is not counted, the term that it is added to included: it is bound by arithmetic, and its traffic is
hidden behind that. A product [m, k] x [k, n] is wide if m, k and n are all above 128, about the FLOP that a GPU does in
the time of moving one number. (A product of a stack of matrices is judged by one of them.) The frozen model's passes
are taken off.

*Parts*: the set-up is what an adapter makes of its own tensors before it sees an input; its backward pass is what runs
in the nodes of autograd from which no path leads to the model's input, and what is made again there. A step is the sum
of the four parts.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode

from surgery.codegen.recompute import setup_backward
from surgery.experiments.timing import plain_tensors
from surgery.runtime.adapter import Adapter
from surgery.runtime.batched_setups import SetupBatches
from surgery.runtime.operated import Direct, Substituted

PARTS = ("setup", "setup_backward", "forward", "backward")
THIN = 128  # the least size of a product up to which moving its operands takes longer than its arithmetic
_SETUP = (Adapter.computed.__code__, SetupBatches.values.__code__, setup_backward.__code__)
_EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_OVERWRITE = {"copy_", "zero_", "fill_", "bernoulli_", "normal_", "uniform_", "random_", "exponential_", "geometric_"}
_LIKE = {"new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"}  # which ask for a dtype alone
_LOOK_UP = {"embedding", "index", "index_select", "gather", "take"}
_CHANGE_AT = {"index_put_", "put_", "scatter_", "scatter_add_", "index_add_", "index_copy_"}
_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"}
_CONVOLUTIONS = {"convolution": 1, "convolution_backward": 2}  # where the kernels are among the tensors


@dataclass(frozen=True)
class Layers:
    """The numbers that the operated layers take and give in one step: a pass over one is the mean of both."""

    count: int
    one_pass: float  # bytes, in all of them together
    smallest: int  # numbers of the smallest input or output
    rows: int  # and the least rows of one

    @staticmethod
    def of(model: nn.Module, step: Callable[[], Any]) -> Layers:
        """As they are called in a step."""
        shapes: list[list[torch.Size]] = []
        sizes: list[int] = []

        def note(module: nn.Module, args: tuple, output: Any) -> None:
            tensors = [t for t in plain_tensors((args, output)) if t.is_floating_point()]
            shapes.append([t.shape for t in tensors])  # of token ids the output alone
            sizes.append(tensors[-1].element_size())

        hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, (Direct, Substituted))]
        try:
            step()
        finally:
            for hook in hooks:
                hook.remove()
        total = sum(size * sum(map(prod, each)) / len(each) for each, size in zip(shapes, sizes))
        sides = [shape for each in shapes for shape in each]
        return Layers(len(shapes), total, min(map(prod, sides)), min(prod(shape[:-1]) for shape in sides))


@dataclass
class StepCount:
    """The counts of one step. `launches` by part; `read`, `written` and `passed` (activations alone) in bytes."""

    launches: Counter[str] = field(default_factory=Counter)
    read: int = 0
    written: int = 0
    passed: int = 0

    @property
    def figures(self) -> dict[str, int]:
        """As a row of a table has them."""
        return {**{f"{part}_launches": self.launches[part] for part in PARTS},
                "bytes_read": self.read, "bytes_written": self.written}


def count_step(forward: Callable[[], Tensor], direction: Tensor, model: nn.Module, batch: Mapping[str, Tensor],
               layers: Layers | None) -> StepCount:
    """A forward and a backward pass from the gradient `direction`, counted; gradients of the step before are there no
    more. Passes are over activations of `layers`."""
    with Counting((*batch.values(), direction), layers) as counting:
        output = forward()
        counting.watch(output, [p for p in model.parameters() if p.requires_grad])
        output.backward(direction)
    return counting.count


class Counting(TorchDispatchMode):
    """Counts the operations inside into `count`, as those of a forward pass until `watch` says otherwise. `inputs`: the
    model's, from which activations are computed."""

    def __init__(self, inputs: Iterable[Tensor], layers: Layers | None) -> None:
        super().__init__()
        self.count, self.pass_name, self.node_is_setup = StepCount(), "forward", False
        self._layers = layers
        self._activations: dict[int, ref] = {}  # the storages that were computed from the input
        for tensor in inputs:
            self._mark(tensor)

    def watch(self, output: Tensor, parameters: Iterable[Tensor]) -> None:
        """From here on it is the backward pass of `output`."""
        self.pass_name = "backward"
        assert output.grad_fn is not None  # a gradient reaches the input of every model that is measured

        def enter(is_setup: bool, *gradients: Any) -> None:
            self.node_is_setup = is_setup

        for node, is_setup in _leads_to_alone(output.grad_fn, parameters).items():
            node.register_prehook(partial(enter, is_setup))

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        results = function(*args, **kwargs)
        taken = list(plain_tensors((args, kwargs)))
        if any(id(t.untyped_storage()) in self._activations for t in taken):
            for tensor in (*_written(function, args, kwargs), *plain_tensors(results)):
                self._mark(tensor)
        if not _is_free(function, taken, results):
            self._add(function, args, kwargs, results, taken)
        return results

    def _add(self, function: Any, args: tuple, kwargs: dict, results: Any, taken: list[Tensor]) -> None:
        is_setup = self.pass_name == "backward" and self.node_is_setup or _is_called_by(_SETUP)
        part = {"forward": "setup", "backward": "setup_backward"}[self.pass_name] if is_setup else self.pass_name
        self.count.launches[part] += 1
        passes = not is_setup and not _is_wide(function, taken)
        for tensor, read, written in _traffic(function, args, kwargs, results):
            self.count.read += read * tensor.element_size()
            self.count.written += written * tensor.element_size()
            if passes and self._is_activation(tensor):
                self.count.passed += (read + written) * tensor.element_size()

    def _is_activation(self, tensor: Tensor) -> bool:
        storage, layers = tensor.untyped_storage(), self._layers
        if layers is None or id(storage) not in self._activations:
            return False
        numbers = storage.nbytes() / tensor.element_size()
        width = next((size for size, stride in zip(tensor.shape, tensor.stride()) if stride == 1 and size > 1), 1)
        is_tall = tensor.ndim < 2 or numbers / width > layers.rows / 2  # of a flat view the rows are not known
        return numbers > layers.smallest / 2 and is_tall

    def _mark(self, tensor: Tensor) -> None:
        storage, known = tensor.untyped_storage(), self._activations
        key = id(storage)
        if key not in known:
            known[key] = ref(storage, lambda _: known.pop(key, None))


# ------------------------------------------------------------------------------------------------- one operation


def _traffic(function: Any, args: tuple, kwargs: dict, results: Any) -> Iterator[tuple[Tensor, int, int]]:
    """The tensors of an operation, each with how many of its numbers are read and how many are written."""
    name, changed = function.overloadpacket.__name__, {id(t) for t in _written(function, args, kwargs)}
    taken = list({id(t): t for t in plain_tensors((args, kwargs))}.values())
    made = [t for t in plain_tensors(results) if id(t) not in changed]
    for i, tensor in enumerate(taken):
        numbers = _numbers(tensor)
        if name in _LIKE:
            numbers = 0
        elif name in _LOOK_UP and i == 0:
            numbers = min(numbers, sum(map(_numbers, made)))
        elif name in _CHANGE_AT and i == 0:
            numbers = min(numbers, max(map(_numbers, taken[1:]), default=numbers))
        looks_away = name in _OVERWRITE or kwargs.get("beta") == 0
        is_overwritten = looks_away and i == 0 or any(tensor is t for t in plain_tensors(kwargs.get("out")))
        yield tensor, 0 if is_overwritten else numbers, numbers if id(tensor) in changed else 0
    yield from ((tensor, 0, _numbers(tensor)) for tensor in made)


def _written(function: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """The arguments that an operation writes into, as its schema says."""
    schema = function._schema.arguments
    given = {argument.name: value for argument, value in zip(schema, args)} | kwargs
    return [tensor for argument in schema if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in plain_tensors(given.get(argument.name))]


def _is_free(function: Any, taken: list[Tensor], results: Any) -> bool:
    made = list(plain_tensors(results))
    if not taken and not made or function.overloadpacket.__name__ in _EMPTY or torch.Tag.inplace_view in function.tags:
        return True
    shown = {id(t.untyped_storage()) for t in taken}
    writes = any(a.alias_info is not None and a.alias_info.is_write for a in function._schema.arguments)
    return not writes and bool(made) and all(id(t.untyped_storage()) in shown for t in made)


def _is_wide(function: Any, taken: list[Tensor]) -> bool:
    """True of a product that is bound by arithmetic."""
    name = function.overloadpacket.__name__
    if name in _PRODUCTS:
        left, right = taken[-2:]
        return min(*left.shape[-2:], right.shape[-1]) > THIN
    if name in _CONVOLUTIONS:
        kernels = taken[_CONVOLUTIONS[name]]
        return min(kernels.shape[0], prod(kernels.shape[1:])) > THIN
    return False


def _numbers(tensor: Tensor) -> int:
    """The numbers in memory that a tensor shows: an expanded axis has one."""
    return prod(size if stride else min(size, 1) for size, stride in zip(tensor.shape, tensor.stride()))


# --------------------------------------------------------------------------------------------------------- parts


def _is_called_by(functions: tuple) -> bool:
    """True while one of these functions, by their code, runs in this thread. (A mark that the adapter set would cost
    every step something.)"""
    frame = sys._getframe(1)
    while frame is not None:
        if any(frame.f_code is code for code in functions):
            return True
        frame = frame.f_back
    return False


def _leads_to_alone(root: Node, parameters: Iterable[Tensor]) -> dict[Node, bool]:
    """Of each node of a graph, whether its gradients go to these parameters alone, and not to the model's input."""
    own = {get_gradient_edge(parameter).node for parameter in parameters}
    alone: dict[Node, bool] = {}
    stack = [root]
    while stack:
        below = [node for node, _ in stack[-1].next_functions if node is not None]
        if unknown := [node for node in below if node not in alone]:
            stack += unknown
            continue
        node = stack.pop()
        alone[node] = node in own or bool(below) and all(alone[each] for each in below)
    return alone
