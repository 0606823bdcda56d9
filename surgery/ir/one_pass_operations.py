"""What is computed in one pass over activations, where a device has kernels for it: a row each.

A gain beside a low-rank term, its backward pass with the sum that is the gain's gradient, and products with an
activation under dropout. `codegen.one_pass` puts them in the place of the operations that they are made of.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from surgery.ir import derivatives, flop_rules
from surgery.ir.expression import Expr, Shape
from surgery.ir.flop_rules import Count
from surgery.ir.gradient_operations import in_step
from surgery.ir.shape_rules import ShapeError, exactly, shape_text
from surgery.ir.sizes import known
from surgery.ir.table import IN_STEP, Memory, Operation


def _low_rank_shape(h: Shape, m: Shape) -> Shape:
    (tokens, rank), (rows, columns) = exactly(2, "a thin activation", h), exactly(2, "a matrix", m)
    if rank != rows:
        raise ShapeError(f"{shape_text(h)} and {shape_text(m)} do not agree")
    return tokens, columns


def _gained_shape(data: tuple, y: Shape, d: Shape, h: Shape, m: Shape) -> Shape:
    if not y == _low_rank_shape(h, m) == (*y[:-1], *d):
        raise ShapeError(f"{shape_text(y)}, a gain {shape_text(d)} and a term {shape_text(h + m)} do not agree")
    return y


def _gained_dot_shape(data: tuple, g: Shape, y: Shape, h: Shape, m: Shape) -> Shape:
    return _gained_shape(data, g, y[1:], h, m)[1:]


def _gained_back_shape(data: tuple, g: Shape, d: Shape, y: Shape, *low: Shape) -> Shape:
    """That of the first of its two values."""
    if g != y or d != g[1:] or low and _low_rank_shape(*low) != g:
        raise ShapeError(f"{shape_text(g)}, {shape_text(y)} and a gain {shape_text(d)} do not agree")
    return g


def _masked_shape(a: Shape, mask: Shape) -> Shape:
    if a != mask or len(a) != 2:
        raise ShapeError(f"{shape_text(a)} and a mask {shape_text(mask)} do not agree")
    return a


def _masked_outer_shape(data: tuple, a: Shape, mask: Shape, g: Shape) -> Shape:
    (tokens, width), (rows, rank) = _masked_shape(a, mask), exactly(2, "a thin activation", g)
    if tokens != rows:
        raise ShapeError(f"{shape_text(a)} and {shape_text(g)} have not as many rows")
    return (rank, width) if data[0] else (width, rank)


def _gained(data: tuple, y: Any, d: Any, h: Any, m: Any) -> Any:
    factor, inside = data
    return d * (y + factor * (h @ m)) if inside else d * y + factor * (h @ m)


def _gained_back(data: tuple, g: Any, d: Any, y: Any, *low: Any) -> tuple:
    factor, inside = data
    term = factor * (low[0] @ low[1]) if low else 0
    return d * g + (0 if inside else term), (g * (y + (term if inside else 0))).sum(0)


def _low_rank_flops(h: int) -> flop_rules.Flops:
    """Of a low-rank term, whose thin factor is the argument `h`, and a few operations beside it."""
    def flops(node: Expr, count: Count) -> float:
        rank = known(node.args[h].shape[-1]) if h < len(node.args) else 0
        return count(node.args[0]) * (4 + 2 * rank)

    return flops


_row = partial(in_step, module="kernels_one_pass")

ROWS = [
    _row("gained", 4, _gained_shape, _gained, "d (y + c h m), or d y + c h m", sizes=("factor", "inside"),
         flops=_low_rank_flops(2), derivative=derivatives.gained),
    _row("gained_dot", 4, _gained_dot_shape, lambda data, g, y, h, m: (g * (y + data[0] * (h @ m))).sum(0),
         "Σ g (y + c h m) over the rows", sizes=("factor",), flops=_low_rank_flops(2)),
    _row("gained_back", None, _gained_back_shape, _gained_back,
         "d g and Σ g y over the rows, c h m added to y, to d g or to none", sizes=("factor", "inside"),
         flops=_low_rank_flops(3)),
    Operation("part", 1, lambda data, pair: pair if data[0] == 0 else pair[1:], lambda data, pair: pair[data[0]],
              "one of two values that are computed together", stage=IN_STEP, sizes=("which",), text="{}[{data[0]}]",
              memory=Memory.NEW),
    _row("masked_times", 3, lambda a, mask, m: _low_rank_shape(_masked_shape(a, mask), m),
         lambda a, mask, m: a.masked_fill(mask, 0.0) @ m, "masked(a) m", flops=flop_rules.product),
    _row("times_masked", 3, lambda h, m, mask: _masked_shape(_low_rank_shape(h, m), mask),
         lambda h, m, mask: (h @ m).masked_fill(mask, 0.0), "masked(h m)", flops=flop_rules.product),
    _row("masked_outer", 3, _masked_outer_shape,
         lambda data, a, mask, g: g.mT @ a.masked_fill(mask, 0.0) if data[0] else a.masked_fill(mask, 0.0).mT @ g,
         "masked(a)ᵀ g, or its transpose", sizes=("turned",), flops=flop_rules.each_read(2, -1)),
]
