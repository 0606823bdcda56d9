"""The frozen layer as a program sees it: a linear map that is called, whatever the module's kind.

One class per kind of layer. Activations inside a program are matrices [tokens, features]; `enter`, `rows` and `leave`
convert a layer's own input and output. Nothing here changes the module.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any, Self

import torch
import torch.nn as nn
import torch.nn.functional as F

from surgery.codegen.kernels import column_squares, on_cpu
from surgery.codegen.masks import mask, masked
from surgery.ir.dense import autocasts, in_dtype
from surgery.ir.orthogonal_maps import is_traced
from surgery.layers.layouts import Layout
from surgery.layers.opaque_linear import stored, stored_weight
from surgery.runtime.sharding import is_part, whole

_BEGIN = 64  # bytes: torch's own tensors of a CPU begin at multiples of them


def laid(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, where torch itself would have put it: a copy, where it begins elsewhere, as in a file that is mapped.
    A CPU's library may add a product up in another order by where its numbers begin, and a merge of the model in memory
    would give other last bits than one of its files."""
    return tensor.clone() if tensor.device.type == "cpu" and tensor.data_ptr() % _BEGIN else tensor


class Frozen:
    """What programs ask of every kind; `module` is the operated one, `parameter` its weight's name.

    `follows_autocast` says that torch runs the module in autocast's dtype.
    """

    follows_autocast = True

    def __init__(self, module: nn.Module, layout: Layout, parameter: str, gives_gradient: bool = True):
        self.layout, self.module = layout, module
        self.stored = stored_weight(module, parameter)
        self.weight = layout.matrix(self.stored)
        self.bias: torch.Tensor | None = None
        if parameter == "weight" and ("bias" in module._parameters or hasattr(module, "bias")):
            self.bias = stored(module, "bias")
        self.dtype, self.device = self.weight.dtype, self.weight.device
        # as the module holds them, whatever this view of it is cast to
        self.held: tuple[torch.Tensor, ...] = (self.stored,) if self.bias is None else (self.stored, self.bias)

    def whole(self) -> Frozen:
        """Itself, with all of each tensor where this process holds a part."""
        return self._with(whole) if any(map(is_part, self.held)) else self

    def laid(self) -> Frozen:
        """Itself, with each tensor `laid`, where it is a plain weight's."""
        return self if self.weight is None else self._with(laid)

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Frozen:
        """Itself, with another tensor in the place of each."""
        other = copy(self)
        other.stored, other.bias = change(self.stored), None if self.bias is None else change(self.bias)
        other.weight = self.layout.matrix(other.stored)
        return other

    def of(self, weight: torch.Tensor) -> Self:
        """The layer with another matrix [out, in]: one of a stack, say."""
        other = object.__new__(type(self))
        vars(other).update(vars(self), weight=weight)  # as `copy` does, in a tenth of its time
        return other

    def dtype_of(self, x: torch.Tensor) -> torch.dtype:
        """The dtype of the activations for an input: the layer's own, or that of an autocast. Raises: RuntimeError, as
        torch's own layer, for an input of another dtype."""
        if not self.follows_autocast:
            return self.dtype
        # autocast leaves float64 alone, and whole numbers
        narrows = x.is_floating_point() and torch.float64 not in (x.dtype, self.dtype) and autocasts(self.device.type)
        if narrows:
            return torch.get_autocast_dtype(self.device.type)
        if x.dtype != self.dtype:
            raise RuntimeError(f"an operated {type(self.module).__name__} takes {self.dtype}, as it does by itself, "
                               f"and is given {x.dtype}")
        return self.dtype

    @property
    def is_trained(self) -> bool:
        """Whether the layer's own tensors take a gradient (`train` may unfreeze them)."""
        return self.stored.requires_grad or self.bias is not None and self.bias.requires_grad

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """W as [out, in]."""
        return self.weight.to(dtype)

    def squares(self, axis: int, dtype: torch.dtype) -> torch.Tensor:
        """Σ W² over each row (axis 1) or column (axis 0) of W [out, in], summed in a dtype: read as it is stored."""
        weight = self.read(dtype) if self.weight is None else self.weight
        if weight.requires_grad:  # the second derivative of a norm is not finite at 0
            return weight.to(dtype).square().sum(axis)
        if on_cpu(weight) and weight.stride(axis) != 1:  # which torch's own norm takes twenty times as long for
            return column_squares(weight if axis == 0 else weight.mT, dtype)
        return torch.linalg.vector_norm(weight, dim=axis, dtype=dtype).square()

    def offset(self, dtype: torch.dtype) -> torch.Tensor:
        """b as [out]."""
        assert self.bias is not None  # a program that asks for it is of a layer that has one
        return self.bias.to(dtype)

    def fill(self, shape: tuple[int, ...], value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full(shape, value, dtype=dtype, device=self.device)

    def eye(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.eye(shape[-1], dtype=dtype, device=self.device).expand(shape)

    def like(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor of the dtype (torch's default one, where none counts), where the weight is."""
        return torch.empty(0, dtype=dtype, device=self.device)

    def frozen_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """A few rows [r, in] through the map: [r, out]. The weight is read in order, as the larger one."""
        return in_dtype((self.weight @ in_dtype(rows, self.weight.dtype).mT).mT, rows.dtype)

    def frozen_exact(self, rows: torch.Tensor) -> torch.Tensor:
        """`frozen_rows`, in the dtype of the rows, whatever the weight's is."""
        return self.frozen_rows(rows) if rows.dtype == self.weight.dtype else _exact(rows, self.weight, False)

    def frozen_back_exact(self, rows: torch.Tensor) -> torch.Tensor:
        """`frozen_back`, in the dtype of the rows."""
        return self.frozen_back(rows) if rows.dtype == self.weight.dtype else _exact(rows, self.weight, True)

    def frozen_flat(self, x: torch.Tensor) -> torch.Tensor:
        """Activations [tokens, in] inside of the program through the map: [tokens, out]."""
        return F.linear(x, self.weight)

    def frozen_back(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [r, out] through the transposed map: [r, in]."""
        return in_dtype(in_dtype(rows, self.weight.dtype) @ self.weight, rows.dtype)

    def frozen_onto(self, y: torch.Tensor, x: torch.Tensor, beta: float = 1.0) -> torch.Tensor:
        """beta y + x Wᵀ, written into y: [tokens, out], [tokens, in]."""
        return y.addmm_(x, self.weight.mT, beta=beta)

    def frozen_back_onto(self, y: torch.Tensor, rows: torch.Tensor, beta: float = 1.0) -> torch.Tensor:
        """beta y + rows W, written into y: [tokens, in], [tokens, out]."""
        return y.addmm_(rows, self.weight, beta=beta)

    def dropout(self, x: Any, p: float) -> Any:
        return F.dropout(x, p) if is_traced() or not on_cpu(x) else masked(x, mask(x, p)) / (1 - p)

    def tokens(self, x: Any) -> int | None:
        """The number of rows of an input that has entered, where it is known before the map runs."""
        return None

    def rows(self, x: Any) -> Any:
        """An input that has entered as what the program reads."""
        return x

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """W as [out, in]; of a layer that stores none, recovered by calls."""
        return self.matrix(dtype)

    def as_dtype(self, dtype: torch.dtype) -> Frozen:
        """The layer with its tensors in another dtype."""
        raise NotImplementedError

    def enter(self, x: torch.Tensor, dtype: torch.dtype) -> Any:
        """The layer's own input, checked, in the dtype in which the program reads its rows."""
        raise NotImplementedError

    def leave(self, y: torch.Tensor) -> torch.Tensor:
        """The program's output as the layer's own."""
        raise NotImplementedError


PART = 1 << 21  # numbers of a weight that are in a wider dtype at once


def _exact(rows: torch.Tensor, weight: torch.Tensor, back: bool) -> torch.Tensor:
    """Rows times Wᵀ, or W (`back`), in the dtype of the rows."""
    if is_traced() or weight.requires_grad:
        return rows @ (weight if back else weight.mT).to(rows.dtype)
    return _Exact.apply(rows, weight, back)


class _Exact(torch.autograd.Function):
    """A part of W at a time, of which none is kept."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, back: bool) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.back = back
        size = max(1, PART // max(1, weight.shape[1]))
        wide = (part.to(rows.dtype) for part in weight.split(size))
        if not back:
            return torch.cat([rows @ part.mT for part in wide], dim=-1)
        result = rows.new_zeros(len(rows), weight.shape[1])
        for some, part in zip(rows.split(size, dim=-1), wide):
            result.addmm_(some, part)
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _Exact.apply(*grad_outputs, *ctx.saved_tensors, not ctx.back), None, None


class FrozenLinear(Frozen):
    """nn.Linear, transformers' Conv1D: x [..., in]."""

    def as_dtype(self, dtype: torch.dtype) -> FrozenLinear:
        """The layer with its tensors in another dtype (itself, where they are: a bias may have one of its own)."""
        if self.weight.dtype == dtype and (self.bias is None or self.bias.dtype == dtype):
            return self
        other = copy(self)
        other.weight, other.bias = self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)
        return other

    @property
    def width(self) -> int:
        """How many features it takes."""
        return self.weight.shape[-1]

    def enter(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if x.shape[-1:] != (self.width,):  # what is multiplied entry by entry would be spread over all features
            raise RuntimeError(f"an operated {type(self.module).__name__} takes rows of {self.width} features, and is "
                               f"given {list(x.shape)}")
        self.shape = x.shape[:-1]
        return in_dtype(x, dtype)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])

    def leave(self, y: torch.Tensor) -> torch.Tensor:
        return y if len(self.shape) == 1 else y.reshape(*self.shape, y.shape[-1])

    def tokens(self, x: torch.Tensor) -> int | None:
        # one program is compiled, for any number
        return None if torch.compiler.is_compiling() else x.shape[:-1].numel()

    def frozen(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)

    def frozen_biased(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class FrozenConv(Frozen):
    """nn.Conv1d, 2d, 3d: x [batch, channels, ...]; a matrix [m, in · kernel] is m kernels. In groups, `in` is what one
    group sees, and a matrix is as many equal runs of kernels as there are groups, one for each."""

    is_alone = False
    module: nn.Conv2d  # pyright: ignore[reportIncompatibleVariableOverride]  # or one of 1 or 3 axes, with the same forward

    def enter(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return x.to(dtype)

    def leave(self, y: torch.Tensor) -> torch.Tensor:
        if self.is_alone:
            return y
        y = y.reshape(*self.shape, y.shape[-1]).movedim(-1, self.channels)
        return y.contiguous() if self.is_dense else y  # where torch's own is, which models take for granted (`view`)

    def run_alone(self, x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """All that the layer gives, with a matrix and a bias in the place of its own, in the layer's form: not rows."""
        self.is_alone = True
        return self.module._conv_forward(x, matrix.reshape(self.stored.shape), bias)

    def run(self, x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = self.module._conv_forward(x, matrix.reshape(-1, *self.stored.shape[1:]), bias)
        self.channels = y.ndim - self.stored.ndim + 1  # an input without a batch axis is one image
        self.is_dense = y.is_contiguous()
        y = y.movedim(self.channels, -1)
        self.shape = y.shape[:-1]
        return y.reshape(-1, y.shape[-1])

    def frozen(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x, self.stored)

    def frozen_biased(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x, self.stored, self.bias)


class FrozenEmbedding(Frozen):
    """nn.Embedding: token ids of any shape are one-hot rows [tokens, vocabulary]; its map is Wᵀ."""

    follows_autocast = False
    module: nn.Embedding  # pyright: ignore[reportIncompatibleVariableOverride]  # a narrower type of what `Frozen` sets

    def enter(self, x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, None]:
        self.shape, self.ids = x.shape, x.reshape(-1)
        return self.ids, None

    def leave(self, y: torch.Tensor) -> torch.Tensor:
        """No gradient comes from where padding stands. (Not by `F.embedding`, which would keep it from the factor that
        is looked up alone, and not from what is multiplied with it.)"""
        if self.module.padding_idx is not None:
            y = y.where((self.ids != self.module.padding_idx)[:, None], y.detach())
        return y.reshape(*self.shape, y.shape[-1])

    def dropout(self, x: tuple, p: float) -> tuple:
        """A one-hot row has one entry to drop: the token's whole update."""
        ids, kept = x
        mask = F.dropout(self.weight.new_ones(ids.shape), p)
        return ids, mask if kept is None else mask * kept

    def run(self, x: tuple, matrix: torch.Tensor) -> torch.Tensor:
        """The rows of a matrix [m, vocabulary]ᵀ that the ids name."""
        ids, kept = x
        rows = F.embedding(ids, matrix.mT)
        return rows if kept is None else rows * kept[:, None].to(rows.dtype)

    def frozen(self, x: tuple) -> torch.Tensor:
        return self.run(x, self.weight.mT)


# The map of each kind of layer with a stored weight, by the kind's name.
MAPS: dict[str, type[Frozen]] = {"linear": FrozenLinear, "convolution": FrozenConv, "grouped convolution": FrozenConv,
                                 "embedding": FrozenEmbedding, "norm": Frozen}  # which runs its own forward alone
