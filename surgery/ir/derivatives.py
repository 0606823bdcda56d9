"""Derivatives of operations on activations, as rows of the table have them: reverse differentiation, an identity each.

A rule takes a node and g, the gradient of it; it gives a term for each argument that may take a gradient. What a term
needs of the forward pass stands in it as `forward(...)`, opaque, so that no rule of rewriting computes it in another
way (`codegen.gradients` decides what of it is kept, and what is made again).
"""

from __future__ import annotations

from surgery.ir.builders import scaled, times
from surgery.ir.expression import Expr
from surgery.ir.sizes import Dim
from surgery.ir.table import make, operation

Terms = tuple[Expr, ...]


def forward(node: Expr) -> Expr:
    """A value of the forward pass in a gradient; a leaf of a step is there in both passes."""
    return node if operation(node).is_leaf else Expr("forward", (), node, node.shape)


def _flat(a: Expr) -> Expr:
    """Activations of any rank as a matrix."""
    return a if len(a.shape) == 2 else make("flat", a)


def _outer(a: Expr, g: Expr) -> Expr:
    """aᵀ g, summed over all the rows that there are."""
    scalar, rest = scaled(g)
    return _times(scalar, make("outer", _flat(a), _flat(rest)))


def _times(scalar: Expr | None, product: Expr) -> Expr:
    """The scalar of an activation, if it has one, in front of what comes of it: that is smaller."""
    return product if scalar is None else times(scalar, product)


# ------------------------------------------------------------------------------------------------------ the rules


def add(node: Expr, g: Expr) -> Terms:
    return g, g


def add_bias(node: Expr, g: Expr) -> Terms:
    return g, make("column_sum", g)


def matmul(node: Expr, g: Expr) -> Terms:
    """y = a m:  g mᵀ  and  aᵀ g.  The other way round, y = m a is yᵀ = aᵀ mᵀ."""
    a, m = node.args
    if not isinstance(a.shape[0], Dim):  # the activation is the factor whose rows are tokens
        return make("T", _outer(make("T", forward(m)), make("T", g))), make("matmul", make("T", a), g)
    return make("matmul", g, make("T", m)), _outer(forward(a), g)


def turned(node: Expr, g: Expr) -> Terms:
    """gᵀ; (aᵀ b)ᵀ = bᵀ a."""
    scalar, rest = scaled(g)
    return (_times(scalar, make("outer", *rest.args[::-1])) if rest.op == "outer" else make("T", g),)


def mul(node: Expr, g: Expr) -> Terms:
    c, a = node.args
    if c.shape:
        return make("mul", g, forward(a)), make("mul", forward(c), g)
    return make("dot", _flat(g), _flat(forward(a))), make("mul", c, g)


def scale(node: Expr, g: Expr) -> Terms:
    a, d = node.args
    return make("scale", g, d), make("column_dot", _flat(g), _flat(forward(a)))


def gained(node: Expr, g: Expr) -> Terms:
    """Of d (y + c h m), or of d y + c h m."""
    (y, d, h, m), (factor, inside) = node.args, node.data
    led = make("scale", g, d) if inside else g
    of_gain = make("gained_dot", g, *map(forward, (y, h, m)), data=(factor,)) if inside else make(
        "column_dot", g, forward(y))
    return (make("scale", g, d), of_gain, times(factor, make("matmul", led, make("T", m))),
            times(factor, make("outer", forward(h), led)))


def masked(node: Expr, g: Expr) -> Terms:
    scalar, rest = scaled(g)
    return (_times(scalar, make("masked", rest, forward(node.args[1]))),)


def blocks(node: Expr, g: Expr) -> Terms:
    a, s = node.args
    scalar, rest = scaled(g)
    return (_times(scalar, make("blocks", rest, make("T", s))),
            _times(scalar, make("block_dot", _flat(forward(a)), _flat(rest), s)))


def frozen(node: Expr, g: Expr) -> Terms:
    return (Expr("frozen_back", (g,), None, node.args[0].shape),)


def frozen_back(node: Expr, g: Expr) -> Terms:
    return (Expr("frozen", (g,), None, node.args[0].shape),)


def side_by_side(node: Expr, g: Expr) -> Terms:
    cut, end = node.args[0].shape[-1], node.shape[-1]
    return make("between", g, data=(0, cut)), make("between", g, data=(cut, end))


def between(node: Expr, g: Expr) -> Terms:
    return (make("placed", g, make("range", data=node.data), data=node.args[0].shape[-1:]),)


def columns(node: Expr, g: Expr) -> Terms:
    """Each column's gradient goes back to its place; places take none."""
    a, places = node.args
    return (make("placed", g, places, data=a.shape[-1:]),)


def placed(node: Expr, g: Expr) -> Terms:
    return (make("columns", g, node.args[1]),)


def split(node: Expr, g: Expr) -> Terms:
    return (make("join", g),)


def join(node: Expr, g: Expr) -> Terms:
    return (make("split", g, data=node.args[0].shape[-2:]),)


def swap(node: Expr, g: Expr) -> Terms:
    outer, p, q, inner = node.data
    return (make("swap", g, data=(outer, q, p, inner)),)


def mix(node: Expr, g: Expr) -> Terms:
    return (make("mix", g, data=tuple(zip(*node.data))),)


def circulate(node: Expr, g: Expr) -> Terms:
    a, c = node.args
    return make("circulate_back", g, c), make("circulate_dot", _flat(forward(a)), _flat(g), c)


def spectrum(node: Expr, g: Expr) -> Terms:
    """For the activations alone: the basis is a constant."""
    return (make("waves", g, node.args[1]),)


def waves(node: Expr, g: Expr) -> Terms:
    return (make("spectrum", g, node.args[1]),)


def mixed(node: Expr, g: Expr) -> Terms:
    x, k = node.args
    return make("mixed_back", g, k), make("mixed_dot", forward(x), g)
