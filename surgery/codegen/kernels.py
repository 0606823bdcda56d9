"""Kernels that do in one pass over activations what autograd needs several for. No gradient is taken through them.

Each takes and gives matrices [tokens, features]; where a shape is given the doc has it. Promises: any float dtype, any
device, no copy of an activation.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor

from surgery.codegen.memory_order import WIDER
from surgery.codegen.supposed_device import runs_as_on
from surgery.ir.primitives_indexing import mixed_blocks

ROWS = 128  # of an activation that a CPU keeps close while it reads them with a stride
SMALL_PARTS = 32  # of a weight, at least, of which one at a time is copied
TILE = 32  # columns of blocks that a device multiplies well
NARROW = 16  # columns of blocks below which a CPU does not
THIN = range(2, 65)  # columns of an activation beside a much wider one
FEWEST = 64  # tokens of which a thin product is made in parts:
BAND = 16  # of so many rows, which is what a CPU's registers hold,
RUN, RUNS = 64, 16  # or of so many columns at least, and so many parts at most
# What torch raises where a gradient is of several outputs at once and looks like that of one (`is_grads_batched`, a
# `vmap` of `autograd.grad`): it writes none of those into memory for one, and takes not all views of it.
SEVERAL = RuntimeError


def on_cpu(a: Tensor) -> bool:
    """True on a CPU, where kernels work on a cacheful at a time, and `masks` draws the indices of what is dropped."""
    return runs_as_on(a.device.type) == "cpu"


def wide(a: Tensor) -> torch.dtype:
    """The dtype in which sums over the numbers of a are taken."""
    return torch.promote_types(a.dtype, torch.float32)


def column_dot(a: Tensor, b: Tensor) -> Tensor:
    """Σ a b over the rows: [t, n], [t, n] -> [n]. The products are summed in float32 at least: some thousands of them
    in bfloat16 are off by several per cent."""
    if on_cpu(a) or a.dtype == wide(a) or a.shape[-1] % TILE:
        return _wide_products(a, b).sum(0).to(a.dtype)
    # The diagonal of aᵀ b on small blocks. It does 32 times the arithmetic, on units that have it to spare, rounds no
    # product, and reads a and b once: on an H200 74 us in the place of 278 for [8192, 4096] in bfloat16.
    x, y = (t.unflatten(-1, (-1, TILE)).transpose(0, 1) for t in (a, b))
    return (x.mT @ y).diagonal(dim1=-2, dim2=-1).flatten()


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Σ a b over all entries: [t, n], [t, n] -> []. Summed in float32 at least, and rounded once: where columns cancel,
    the sum of rounded ones is per cents off."""
    return _wide_products(a, b).sum().to(a.dtype)


