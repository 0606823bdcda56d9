"""Σ a b d over each row of two matrices [m, n], a few rows at a time: no matrix is made beside them or kept."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from surgery.ir.orthogonal_maps import is_traced

ROWS = {"cpu": 16}  # what a core keeps close; elsewhere each operation costs more to start
OTHERWISE = 1024


def _parts(a: Tensor) -> tuple[Tensor, ...]:
    return a.split(ROWS.get(a.device.type, OTHERWISE))


def _products(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    return (x * y for x, y in zip(_parts(a), _parts(b)))


class _WeightedDot(torch.autograd.Function):
    @staticmethod
    def forward(a: Tensor, b: Tensor, d: Tensor) -> Tensor:
        return torch.cat([rows @ d for rows in _products(a, b)])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (a, b, d), (grad,) = ctx.saved_tensors, grad_outputs
        of_a, of_b, of_d = ctx.needs_input_grad
        # the products are made again: held, they would be a matrix as large as the weight
        return (grad[:, None] * b * d if of_a else None, grad[:, None] * a * d if of_b else None,
                reduce(torch.add, (rows.mT @ g for rows, g in zip(_products(a, b), _parts(grad)))) if of_d else None)


def weighted_dot(a: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """Σ a b d over each row: [m, n], [m, n], [n] -> [m]. A compiler makes one pass of it by itself."""
    return (a * b * d).sum(-1) if is_traced() else _WeightedDot.apply(a, b, d)
