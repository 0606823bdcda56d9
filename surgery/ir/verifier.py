"""The verifier: what must hold of every node of an expression, as a table, for each form that the compiler gives it.

Takes an expression and the form that it is said to be in; raises `Malformed` with the node and the law that it breaks.
Run between the stages in tests. Promises: a node that passes has the arguments, the shape and the data that its meaning
needs, and is the one object that stands for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import prod

from surgery.ir.expression import Expr, Formula, walk
from surgery.ir.primitives import PRIMITIVES, ShapeError
from surgery.ir.sizes import Dim


class Malformed(AssertionError):
    """An expression that breaks a law: a mistake of the compiler's, never of a user's."""


@dataclass(frozen=True)
class Law:
    """What must hold of a node, said in words; `arity` is None where any number of arguments will do."""

    says: str
    holds: Callable[[Expr], bool]


Laws = Mapping[str, tuple[Law, ...]]


def _plain(node: Expr) -> bool:
    """The shape that the primitive's own rule gives."""
    try:
        row = PRIMITIVES[node.op]
        fits = node.shape == row.shape_of(node.data, tuple(a.shape for a in node.args))
        return fits and (node.data is not None) == bool(row.sizes)
    except (ShapeError, TypeError):
        return False


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, Fraction, Dim)) and not isinstance(value, bool)


def _is_mask(value: object) -> bool:
    """The share that is dropped, and the step whose mask it is."""
    if not isinstance(value, tuple) or len(value) != 2:
        return False
    share, step = value
    return isinstance(share, float) and 0 < share < 1 and isinstance(step, str)


def _leaf(says: str, holds: Callable[[Expr], bool]) -> tuple[Law, ...]:
    return Law("no arguments", lambda n: not n.args), Law(says, holds)


def _on(arity: int, says: str, holds: Callable[[Expr], bool]) -> tuple[Law, ...]:
    return Law(f"{arity} argument{'s' * (arity > 1)}", lambda n: len(n.args) == arity), Law(says, holds)


def _primitive(name: str) -> tuple[Law, ...]:
    return _on(PRIMITIVES[name].arity, "the shape of its primitive's rule, and its sizes for data", _plain)


def _rows(node: Expr) -> tuple:
    return node.args[0].shape[:-1]


# ------------------------------------------------------------------------------------------------------ the laws

LEAVES: Laws = {
    "weight": _leaf("[out, in]", lambda n: len(n.shape) == 2 and n.data is None),
    "bias": _leaf("[out]", lambda n: len(n.shape) == 1 and n.data is None),
    "param": _leaf("a key: step.name", lambda n: isinstance(n.data, str) and n.data.count(".") == 1),
    "places": _leaf("a key: step.name", lambda n: isinstance(n.data, str) and n.data.count(".") == 1),
    "const": _leaf("one number", lambda n: not n.shape and _is_number(n.data)),
    "eye": _leaf("square, and no data", lambda n: len(n.shape) >= 2 and n.shape[-1] == n.shape[-2] and n.data is None),
}
DROP: Laws = {"drop": _on(1, "a share between 0 and 1 with its step, and its argument's shape, a matrix's",
                          lambda n: _is_mask(n.data) and n.shape == n.args[0].shape and len(n.shape) == 2)}
# As long as a condition on sizes is not decided.
UNDECIDED: Laws = {"undecided": (Law("what it can be", lambda n: bool(n.args)),)}
FILL: Laws = {"fill": _leaf("a float in a shape", lambda n: isinstance(n.data, float) and bool(n.shape))}
PUBLIC: Laws = {name: _primitive(name) for name, row in PRIMITIVES.items() if row.public}
CORES: Laws = {name: _primitive(name) for name, row in PRIMITIVES.items() if not row.public}
ACTIVATIONS: Laws = {
    "x": _leaf("[tokens, features], or ids of rows", lambda n: len(n.shape) == 2 and n.data in (None, "ids")),
    "frozen": _on(1, "rows through the layer, biased or not",
                  lambda n: n.shape[:-1] == _rows(n) and n.data in (None, "biased")),
    "frozen_back": _on(1, "rows back through the layer", lambda n: n.shape[:-1] == _rows(n) and n.data is None),
    "run": _on(2, "an input through the layer with a matrix in the weight's place",
               lambda n: n.shape == _rows(n) + n.args[1].shape[:1] and n.args[0].shape[-1] == n.args[1].shape[-1]),
    "dropout": _on(1, "a share between 0 and 1 with its step, and its argument's shape",
                   lambda n: _is_mask(n.data) and n.shape == n.args[0].shape),
    "split": _on(1, "the last axis as two", lambda n: n.shape == _rows(n) + n.data
                 and n.args[0].shape[-1] == n.data[0] * n.data[1]),
    "join": _on(1, "the last two axes as one", lambda n: n.shape[:-1] == _rows(n)[:-1]
                and n.shape[-1] == n.args[0].shape[-1] * n.args[0].shape[-2]),
    "swap": _on(1, "its argument's shape, in four factors",
                lambda n: n.shape == n.args[0].shape and prod(n.data) == n.shape[-1]),
    "mix": _on(1, "its argument with the rows of numbers in the place of its own",
               lambda n: n.args[0].shape[-2] == len(n.data[0])
               and n.shape == (*_rows(n)[:-1], len(n.data), n.args[0].shape[-1])),
    "add_bias": _on(2, "a number for each feature",
                    lambda n: n.shape == n.args[0].shape and n.args[1].shape == n.shape[-1:]),
}
_TAKEN_APART = {"T", "diag", "eye", "fill", "add", "kron", "block_diag", "cayley", "expm"}
# What the normal form of `rewrite.algebra` promises.
NORMAL: Laws = {
    "mul": (Law("a scalar in front", lambda n: not n.args[0].shape or n.args[0].shape == n.args[1].shape == n.shape),
            Law("numbers multiplied out", lambda n: n.args[1].op != "mul" or n.args[1].args[0].op != "const"
                or n.args[0].op != "const")),
    "T": (Law("transposes only at what cannot be taken apart", lambda n: n.args[0].op not in _TAKEN_APART),),
    "matmul": (Law("scalars in front of products", lambda n: not any(_is_scaled(a) for a in n.args)),
               Law("nothing times I", lambda n: not any(a.op == "eye" and a.shape == n.shape for a in n.args))),
    "add": (Law("nothing plus 0", lambda n: not any(a.op == "fill" and a.data == 0 for a in n.args)),),
}


