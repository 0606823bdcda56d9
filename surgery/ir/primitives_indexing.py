"""Operations that move entries, place them, or take a matrix apart. Most take sizes,
whole numbers known at compile time."""

from __future__ import annotations

from math import prod
from typing import Any

from surgery.ir import derivatives, flop_rules
from surgery.ir.expression import Expr, Shape
from surgery.ir.notation_forms import rows_of_numbers
from surgery.ir.shape_rules import ShapeError, exactly, matrix, shape_text, vector
from surgery.ir.sizes import Dim, tidy
from surgery.ir.table import (
    CORE,
    OF_A_SPEC,
    SUGAR,
    Added,
    Form,
    Linear,
    Memory,
    Operation,
    Orthogonal,
    Stage,
    Transpose,
    When,
)

Sizes = tuple[Any, ...]

# ---------------------------------------------------------------------------------------------- shape rules


def _reshape_shape(sizes: Sizes, a: Shape) -> Shape:
    if prod(a) != prod(sizes):
        raise ShapeError(f"{shape_text(a)} has {prod(a)} entries and {shape_text(sizes)} has {prod(sizes)}")
    return sizes


def _columns_shape(a: Shape, places: Shape) -> Shape:
    return matrix(a)[:-1] + _listed(places)


def _rows_shape(a: Shape, places: Shape) -> Shape:
    return matrix(a)[:-2] + _listed(places) + a[-1:]


def _listed(places: Shape) -> Shape:
    return exactly(1, "a vector of places", places)


def _range_shape(ends: Sizes) -> Shape:
    first, end = ends
    if isinstance(first, int) and isinstance(end, int) and first >= end:
        raise ShapeError(f"from {first} up to {end} there is no place")
    return (tidy(end - first),)


def _between_shape(ends: Sizes, a: Shape) -> Shape:
    _at_most(ends[1], vector(a)[-1], "columns")
    return a[:-1] + _range_shape(ends)


def _placed_shape(sizes: Sizes, a: Shape, places: Shape) -> Shape:
    if vector(a)[-1:] != places:
        raise ShapeError(f"{shape_text(a)} and {shape_text(places)} places do not agree")
    return a[:-1] + sizes


def _at_most(count: Any, most: Any, what: str) -> None:
    if not isinstance(count, Dim) and not isinstance(most, Dim) and count > most:
        raise ShapeError(f"{count} {what} are asked for, and there are {most}")


def _shuffle_shape(sizes: Sizes) -> Shape:
    return (prod(sizes),) * 2


def _literal_shape(rows: Sizes) -> Shape:
    return (len(rows), len(rows[0]))


def _circulant_shape(c: Shape) -> Shape:
    p, q, b = exactly(3, "a stack of first rows [p, q, b]", c)
    return (p * b, q * b)


def _scatter_shape(sizes: Sizes, values: Shape, places: Shape) -> Shape:
    if exactly(1, "a vector of values", values) != places:
        raise ShapeError(f"{shape_text(values)} values and {shape_text(places)} places do not agree")
    return sizes


def _top_shape(sizes: Sizes, a: Shape) -> Shape:
    _at_most(sizes[0], prod(a), "entries")
    return sizes


def _row_top_shape(sizes: Sizes, a: Shape) -> Shape:
    rows, columns = exactly(2, "a matrix", a)
    _at_most(sizes[0], columns, "entries of a row")
    return (rows * sizes[0],)


def _mix_shape(sizes: Sizes, a: Shape) -> Shape:
    _at_most(sizes[0], vector(a)[-1], "entries of a row")
    return a


def _singular_shape(sizes: Sizes, a: Shape) -> Shape:
    for side in exactly(2, "a matrix", a):
        _at_most(sizes[0], side, "singular values")
    return sizes


def _qr_shape(a: Shape) -> Shape:
    rows, columns = matrix(a)[-2:]
    _at_most(columns, rows, "orthonormal columns")
    return a


