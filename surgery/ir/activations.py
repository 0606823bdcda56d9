"""Operations on activations: the frozen layer's own maps, and what acts on the last axes. A row each.

What is written here beside `scale`, `blocks`, `spectrum` and their like (in `primitives` and beside it), which act on
activations and on the rows of matrices alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from surgery.ir import derivatives, flop_rules
from surgery.ir.expression import Expr, Shape
from surgery.ir.shape_rules import ShapeError, dropped, elementwise, matrix, shape_text
from surgery.ir.sizes import TOKENS
from surgery.ir.table import ACTING, BACK_ONTO, ON_INPUT, ONTO, Law, Linear, Memory, Operation

# How a set-up's product with the frozen weight is made: in the dtype of the set-up, whatever the weight's is.
EXACT = "exact"


def is_ids(node: Expr) -> bool:
    """Whether an input is token ids, which stand for rows with a single 1."""
    return node.op == "x" and node.data == "ids" or node.op == "dropout" and is_ids(node.args[0])


def _rows(node: Expr) -> Shape:
    return node.args[0].shape[:-1]


def _frozen_text(node: Expr, args: list[str]) -> str:
    """The layer's method for what its argument is: the input itself, rows of activations, or rows of a set-up."""
    from_input = node.args[0].op in ("x", "dropout", "masked")
    call = node.data or ("" if from_input else "flat" if TOKENS in node.shape else "rows")
    return f"layer.{'_'.join(filter(None, ['frozen', call]))}({args[0]})"


def _frozen(node: Expr, args: list, leaves: Mapping[str, Any]) -> Any:
    weight = leaves["weight"]
    result = args[0] @ (weight if is_ids(node.args[0]) else weight.mT)
    return result + leaves["bias"] if node.data == "biased" else result


def _run_shape(a: Shape, m: Shape) -> Shape:
    if a[-1:] != m[-1:]:
        raise ShapeError(f"{shape_text(a)} and {shape_text(m)} do not agree")
    return a[:-1] + m[:1]


def _fits_alone(node: Expr) -> bool:
    if len(node.args) not in (2, 3) or node.data is not None:
        return False
    a, m, *biases = (argument.shape for argument in node.args)
    return a[-1:] == m[-1:] and node.shape == a[:-1] + m[:1] and all(bias == m[:1] for bias in biases)


def _run_alone(node: Expr, args: list, leaves: Mapping[str, Any]) -> Any:
    x, m, *biases = args
    return sum(biases, x @ m.mT)


def _split_shape(sizes: tuple, a: Shape) -> Shape:
    if len(sizes) != 2 or prod(sizes) != a[-1]:
        raise ShapeError(f"{shape_text(a)} does not end in {sizes}")
    return a[:-1] + sizes


def _swap_shape(sizes: tuple, a: Shape) -> Shape:
    if len(sizes) != 4 or prod(sizes) != a[-1]:
        raise ShapeError(f"{shape_text(a)} does not end in {sizes}")
    return a


def _mix_shape(rows: tuple, a: Shape) -> Shape:
    if len(rows[0]) != matrix(a)[-2]:
        raise ShapeError(f"{shape_text(a)} has not {len(rows[0])} rows")
    return (*a[:-2], len(rows), a[-1])


def _add_bias_shape(a: Shape, b: Shape) -> Shape:
    if b != a[-1:]:
        raise ShapeError(f"{shape_text(a)} and {shape_text(b)} do not agree")
    return a


