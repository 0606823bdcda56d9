"""Places of entries: whether those that a parameter holds exist in what they point into.

Takes a formula's expressions and leaves. Promises: sizes that are not known yet are left for later, when they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

from surgery.diagnostics import fail
from surgery.ir.expression import Expr, Leaf, walk
from surgery.ir.primitives import is_whole
from surgery.ir.sizes import Dim, Size

_INTO = {"take": lambda node: node.args[0].shape, "scatter": lambda node: node.shape}


def assert_exist(exprs: Iterable[Expr], leaves: Iterable[Leaf]) -> None:
    """Raises: SurgeryError (bad-value), if a parameter may hold a place beyond the last entry of what it points
    into."""
    known = {leaf.key: leaf for leaf in leaves}
    nodes = list(walk(*exprs))
    if any(node.op == "undecided" for node in nodes):
        return
    for node in (n for n in nodes if n.op in _INTO):
        entries, places = prod(_INTO[node.op](node)), below(node.args[1], known)
        if not isinstance(entries, Dim) and not isinstance(places, Dim) and places > entries:
            leaf = known.get(node.args[1].data)
            what = f"`{leaf.key.rpartition('.')[2]}` holds" if leaf else "these are"
            raise fail("bad-value", f"{what} places among {places:g} entries, and `{node.op}` is given {entries:g}",
                       leaf and leaf.span)


def below(places: Expr, known: Mapping[str, Leaf]) -> Size:
    """How many entries there are among which an expression's places lie."""
    if places.op == "top":
        return prod(places.args[0].shape)
    leaf = known[places.data]
    return below(leaf.init, known) if leaf.init is not None else leaf.draw.arguments[0][1]


def bounds(leaves: Iterable[Leaf]) -> dict[str, Size]:
    """How many entries each leaf of whole numbers lies among, by its key."""
    known = {leaf.key: leaf for leaf in leaves}
    return {key: below(leaf.expr, known) for key, leaf in known.items() if is_whole(leaf.expr)}
