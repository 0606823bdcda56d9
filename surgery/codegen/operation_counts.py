"""The work of one operation: multiplications and additions, and numbers moved between memory and processor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from math import log2, prod

from surgery.ir.expression import Expr
from surgery.ir.sizes import Dim
from surgery.rewrite.builders import scaled, value_of

# What is not computed: views, and what is there already.
MADE_ELSEWHERE = {"T", "split", "join", "flat", "between", "detach", "reshape", "columns", "drop", "param", "places",
                  "weight", "bias", "x", "value", "kept", "grad", "const", "eye"}
ACCUMULATED = {"matmul", "blocks"}  # products that a sum writes into its other term
FACTORISED = 5e5  # what a factorisation of a small matrix costs beside its arithmetic
Count = Callable[[Expr], float]


def is_ids(node: Expr) -> bool:
    """Whether an input is token ids, which stand for rows with a single 1."""
    return node.op == "x" and node.data == "ids" or node.op == "dropout" and is_ids(node.args[0])


def is_taken_in(node: Expr, reads: Mapping[Expr, Sequence[Expr]]) -> bool:
    """Whether it is no pass of its own: a multiple by a number goes into the sum or the product that reads it."""
    return node.op == "mul" and value_of(node.args[0]) is not None and len(reads.get(node, ())) == 1


def is_accumulated(node: Expr, reads: Mapping[Expr, Sequence[Expr]]) -> bool:
    """Whether it is a product that a sum takes in: written by the sum, into its other term."""
    over = reads.get(node, ())
    over = reads.get(over[0], ()) if len(over) == 1 and is_taken_in(over[0], reads) else over
    return node.op in ACCUMULATED and len(over) == 1 and over[0].op == "add"


def _is_product(term: Expr) -> bool:
    return scaled(term)[1].op in ACCUMULATED


def moved(node: Expr, tokens: int) -> float:
    """How many numbers are read and written; of a sum with a product in it, what else there is."""
    if node.op in MADE_ELSEWHERE or is_ids(node):
        return 0.0
    if node.args and is_ids(node.args[0]):  # rows are looked up
        return 2 * size(node, tokens)
    if node.op == "add" and any(map(_is_product, node.args)):
        return size(node, tokens)
    weight = float(node.shape[-1] * node.args[0].shape[-1]) if node.op in ("frozen", "frozen_back") else 0.0
    return size(node, tokens) + weight + sum(size(a, tokens) for a in node.args)


def size(node: Expr, tokens: int) -> float:
    """How many numbers a node's value has."""
    return float(prod(_known(s, tokens) for s in node.shape))


def _known(value: object, tokens: int) -> float:
    """A dimension with the number of tokens put in."""
    if not isinstance(value, Dim):
        return float(value)
    return float(sum((c * tokens ** sum(power for _, power in monomial) for monomial, c in value.terms), Fraction(0)))


def flops(node: Expr, tokens: int) -> float:
    """Multiplications and additions of computing a node once."""
    if node.op in MADE_ELSEWHERE or is_ids(node) or node.args and is_ids(node.args[0]):
        return 0.0
    rule = _RULES.get(node.op)
    return rule(node, lambda each: size(each, tokens)) if rule else size(node, tokens)


def _product(node: Expr, count: Count) -> float:
    return 2 * count(node) * float(node.args[0].shape[-1])


def _outer(node: Expr, count: Count) -> float:
    return 2 * count(node.args[0]) * float(node.shape[-1])


def _fourier(numbers: float) -> float:
    return 5 * numbers * log2(max(numbers, 2))


def _circulate(node: Expr, count: Count) -> float:
    return _fourier(count(node.args[0])) + _fourier(count(node)) + 4 * count(node) * node.args[1].shape[1]


def _circulate_dot(node: Expr, count: Count) -> float:
    a, g, c = node.args
    return _fourier(count(a)) + _fourier(count(g)) + 4 * count(a) * c.shape[0]


def _cubic(factor: float) -> Callable[[Expr, Count], float]:
    """For each square matrix of a stack."""
    return lambda node, count: count(node) * factor * node.shape[-1] + FACTORISED * count(node) / node.shape[-1] ** 2


_RULES: dict[str, Callable[[Expr, Count], float]] = {
    "matmul": _product, "frozen": _product, "frozen_back": _product, "outer": _outer,
    "run": lambda node, count: 2 * count(node) * float(node.args[1].shape[-1]),
    "blocks": lambda node, count: 2 * count(node) * float(node.args[1].shape[1]),
    "block_dot": lambda node, count: 2 * count(node.args[0]) * float(node.shape[-1]),
    "spectrum": lambda node, count: 2 * count(node) * float(node.args[1].shape[1]),
    "waves": lambda node, count: 2 * count(node) * float(node.args[1].shape[0]),
    "mixed": lambda node, count: 4 * count(node) * float(node.args[1].shape[2]),
    "mixed_back": lambda node, count: 4 * count(node) * float(node.args[1].shape[3]),
    "mixed_dot": lambda node, count: 4 * count(node.args[0]) * float(node.shape[3]),
    "top_mix": lambda node, count: count(node.args[0]) + 2 * count(node) * node.data[0],
    "circulate": _circulate, "circulate_back": _circulate, "circulate_dot": _circulate_dot,
    "gram": lambda node, count: 2 * count(node) * float(node.args[0].shape[-1]),
    "weighted_dot": lambda node, count: 3 * count(node.args[0]),
    "ifft2": lambda node, count: _fourier(count(node)),
    "cayley": _cubic(10), "resolvent": _cubic(10), "expm": _cubic(40), "phi": _cubic(320),
    "mirrored": lambda node, count: FACTORISED + 3 * count(node) * node.shape[0],
    "reflect": lambda node, count: 4 * count(node) * float(node.args[0].shape[1]),
}