ROWS = [
    Operation("frozen", 1, None, None, "x Wᵀ, by the layer itself: biased or not, or in the dtype of x", stage=ON_INPUT,
              law=Law("rows through the layer, biased or not, or exactly",
                      lambda n: n.shape[:-1] == _rows(n) and n.data in (None, "biased", EXACT)),
              evaluate=_frozen, linear=Linear.TOGETHER, text=_frozen_text, memory=Memory.OF_LAYER, is_unkept=True,
              is_matmul=True, of_layer=True, onto=ONTO, flops=flop_rules.product, derivative=derivatives.frozen),
    Operation("frozen_back", 1, None, None, "x W, by the layer itself", stage=ON_INPUT,
              law=Law("rows back through the layer, exactly or not",
                      lambda n: n.shape[:-1] == _rows(n) and n.data in (None, EXACT)),
              evaluate=lambda node, args, leaves: args[0] @ leaves["weight"], linear=Linear.TOGETHER,
              text=lambda node, args: f"layer.frozen_back{'_exact' if node.data else ''}({args[0]})",
              memory=Memory.OF_LAYER, is_unkept=True, is_matmul=True, of_layer=True, onto=BACK_ONTO,
              flops=flop_rules.product, derivative=derivatives.frozen_back),
    Operation("run", 2, _run_shape, lambda x, m: x @ m.mT, "an input through the layer with a matrix in W's place",
              stage=ON_INPUT, linear=Linear.EACH, text="layer.run({}, {})", memory=Memory.OF_LAYER, is_unkept=True,
              flops=flop_rules.each(2, 1, -1)),
    # In the layer's own form, and not as rows.
    Operation("run_alone", None, None, None,
              "all of a layer's output, with a matrix and a bias in the place of its own",
              stage=ON_INPUT, law=Law("an input, a matrix in W's place, and a bias or none", _fits_alone),
              evaluate=_run_alone, text=lambda node, args: f"layer.run_alone({', '.join(args)})",
              memory=Memory.OF_LAYER, flops=flop_rules.each(2, 1, -1)),
    # Its dense meaning is that of evaluation, which drops nothing.
    Operation("dropout", 1, dropped, lambda mask, a: a, "x through dropout", stage=ON_INPUT, sizes=("share", "step"),
              text="layer.dropout({}, {data[0]!r})"),
    Operation("split", 1, _split_shape, lambda sizes, a: a.unflatten(-1, sizes), "the last axis as two", stage=ACTING,
              sizes=("m", "n"), linear=Linear.TOGETHER, text="{}.unflatten(-1, {data})", memory=Memory.VIEW,
              derivative=derivatives.split),
    Operation("join", 1, lambda a: matrix(a)[:-2] + (a[-2] * a[-1],), lambda a: a.flatten(-2),
              "the last two axes as one", stage=ACTING, linear=Linear.TOGETHER, text="{}.flatten(-2)",
              memory=Memory.VIEW, derivative=derivatives.join),
    # It makes a copy wherever both factors are larger than 1, and gives a view where one is not.
    Operation("swap", 1, _swap_shape,
              lambda sizes, a: a.unflatten(-1, sizes).transpose(-3, -2).flatten(-4),
              "the last axis as [g, p, q, r], p and q exchanged", stage=ACTING, sizes=("g", "p", "q", "r"),
              linear=Linear.TOGETHER, text="swap({}, {data})", kernel="kernels_permute.swap",
              flops=flop_rules.swap, derivative=derivatives.swap),
    Operation("mix", 1, _mix_shape, lambda rows, a: a.new_tensor(rows) @ a, "L a for a matrix L of known numbers",
              stage=ACTING, sizes=("*rows",), linear=Linear.TOGETHER, text="mix({}, {data})",
              kernel="kernels_permute.mix", memory=Memory.NEW, passes=1, derivative=derivatives.mix),
    # It stands at the root of a body alone, and is taken apart before there is code.
    Operation("either", 2, elementwise, lambda a, b: a + (b - b.detach()),
              "a, with the gradients of an equal b beside its own", stage=ON_INPUT),
    Operation("add_bias", 2, _add_bias_shape, lambda a, b: a + b, "a number added to each feature", stage=ON_INPUT,
              linear=Linear.TOGETHER, text="{} + {}", memory=Memory.NEW, derivative=derivatives.add_bias),
]
