"""One pass over activations for what torch needs several for, in Triton: for CUDA alone, and imported only there.

`kernels_one_pass` says what each computes, and has its plain form. Promises: products and sums in float32, in an order
that the shapes alone decide; matrices of any strides; one program may be run on any number of tokens.
"""
# What Triton compiles is its own language, and where it is missing there is none.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from surgery.codegen.dropout_number import ROUNDS, SEED_BITS

# Rows and columns of a tile, and warps, for each kernel; CHUNK: the rows that one program of a sum over rows reads. The
# best of some on an H100, for [8192, 4096] in bfloat16: gains reach 2.6 of its 2.75 TB/s; draws of Philox take as long
# as a pass.
TILES = {"gained": (32, 128, 4), "gained_back": (32, 128, 4), "masked": (8, 512, 4), "times_masked": (32, 256, 4),
         "masked_times": (32, 128, 4), "masked_outer": (64, 64, 4)}
CHUNK = 512


# --------------------------------------------------------------------------------------------------------- parts


@triton.jit
def _tile(pointer, rows, columns, row_stride, column_stride, height, width):
    """The numbers at these rows and columns, 0 outside of the matrix."""
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    return tl.load(pointer + rows[:, None] * row_stride + columns[None, :] * column_stride, mask=inside, other=0.0)