def column_squares(w: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ w² over the rows of a weight, summed in a dtype, with a small part of it as memory: [m, n] -> [n]."""
    parts = w.split(min(ROWS, -(-len(w) // SMALL_PARTS)))
    return _added_up(zip(parts, parts), dtype).sum(0)


def _wide_products(a: Tensor, b: Tensor) -> Tensor:
    """a b in the dtype of sums, on a CPU with rows added up, a cacheful of them at a time: [t, n], [t, n] -> [u, n]."""
    if on_cpu(a) and len(a) > ROWS:
        return _added_up(zip(a.split(ROWS), b.split(ROWS)), wide(a))
    return a * b if a.dtype == wide(a) else a.to(wide(a)).mul_(b)  # no more memory than that of the sum's terms


def _added_up(pairs: Iterator[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
    """The products of pairs, the first ones no smaller than the others, added up row by row in a dtype."""
    first, other = next(pairs)
    sums = first.to(dtype) * other
    for x, y in pairs:
        sums[:len(x)].addcmul_(x, y)
    return sums


def side_by_side(a: Tensor, b: Tensor) -> Tensor:
    """[a, b], the columns of both: [..., m], [..., n] -> [..., m + n]; in memory column after column if they are."""
    if a.ndim == 2 and a.stride(0) == b.stride(0) == 1:
        return torch.cat([a.mT, b.mT]).mT
    return torch.cat([a, b], dim=-1)


def column_sum(a: Tensor) -> Tensor:
    """Σ a over the rows: [t, n] -> [n]."""
    return a.sum(0)


def _slices(a: Tensor, count: int) -> Tensor:
    """[t, b k] as a stack [b, t, k]: a view."""
    return a.unflatten(-1, (count, -1)).transpose(-3, -2)


def _parts(*activations: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of each, on a CPU a cacheful at a time."""
    return zip(*(a.split(ROWS) if on_cpu(a) else (a,) for a in activations))


def blocks(a: Tensor, s: Tensor) -> Tensor:
    """a block_diag(s): [t, b k], [b, k, m] -> [t, b m], with no second activation beside it."""
    rows = a.flatten(0, -2)
    result = a.new_empty(len(rows), s.shape[0] * s.shape[2])
    if not on_cpu(a):
        torch.bmm(_slices(rows, len(s)), s, out=_slices(result, len(s)))
    elif s.shape[2] < NARROW:  # turned in cache: written with a stride they take up to four times as long
        for part, into in _parts(rows, result):
            into.copy_(column_blocks(part, s))
    else:
        _slices(result, len(s)).baddbmm_(_slices(rows, len(s)), s, beta=0)
    return result.unflatten(0, a.shape[:-1])


def column_blocks(a: Tensor, s: Tensor) -> Tensor:
    """a block_diag(s) in memory column after column, for a product that reads it: [t, b k], [b, k, m] -> [t, b m]."""
    return (s.mT @ _slices(a, len(s)).mT).flatten(0, 1).mT


def thin(a: Tensor, m: Tensor) -> Tensor:
    """a m for a few columns, on a CPU in parts of a: [t, k], [k, r] -> [t, r]."""
    if _is_shared_out(a):
        try:
            return _thin_in_parts(a, m)
        except SEVERAL:
            pass
    return a @ m


def _thin_in_parts(a: Tensor, m: Tensor) -> Tensor:
    columns, count = m.mT.contiguous(), len(a) // BAND
    rows, rest = a.split([count * BAND, len(a) % BAND])
    turned = torch.bmm(columns.expand(count, -1, -1), rows.unflatten(0, (count, BAND)).mT)
    first = turned.mT.reshape(len(rows), len(columns))
    return torch.cat([first, rest @ m]) if len(rest) else first


def outer(a: Tensor, g: Tensor, alpha: float = 1.0) -> Tensor:
    """alpha aᵀ g, on a CPU for a few columns of a or of g in parts of the other: [t, m], [t, n] -> [m, n]."""
    few, many = (a, g) if a.shape[1] <= g.shape[1] else (g, a)
    (tokens, rank), width = few.shape, many.shape[1]
    if _is_shared_out(many) and rank in THIN and width >= max(WIDER * rank, RUN):
        try:
            return _outer_in_parts(few, many, alpha, few is not a)
        except SEVERAL:
            pass
    # with the few columns in front both are read in order; the gradient of so few tokens rather is in order itself
    is_turned = few is g and width > WIDER * rank and tokens >= FEWEST
    return _product(g.mT, a, alpha).mT if is_turned else _product(a.mT, g, alpha)


def _outer_in_parts(few: Tensor, many: Tensor, alpha: float, is_turned: bool) -> Tensor:
    """alpha fewᵀ many: [t, r], [t, n] -> [r, n], or [n, r] if it is turned, in any case in rows."""
    rank, width = few.shape[1], many.shape[1]
    count = min(RUNS, width // RUN)
    columns, rest = many.split([width // count * count, width % count], dim=1)
    parts = few.new_empty(count, rank, width // count)
    parts.baddbmm_(few.mT.expand(count, -1, -1), _slices(columns, count), beta=0, alpha=alpha)
    first = parts.mT.flatten(0, 1) if is_turned else parts.transpose(0, 1).flatten(1)
    if not rest.shape[1]:
        return first
    last = _product(few.mT, rest, alpha)
    return torch.cat([first, last.mT]) if is_turned else torch.cat([first, last], dim=1)


def _product(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """alpha a b, of matrices, in one pass; in two of several gradients at once, and where a compiler makes one of
    them."""
    if alpha == 1.0:
        return a @ b
    if not torch.compiler.is_compiling():
        try:
            return a.new_empty(a.shape[0], b.shape[1]).addmm_(a, b, beta=0, alpha=alpha)
        except SEVERAL:
            pass
    return a @ b * alpha


def _is_shared_out(a: Tensor) -> bool:
    """Whether a thin product of a is a batch of products of its parts: what multiplies matrices for torch on a CPU
    shares one with a side of 2 to 64 out badly, with threads and without. Few tokens and narrow floats are no better
    in parts. (A compiler may not know the sizes that parts are chosen by.)"""
    return not torch.compiler.is_compiling() and len(a) >= FEWEST and on_cpu(a) and a.dtype == wide(a)


def add_blocks(y: Tensor, a: Tensor, s: Tensor, alpha: float = 1.0) -> Tensor:
    """y + alpha a block_diag(s), written into y: [t, b m], [t, b k], [b, k, m]."""
    _slices(y, len(s)).baddbmm_(_slices(a, len(s)), s, alpha=alpha)
    return y


def block_dot(a: Tensor, g: Tensor, s: Tensor) -> Tensor:
    """aᵀ g on the blocks of the diagonal: [t, b k], [t, b m] -> [b, k, m], the shape of s."""
    if s.shape[-1] < s.shape[-2]:  # a product with a narrow result is faster flat: measured, up to 14 times
        return block_dot(g, a, s.mT).mT.contiguous()
    if not on_cpu(a) or a.dtype == wide(a):  # one product, which sums in float32 at least and rounds once
        return _slices(a, len(s)).mT @ _slices(g, len(s))
    result = a.new_zeros(s.shape, dtype=wide(a))
    for rows, grads in _parts(a, g):  # rounded in each part, and not in their sum
        result += _slices(rows, len(s)).mT @ _slices(grads, len(s))
    return result.to(a.dtype)


def circulate_back(g: Tensor, c: Tensor) -> Tensor:
    """g circulant(c), by Fourier transforms: [t, p b], [p, q, b] -> [t, q b]."""
    p, q, b = c.shape
    if not g.numel():  # no tokens, of which torch has no transform
        return g.new_zeros(*g.shape[:-1], q * b)
    mixed = mixed_blocks(_spectrum(g, p, b), _spectrum(c, q, b).transpose(0, 1))
    return torch.fft.irfft(mixed, n=b).reshape(*g.shape[:-1], q * b).to(g.dtype)


def circulate_dot(a: Tensor, g: Tensor, c: Tensor) -> Tensor:
    """The gradient of a circulant(c)ᵀ in c: [t, q b], [t, p b] -> [p, q, b]."""
    p, q, b = c.shape
    if not g.numel():
        return torch.zeros_like(c)
    if p == q == 1:  # numbers at each frequency
        return torch.fft.irfft((_spectrum(g, p, b).conj() * _spectrum(a, q, b)).sum(0, keepdim=True), n=b).to(c.dtype)
    # on a CPU in parts, since spectra of all rows are new memory that takes longer to get than they do
    mixed = reduce(torch.add, (_correlated(rows, read, c) for rows, read in _parts(g, a)))
    return torch.fft.irfft(mixed.permute(1, 2, 0), n=b).to(c.dtype)


def _correlated(g: Tensor, a: Tensor, c: Tensor) -> Tensor:
    """The sum over rows of the spectra of g, conjugated, and of a at each frequency: [f, p, q]."""
    left, right = _spectrum(g, c.shape[0], c.shape[2]).conj(), _spectrum(a, c.shape[1], c.shape[2])
    left, right = left.permute(2, 1, 0), right.permute(2, 0, 1)
    # what a product reads with strides it copies itself, in one thread
    return left.resolve_conj().contiguous() @ right.contiguous() if on_cpu(g) else left @ right


def _spectrum(a: Tensor, count: int, size: int) -> Tensor:
    return torch.fft.rfft(a.to(wide(a)).reshape(-1, count, size))


def mixed(x: Tensor, kernel: Tensor) -> Tensor:
    """x k̄ at each frequency: [2, f, ..., q], [2, f, q, p] -> [2, f, ..., p], real and imaginary parts."""
    (real, imaginary), (k, m) = x.flatten(2, -2), kernel
    result = x.flatten(2, -2) @ k
    result[0].baddbmm_(imaginary, m)
    result[1].baddbmm_(real, m, alpha=-1)
    return result.reshape(*x.shape[:-1], kernel.shape[-1])


def mixed_back(g: Tensor, kernel: Tensor) -> Tensor:
    """g kᵀ at each frequency: [2, f, ..., p], [2, f, q, p] -> [2, f, ..., q]."""
    return mixed(g, torch.stack([kernel[0].mT, -kernel[1].mT]))


def mixed_dot(x: Tensor, g: Tensor) -> Tensor:
    """The gradient of `mixed` in its kernel: [2, f, ..., q], [2, f, ..., p] -> [2, f, q, p]."""
    return mixed(x.flatten(2, -2).mT, g.flatten(2, -2))
