"""Recognise modules that multiply their input by a matrix of their own, and use it in no other way: routers of experts,
which are no `nn.Linear`, since what they give is chosen from the products.

Takes a module (on the meta device too); says whether its weight [out, in] only ever stands in x Wᵀ. Promises: the
module is not called or changed: a copy of its own, with numbers of ours, is; what cannot be called with rows alone is
not one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from surgery.layers.norm_probe import by_ourselves, copy_with

CASTS = ("float", "double", "half", "bfloat16", "to", "type")


def multiplies(module: nn.Module) -> bool:
    """Whether a module with a forward of its own multiplies by its parameter `weight` (and adds its `bias`)."""
    held = {name: p for name, p in module._parameters.items() if p is not None}
    weight, bias = held.get("weight"), held.get("bias")
    if weight is None or weight.ndim != 2 or not held.keys() <= {"weight", "bias"} or module._modules:
        return False
    if not all(p.is_floating_point() and p.itemsize > 1 for p in held.values()):
        return False
    try:
        with by_ourselves():
            copy = copy_with(module, torch.randn)
            with _Uses(copy._parameters["weight"], copy._parameters.get("bias") if bias is not None else None) as uses:
                copy(torch.randn(1, 3, weight.shape[1], generator=torch.Generator().manual_seed(1)))
    except Exception:  # a third party's module raises whatever it likes
        return False
    return uses.products > 0 and not uses.others


class _Uses(TorchFunctionMode):
    """What is done with a weight and its casts: `products` by it, and whether there is anything else."""

    def __init__(self, weight: Any, bias: Any):
        super().__init__()
        self.weights, self.biases = [weight], [] if bias is None else [bias]
        self.products, self.others = 0, False

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        for held in (self.weights, self.biases):
            if isinstance(made, Tensor) and any(_is_in(held, each) for each in (*args, *kwargs.values())):
                self._note(func, args, kwargs, held, made)
        return made

    def _note(self, func: Callable, args: tuple, kwargs: dict, held: list[Any], made: Tensor) -> None:
        if func is nn.functional.linear and _is_product(*args, **kwargs, weights=self.weights, biases=self.biases):
            self.products += held is self.weights
        elif getattr(func, "__name__", "") in CASTS and _is_in(held, args[0]):
            held.append(made)
        else:
            self.others = True


def _is_product(input: Any, weight: Any, bias: Any = None, *, weights: list[Any], biases: list[Any]) -> bool:
    adds = _is_in(biases, bias) if biases else bias is None
    return adds and _is_in(weights, weight) and not _is_in([*weights, *biases], input)


def _is_in(held: Iterable[Any], each: Any) -> bool:
    return any(each is one for one in held)
