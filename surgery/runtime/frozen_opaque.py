"""A called layer as a program sees it: the same questions as of a stored weight, answered by calls."""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn as nn

from surgery.diagnostics import fail
from surgery.layers import opaque_linear
from surgery.layers.layouts import Layout
from surgery.runtime.frozen_layers import MAPS, Frozen, FrozenLinear


class FrozenCalled(FrozenLinear):
    """A linear layer whose weight is no plain matrix. It runs in its input's dtype, and gives its output in its own.

    `weight` is W where a program that reads all of it was given it, else None.
    """

    weight: torch.Tensor | None = None

    def __init__(self, module: nn.Module, layout: Layout, parameter: str, gives_gradient: bool = True):
        self.layout, self.module, self.bias, self.given = layout, module, opaque_linear.bias(module), None
        self.gives_gradient = gives_gradient

    @cached_property
    def dtype(self) -> torch.dtype:
        return opaque_linear.dtype(self.module)

    @cached_property
    def device(self) -> torch.device:
        return opaque_linear.device(self.module)

    @property
    def width(self) -> int:
        return opaque_linear.said_sides(self.module)[1]

    @property
    def held(self) -> tuple[torch.Tensor, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]  # looked up anew
        """The tensors that W and b are made of."""
        loose = (t for t in vars(self.module).values() if isinstance(t, torch.Tensor))
        return (*opaque_linear.pieces(self.module), *loose, *(() if self.bias is None else (self.bias,)))

    def dtype_of(self, x: torch.Tensor) -> torch.dtype:
        # only the layer knows which dtypes it takes, so that it is called in its input's
        self.dtype, self.device = x.dtype, x.device
        return super().dtype_of(x)

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """W [out, in], recovered by calls."""
        return opaque_linear.matrix(self.module, dtype)

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        return self.read(dtype) if self.weight is None else self.weight.to(dtype)

    def enter(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        self.dtype = dtype
        return super().enter(x, dtype)

    def leave(self, y: torch.Tensor) -> torch.Tensor:
        return super().leave(y).to(self.given or y.dtype)

    def frozen_rows(self, rows: torch.Tensor) -> torch.Tensor:
        return self._checked(rows, opaque_linear.through(self.module, rows.to(self.dtype))).to(rows.dtype)

    def frozen_back(self, rows: torch.Tensor) -> torch.Tensor:
        return opaque_linear.back(self.module, rows.to(self.dtype)).to(rows.dtype)

    # a layer that is called computes in its own dtype, whatever is asked
    def frozen_exact(self, rows: torch.Tensor) -> torch.Tensor:
        return self.frozen_rows(rows)

    def frozen_back_exact(self, rows: torch.Tensor) -> torch.Tensor:
        return self.frozen_back(rows)

    def frozen_biased(self, x: torch.Tensor) -> torch.Tensor:
        y = self._checked(x, opaque_linear.call(self.module, x))
        self.given = y.dtype
        return y.to(x.dtype)

    def frozen(self, x: torch.Tensor) -> torch.Tensor:
        y = self.frozen_biased(x)
        return y if self.bias is None else y - self.bias.to(y.dtype)  # the layer adds it whatever is asked

    frozen_flat = frozen

    def _checked(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What the layer gives. Raises: SurgeryError (no-gradient), if the input needs a gradient and will get none."""
        if x.requires_grad and torch.is_grad_enabled() and not (self.gives_gradient and y.requires_grad):
            name = type(self.module).__name__
            raise fail("no-gradient", f"{name} gives no gradient to its input: nothing before it can train",
                       helps=("evaluate under torch.no_grad(), or leave such layers out with `except`",
                              "if the model was evaluated before the surgery, load it anew: some layers then repack "
                              "themselves for good"))
        return y


_MAPS = {**MAPS, "called linear": FrozenCalled}


def frozen(module: nn.Module, layout: Layout, parameter: str, gives_gradient: bool = True) -> Frozen:
    """The frozen map of a module, as programs call it. `gives_gradient`: whether a called one does so to its input."""
    return _MAPS[layout.kind.name](module, layout, parameter, gives_gradient)
