"""The operations of the language on matrices, and the compiler's own cores of structured maps: a row each.

Elementwise rows broadcast scalars alone. Those that move entries or take a matrix apart are in `primitives_indexing`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from surgery.ir import derivatives, flop_rules, row_rules
from surgery.ir.expression import Expr, Shape
from surgery.ir.notation_forms import ATOM, ENTRYWISE, PRODUCT, SUM, around, entrywise_product, infix, transpose
from surgery.ir.notation_forms import product as product_notation
from surgery.ir.shape_rules import (
    ShapeError,
    elementwise,
    entrywise_quotient,
    exactly,
    matrix,
    product,
    same,
    shape_text,
    square,
    vector,
)
from surgery.ir.shape_rules import entrywise_product as product_shape
from surgery.ir.sizes import known, known_shape
from surgery.ir.table import (
    ADDCMUL,
    ADDMM,
    CORE,
    MUL,
    SUGAR,
    Added,
    Form,
    InPlace,
    Linear,
    Memory,
    Operation,
    Orthogonal,
    Transpose,
    When,
)

# ---------------------------------------------------------------------------------------------- shape rules


def _block_diag_shape(a: Shape) -> Shape:
    blocks, rows, columns = exactly(3, "a stack of blocks [b, p, q]", a)
    return (blocks * rows, blocks * columns)


def _kron_shape(a: Shape, b: Shape) -> Shape:
    if len(a) != len(b) or len(a) not in (1, 2):
        raise ShapeError(f"needs two matrices or two vectors, not {shape_text(a)} and {shape_text(b)}")
    return tuple(x * y for x, y in zip(a, b))


def _reflect_shape(a: Shape) -> Shape:
    rows = exactly(2, "a matrix whose columns are the mirrors", a)[0]
    return (rows, rows)


def _fitting(fits: bool, what: str, *shapes: Shape) -> None:
    if not fits:
        raise ShapeError(f"needs {what}, not {' and '.join(map(shape_text, shapes))}")


def _side_by_side_shape(a: Shape, b: Shape) -> Shape:
    _fitting(() not in (a, b) and a[:-1] == b[:-1], "as many rows in both", a, b)
    return a[:-1] + (a[-1] + b[-1],)


def _stacked_shape(a: Shape, b: Shape) -> Shape:
    has_as_many = len(a) > 1 and len(a) == len(b) and (*a[:-2], a[-1]) == (*b[:-2], b[-1])
    _fitting(has_as_many, "as many columns in both", a, b)
    rows = len(a) - 2  # which axis they are
    return (*a[:rows], a[rows] + b[rows], a[rows + 1])


def _clamp_shape(a: Shape, lowest: Shape, highest: Shape) -> Shape:
    return elementwise(elementwise(a, lowest), highest)


def _face_shape(a: Shape, b: Shape) -> Shape:
    _fitting(() not in (a, b) and a[:-1] == b[:-1], "as many rows in both", a, b)
    return a[:-1] + (a[-1] * b[-1],)


def _scale_shape(a: Shape, d: Shape) -> Shape:
    _fitting(a != () and d == a[-1:], "a number for each column", a, d)
    return a


def _blocks_shape(a: Shape, s: Shape) -> Shape:
    _fitting(a != () and len(s) == 3 and a[-1] == s[0] * s[1], "a block for each slice of the last axis", a, s)
    return a[:-1] + (s[0] * s[2],)


# ------------------------------------------------------------------------------------------- dense meanings


def _skew(a: Any) -> Any:
    from surgery.ir.orthogonal_maps import skew

    return skew(a)


def _cayley(k: Any) -> Any:
    from surgery.ir.orthogonal_maps import cayley

    return cayley(k)


def _rotation(a: Any) -> Any:
    from surgery.ir.orthogonal_maps import rotation

    return rotation(a)


def _expm(k: Any) -> Any:
    from surgery.ir.orthogonal_maps import expm

    return expm(k)


def divided(a: Any, b: Any) -> Any:
    """a / b, and 0 without a gradient where b is 0, whatever a is: then x / y = x (1 / y) everywhere, and what is
    divided by its norm has a direction or is zero. The zero is taken out of b too, or its gradient would be 0 ∞."""
    import torch

    if not isinstance(b, torch.Tensor):
        return a / b if b else a * 0.0
    none = b == 0
    return (a / b.masked_fill(none, 1.0)).masked_fill(none, 0.0)


def _reflect(u: Any) -> Any:
    product = u.new_ones(u.shape[0]).diag_embed()
    for column in u.unbind(dim=1):
        product = product - (product @ column[:, None]) * divided(2 * column, column @ column)
    return product


def _block_diag(blocks: Any) -> Any:
    return blocks.permute(1, 2, 0).diag_embed(dim1=0, dim2=2).flatten(2).flatten(0, 1)


def _kron(a: Any, b: Any) -> Any:
    # torch's own fails in a view of what lies in another order, which a turned row does though it is contiguous
    a, b = a.contiguous(), b.contiguous()
    if a.ndim == 1:
        return (a[:, None] * b).flatten()
    return (a[:, None, :, None] * b[:, None]).flatten(2).flatten(0, 1)


def _balance(x: Any, y: Any) -> Any:
    from surgery.ir.orthogonal_maps import balance

    return balance(x, y)


def _centred(x: Any, y: Any, t: Any) -> Any:
    from surgery.ir.orthogonal_maps import centred

    return centred(x, y, t)


def _skew_core(sizes: tuple[float], a: Any) -> Any:
    from surgery.ir.orthogonal_maps import skew_core

    return skew_core(a, *sizes)


def _inverse(a: Any) -> Any:
    from surgery.ir.orthogonal_maps import inverse

    return inverse(a)


def _resolvent(m: Any) -> Any:
    from surgery.ir.orthogonal_maps import resolvent

    return resolvent(m)


def _phi(v: Any, u: Any) -> Any:
    """(e^m - I) m⁻¹ of m = V U without the inverse: the corner of the exponential of [[m, I], [0, 0]]. In float64, from
    the product on: m may be large where the angles of e^(U V) are not, and its gradient is multiplied by the lengths
    of columns that may be far apart."""
    import torch

    m = v.double() @ u.double()
    size, eye = m.shape[-1], torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
    top = torch.cat([m, eye.expand_as(m)], dim=-1)
    return _expm(torch.cat([top, torch.zeros_like(top)], dim=-2))[..., :size, size:].to(v.dtype)


def _mirrored(u: Any) -> Any:
    """T Uᵀ / 2 of Π (I - 2 u uᵀ / uᵀu) = I - U T Uᵀ: T⁻¹ is the upper triangle of UᵀU with the diagonal halved."""
    from surgery.ir.orthogonal_maps import mirrored

    return mirrored(u)


def _side_by_side(a: Any, b: Any) -> Any:
    import torch

    return torch.cat([a, b], dim=-1)


def _stacked(a: Any, b: Any) -> Any:
    import torch

    return torch.cat([a, b], dim=-2)


def _face(a: Any, b: Any) -> Any:
    """By columns, of which there are few and long ones: their gradient sums whole columns."""
    if a.ndim == 1:
        return (a[:, None] * b).flatten()
    return (a.mT[..., :, None, :] * b.mT[..., None, :, :]).flatten(-3, -2).mT


def _norm(a: Any) -> Any:
    """By rows: torch's own is 2e-5 off for a million numbers in float32."""
    return (a.norm(dim=-1) if a.ndim > 1 else a).norm()


