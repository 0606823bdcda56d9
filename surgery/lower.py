"""From a formula to the program that an adapter runs.

Takes a `Formula`; gives a `Program` that maps a layer's input to its output. Promises: the same values and gradients as
the dense formula, to dtype tolerance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn as nn

from surgery.expr.evaluate import dense
from surgery.expr.ir import Expr, Formula
from surgery.expr.primitives import make
from surgery.layout import Layout

Dropped = tuple[tuple[float, Expr], ...]


@dataclass(frozen=True)
class Program:
    """The output as a sum over the layer's map run with several matrices: `kept` on the input, each of `dropped` on the
    input with dropout."""

    formula: Formula
    kept: Expr
    dropped: Dropped

    def run(self, layout: Layout, module: nn.Module, x: torch.Tensor, leaves: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """y = x W'ᵀ + b' for the layer's own kind of input. `leaves` are in the dtype to compute W' in."""
        dtype = module.weight.dtype
        bias = dense(self.formula.bias, leaves).to(dtype) if "bias" in leaves else None
        if not module.training:
            return layout.run(module, x, dense(self.formula.weight, leaves).to(dtype), bias)
        y = layout.run(module, x, dense(self.kept, leaves).to(dtype), bias)
        for p, part in self.dropped:
            y = y + layout.run_dropped(module, x, dense(part, leaves).to(dtype), p)
        return y


@lru_cache(maxsize=None)
def lower(formula: Formula) -> Program:
    """The program of a formula."""
    kept, dropped = _split(formula.weight)
    return Program(formula, kept, dropped)


def _split(expr: Expr) -> tuple[Expr | None, Dropped]:
    """The expression as what sees the whole input, and (p, part) for what sees it through dropout: linearity in `drop`."""
    if expr.op == "drop":
        return None, ((expr.data, expr.args[0]),)
    if expr.op not in ("add", "matmul"):
        return expr, ()
    (left, left_drops), (right, right_drops) = map(_split, expr.args)
    if expr.op == "add":
        kept = make("add", left, right) if left and right else left or right
        return kept, left_drops + right_drops
    if right_drops:
        return right and make("matmul", left, right), tuple((p, make("matmul", left, e)) for p, e in right_drops)
    return left and make("matmul", left, right), tuple((p, make("matmul", e, right)) for p, e in left_drops)