@triton.jit
def _put(pointer, tile, rows, columns, row_stride, column_stride, height, width):
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    places = pointer + rows[:, None] * row_stride + columns[None, :] * column_stride
    tl.store(places, tile.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _stays(number, rows, first_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, N_ROUNDS: tl.constexpr,
           BITS: tl.constexpr):
    """True for each entry of a tile that dropout leaves: a word of Philox for each, four neighbours from one call."""
    groups = first_column // 4 + tl.arange(0, COLUMNS // 4)
    zeros = tl.zeros([ROWS, COLUMNS // 4], tl.int32)
    at = zeros + rows.to(tl.int32)[:, None]
    a, b, c, d = tl.philox(number & ((1 << BITS) - 1), zeros + groups[None, :], at, zeros, zeros, N_ROUNDS)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (ROWS, COLUMNS))
    return (words >> 8) >= (number >> BITS).to(tl.uint32)


# ------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _gained(y, d, h, m, out, height, width, rank, factor, y_row, y_column, h_row, h_column, m_row, m_column,
            INSIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, RANK)
    left = _tile(h, rows, ranks, h_row, h_column, height, rank)
    right = _tile(m, ranks, columns, m_row, m_column, rank, width)
    low = factor * tl.dot(left, right, input_precision="ieee")
    gain = tl.load(d + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    own = _tile(y, rows, columns, y_row, y_column, height, width).to(tl.float32)
    result = gain * (own + low) if INSIDE else gain * own + low
    _put(out, result, rows, columns, width, 1, height, width)


@triton.jit
def _gained_back(g, d, y, h, m, out, sums, height, width, rank, factor, g_row, g_column, y_row, y_column, h_row,
                 h_column, m_row, m_column, LOW: tl.constexpr, INSIDE: tl.constexpr, ROWS: tl.constexpr,
                 COLUMNS: tl.constexpr, RANK: tl.constexpr, STEPS: tl.constexpr):
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    gain = tl.load(d + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    ranks = tl.arange(0, RANK)
    if LOW:
        right = _tile(m, ranks, columns, m_row, m_column, rank, width)
    total = tl.zeros([COLUMNS], tl.float32)
    for step in range(STEPS):
        rows = (tl.program_id(0) * STEPS + step).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        grad = _tile(g, rows, columns, g_row, g_column, height, width).to(tl.float32)
        own = _tile(y, rows, columns, y_row, y_column, height, width).to(tl.float32)
        result = gain * grad
        if LOW:
            left = _tile(h, rows, ranks, h_row, h_column, height, rank)
            low = factor * tl.dot(left, right, input_precision="ieee")
            if INSIDE:
                own += low
            else:
                result += low
        total += tl.sum(grad * own, 0)
        _put(out, result, rows, columns, width, 1, height, width)
    tl.store(sums + tl.program_id(0).to(tl.int64) * width + columns, total, mask=columns < width)


@triton.jit
def _masked(a, number, out, height, width, a_row, a_column, out_row, out_column, ROWS: tl.constexpr,
            COLUMNS: tl.constexpr, N_ROUNDS: tl.constexpr, BITS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    columns = first + tl.arange(0, COLUMNS)
    tile = _tile(a, rows, columns, a_row, a_column, height, width)
    stays = _stays(tl.load(number), rows, first, ROWS, COLUMNS, N_ROUNDS, BITS)
    _put(out, tl.where(stays, tile, 0.0), rows, columns, out_row, out_column, height, width)


@triton.jit
def _times_masked(h, m, number, out, height, width, rank, h_row, h_column, m_row, m_column, ROWS: tl.constexpr,
                  COLUMNS: tl.constexpr, RANK: tl.constexpr, N_ROUNDS: tl.constexpr, BITS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    columns = first + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, RANK)
    left = _tile(h, rows, ranks, h_row, h_column, height, rank)
    right = _tile(m, ranks, columns, m_row, m_column, rank, width)
    low = tl.dot(left, right, input_precision="ieee")
    stays = _stays(tl.load(number), rows, first, ROWS, COLUMNS, N_ROUNDS, BITS)
    _put(out, tl.where(stays, low, 0.0), rows, columns, width, 1, height, width)


@triton.jit
def _masked_times(a, number, m, out, height, width, rank, a_row, a_column, m_row, m_column, ROWS: tl.constexpr,
                  COLUMNS: tl.constexpr, RANK: tl.constexpr, STEPS: tl.constexpr, N_ROUNDS: tl.constexpr,
                  BITS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ranks = tl.arange(0, RANK)
    at = tl.load(number)
    total = tl.zeros([ROWS, RANK], tl.float32)
    for step in range(STEPS):
        first = step * COLUMNS
        columns = first + tl.arange(0, COLUMNS)
        tile = _tile(a, rows, columns, a_row, a_column, height, width)
        stays = _stays(at, rows, first, ROWS, COLUMNS, N_ROUNDS, BITS)
        right = _tile(m, columns, ranks, m_row, m_column, width, rank)
        total += tl.dot(tl.where(stays, tile, 0.0).to(right.dtype), right, input_precision="ieee")
    _put(out, total, rows, ranks, rank, 1, height, rank)


@triton.jit
def _masked_outer(a, number, g, sums, height, width, rank, a_row, a_column, g_row, g_column, sums_column, sums_rank,
                  ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, STEPS: tl.constexpr,
                  N_ROUNDS: tl.constexpr, BITS: tl.constexpr):
    first = tl.program_id(1) * COLUMNS
    columns = first + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, RANK)
    at = tl.load(number)
    total = tl.zeros([COLUMNS, RANK], tl.float32)
    for step in range(STEPS):
        rows = (tl.program_id(0) * STEPS + step).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        tile = _tile(a, rows, columns, a_row, a_column, height, width)
        stays = _stays(at, rows, first, ROWS, COLUMNS, N_ROUNDS, BITS)
        right = _tile(g, rows, ranks, g_row, g_column, height, rank)
        kept = tl.where(stays, tile, 0.0).to(right.dtype)
        total += tl.dot(tl.trans(kept), right, input_precision="ieee")
    chunk = sums + tl.program_id(0).to(tl.int64) * width * rank
    _put(chunk, total, columns, ranks, sums_column, sums_rank, width, rank)


# ------------------------------------------------------------------------------------------------------ launches


def _rank(rank: int) -> int:
    """As many as a product of tiles takes."""
    return max(16, triton.next_power_of_2(rank))


def _held(count: int, rank: int, dtype: torch.dtype) -> int:
    """So many rows of a thin factor, or fewer where they would take more than 16 KiB: several are held at a time."""
    return min(count, 2**14 // (_rank(rank) * dtype.itemsize))


def _chunks(rows: int, tile: int) -> tuple[int, int]:
    """How many programs share the rows of a sum, and how many tiles each reads (a power of 2: each number is a kernel
    of its own). Shapes alone decide the order in which it is summed."""
    steps = min(max(1, CHUNK // tile), triton.next_power_of_2(triton.cdiv(rows, tile)))
    return triton.cdiv(rows, steps * tile), steps


def _drawn() -> dict[str, Any]:
    return {"N_ROUNDS": ROUNDS, "BITS": SEED_BITS}


def gained(y: Tensor, d: Tensor, h: Tensor, m: Tensor, factor: float, inside: bool) -> Tensor:
    (height, width), rank = y.shape, h.shape[1]
    out = torch.empty((height, width), dtype=y.dtype, device=y.device)
    rows, columns, warps = TILES["gained"]
    columns = _held(columns, rank, y.dtype)
    _gained[triton.cdiv(height, rows), triton.cdiv(width, columns)](
        y, d.contiguous(), h, m, out, height, width, rank, factor, *y.stride(), *h.stride(), *m.stride(), inside,
        rows, columns, _rank(rank), num_warps=warps)
    return out


def gained_back(g: Tensor, d: Tensor, y: Tensor, h: Tensor | None, m: Tensor | None, factor: float,
                inside: bool) -> tuple[Tensor, Tensor]:
    rows, columns, warps = TILES["gained_back"]
    height, width = g.shape
    chunks, steps = _chunks(height, rows)
    out = torch.empty((height, width), dtype=g.dtype, device=g.device)
    sums = torch.empty((chunks, width), dtype=torch.float32, device=g.device)
    left, right = (g, g) if h is None or m is None else (h, m)  # g in their place is not read
    low = left is not g
    rank = left.shape[1] if low else 1
    columns = _held(columns, rank, g.dtype)
    _gained_back[chunks, triton.cdiv(width, columns)](
        g, d.contiguous(), y, left, right, out, sums, height, width, rank, factor, *g.stride(), *y.stride(),
        *left.stride(), *right.stride(), low, inside, rows, columns, _rank(rank), steps, num_warps=warps)
    return out, sums


def masked(a: Tensor, number: Tensor, out: Tensor | None = None) -> Tensor:
    out = torch.empty_like(a) if out is None else out
    (height, width), (rows, columns, warps) = a.shape, TILES["masked"]
    _masked[triton.cdiv(height, rows), triton.cdiv(width, columns)](
        a, number, out, height, width, *a.stride(), *out.stride(), rows, columns, **_drawn(), num_warps=warps)
    return out


def masked_(a: Tensor, number: Tensor) -> None:
    masked(a, number, a)


def times_masked(h: Tensor, m: Tensor, number: Tensor) -> Tensor:
    (height, rank), width = h.shape, m.shape[1]
    rows, columns, warps = TILES["times_masked"]
    columns = _held(columns, rank, h.dtype)
    out = torch.empty((height, width), dtype=h.dtype, device=h.device)
    _times_masked[triton.cdiv(height, rows), triton.cdiv(width, columns)](
        h, m, number, out, height, width, rank, *h.stride(), *m.stride(), rows, columns, _rank(rank), **_drawn(),
        num_warps=warps)
    return out


def masked_times(a: Tensor, number: Tensor, m: Tensor) -> Tensor:
    (height, width), rank = a.shape, m.shape[1]
    rows, columns, warps = TILES["masked_times"]
    columns = _held(columns, rank, a.dtype)
    out = torch.empty((height, rank), dtype=a.dtype, device=a.device)
    _masked_times[(triton.cdiv(height, rows),)](
        a, number, m, out, height, width, rank, *a.stride(), *m.stride(), rows, columns, _rank(rank),
        triton.cdiv(width, columns), **_drawn(), num_warps=warps)
    return out


def masked_outer(a: Tensor, number: Tensor, g: Tensor, turned: bool) -> Tensor:
    """Sums over chunks of rows: [chunks, n, r], or [chunks, r, n] if turned."""
    (height, width), rank = a.shape, g.shape[1]
    rows, columns, warps = TILES["masked_outer"]
    rows = _held(rows, rank, a.dtype)
    chunks, steps = _chunks(height, rows)
    shape, strides = ((rank, width), (1, width)) if turned else ((width, rank), (rank, 1))
    sums = torch.empty((chunks, *shape), dtype=torch.float32, device=a.device)
    _masked_outer[chunks, triton.cdiv(width, columns)](
        a, number, g, sums, height, width, rank, *a.stride(), *g.stride(), *strides, rows, columns, _rank(rank), steps,
        **_drawn(), num_warps=warps)
    return sums
