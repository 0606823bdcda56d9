"""What only a backward pass computes, and the masks of dropout, which both passes of a step read: a row each."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from surgery.ir import derivatives, flop_rules
from surgery.ir.expression import Shape
from surgery.ir.shape_rules import ShapeError, dropped, elementwise, exactly, matrix, same, shape_text
from surgery.ir.table import IN_STEP, OPERATIONS, Added, Form, InPlace, Linear, Memory, Operation, When


def _mask(mask: tuple, a: Any) -> Any:
    import torch

    return torch.zeros_like(a, dtype=torch.bool)


def _columns_shape(a: Shape, g: Shape) -> Shape:
    return exactly(2, "two matrices of as many rows", elementwise(a, g))[1:]


def _outer_shape(a: Shape, g: Shape) -> Shape:
    if len(a) != 2 or a[:1] != g[:-1]:
        raise ShapeError(f"needs two matrices of as many rows, not {shape_text(a)} and {shape_text(g)}")
    return a[1:] + g[1:]


def _circulate_back_shape(g: Shape, c: Shape) -> Shape:
    p, q, b = exactly(3, "a stack of first rows", c)
    if g[-1:] != (p * b,):
        raise ShapeError(f"needs rows of {p * b}, not {shape_text(g)}")
    return g[:-1] + (q * b,)


def _mixed_back_shape(g: Shape, k: Shape) -> Shape:
    if g[:2] != k[:2] or g[-1] != exactly(4, "a kernel [2, f, q, p]", k)[3]:
        raise ShapeError(f"{shape_text(g)} and {shape_text(k)} do not agree")
    return g[:-1] + (k[2],)


def _mixed_dot_shape(x: Shape, g: Shape) -> Shape:
    if len(x) < 3 or x[:-1] != g[:-1]:
        raise ShapeError(f"{shape_text(x)} and {shape_text(g)} are not the spectra of as many rows")
    return x[:2] + (x[-1], g[-1])


def _block_dot(a: Any, g: Any, s: Any) -> Any:
    rows, grads = a.unflatten(-1, s.shape[:2]), g.unflatten(-1, s.shape[::2])
    return (rows[..., None] * grads[..., None, :]).sum(0)


def _circulate_back(g: Any, c: Any) -> Any:
    # by the matrix itself: a dense meaning is to be plainly right, and the kernel is held to it
    return g @ OPERATIONS["circulant"].value(None, [c], c)


def _circulate_dot(a: Any, g: Any, c: Any) -> Any:
    """Of aᵀ g, a matrix [q b, p b] of circulant blocks' gradients, the sums along the wrapped diagonals."""
    import torch

    p, q, b = c.shape
    blocks = (g.mT @ a).reshape(p, b, q, b).permute(0, 2, 1, 3)
    at = torch.arange(b, device=c.device)
    return torch.stack([blocks[:, :, at, (at + shift) % b].sum(-1) for shift in range(b)], -1)


def _mixed_dot(x: Any, g: Any) -> Any:
    return OPERATIONS["mixed"].value(None, [x.flatten(2, -2).mT, g.flatten(2, -2)], x)


def _mixed_back(g: Any, k: Any) -> Any:
    import torch

    return OPERATIONS["mixed"].value(None, [g, torch.stack([k[0].mT, -k[1].mT])], g)


def in_step(name: str, arity: int | None, shape: Callable[..., Shape], dense: Callable[..., Any], doc: str,
            module: str = "kernels", **more: Any) -> Operation:
    """What a step computes by a kernel of its name, in one of codegen's modules of kernels."""
    return Operation(name, arity, shape, dense, doc, stage=IN_STEP, memory=Memory.NEW, step_kernel=f"{module}.{name}",
                     **more)


ROWS = [
    # Its dense meaning is that of evaluation, which drops nothing.
    Operation("mask", 1, dropped, _mask, "what dropout takes out of x", stage=IN_STEP, sizes=("share", "step"),
              stops_gradient=True, text="mask({}, {data[0]!r})", step_kernel="masks.mask"),
    Operation("number", 1, dropped, _mask, "the number from which such a mask is drawn again, in its place",
              stage=IN_STEP, sizes=("share", "step"), stops_gradient=True, text="number({}, {data[0]!r})",
              step_kernel="masks.number"),
    in_step("masked", 2, elementwise, lambda a, mask: a.masked_fill(mask, 0.0), "a with 0 where the mask says so",
            module="masks", linear=Linear.EACH, is_unkept=True, passes=1, derivative=derivatives.masked,
            in_place=InPlace(Form("masked_", kernel="masks.masked_", is_fused=False), lambda node: node.args[:1]),
            added=Added(Form("add_masked", kernel="masks.add_masked"), fits=lambda z: z.args[0].op == "matmul",
                        takes=lambda z: z.args[:1], when=When.IN_STEP)),
    in_step("outer", 2, _outer_shape, lambda a, g: a.mT @ g, "aᵀ g", linear=Linear.EACH,
            times=Form("outer", kernel="kernels.outer", writes=False), flops=flop_rules.each_read(2, -1)),
    Operation("flat", 1, lambda a: (prod(matrix(a)[:-1]), a[-1]), lambda a: a.flatten(0, -2),
              "activations of any rank as a matrix", stage=IN_STEP, linear=Linear.TOGETHER, text="{}.flatten(0, -2)",
              memory=Memory.VIEW),
    Operation("zeros", 1, same, lambda a: 0 * a, "zeros of its size", stage=IN_STEP, text="torch.zeros_like({})",
              memory=Memory.NEW),
    in_step("column_dot", 2, _columns_shape, lambda a, b: (a * b).sum(0), "Σ a b over the rows", linear=Linear.EACH),
    in_step("dot", 2, lambda a, b: elementwise(a, b)[:0], lambda a, b: (a * b).sum(), "Σ a b over all entries",
            linear=Linear.EACH),
    in_step("column_sum", 1, lambda a: exactly(2, "a matrix", a)[1:], lambda a: a.sum(0), "Σ a over the rows",
            linear=Linear.TOGETHER),
    in_step("block_dot", 3, lambda a, g, s: exactly(3, "a stack of blocks", s), _block_dot,
            "aᵀ g on the blocks of the diagonal, in the shape of s", flops=flop_rules.block_dot),
    in_step("column_blocks", 2, lambda a, s: OPERATIONS["blocks"].shape_of(None, (a, s)),
            lambda a, s: OPERATIONS["blocks"].value(None, [a, s], a), "a block_diag(s), in memory column after column",
            linear=Linear.EACH, flops=flop_rules.blocks),
    in_step("thin", 2, lambda a, m: OPERATIONS["matmul"].shape_of(None, (a, m)), lambda a, m: a @ m,
            "a m for a few columns of m", linear=Linear.EACH, flops=flop_rules.each_read(2, -1)),
    in_step("circulate_back", 2, _circulate_back_shape, _circulate_back, "g circulant(c)", linear=Linear.EACH,
            flops=flop_rules.circulate),
    in_step("circulate_dot", 3, lambda a, g, c: exactly(3, "a stack of first rows", c), _circulate_dot,
            "the gradient of `circulate` in c", flops=flop_rules.circulate_dot),
    in_step("mixed_back", 2, _mixed_back_shape, _mixed_back, "the gradient of `mixed` in x", linear=Linear.EACH,
            flops=flop_rules.each(4, 1, 3)),
    in_step("mixed_dot", 2, _mixed_dot_shape, _mixed_dot, "the gradient of `mixed` in its kernel", linear=Linear.EACH,
            flops=flop_rules.each_read(4, 3)),
]
