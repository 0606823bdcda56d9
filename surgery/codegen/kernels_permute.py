"""Kernels that permute or linearly mix the last axes of activations, differentiable or not."""

from __future__ import annotations

import torch
from torch import Tensor

Rows = tuple[tuple[float, ...], ...]


def swap(a: Tensor, sizes: tuple[int, int, int, int]) -> Tensor:
    """The last axis as [g, p, q, r], p and q exchanged: one copy."""
    return a.unflatten(-1, sizes).transpose(-3, -2).flatten(-4)


def mix(a: Tensor, rows: Rows) -> Tensor:
    """L a for a matrix L of known numbers: [..., n, q] -> [..., m, q]. A 0 costs nothing."""
    parts = a.unbind(-2)
    sums = []
    for row in rows:
        terms = [(c, x) for c, x in zip(row, parts) if c]
        if not terms:
            sums.append(torch.zeros_like(parts[0]))
            continue
        (first, x), *rest = terms
        sum_ = x if first == 1 else x * first
        for c, x in rest:
            sum_ = sum_.add(x, alpha=c)  # one pass for each, and no multiple of x beside it
        sums.append(sum_)
    return torch.stack(sums, -2)


def add_placed(y: Tensor, a: Tensor, places: Tensor, alpha: float = 1.0) -> Tensor:
    """y + alpha a at its places, written into y: [t, n], [t, k], [k]."""
    return y.index_add_(-1, places, a, alpha=alpha)


def put(a: Tensor, values: Tensor, places: Tensor) -> Tensor:
    """a + scatter(values, places): [m, n], [k], [k] -> [m, n], in one copy."""
    return a.flatten().scatter_add(0, places, values).view(a.shape)


def add_circulant(a: Tensor, c: Tensor) -> Tensor:
    """a + circulant(c): [p b, q b], [p, q, b] -> [p b, q b], with a fourth of a matrix beside it."""
    p, q, b = c.shape
    count, result = -(-b // 4), a.new_empty(a.shape)
    # of a row that is repeated, what begins one number before the end of each turn has moved right by one more
    rows = c.repeat(1, 1, count + 1)
    here, there = (m.unflatten(-1, (q, b)).unflatten(0, (p, b)) for m in (a, result))
    for first in range(0, b, count):
        some = slice(first, first + count)
        shape, steps = here[:, some].shape, (rows.stride(0), b - 1, rows.stride(1), 1)
        torch.add(here[:, some], rows.as_strided(shape, steps, -first % b), out=there[:, some])
    return result
