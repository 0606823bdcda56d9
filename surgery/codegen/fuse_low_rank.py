"""Compute the two thin factors of each low-rank term once in the set-up, and not for every token.

Takes a weight expression in the lowering's form; gives an equal one in which every low-rank matrix is a product U V of
two that are `built`, and those that are added up are one, [U, P] [V; Q]: what else stands in them (gains, rotations,
scalars, the frozen layer) meets a few rows in the place of all the tokens.
"""

from __future__ import annotations

from surgery.codegen.apply_to_activations import is_structured
from surgery.ir.builders import scaled, summands, times, total, value_of
from surgery.ir.expression import Expr, walk
from surgery.ir.operations import make
from surgery.rewrite.cheaper_forms import cheapest
from surgery.rewrite.low_rank import Factors, factors

_OPEN = ("matmul", "add", "mul", "drop")  # what acts as its parts do
_LEAVES = ("param", "built", "fill")


def thinly(expr: Expr, trained: frozenset[str]) -> Expr:
    """The expression with its low-rank parts made in the set-up (itself where there is none). `trained` are the keys of
    the parameters that take a gradient."""
    if len(expr.shape) != 2:
        return expr
    scalar, rest = scaled(expr)
    if scalar is not None and value_of(scalar) is not None:
        return times(scalar, thinly(rest, trained))
    if (pair := _thin(expr)) is not None:
        return make("matmul", *map(_built, pair))
    if expr.op != "add":
        return expr.with_args(tuple(thinly(a, trained) for a in expr.args)) if expr.op in _OPEN else expr
    # The low-rank terms of a sum become one, [U, P] [V; Q]: those that take a gradient, and those that need none,
    # whose factors would else be read for a gradient that nobody asks for.
    terms, joined = list(summands(expr)), []
    for is_trained in (True, False):
        low = [term for term in terms if (pair := _thin(term)) is not None
               and not pair[1].has("weight")  # the frozen layer's own output is there already
               and any(n.op == "param" and n.data in trained for n in walk(term)) is is_trained]
        pair = _thin(total(low, expr.shape)) if len(low) > 1 else None
        if pair is not None:
            joined.append(make("matmul", *map(_built, pair)))
            terms = [term for term in terms if term not in low]
    return total([*(thinly(term, trained) for term in terms), *joined], expr.shape)


def _thin(expr: Expr) -> Factors | None:
    """The factors of a low-rank matrix if the set-up may compute them: not where a factor acts faster than it is built,
    nor below dropout."""
    pair = factors(expr)
    return None if pair is None or any(is_structured(f) or f.has("drop") for f in pair) else pair


def _built(factor: Expr) -> Expr:
    """A factor as one matrix, whatever it is made of; in front of the frozen layer's own output, which is there
    already, what is multiplied with that."""
    if factor.op == "matmul" and factor.args[1].op == "weight":
        return make("matmul", _built(factor.args[0]), factor.args[1])
    leaf = factor.args[0] if factor.op == "T" else factor
    return factor if leaf.op in _LEAVES else make("built", cheapest(factor))
