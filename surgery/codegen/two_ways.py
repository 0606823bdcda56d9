"""Compute an output by W' as one matrix, and the gradients of what trains in it by its activations.

Takes a weight expression in the lowering's form, and outputs of it; gives `either(x W'ᵀ, y)`: the value and the input's
gradient are those of the first, and of the second, an equal expression, only what the other gradients read is computed.
One product with W' is less work than it and those that an update needs beside it for every token, forwards and
backwards; the gradient of W' as a whole would be one more, of which what trains reads little.
"""

from __future__ import annotations

from collections.abc import Callable

from surgery.codegen.apply_to_activations import is_structured, matrix
from surgery.codegen.images_and_ids import split_dropout, spread
from surgery.ir.builders import summands, total
from surgery.ir.expression import Expr, rebuild, substituted, walk
from surgery.ir.operations import make, operation
from surgery.ir.table import Source
from surgery.layers.kinds import LayerKind
from surgery.rewrite.cheaper_forms import cheapest
from surgery.rewrite.low_rank import factors


def at_once(operand: Expr, x: Expr, kind: LayerKind, is_trained: Callable[[Expr], bool]) -> Expr | None:
    """x W'ᵀ with W' made without a gradient; None where that saves nothing: what trains is to be added to the weight,
    as something else than two thin factors, which are little work as they are."""
    kept, dropping = split_dropout(operand)
    if kept is None or not kind.is_product or operand.is_large:
        return None
    trained = [term for term in summands(kept) if is_trained(term)]
    if any(term.has("weight") for term in trained) or all(factors(term) for term in trained):
        return None
    y = make("matmul", x, make("T", make("detach", matrix(kept))))
    return total([y, *(spread(part, x, kind) for part in dropping)], y.shape)


def with_gains_made(expr: Expr, is_trained: Callable[[Expr], bool]) -> Expr:
    """The expression with a gain between two matrices taken into one of them that trains: its gradient comes with that
    of the matrix, and no value of the forward pass is read for it."""
    def change(node: Expr, args: tuple[Expr, ...]) -> Expr:
        if node.op != "matmul" or args[0].op != "matmul" or args[0].args[1].op != "diag":
            return node.with_args(args)
        (left, gain), right = args[0].args, args[1]
        if is_trained(right) and not is_structured(right):
            return make("matmul", left, make("built", cheapest(make("matmul", gain, right))))
        if is_trained(left) and not is_structured(left):
            return make("matmul", make("built", cheapest(make("matmul", left, gain))), right)
        return node.with_args(args)

    return rebuild(expr, change)


def by_transforms(output: Expr) -> Expr:
    """The output with products of circulant blocks by fast transforms, whatever their size: their gradient in c takes
    two thirds of the time of that by products with a basis."""
    def change(node: Expr, args: tuple[Expr, ...]) -> Expr:
        if node.op != "waves" or args[0].op != "mixed":
            return node.with_args(args)
        spectrum, kernel = args[0].args
        return make("circulate", spectrum.args[0], kernel.args[0])

    return rebuild(output, change)


def either(first: Expr, second: Expr) -> Expr:
    """The value and the input's gradient of the first, and the other gradients of the second."""
    x = _input(second)
    return make("either", first, substituted(second, {x: make("detach", x)}))


def ways(body: Expr) -> tuple[Expr, Expr]:
    """The first and the second of an `either`, over the same input; of any other body, itself twice."""
    if body.op != "either":
        return body, body
    first, second = body.args
    x = _input(first)
    return first, substituted(second, {make("detach", x): x})


def _input(body: Expr) -> Expr:
    return next(node for node in walk(body) if operation(node).source is Source.INPUT)
