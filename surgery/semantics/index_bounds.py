"""Check that the places (indices of entries) that a parameter holds exist in the tensor that they point into.

Takes a formula's expressions and leaves. Promises: sizes that are not known yet are left for later, when they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

from surgery.diagnostics import Span, fail
from surgery.ir.expression import Expr, Leaf, walk
from surgery.ir.operations import is_undecided, is_whole, operation
from surgery.ir.sizes import Dim, Size, known


def assert_exist(exprs: Iterable[Expr], leaves: Iterable[Leaf], span: Span | None) -> None:
    """Raises: SurgeryError (bad-value), if a parameter may hold a place beyond the last entry of what it points into,
    or an expression's own places do (told at `span`)."""
    by_key = {leaf.key: leaf for leaf in leaves}
    nodes = list(walk(*exprs))
    if any(map(is_undecided, nodes)):
        return
    for node in nodes:
        if not operation(node).places or (into := operation(node).into) is None:
            continue  # places that point into nothing are numbers
        (at,) = operation(node).places
        entries, places = prod(into(node)), below(node.args[at], by_key)
        beyond = places - entries  # a number, where both are or the same unknown stands in both
        if not isinstance(beyond, Dim) and beyond > 0:
            leaf = by_key.get(node.args[at].data)
            what = f"`{leaf.name}` holds" if leaf else "these are"
            raise fail("bad-value", f"{what} places among {_text(places)} entries, and `{node.op}` is given "
                       f"{_text(entries)}", leaf.span if leaf else span)


def _text(count: Size | float) -> str:
    return str(count) if isinstance(count, Dim) else f"{count:g}"


def below(places: Expr, leaves: Mapping[str, Leaf]) -> Size | float:
    """How many entries there are among which an expression's places lie."""
    if (into := operation(places).into) is not None:
        return prod(into(places))
    leaf = leaves[places.data]
    if leaf.init is not None:
        return below(leaf.init, leaves)
    most = leaf.law.arguments[0][1]
    assert not isinstance(most, str)  # the first argument of a draw of whole numbers is one
    return most


def bounds(leaves: Iterable[Leaf]) -> dict[str, float]:
    """How many entries each leaf of whole numbers of a known module lies among, by its key."""
    by_key = {leaf.key: leaf for leaf in leaves}
    counts = {key: below(leaf.expr, by_key) for key, leaf in by_key.items() if is_whole(leaf.expr)}
    return {key: count if isinstance(count, float) else known(count) for key, count in counts.items()}
