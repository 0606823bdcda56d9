"""W' of a stack of experts while their own forward runs: each token goes through the program of its expert.

Takes the stored stack, the map of one of its matrices, and how to make W' of all; gives a tensor that stands in the
stack's place for one call. Promises: a product with one matrix, or of tokens that are grouped by expert, makes no W'
and touches no expert that has no token; any other use of it is answered with W' of all experts, made once for the
call, with values and gradients that are the same. It is known by torch's protocol for tensor classes alone, so that it
does not matter whose loop over the experts it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from surgery.ir.dense import without_autocast
from surgery.runtime.effective_weight import ASKED, EffectiveWeight, hollow, name_of, values_of
from surgery.runtime.expert_maps import ExpertMaps


@dataclass
class Stack:
    """The experts of one call. `maps` takes tokens through them; `make()` is W' of all as the module stores it; `made`
    keeps that from when something has asked for it, and everything then uses it."""

    maps: ExpertMaps
    make: Callable[[], Tensor]
    takes_gradient: bool
    made: Tensor | None = None

    def whole(self) -> Tensor:
        if self.made is None:
            with torch.set_grad_enabled(self.takes_gradient):
                self.made = self.make()
        return self.made


@dataclass(frozen=True)
class _View:
    """Which part of a stack it is: all of it, the matrix of one expert, or those of a tensor of expert numbers;
    `is_in_out` if its last two axes are [in, out]; `seen` takes it from the whole W'."""

    stack: Stack
    is_in_out: bool
    seen: Callable[[Tensor], Tensor] = lambda whole: whole
    experts: int | Tensor | None = None


class RoutedWeight(EffectiveWeight):
    """A stack of experts, or a part of it, in the place of a weight. Itself it is a tensor without memory."""

    _view: _View

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name, kwargs = name_of(func), kwargs or {}
        weight = next((a for a in args if isinstance(a, cls)), None)
        if weight is not None and weight._view.stack.made is None and name in _KNOWN:
            answer = _KNOWN[name](*args, **kwargs) if _OPTIONS.issuperset(kwargs) else None
            if answer is not None:
                return answer
        if name == "requires_grad.__get__":
            return args[0]._trains
        if name in ASKED:
            return func(args[0]._stored, *args[1:], **kwargs)
        return func(*values_of(args), **values_of(kwargs))


def routed_weight(stack: Stack, stored: Tensor, is_in_out: bool, trains: bool) -> RoutedWeight:
    """The stack in the place of what the module stores; `trains`: whether a gradient is taken through it."""
    return _routed(_View(stack, is_in_out), stored, trains)


def _routed(view: _View, stored: Tensor, trains: bool) -> RoutedWeight:
    weight = hollow(stored, trains).as_subclass(RoutedWeight)
    weight._view, weight._stored, weight._trains = view, stored, trains
    weight._make = lambda: view.seen(view.stack.whole())
    return weight


# ---------------------------------------------------------------------------------------------- parts of the stack


def _item(weight: Any, index: Any) -> RoutedWeight | None:
    """`stack[3]`, `stack[expert]` and `stack[experts]`, an expert to each row."""
    view = weight._view
    numbers = index if type(index) is Tensor and index.dtype in (torch.int32, torch.int64) else None
    if view.experts is not None or numbers is None and type(index) is not int:
        return None
    if numbers is not None and numbers.ndim:
        if numbers.ndim > 1:
            return None
        like = weight._stored[:1].expand(len(numbers), -1, -1)  # to be asked for its shape: nothing is copied
        return _part(weight, like, experts=numbers, seen=lambda whole: view.seen(whole)[numbers])
    count = weight._stored.shape[0]
    expert = int(index)
    if not -count <= expert < count:
        return None  # torch's own error
    return _part(weight, weight._stored[expert], experts=expert % count, seen=lambda whole: view.seen(whole)[expert])


def _turned(weight: Any, *axes: int) -> RoutedWeight | None:
    """The last two axes the other way round; of anything else there is no such view."""
    ndim = weight._stored.ndim
    if axes and {axis % ndim for axis in axes} != {ndim - 2, ndim - 1} or not axes and ndim != 2:
        return None
    return _flipped(weight)


def _flipped(weight: Any) -> RoutedWeight:
    view = weight._view
    flipped = _View(view.stack, not view.is_in_out, lambda whole: view.seen(whole).mT, view.experts)
    return _routed(flipped, weight._stored.mT, weight._trains)


def _part(weight: RoutedWeight, stored: Tensor, **changes: Any) -> RoutedWeight:
    return _routed(replace(weight._view, **changes), stored, weight._trains)


# ---------------------------------------------------------------------------------------------------- products


def _linear(x: Any, weight: Any, bias: Tensor | None = None) -> Tensor | None:
    """`F.linear(x, stack[e])`."""
    if type(x) is not Tensor or not isinstance(weight._view.experts, int) or weight._view.is_in_out:
        return None
    y = weight._view.stack.maps.one(weight._view.experts, x)
    return y if bias is None else y + bias.to(y.dtype)


def _matmul(left: Any, right: Any) -> Tensor | None:
    """`x @ stack[e].T`, and batches: `torch.bmm(x, stack[experts].mT)`, `stack[experts] @ x`."""
    if isinstance(left, RoutedWeight):  # M X is (Xᵀ Mᵀ)ᵀ
        y = _matmul(right.mT, _flipped(left)) if type(right) is Tensor and right.ndim > 1 else None
        return None if y is None else y.mT
    view = right._view
    if type(left) is not Tensor or not view.is_in_out:
        return None
    if isinstance(view.experts, int):
        return view.stack.maps.one(view.experts, left) if left.ndim > 1 else None
    return _batched(left, right) if left.ndim == 3 and len(left) == len(right._stored) else None


def _batched(x: Tensor, weight: RoutedWeight) -> Tensor:
    """x [n, rows, in], each with the matrix of its own expert: [n, rows, out]."""
    view = weight._view
    if view.experts is None:
        return view.stack.maps.grouped(range(len(x)), [1] * len(x), x)
    assert isinstance(view.experts, Tensor)  # one for each
    order = view.experts.argsort(stable=True)
    experts, counts = view.experts[order].unique_consecutive(return_counts=True)
    y = view.stack.maps.grouped(experts.tolist(), counts.tolist(), x[order])
    return y[order.argsort()]


def _grouped_mm(x: Any, weight: Any, offs: Tensor | None = None, bias: Any = None, out_dtype: Any = None
                ) -> Tensor | None:
    """`F.grouped_mm(x, stack.mT, offs=ends)`: rows in the order of the experts, which autocast leaves alone."""
    view = weight._view
    known = type(x) is Tensor and x.ndim == 2 and view.experts is None and view.is_in_out
    if not known or offs is None or bias is not None or out_dtype is not None:
        return None
    ends = offs.tolist()
    counts = [end - start for start, end in zip([0, *ends], ends)]
    with without_autocast(x.device.type):
        return view.stack.maps.grouped(range(len(ends)), counts, x)


_OPTIONS = {"bias", "offs", "out_dtype"}
_KNOWN: dict[str, Callable[..., Any]] = {
    "__getitem__": _item, "transpose": _turned, "t": _turned, "T.__get__": _turned, "mT.__get__": _flipped,
    "linear": _linear, "matmul": _matmul, "__matmul__": _matmul, "mm": _matmul, "bmm": _matmul,
    "grouped_mm": _grouped_mm, "_grouped_mm": _grouped_mm}