# ------------------------------------------------------------------------------------------- dense meanings


def _shuffle(sizes: Sizes, like: Any) -> Any:
    import torch

    size = prod(sizes)
    order = torch.arange(size, device=like.device).reshape(sizes).T.flatten()
    return torch.eye(size, dtype=like.dtype, device=like.device)[order]


def _circulant(c: Any) -> Any:
    """Row i of each block is its first row, moved to the right i times."""
    import torch

    p, q, b = c.shape
    at = torch.arange(b, device=c.device)
    blocks = c[:, :, (at[None, :] - at[:, None]) % b]
    return blocks.transpose(1, 2).reshape(p * b, q * b)


def _range(ends: Sizes, like: Any) -> Any:
    import torch

    return torch.arange(*ends, device=like.device)


def _placed(sizes: Sizes, a: Any, places: Any) -> Any:
    return a.new_zeros(*a.shape[:-1], *sizes).index_add(-1, places, a)


def _scatter(sizes: Sizes, values: Any, places: Any) -> Any:
    return values.new_zeros(prod(sizes)).scatter_add(0, places, values).reshape(sizes)


def _top(sizes: Sizes, a: Any) -> Any:
    return a.flatten().topk(sizes[0]).indices.sort().values


def _row_top(sizes: Sizes, a: Any) -> Any:
    import torch

    best = a.topk(sizes[0], dim=-1).indices.sort(dim=-1).values
    return (best + a.shape[1] * torch.arange(len(a), device=a.device)[:, None]).flatten()


def _top_softmax(sizes: Sizes, a: Any) -> Any:
    best = a.topk(sizes[0], dim=-1)
    return a.new_zeros(a.shape).scatter(-1, best.indices, best.values.softmax(dim=-1))


def _top_mix_shape(sizes: Sizes, a: Shape, b: Shape) -> Shape:
    rows, columns = exactly(2, "a matrix", b)
    if _mix_shape(sizes, a)[-1] != rows:
        raise ShapeError(f"needs a row for each entry, not {shape_text(b)}")
    return a[:-1] + (columns,)


def _top_mix(sizes: Sizes, a: Any, b: Any) -> Any:
    best = a.topk(sizes[0], dim=-1)
    return (best.values.softmax(dim=-1)[..., None, :] @ b[best.indices]).squeeze(-2)


def _left_of(sizes: Sizes, parts: Any) -> Any:
    return parts[0][..., :sizes[0]]


def _values_of(sizes: Sizes, parts: Any) -> Any:
    return parts[1][..., :sizes[0]]


def _right_of(sizes: Sizes, parts: Any) -> Any:
    return parts[2][..., :sizes[0], :]


def _left_singular(sizes: Sizes, a: Any) -> Any:
    return _left_of(sizes, _singular_parts(a))


def _singular(sizes: Sizes, a: Any) -> Any:
    return _values_of(sizes, _singular_parts(a))


def _right_singular(sizes: Sizes, a: Any) -> Any:
    return _right_of(sizes, _singular_parts(a))


def _singular_parts(a: Any) -> Any:
    from surgery.ir.singular_values import singular_parts

    return singular_parts(a)


def _qr(a: Any) -> Any:
    import torch

    return torch.linalg.qr(a).Q


def _ifft2(a: Any) -> Any:
    import torch

    return torch.fft.ifft2(a).real


def _circulate(a: Any, c: Any) -> Any:
    """Each slice of the last axis correlated with the rows of its blocks, by Fourier transforms."""
    import torch

    p, q, b = c.shape
    if not a.numel():  # no tokens, of which torch has no transform
        return (a.sum(-1, keepdim=True) * c.sum()).to(a.dtype).expand(*a.shape[:-1], p * b)
    dtype = torch.promote_types(a.dtype, torch.float32)
    spectrum = torch.fft.rfft(a.to(dtype).reshape(-1, q, b))
    kernel = torch.fft.rfft(c.to(dtype)).conj()
    return torch.fft.irfft(mixed_blocks(spectrum, kernel), n=b).reshape(*a.shape[:-1], p * b).to(a.dtype)