def _root(a: Any) -> Any:
    from surgery.ir.orthogonal_maps import root

    return root(a)


def _over_root(a: Any, s: Any) -> Any:
    from surgery.ir.orthogonal_maps import over_root

    return over_root(a, s)


def _blocks(a: Any, s: Any) -> Any:
    """Each slice of the last axis times its own block."""
    slices = a.reshape(-1, *s.shape[:2]).transpose(0, 1)
    return (slices @ s).transpose(0, 1).reshape(*a.shape[:-1], s.shape[0] * s.shape[2])


def _extreme(name: str) -> Callable[[Any, Any], Any]:
    def choose(a: Any, b: Any) -> Any:
        import torch

        like = a if isinstance(a, torch.Tensor) else b
        both = (x if isinstance(x, torch.Tensor) else torch.full_like(like, x) for x in (a, b))
        return getattr(torch, name)(*both)

    return choose


def _clamp(a: Any, lowest: Any, highest: Any) -> Any:
    """torch takes both bounds as tensors or both as numbers, and has no gradient for a number between matrices."""
    import torch

    like = next(x for x in (a, lowest, highest) if isinstance(x, torch.Tensor))
    three = (x if isinstance(x, torch.Tensor) else like.new_full((), x) for x in (a, lowest, highest))
    return torch.clamp(*torch.broadcast_tensors(*three))