def _is_scaled(node: Expr) -> bool:
    return node.op == "mul" and not node.args[0].shape and bool(node.args[1].shape)


def _both(*tables: Laws) -> Laws:
    """The laws of all tables together."""
    return {op: tuple(law for t in tables for law in t.get(op, ())) for table in tables for op in table}


def _without(table: Laws, *ops: str) -> Laws:
    return {op: laws for op, laws in table.items() if op not in ops}


ELABORATED = _both(LEAVES, FILL, PUBLIC, DROP, UNDECIDED)
SIMPLIFIED = _both(_without(ELABORATED, "neg", "sub"), NORMAL)
CHEAPEST = _both(_without(SIMPLIFIED, "undecided"), CORES)
LOWERED = _both(LEAVES, FILL, _without(PUBLIC, "neg", "sub"), CORES, ACTIVATIONS)
MATERIALISED = _without(LOWERED, "x", "dropout", "frozen", "run", "add_bias")


# -------------------------------------------------------------------------------------------------- verification


def verify(expr: Expr, form: Laws) -> Expr:
    """The expression, if every node of it keeps the laws of the form. Raises: Malformed."""
    for node in walk(expr):
        _verify_node(node, form)
    _verify_leaves(expr)
    return expr


def _verify_node(node: Expr, form: Laws) -> None:
    if node.op not in form:
        raise Malformed(f"`{node.op}` has no place here: {node} {list(node.shape)}")
    if Expr(node.op, node.args, node.data, node.shape) is not node:
        raise Malformed(f"another node is equal to {node} {list(node.shape)}")
    if not all(isinstance(s, Dim) or type(s) is int and s > 0 for s in node.shape):
        raise Malformed(f"{node} has a size that is not a whole number: {list(node.shape)}")
    for law in form[node.op]:
        if not law.holds(node):
            shapes = [list(a.shape) for a in node.args]
            raise Malformed(f"{node} {list(node.shape)} of {shapes} breaks a law: {law.says}")


def _verify_leaves(expr: Expr) -> None:
    """A name has one shape, and the layer's own map has the weight's."""
    shapes: dict[str, tuple] = {}
    for node in walk(expr):
        if node.op in ("weight", "bias", "param", "places", "x"):
            key = node.data or node.op
            if shapes.setdefault(key, node.shape) != node.shape:
                raise Malformed(f"{key} is {list(shapes[key])} and {list(node.shape)}")


def verify_formula(formula: Formula, form: Laws = ELABORATED) -> Formula:
    """The formula, if its expressions keep the laws, all their parameters are leaves, and each leaf starts from the
    weight, the bias and the leaves before it. Raises: Malformed."""
    known: dict[str, tuple] = {}
    for leaf in formula.leaves:
        if leaf.key in known or (leaf.init is None) == (leaf.draw is None):
            raise Malformed(f"the leaf {leaf.key} stands twice, or does not have one start")
        if leaf.init is not None:
            _verify_known(verify(leaf.init, form), known)
        known[leaf.key] = leaf.shape
    for expr in (formula.weight, formula.bias, *(claim.expr for claim in formula.claims)):
        _verify_known(verify(expr, form), known)
    return formula


def _verify_known(expr: Expr, known: Mapping[str, tuple]) -> None:
    for node in _parameters(expr):
        if known.get(node.data) != node.shape:
            raise Malformed(f"{node.data} {list(node.shape)} is not a leaf of that shape here")


def _parameters(expr: Expr) -> Iterable[Expr]:
    return (node for node in walk(expr) if node.op in ("param", "places"))