def mixed_blocks(x: Any, k: Any) -> Any:
    """[t, q, f] and [p, q, f] to [t, p, f], a product of matrices at each frequency; of one block, of numbers, without
    turning all of x. (What a product reads with strides it copies itself, in one thread of a CPU.)"""
    if x.shape[1] == 1:
        return x * k[:, 0]
    return (x.permute(2, 0, 1).contiguous() @ k.permute(2, 1, 0).contiguous()).permute(1, 2, 0)


def _circulate_shape(a: Shape, c: Shape) -> Shape:
    rows, columns = _circulant_shape(c)
    if vector(a)[-1] != columns:
        raise ShapeError(f"needs rows of {columns}, not {shape_text(a)}")
    return a[:-1] + (rows,)


def _between_text(node: Expr, args: list[str]) -> str:
    first, end = node.data
    return f"{args[0]}[{':' if len(node.shape) == 2 else '...'}, {first}:{end}]"


ROWS = [
    Operation("reshape", 1, _reshape_shape, lambda sizes, a: a.reshape(sizes),
              "the entries of a, row by row, in another shape", sizes=("*sizes",), linear=Linear.TOGETHER,
              text="{}.reshape({data})", memory=Memory.VIEW),
    Operation("rows", 2, _rows_shape, lambda a, places: a.index_select(-2, places),
              "the rows of a at the places, or the first k, of a number k", stage=SUGAR, places=(1,), counts=True,
              into=lambda node: node.args[0].shape[-2:-1], linear=Linear.TOGETHER),
    Operation("columns", 2, _columns_shape, lambda a, places: a.index_select(-1, places),
              "the columns of a at the places, or the first k, of a number k", places=(1,), counts=True,
              into=lambda node: node.args[0].shape[-1:], linear=Linear.TOGETHER, memory=Memory.NEW,
              derivative=derivatives.columns),
    Operation("range", 0, _range_shape, _range, "the places from i up to j, without j", sizes=("i", "j"), whole=True,
              into=lambda node: node.data[1:], stops_gradient=True),
    Operation("between", 1, _between_shape, lambda ends, a: a[..., ends[0]:ends[1]], "some columns side by side",
              stage=Stage.SIMPLIFIED | CORE, sizes=("first", "end"), linear=Linear.TOGETHER, text=_between_text,
              memory=Memory.VIEW, derivative=derivatives.between),
    Operation("placed", 2, _placed_shape, _placed, "the columns of a at their places among n of zeros", stage=CORE,
              sizes=("n",), places=(1,), into=lambda node: node.shape[-1:], linear=Linear.TOGETHER, memory=Memory.NEW,
              added=Added(Form("add_placed", kernel="kernels_permute.add_placed"), fits=lambda z: len(z.shape) == 2,
                          when=When.IN_STEP),
              derivative=derivatives.placed),
    Operation("shuffle", 0, _shuffle_shape, _shuffle,
              "the permutation [p q, p q] that takes a ⊗ b, a [p], b [q], to b ⊗ a",
              sizes=("p", "q"), transpose=Transpose.KNOWN, orthogonal=Orthogonal.ALWAYS, is_structured=True),
    Operation("literal", 0, _literal_shape, lambda rows, like: like.new_tensor(rows), "a matrix of numbers", sign="[]",
              sizes=("*rows",), transpose=Transpose.KNOWN, notation=rows_of_numbers),
    Operation("circulant", 1, _circulant_shape, _circulant,
              "circulant blocks by their first rows: [p, q, b] -> [p b, q b]", linear=Linear.TOGETHER,
              is_structured=True,
              added=Added(Form("add_circulant", kernel="kernels_permute.add_circulant", writes=False),
                          when=When.WITHOUT_GRADIENT, scales=False)),
    Operation("scatter", 2, _scatter_shape, _scatter,
              "values at their places (row by row) in a [m, n] of zeros, several at one place added up",
              sizes=("m", "n"), places=(1,), into=lambda node: node.shape, linear=Linear.TOGETHER,
              added=Added(Form("put", kernel="kernels_permute.put", writes=False), scales=False)),
    Operation("take", 2, lambda a, places: places, lambda a, places: a.flatten()[places],
              "the entries of a at the places", places=(1,), into=lambda node: node.args[0].shape,
              linear=Linear.TOGETHER),
    Operation("top", 1, _top_shape, _top, "the places of the k largest of all entries", sizes=("k",), whole=True,
              into=lambda node: node.args[0].shape, stops_gradient=True, jumps=True),
    Operation("row_top", 1, _row_top_shape, _row_top,
              "the places of the k largest entries of each row: [m, n] -> [m k]", sizes=("k",), whole=True,
              into=lambda node: node.args[0].shape, stops_gradient=True, jumps=True),
    Operation("row_of", 1, lambda sizes, places: _listed(places), lambda sizes, places: places // sizes[1],
              "the rows of places in a matrix [m, n]", stage=CORE, sizes=("m", "n"), places=(0,), whole=True,
              into=lambda node: node.data[:1], stops_gradient=True),
    Operation("column_of", 1, lambda sizes, places: _listed(places), lambda sizes, places: places % sizes[1],
              "the columns of places in a matrix [m, n]", stage=CORE, sizes=("m", "n"), places=(0,), whole=True,
              into=lambda node: node.data[1:], stops_gradient=True),
    # Of a start alone, which is computed once and in float64: the dtype of a program may not hold them.
    Operation("numbers", 1, _listed, None, "the places as numbers, in what a parameter starts at", stage=OF_A_SPEC,
              places=(0,), evaluate=lambda node, args, leaves: args[0].to(leaves["weight"].dtype),
              stops_gradient=True),
    Operation("top_softmax", 1, _mix_shape, _top_softmax,
              "the softmax over the k largest entries of each row, 0 elsewhere", sizes=("k",), jumps=True),
    Operation("top_mix", 2, _top_mix_shape, _top_mix, "the rows of b that the softmax over the k largest entries mixes",
              stage=CORE, sizes=("k",), flops=flop_rules.mixed_rows, jumps=True),
    Operation("left_singular", 1, lambda sizes, a: a[:1] + _singular_shape(sizes, a), _left_singular,
              "the first k left singular vectors: [m, n] -> [m, k]", sizes=("k",), flops=flop_rules.decomposed,
              jointly=_singular_parts, part=_left_of),
    Operation("singular", 1, _singular_shape, _singular, "the k largest singular values: [m, n] -> [k]",
              sizes=("k",), flops=flop_rules.decomposed, jointly=_singular_parts, part=_values_of),
    Operation("right_singular", 1, lambda sizes, a: _singular_shape(sizes, a) + a[1:], _right_singular,
              "the first k right singular vectors, as rows: [m, n] -> [k, n]", sizes=("k",),
              flops=flop_rules.decomposed, jointly=_singular_parts, part=_right_of),
    Operation("qr", 1, _qr_shape, _qr, "the orthonormal Q of a = Q R: [m, n] -> [m, n]"),
    Operation("ifft2", 1, lambda a: exactly(2, "a matrix", a), _ifft2, "the real part of the inverse Fourier transform",
              linear=Linear.TOGETHER, flops=flop_rules.transformed),
    Operation("circulate", 2, _circulate_shape, _circulate, "a circulant(c)ᵀ, by Fourier transforms", stage=CORE,
              linear=Linear.EACH, memory=Memory.NEW, flops=flop_rules.circulate, derivative=derivatives.circulate),
]