# ------------------------------------------------------------------------------------------------- what rows share


def _entrywise(name: str, number: Callable[[float], float], doc: str, **more: Any) -> Operation:
    """A function of each entry that torch has as a method by the same name."""
    return Operation(name, 1, same, lambda a: getattr(a, name)(), f"{doc}, entry by entry", number=number,
                     transpose=Transpose.INSIDE, text=f"{{}}.{name}()", rows=row_rules.entrywise, **more)


def _are_matrices(node: Expr) -> bool:
    return all(len(a.shape) == 2 for a in node.args)


def _are_alike(node: Expr) -> bool:
    return all(a.shape == node.shape for a in node.args)


def _product_text(node: Expr, args: list[str]) -> str:
    """a @ b; a matrix times a stack of narrow ones as the rows of that times it, one product in the place of many."""
    (a, b), (left, right) = args, (argument.shape for argument in node.args)
    is_narrow = len(left) == 2 < len(right) and 2 * known(right[-1]) <= min(known_shape(left))
    return f"({b}.mT @ {a}.mT).mT" if is_narrow else f"{a} @ {b}"


def _scaled_activation(node: Expr) -> tuple[Expr, ...]:
    """What a scalar times an activation may be written over."""
    scalar, a = node.args
    return (a,) if not scalar.shape and a.shape == node.shape else ()


