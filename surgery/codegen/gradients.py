"""The gradients of a program's body, as expressions: reverse differentiation by a table of identities.

Takes y over the leaves `x` and `value`, and the leaves that take a gradient; gives one expression for each over the
leaf `grad` (the gradient of y), the leaves, and `kept` values of the forward pass. Promises: what is kept is the least
that the gradients need; what one elementwise pass makes of something kept is made again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from surgery.codegen.operation_counts import ACCUMULATED
from surgery.ir.expression import Expr, Shape, rebuild, walk
from surgery.ir.primitives import make
from surgery.ir.sizes import Dim
from surgery.rewrite.builders import is_zero, scaled, times, total
from surgery.rewrite.normal_form import simplify

LEAVES = {"x", "value", "grad", "kept"}
# What is made again: in one pass, or thereabouts, over what it acts on, or in none.
PASSES = {"scale": 1, "masked": 1, "spectrum": 1, "mix": 1, "split": 0, "join": 0, "T": 0}


@dataclass(frozen=True)
class Gradients:
    """An expression for each leaf asked for; `kept` are the forward values that leaves `kept` stand for by index."""

    of: tuple[Expr, ...]
    kept: tuple[Expr, ...]


def gradients(output: Expr, leaves: Sequence[Expr]) -> Gradients | None:
    """The gradients of <output, grad>; None where an operation has no row in the table."""
    found = _parts(output, leaves)
    if found is None:
        return None
    raw = [_of_leaf(found.get(leaf, []), leaf) for leaf in leaves]
    return _keeping(raw)


def _parts(output: Expr, leaves: Sequence[Expr]) -> dict[Expr, list[Expr]] | None:
    """For each node between the output and the leaves the terms of its gradient."""
    order, leads = list(walk(output)), set(leaves)
    for node in order:  # arguments stand before what they are in
        if node.op != "mask" and any(a in leads for a in node.args):
            leads.add(node)
    parts = {output: [Expr("grad", (), None, output.shape)]}
    for node in reversed(order):
        if node.args and node in leads:
            if node.op not in RULES:
                return None
            gradient = _sum(parts.get(node, []), node.shape)
            terms = () if is_zero(gradient) else RULES[node.op](node, gradient)
            for arg, term in zip(node.args, terms):
                if arg in leads:
                    parts.setdefault(arg, []).append(term)
    return parts


def _of_leaf(terms: list[Expr], leaf: Expr) -> Expr:
    """The gradient of a leaf; where its terms cancel, zeros of its size, which only the leaf itself knows."""
    gradient = _sum(terms, leaf.shape)
    return _node("zeros", leaf.shape, leaf) if is_zero(gradient) else gradient


def _sum(terms: list[Expr], shape: Shape) -> Expr:
    """The sum of the terms, products last: those are accumulated into what stands before them."""
    return simplify(total(sorted(map(simplify, terms), key=_is_product), shape))


def _is_product(term: Expr) -> bool:
    rest = scaled(term)[1]
    return (rest.args[0] if rest.op == "masked" else rest).op in ACCUMULATED


def _keeping(raw: list[Expr]) -> Gradients:
    """The expressions with a leaf `kept` for each value of the forward pass that they are left with."""
    wanted = {node.data for node in walk(*raw) if node.op == "forward"}
    kept: dict[Expr, Expr] = {}

    def recall(node: Expr) -> Expr:
        return node if node.op in LEAVES else again(node) if is_cheap(node, 1) else keep(node)

    def is_cheap(node: Expr, passes: int) -> bool:
        """Whether so many passes make it of leaves and of what is wanted too."""
        left = passes - PASSES.get(node.op, 2)
        return left >= 0 and all(a.op in LEAVES or a in wanted or is_cheap(a, left) for a in node.args)

    def again(node: Expr) -> Expr:
        made = (recall(a) if a.op in LEAVES or a in wanted else again(a) for a in node.args)
        return node.with_args(tuple(made))

    def keep(node: Expr) -> Expr:
        return kept.setdefault(node, Expr("kept", (), len(kept), node.shape))

    def change(node: Expr, args: tuple[Expr, ...]) -> Expr:
        return recall(node.data) if node.op == "forward" else node.with_args(args)

    return Gradients(tuple(rebuild(expr, change) for expr in raw), tuple(kept))


def _forward(node: Expr) -> Expr:
    """A value of the forward pass inside a gradient: opaque, so that no rule computes it in another way."""
    return node if node.op in LEAVES else Expr("forward", (), node, node.shape)


# ------------------------------------------------------------------------------------------------ the identities


def _flat(a: Expr) -> Expr:
    """Activations of any rank as a matrix."""
    rows = a.shape[0]
    for size in a.shape[1:-1]:
        rows = rows * size
    return a if len(a.shape) == 2 else Expr("flat", (a,), None, (rows, a.shape[-1]))


def _node(op: str, shape: Shape, *args: Expr) -> Expr:
    return Expr(op, args, None, shape)


def _matmul(node: Expr, g: Expr) -> tuple[Expr, Expr]:
    """y = a m:  g mᵀ  and  aᵀ g.  The other way round, y = m a is yᵀ = aᵀ mᵀ."""
    a, m = node.args
    if not isinstance(a.shape[0], Dim):
        return make("T", _outer(make("T", _forward(m)), make("T", g))), make("matmul", make("T", a), g)
    return make("matmul", g, make("T", m)), _outer(_forward(a), g)


def _outer(a: Expr, g: Expr) -> Expr:
    """aᵀ g, summed over all the rows that there are."""
    scalar, rest = scaled(g)
    a, rest = _flat(a), _flat(rest)
    return _times(scalar, _node("outer", (a.shape[-1], rest.shape[-1]), a, rest))


def _times(scalar: Expr | None, product: Expr) -> Expr:
    """The scalar of an activation, if it has one, in front of what comes of it: that is smaller."""
    return product if scalar is None else times(scalar, product)


def _turned(g: Expr) -> Expr:
    """gᵀ; (aᵀ b)ᵀ = bᵀ a."""
    scalar, rest = scaled(g)
    if rest.op != "outer":
        return make("T", g)
    return _times(scalar, _node("outer", rest.shape[::-1], *rest.args[::-1]))


def _mul(node: Expr, g: Expr) -> tuple[Expr, Expr]:
    c, a = node.args
    dots = _node("column_dot", a.shape[-1:], _flat(g), _flat(_forward(a)))
    return make("total", dots), make("mul", c, g)


def _scale(node: Expr, g: Expr) -> tuple[Expr, Expr]:
    a, d = node.args
    return make("scale", g, d), _node("column_dot", d.shape, _flat(g), _flat(_forward(a)))


def _masked(node: Expr, g: Expr) -> tuple[Expr]:
    scalar, rest = scaled(g)
    masked = _node("masked", g.shape, rest, _forward(node.args[1]))
    return (_times(scalar, masked),)


def _blocks(node: Expr, g: Expr) -> tuple[Expr, Expr]:
    a, s = node.args
    scalar, rest = scaled(g)
    return (_times(scalar, make("blocks", rest, make("T", s))),
            _times(scalar, _node("block_dot", s.shape, _flat(_forward(a)), _flat(rest), s)))


def _frozen_back(node: Expr, g: Expr) -> tuple[Expr]:
    return (Expr("frozen", (g,), None, node.args[0].shape),)


def _side_by_side(node: Expr, g: Expr) -> tuple[Expr, Expr]:
    a, b = node.args
    cut, end = a.shape[-1], node.shape[-1]
    return Expr("between", (g,), (0, cut), a.shape), Expr("between", (g,), (cut, end), b.shape)


def _swap(node: Expr, g: Expr) -> tuple[Expr]:
    outer, p, q, inner = node.data
    return (Expr("swap", (g,), (outer, q, p, inner), node.shape),)


def _mix(node: Expr, g: Expr) -> tuple[Expr]:
    return (Expr("mix", (g,), tuple(zip(*node.data)), node.args[0].shape),)


def _circulate(node: Expr, g: Expr) -> tuple[Expr, Expr]:
    a, c = node.args
    return _node("circulate_back", a.shape, g, c), _node("circulate_dot", c.shape, _flat(_forward(a)), _flat(g), c)


def _spectrum(node: Expr, g: Expr) -> tuple[Expr, ...]:
    """For the activations alone: the basis is a constant."""
    return (make("waves", g, node.args[1]),)


def _waves(node: Expr, g: Expr) -> tuple[Expr, ...]:
    return (make("spectrum", g, node.args[1]),)


def _mixed(node: Expr, g: Expr) -> tuple[Expr, Expr]:
    x, k = node.args
    return _node("mixed_back", x.shape, g, k), _node("mixed_dot", k.shape, _forward(x), g)


RULES: dict[str, Callable[[Expr, Expr], tuple[Expr, ...]]] = {
    "add": lambda node, g: (g, g),
    "add_bias": lambda node, g: (g, _node("column_sum", node.args[1].shape, g)),
    "matmul": _matmul,
    "mul": _mul,
    "scale": _scale,
    "blocks": _blocks,
    "swap": _swap,
    "mix": _mix,
    "circulate": _circulate,
    "spectrum": _spectrum,
    "waves": _waves,
    "mixed": _mixed,
    "frozen": lambda node, g: (_node("frozen_back", node.args[0].shape, g),),
    "frozen_back": _frozen_back,
    "masked": _masked,
    "side_by_side": _side_by_side,
    "T": lambda node, g: (_turned(g),),
    "split": lambda node, g: (_node("join", node.args[0].shape, g),),
    "join": lambda node, g: (Expr("split", (g,), node.args[0].shape[-2:], node.args[0].shape),),
}
