"""Classify a spec into families of methods, by its formulas.

Takes a spec's formulas; gives names of `FAMILIES`. Promises: no torch; nothing has to be written into a spec for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from surgery.ir.expression import Expr, Formula, walk

UNFROZEN = "unfrozen"


@dataclass(frozen=True)
class Family:
    """What its members do, and whether a formula does so."""

    means: str
    has: Callable[[Formula], bool]


def _nodes(formula: Formula) -> list[Expr]:
    """All of what a formula computes, and what its parameters start at."""
    starts = (leaf.init for leaf in formula.leaves if leaf.init is not None)
    return list(walk(formula.weight, formula.bias, *starts))


def _uses(*ops: str) -> Callable[[Formula], bool]:
    return lambda formula: formula.weight.has(*ops)


def _claims(name: str) -> Callable[[Formula], bool]:
    return lambda formula: any(claim.name == name for claim in formula.claims)


def _measures_the_weight(formula: Formula) -> bool:
    return any(node.op in ("row_norm", "col_norm") and node.has("weight") for node in _nodes(formula))


def _is_sparse(formula: Formula) -> bool:
    # rows and columns of I place what is trained; those of anything else are read
    return any(node.op == "scatter" or node.op in ("rows", "columns") and node.args[0].op == "eye"
               for node in _nodes(formula))


def _multiplies_entries(formula: Formula) -> bool:
    sides = formula.weight.shape
    return any(node.op == "mul" and all(arg.shape == sides for arg in node.args) for node in walk(formula.weight))


FAMILIES = {
    "additive": Family("adds to the weight", lambda formula: any(
        part.step.placement == "add" and len(part.expr.shape) == 2 for part in formula.parts)),
    "multiplicative": Family("multiplies the weight, from the left or from the right", lambda formula: any(
        part.step.placement != "add" for part in formula.parts)),
    "orthogonal": Family("rotations, reflections or orthonormal factors", lambda formula: (
        _claims("orthogonal")(formula) or _uses("cayley", "expm", "reflect", "qr")(formula)
        or any(leaf.manifold for leaf in formula.leaves))),
    "diagonal": Family("a gain for each row or column", lambda formula: (
        _claims("diagonal")(formula) and not _measures_the_weight(formula))),
    "magnitude": Family("sizes of the weight's rows or columns", _measures_the_weight),
    "spectral": Family("singular values or vectors of the weight, or frequencies", lambda formula: any(
        node.op in ("left_singular", "singular", "right_singular", "ifft2") for node in _nodes(formula))),
    "kronecker": Family("Kronecker products, blocks, tensors or circulants", _uses(
        "kron", "block_diag", "circulant", "einsum")),
    "hadamard": Family("matrices multiplied entry by entry", _multiplies_entries),
    "sparse": Family("some entries, rows or columns alone", _is_sparse),
    "shared": Family("tensors that modules share", lambda formula: any(leaf.group for leaf in formula.leaves)),
    "bias": Family("the bias too", lambda formula: formula.changes_bias),
    UNFROZEN: Family("what the model has is trained, and nothing added", lambda formula: False),
}


def families(formulas: Sequence[Formula]) -> tuple[str, ...]:
    """The families that a spec with these formulas, of its targets, belongs to."""
    if not formulas:
        return (UNFROZEN,)
    return tuple(name for name, family in FAMILIES.items() if any(map(family.has, formulas)))