ROWS = [
    Operation("neg", 1, same, lambda a: -a, "-a", stage=SUGAR, sign="-", linear=Linear.TOGETHER,
              notation=around("-", "", PRODUCT, SUM)),
    Operation("add", 2, elementwise, lambda a, b: a + b, "a + b", sign="+", linear=Linear.TOGETHER,
              transpose=Transpose.INSIDE, number=lambda a, b: a + b, text="{} + {}", memory=Memory.NEW, is_unkept=True,
              derivative=derivatives.add, notation=infix("+", SUM, SUM, ENTRYWISE), rows=row_rules.entrywise),
    Operation("sub", 2, elementwise, lambda a, b: a - b, "a - b", stage=SUGAR, sign="-", linear=Linear.TOGETHER,
              notation=infix("-", SUM, SUM, ENTRYWISE)),
    Operation("mul", 2, product_shape, lambda a, b: a * b, "a * b, entry by entry", sign="*", linear=Linear.EACH,
              transpose=Transpose.INSIDE, number=lambda a, b: a * b, text="{} * {}", memory=Memory.NEW,
              in_place=InPlace(MUL, _scaled_activation),
              # autograd makes a matrix more for the gradient of `addcmul`
              added=Added(ADDCMUL, fits=_are_alike, when=When.WITHOUT_GRADIENT),
              derivative=derivatives.mul, notation=entrywise_product, rows=row_rules.entrywise),
    Operation("div", 2, entrywise_quotient, divided, "a / b, entry by entry; 0 where b is 0", sign="/",
              transpose=Transpose.INSIDE, number=lambda a, b: a / b,
              notation=infix("/", ENTRYWISE, ENTRYWISE, ATOM), rows=row_rules.entrywise),
    Operation("min", 2, elementwise, _extreme("minimum"), "the smaller of each pair of entries",
              transpose=Transpose.INSIDE, number=min, jumps=True, rows=row_rules.entrywise),
    Operation("max", 2, elementwise, _extreme("maximum"), "the larger of each pair of entries",
              transpose=Transpose.INSIDE, number=max, jumps=True, rows=row_rules.entrywise),
    _entrywise("exp", math.exp, "e^a"),
    _entrywise("cos", math.cos, "cos a"),
    _entrywise("sin", math.sin, "sin a"),
    _entrywise("sqrt", math.sqrt, "√a"),
    _entrywise("abs", abs, "|a|", jumps=True, notation=around("|", "|")),
    _entrywise("sigmoid", lambda a: 1 / (1 + math.exp(-a)), "1 / (1 + e^-a)"),
    _entrywise("tanh", math.tanh, "tanh a"),
    _entrywise("relu", lambda a: max(a, 0), "max(a, 0), with no gradient at 0", jumps=True),
    Operation("sign", 1, same, lambda a: a.detach().sign(), "1, 0 or -1, entry by entry, with no gradient",
              stops_gradient=True, transpose=Transpose.INSIDE, number=lambda a: (a > 0) - (a < 0), jumps=True,
              text="{}.detach().sign()", rows=row_rules.entrywise),
    Operation("clamp", 3, _clamp_shape, _clamp, "min(max(a, b), c), at b and c with the gradient of a",
              transpose=Transpose.INSIDE, number=lambda a, b, c: min(max(a, b), c), jumps=True,
              rows=row_rules.entrywise),
    Operation("detach", 1, same, lambda a: a.detach(), "a, through which no gradient flows", stops_gradient=True,
              transpose=Transpose.INSIDE, number=lambda a: a, text="{}.detach()", memory=Memory.VIEW,
              rows=row_rules.entrywise),
    Operation("norm", 1, lambda a: (), _norm, "√Σ a², the Frobenius norm", notation=around("‖", "‖")),
    Operation("row_norm", 1, lambda a: matrix(a)[:-1], lambda a: a.norm(dim=-1), "the norm of each row: [m, n] -> [m]",
              rows=row_rules.of_rows),
    Operation("col_norm", 1, lambda a: matrix(a)[:-2] + a[-1:], lambda a: a.norm(dim=-2),
              "the norm of each column: [m, n] -> [n]", rows=row_rules.of_columns),
    Operation("matmul", 2, product, lambda a, b: a @ b, "a @ b, the matrix product", sign="@", linear=Linear.EACH,
              transpose=Transpose.KNOWN, orthogonal=Orthogonal.OF_ORTHOGONAL, text=_product_text, memory=Memory.NEW,
              is_unkept=True, is_matmul=True, added=Added(ADDMM, fits=_are_matrices, is_product=True),
              flops=flop_rules.product, derivative=derivatives.matmul, notation=product_notation,
              rows=row_rules.product),
    Operation("T", 1, lambda a: matrix(a)[:-2] + (a[-1], a[-2]), lambda a: a.mT, "aᵀ, of the last two axes", sign=".T",
              linear=Linear.TOGETHER, transpose=Transpose.KNOWN, orthogonal=Orthogonal.OF_ORTHOGONAL, text="{}.mT",
              memory=Memory.VIEW, derivative=derivatives.turned, notation=transpose, rows=row_rules.turned),
    Operation("diag", 1, lambda a: vector(a) + a[-1:], lambda a: a.diag_embed(), "the diagonal matrix of a vector",
              linear=Linear.TOGETHER, transpose=Transpose.KNOWN, is_structured=True, text="{}.diag_embed()"),
    Operation("block_diag", 1, _block_diag_shape, _block_diag, "a stack [b, p, q] along the diagonal of [b p, b q]",
              linear=Linear.TOGETHER, transpose=Transpose.INSIDE, orthogonal=Orthogonal.OF_ORTHOGONAL,
              is_structured=True),
    Operation("kron", 2, _kron_shape, _kron, "a ⊗ b, the Kronecker product of two matrices or two vectors",
              linear=Linear.EACH, transpose=Transpose.INSIDE, orthogonal=Orthogonal.OF_ORTHOGONAL, is_structured=True),
    Operation("skew", 1, square, _skew, "a - aᵀ", linear=Linear.TOGETHER, transpose=Transpose.KNOWN),
    Operation("cayley", 1, square, _cayley, "(I - a/2)⁻¹ (I + a/2), orthogonal when a is skew",
              transpose=Transpose.INSIDE, orthogonal=Orthogonal.OF_SKEW, is_solve=True, flops=flop_rules.cubic(10)),
    Operation("expm", 1, square, _expm, "e^a of a matrix, orthogonal when a is skew",
              transpose=Transpose.INSIDE, orthogonal=Orthogonal.OF_SKEW, is_solve=True, flops=flop_rules.cubic(40)),
    Operation("inverse", 1, square, _inverse, "a⁻¹; not finite where there is none", transpose=Transpose.INSIDE,
              orthogonal=Orthogonal.OF_ORTHOGONAL, is_solve=True, flops=flop_rules.cubic(10)),
    Operation("reflect", 1, _reflect_shape, _reflect, "Π (I - 2 u uᵀ / uᵀu) over the columns u, first column leftmost",
              orthogonal=Orthogonal.ALWAYS, flops=flop_rules.each(4, 0, 1)),
    Operation("side_by_side", 2, _side_by_side_shape, _side_by_side, "[a, b], the columns of both",
              linear=Linear.TOGETHER, step_kernel="kernels.side_by_side", memory=Memory.NEW,
              derivative=derivatives.side_by_side, rows=row_rules.row_by_row),
    Operation("stacked", 2, _stacked_shape, _stacked, "the rows of a above those of b", stage=SUGAR,
              linear=Linear.TOGETHER),
    # For the compiler alone: the small cores of structured maps, and maps on the last axis of activations.
    Operation("balance", 2, lambda a, b: elementwise(a, b)[-1:], _balance,
              "t with the columns of a diag(t) and b diag(1/t) alike in length, and no gradient", stage=CORE,
              stops_gradient=True),
    Operation("rotation", 1, square, _rotation, "cayley(a - aᵀ)", stage=CORE, transpose=Transpose.INSIDE,
              orthogonal=Orthogonal.ALWAYS, is_solve=True, flops=flop_rules.cubic(10)),
    Operation("centred", 3, lambda a, b, t: _side_by_side_shape(elementwise(a, b), b), _centred,
              "[b / t - a t, b / t + a t], t for each column", stage=CORE, memory=Memory.NEW),
    Operation("skew_core", 1, lambda sizes, a: 2 * exactly(2, "a matrix", a)[1:], _skew_core,
              "-([0, I; -I, 0] / c + aᵀa / 2)⁻¹", stage=CORE, sizes=("c",), flops=flop_rules.cubic(10)),
    Operation("resolvent", 1, square, _resolvent, "(I - a/2)⁻¹", stage=CORE, is_solve=True, flops=flop_rules.cubic(10)),
    Operation("phi", 2, lambda a, b: square(product(a, b)), _phi, "(e^m - I) m⁻¹ of m = a b", stage=CORE, is_solve=True,
              flops=flop_rules.cubic(320)),
    Operation("mirrored", 1, lambda a: exactly(2, "a matrix whose columns are the mirrors", a)[::-1], _mirrored,
              "V with reflect(U) = I - 2 U V", stage=CORE, flops=flop_rules.mirrored),
    Operation("reversed", 1, matrix, lambda a: a.flip(-1), "the columns in reverse order", stage=CORE,
              linear=Linear.TOGETHER, rows=row_rules.row_by_row),
    Operation("face", 2, _face_shape, _face, "the products of each row's entries: [m, r], [m, s] -> [m, r s]",
              stage=CORE, linear=Linear.EACH, rows=row_rules.row_by_row),
    Operation("unmoved", 1, same, lambda a: a - a.detach(), "a - detach(a): 0 with the gradient of a", stage=CORE,
              transpose=Transpose.INSIDE, rows=row_rules.entrywise),
    Operation("root", 1, same, _root, "√a of a sum of squares: 0 with no gradient where rounding leaves a ≤ 0",
              stage=CORE, rows=row_rules.entrywise),
    Operation("over_root", 2, elementwise, _over_root, "a / √b of sums of squares b: 0 where rounding leaves b ≤ 0",
              stage=CORE, rows=row_rules.entrywise),
    Operation("total", 1, lambda a: (), lambda a: a.sum(), "Σ a over all entries", stage=CORE, linear=Linear.TOGETHER,
              text="{}.sum()"),
    Operation("scale", 2, _scale_shape, lambda a, d: a * d, "a diag(d): each column of a times its d", stage=CORE,
              linear=Linear.EACH, text="{} * {}", memory=Memory.NEW, is_unkept=True, passes=1,
              in_place=InPlace(MUL, lambda node: node.args[:1]), added=Added(ADDCMUL, when=When.WITHOUT_GRADIENT),
              derivative=derivatives.scale, rows=row_rules.entrywise),
    Operation("block_stack", 1, lambda a: (a[1] // a[0], a[0], a[0]),
              lambda a: a.unflatten(-1, (-1, len(a))).transpose(0, 1),
              "k rows of b blocks as a stack: [k, b k] -> [b, k, k]", stage=CORE, linear=Linear.TOGETHER,
              memory=Memory.VIEW),
    Operation("blocks", 2, _blocks_shape, _blocks, "a block_diag(s)", stage=CORE, linear=Linear.EACH,
              step_kernel="kernels.blocks", memory=Memory.NEW, is_unkept=True,
              added=Added(Form("add_blocks", kernel="kernels.add_blocks"), fits=lambda z: len(z.shape) == 2,
                          when=When.IN_STEP, is_product=True),
              flops=flop_rules.blocks, derivative=derivatives.blocks, rows=row_rules.first_by_row),
]
