"""Find how an unknown class stores its stacks of matrices, one for each expert: [E, out, in] or [E, in, out].

Takes a module (on the meta device too); says of each parameter with three axes in which way its matrices stand in
products. Promises: the module is not called or changed: a copy without memory of its own is, with the arguments that
experts take; of what is used in another way too, or in both ways, or in no such call, nothing is said.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from surgery.layers.norm_probe import by_ourselves, copy_with
from surgery.layers.product_probe import CASTS

_TURNS = ("transpose", "t", "swapaxes", "permute", "mT.__get__", "T.__get__")
_PARTS = ("__getitem__", "index_select", "unbind", "contiguous", "clone", "detach", *CASTS)
_ASKED = ("shape.__get__", "dtype.__get__", "device.__get__", "ndim.__get__", "requires_grad.__get__", "size", "dim",
          "numel", "__len__", "is_floating_point")
_TAKES_OUT_IN = ("linear",)
_PRODUCTS = (*_TAKES_OUT_IN, "matmul", "__matmul__", "bmm", "mm", "grouped_mm", "_grouped_mm")


def stacks(module: nn.Module) -> dict[str, bool]:
    """The parameters that are stacks of matrices, by name: whether they are [E, in, out]."""
    held = {name: p for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
    if not held or any(True for child in module.children() for _ in child.parameters()):
        return {}
    with by_ourselves():
        for arguments in _calls(held.values()):
            try:
                copy = copy_with(module, lambda shape, generator: torch.zeros(()).expand(shape))
                with _Uses({name: copy.get_parameter(name) for name in held}) as uses:
                    copy(*arguments)
            except Exception:  # a third party's module raises whatever it likes, and these were not its arguments
                continue
            if uses.seen:
                return {name: ways.pop() for name, ways in uses.seen.items() if len(ways) == 1}
    return {}


def _calls(held: Any) -> Iterator[tuple[Any, ...]]:
    """What modules of experts are called with: rows beside each row's experts and their shares, or how many rows each
    expert has, or rows in equal parts; rows of each width that the stacks have."""
    count = min(p.shape[0] for p in held)
    rows, each = 2 * count, torch.arange(2 * count) % count
    two = torch.stack([each, (each + 1) % count], dim=1)  # some classes take one for each row otherwise
    for width in sorted({side for p in held for side in p.shape[1:]}):
        x = torch.ones(rows, width)
        yield x, two, torch.ones(rows, 2)
        yield x, torch.ones(rows, 2), two
        yield x, torch.ones(rows, count)
        yield x, [2] * count
        yield x, each
        yield x[None], each
        yield (x,)


class _Uses(TorchFunctionMode):
    """What is done with stacks and their parts. `seen`: of each, in which ways it stands in products (whether it is
    [in, out]). Of products and of parts only the shapes are worked out: stacks may be larger than the memory. Any other
    use ends the call."""

    def __init__(self, held: dict[str, Tensor]):
        super().__init__()
        self.seen: dict[str, set[bool]] = {}
        # a tensor is kept beside its name, so that its id stays its own; and whether its axes are turned
        self.known: dict[int, tuple[Tensor, str, bool]] = {id(t): (t, name, False) for name, t in held.items()}

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name, of = getattr(func, "__name__", ""), getattr(func, "__self__", None)
        name = f"{getattr(of, '__name__', '')}.__get__" if name == "__get__" else name  # of a property
        stacked = [a for a in (*args, *kwargs.values()) if id(a) in self.known]
        if not stacked or name in _ASKED:
            return func(*args, **kwargs)
        if len(stacked) == 1 and (made := self._product(name, args, kwargs)) is not None:
            return made
        is_part = name in _PARTS and _is_part(name, args)
        if stacked[0] is not args[0] or not (is_part or name in _TURNS):
            raise ValueError("no product")
        shapes = func(*(a.to("meta") if isinstance(a, Tensor) else a for a in args), **kwargs)
        if not is_part and not _turns(args[0], shapes, args[1:]):
            raise ValueError("no product")
        _, owner, turned = self.known[id(args[0])]
        parts = [torch.zeros(()).expand(s.shape) for s in (shapes if isinstance(shapes, tuple) else (shapes,))]
        self.known |= {id(part): (part, owner, turned is is_part) for part in parts}
        return tuple(parts) if isinstance(shapes, tuple) else parts[0]

    def _product(self, name: str, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        """The shape of a product of rows with a stack or a part of it, which is noted; None for anything else."""
        if name == "einsum":
            return self._contraction(*args)
        if len(args) < 2 or name not in _PRODUCTS:
            return None
        left, right = args[:2]
        if id(right) in self.known:
            rows, matrix, is_in_out = left, right, name not in _TAKES_OUT_IN
        elif name not in _TAKES_OUT_IN and id(left) in self.known:
            rows, matrix, is_in_out = right.mT, left, False
        else:
            return None
        _, owner, turned = self.known[id(matrix)]
        in_, out = matrix.shape[-2:] if is_in_out else matrix.shape[:-3:-1]
        if rows.shape[-1] != in_:
            raise ValueError("these are not its arguments")
        self.seen.setdefault(owner, set()).add(is_in_out is not turned)
        y = rows.new_zeros(*rows.shape[:-1], out)
        return y if matrix is right else y.mT


    def _contraction(self, equation: Any, *operands: Any) -> Tensor | None:
        """The same of a product that einsum is told: one axis of the matrices is summed, the other one is kept."""
        told = re.fullmatch(r"(\w+),(\w+)->(\w*)", equation.replace(" ", "")) if isinstance(equation, str) else None
        if told is None or len(operands) != 2 or not all(isinstance(each, Tensor) for each in operands):
            return None
        is_second = id(operands[1]) in self.known
        of_rows, of_stack = told[2 - is_second], told[1 + is_second]
        _, owner, turned = self.known[id(operands[is_second])]
        ways = [summed in of_rows and summed not in told[3] and kept in told[3] and kept not in of_rows
                for summed, kept in (of_stack[-2:], of_stack[:-3:-1])]
        if len({*of_stack}) < len(of_stack) or ways.count(True) != 1:
            raise ValueError("no product")
        made = torch.einsum(equation, *(each.to("meta") for each in operands))  # which sizes that do not fit make fail
        self.seen.setdefault(owner, set()).add(ways[0] is not turned)
        return torch.zeros(()).expand(made.shape)


def _turns(before: Tensor, after: Tensor, axes: tuple) -> bool:
    """Whether the last two axes are the other way round, and the others as they were."""
    flat = axes[0] if axes and isinstance(axes[0], (tuple, list)) else axes
    last = {before.ndim - 2, before.ndim - 1}
    asked = [axis % before.ndim for axis in flat]
    is_whole = not asked or {*asked} == last or asked == [*range(before.ndim - 2), before.ndim - 1, before.ndim - 2]
    return is_whole and after.shape == before.mT.shape


def _is_part(name: str, args: tuple) -> bool:
    """Whether matrices are taken as they are: by numbers of experts, with new axes in front."""
    if name == "index_select" or name == "unbind":
        return all(axis == 0 for axis in args[1:2])
    if name != "__getitem__":
        return True
    index, numbers = args[1], 0
    for each in index if isinstance(index, tuple) else (index,):
        is_number = isinstance(each, int) or isinstance(each, Tensor) and not each.is_floating_point()
        if not (is_number and args[0].ndim == 3 or each is None or each == slice(None)):
            return False
        numbers += is_number
    return numbers <= 1
