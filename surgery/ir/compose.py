"""Several surgeries of one weight as one formula: one after the other, or as a weighted sum.

Takes formulas of the same weight; gives a formula. Promises: its leaves are theirs, each key led by its surgery's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from surgery.ir.expression import Expr, Formula, in_evaluation, rebuild
from surgery.ir.table import constant, make


def _mapped(formula: Formula, change: Callable[[Expr, tuple[Expr, ...]], Expr]) -> Formula:
    # everything that names a leaf must name it by its new key: starts, claims and parts too
    def put(expr: Expr) -> Expr:
        return rebuild(expr, change)

    leaves = tuple(replace(leaf, key=put(leaf.expr).data, init=leaf.init and put(leaf.init)) for leaf in formula.leaves)
    claims = tuple(replace(claim, expr=put(claim.expr)) for claim in formula.claims)
    parts = tuple(replace(part, expr=put(part.expr), operand=put(part.operand)) for part in formula.parts)
    return Formula(put(formula.weight), put(formula.bias), leaves, claims, parts)


def named(formula: Formula, name: str) -> Formula:
    """The formula with each leaf's key led by a name: `style:add_low_rank.A`, and its group, if it is shared. What is
    drawn in training has the name too, since of two surgeries each has noise and dropout of its own."""
    leaves = {leaf.expr for leaf in formula.leaves}

    def change(node: Expr, args: tuple[Expr, ...]) -> Expr:
        if node in leaves:
            return Expr(node.op, (), f"{name}:{node.data}", node.shape)
        if node.op == "noise":
            return Expr("noise", (), replace(node.data, key=f"{name}:{node.data.key}"), node.shape)
        if node.op == "drop":
            share, step = node.data
            return Expr("drop", args, (share, f"{name}:{step}"), node.shape)
        return node.with_args(args)

    renamed = _mapped(formula, change)
    shared = tuple(replace(leaf, group=leaf.group and f"{name}:{leaf.group}") for leaf in renamed.leaves)
    return replace(renamed, leaves=shared)


def stacked(first: Formula, second: Formula) -> Formula:
    """W'' = second(first(W)): what the first makes is the weight that the second acts on.

    Dropout, which belongs to training one surgery, is kept in the second alone.
    """
    weight, bias = in_evaluation(first.weight), in_evaluation(first.bias)
    below_it = {_leaf("weight", first): weight, _leaf("bias", first): bias}
    over = _mapped(second, lambda node, args: below_it.get(node) or node.with_args(args))
    below = tuple(replace(part, expr=in_evaluation(part.expr)) for part in first.parts)
    return Formula(over.weight, over.bias, first.leaves + over.leaves, first.claims + over.claims, below + over.parts)


def mixed(shares: Mapping[Formula, float]) -> Formula:
    """W' = W + Σ share · Δ of formulas that only add to the weight and to the bias."""
    (first, *_), parts = shares, [(share, part) for formula, share in shares.items() for part in formula.parts]
    sums = {1: _leaf("bias", first), 2: _leaf("weight", first)}  # by rank: what is added to a bias is a vector
    composed = []
    for share, part in parts:
        update = part.expr if share == 1 else make("mul", constant(float(share)), part.expr)
        sums[len(update.shape)] = make("add", sums[len(update.shape)], update)
        composed.append(replace(part, expr=update))
    return Formula(sums[2], sums[1], tuple(leaf for formula in shares for leaf in formula.leaves),
                   tuple(claim for formula in shares for claim in formula.claims), tuple(composed))


def _leaf(op: str, formula: Formula) -> Expr:
    shape = formula.weight.shape
    return Expr(op, (), None, shape if op == "weight" else shape[:1])
