"""The verifier: what must hold of every node of an expression, as a table, for each form that the compiler gives it.

Takes an expression and the form that it is said to be in; raises `Malformed` with the node and the law that it breaks.
Run between the stages in tests. Promises: a node that passes has the arguments, the shape and the data that its meaning
needs, and is the one object that stands for it.
"""

from __future__ import annotations

from collections.abc import Mapping

from surgery.ir.expression import Expr, Formula, walk
from surgery.ir.operations import OPERATIONS, operation
from surgery.ir.sizes import Dim
from surgery.ir.table import Law, Operation, Source, Stage, Transpose


class Malformed(AssertionError):
    """An expression that breaks a law: a mistake of the compiler's, never of a user's."""


# ------------------------------------------------------------------------------------------------------ the laws


def _stays_turned(node: Expr) -> bool:
    """Whether a transpose of it is no simpler. (Of a stack times a vector there is no product the other way round.)"""
    is_of_vectors = node.op == "matmul" and any(len(a.shape) < 2 for a in node.args)
    return operation(node).transpose is Transpose.STAYS or is_of_vectors


# What the normal form promises beyond each row's own laws.
NORMAL: dict[str, tuple[Law, ...]] = {
    "mul": (Law("a scalar in front", lambda n: not n.args[0].shape or n.args[0].shape == n.args[1].shape == n.shape),
            Law("numbers multiplied out", lambda n: n.args[1].op != "mul" or n.args[1].args[0].op != "const"
                or n.args[0].op != "const")),
    "T": (Law("transposes only at what cannot be taken apart", lambda n: _stays_turned(n.args[0])),),
    "matmul": (Law("scalars in front of products", lambda n: not any(
                   a.op == "mul" and not a.args[0].shape and a.args[1].shape for a in n.args)),
               Law("nothing times I", lambda n: not any(a.op == "eye" and a.shape == n.shape for a in n.args))),
    "add": (Law("nothing plus 0", lambda n: not any(a.op == "fill" and a.data == 0 for a in n.args)),),
}
ELABORATED, SIMPLIFIED, CHEAPEST = Stage.ELABORATED, Stage.SIMPLIFIED, Stage.CHEAPEST
MATERIALISED, LOWERED, STEP = Stage.MATERIALISED, Stage.LOWERED, Stage.STEP


def laws(row: Operation, form: Stage) -> tuple[Law, ...]:
    """What must hold of the nodes of an operation in a form."""
    return row.laws() + (NORMAL.get(row.name, ()) if form in SIMPLIFIED | CHEAPEST else ())


# -------------------------------------------------------------------------------------------------- verification


def verify(expr: Expr, form: Stage) -> Expr:
    """The expression, if every node of it keeps the laws of the form. Raises: Malformed."""
    shapes: dict[tuple, tuple] = {}
    for node in walk(expr):
        row = OPERATIONS.get(node.op)
        if row is None or form not in row.stage:
            raise Malformed(f"`{node.op}` has no place here: {node} {list(node.shape)}")
        if Expr(node.op, node.args, node.data, node.shape) is not node:  # and then `is` would not compare formulas
            raise Malformed(f"another node is equal to {node} {list(node.shape)}")
        if not all(isinstance(s, Dim) or type(s) is int and s > 0 for s in node.shape):
            raise Malformed(f"{node} has a size that is not a whole number: {list(node.shape)}")
        for law in laws(row, form):
            if not law.holds(node):
                of = [list(a.shape) for a in node.args]
                raise Malformed(f"{node} {list(node.shape)} of {of} breaks a law: {law.says}")
        # a name has one shape, and the layer's own map has the weight's
        source, name = operation(node).source, node.op if node.data is None else node.data
        if source is not None and (known := shapes.setdefault((source, name), node.shape)) != node.shape:
            raise Malformed(f"{name} is {list(known)} and {list(node.shape)}")
    return expr


def verify_formula(formula: Formula) -> Formula:
    """The formula, if its expressions keep the laws, all their parameters are leaves, and each leaf starts from the
    weight, the bias and the leaves before it. Raises: Malformed."""
    known: dict[str, tuple] = {}
    for leaf in formula.leaves:
        if leaf.key in known or (leaf.init is None) == (leaf.draw is None):
            raise Malformed(f"the leaf {leaf.key} stands twice, or does not have one start")
        if leaf.init is not None:
            _verify_known(verify(leaf.init, ELABORATED), known)
        known[leaf.key] = leaf.shape
    for expr in (formula.weight, formula.bias, *(claim.expr for claim in formula.claims)):
        _verify_known(verify(expr, ELABORATED), known)
    return formula


def _verify_known(expr: Expr, known: Mapping[str, tuple]) -> None:
    for node in (each for each in walk(expr) if operation(each).source is Source.ADAPTER):
        if known.get(node.data) != node.shape:
            raise Malformed(f"{node.data} {list(node.shape)} is not a leaf of that shape here")

