"""A proof, by algebra alone, that a formula starts as the frozen weight:
every start is put in and W' comes out as W."""

from __future__ import annotations

from functools import lru_cache

from surgery.ir.builders import fill, value_of
from surgery.ir.expression import Expr, Formula, rebuild, walk
from surgery.ir.operations import operation
from surgery.ir.table import Linear, Orthogonal
from surgery.rewrite.engine import Rule, Table, rewrite, table
from surgery.rewrite.normal_form import RULES


def _one(quotient: Expr) -> Expr | None:
    """Only of a norm of the frozen weight itself: what trains may start at 0, and 0 / 0 is 0."""
    above, below = quotient.args
    is_norm = above is below and above.op in ("norm", "row_norm", "col_norm")
    is_of_weight = is_norm and all(node.op in ("weight", "T", "neg") for node in walk(above.args[0]))
    return fill(1, quotient.shape) if is_of_weight else None


_DETACH = Rule("detach(x) = x, in value", "detach", lambda n: n.args[0], "detach(A)")
_SAME = Rule("|W| / |W| = 1 where no norm of W is 0", "div", _one, "row_norm(W) / row_norm(W)")
# Rows that say nothing of gradients, which a start does not need.
IN_VALUE = (_DETACH, _SAME)
_OF_GRADIENTS, _STRICT, _GENERIC = table(*RULES), table(*RULES, _DETACH), table(*RULES, *IN_VALUE)
_EXACT = table(*(rule for rule in RULES if not rule.rounds), _DETACH)
_DROPS = table(*(rule for rule in RULES if rule.drops), _DETACH)


@lru_cache(maxsize=1024)
def starts_as_weight(formula: Formula, generic: bool = True) -> bool:
    """Whether W' = W and b' = b follow from the leaves' starts. `generic` supposes that no norm of the weight is zero.

    False means not proven, which is not a proof of the contrary.
    """
    return _comes_out(formula, _starts(formula), _GENERIC if generic else _STRICT)


@lru_cache(maxsize=1024)
def starts_bit_for_bit(formula: Formula) -> bool:
    """The same of floating point, where all that is read is finite: it follows from parameters that start at numbers,
    whatever the others are, and from no rule that rounding would break."""
    numbers = {key: start for key, start in _starts(formula).items() if value_of(start) is not None}
    return _comes_out(formula, numbers, _EXACT)


def _comes_out(formula: Formula, starts: dict[str, Expr], rules: Table) -> bool:
    weight, bias = (rewrite(_put(e, starts), rules) for e in (formula.weight, formula.bias))
    return weight.op == "weight" and bias.op == "bias"


@lru_cache(maxsize=1024)
def surely_trains(formula: Formula) -> bool:
    """Whether W' or b' is linear in a parameter where the others start, with a factor that is not zero, so that it has
    a gradient there. False means not proven."""
    starts = _starts(formula)
    for leaf in formula.leaves:
        free = Expr("param", (), f"{leaf.key}*", leaf.shape)
        for expr in () if leaf.frozen else (formula.weight, formula.bias):
            if _is_linear(rewrite(_put(expr, {**starts, leaf.key: free}), _OF_GRADIENTS), free):
                return True  # one is enough: the others move once it does
    return False


def _starts(formula: Formula) -> dict[str, Expr]:
    """What the leaves start at, by key, where an expression says it: of W, of b, and of nothing else."""
    starts: dict[str, Expr] = {}
    for leaf in formula.leaves:
        if leaf.init is not None:
            value = value_of(leaf.init)
            starts[leaf.key] = fill(value, leaf.shape) if value is not None else _put(leaf.init, starts)
    return starts


@lru_cache(maxsize=1024)
def without_known(expr: Expr, known: frozenset[tuple[str, Expr]]) -> Expr:
    """`expr` without the work that the parameters of `known` values make needless: of what is finite it has the same
    numbers, to the bit."""
    return rewrite(_put(expr, dict(known)), _DROPS)


def _is_linear(expr: Expr, free: Expr) -> bool:
    """True if `expr` is to first order linear in `free` at 0, and not constant: only linear operations lead there, with
    one argument that holds it where they are linear in each argument by itself, and maps that begin as I + a."""
    holding, alone = {free}, {free}  # alone: nothing is added to what holds it, so that it is 0 at 0
    for node in walk(expr):
        if holders := [a for a in node.args if a in holding]:
            row = operation(node)
            is_map = row.orthogonal is Orthogonal.OF_SKEW and node.args[0] in alone
            is_linear = row.linear is Linear.TOGETHER or row.linear is Linear.EACH and len(holders) == 1
            is_zero = node.op == "skew" and node.shape[-1] == 1  # a - aᵀ of one entry
            if row.stops_gradient or is_zero or not (is_map or is_linear):
                return False
            holding.add(node)
            others = [a for a in node.args if a not in alone] if row.linear is Linear.TOGETHER else []
            if not is_map and not others and all(a in alone for a in holders):
                alone.add(node)
    return expr in holding


def _put(expr: Expr, starts: dict[str, Expr]) -> Expr:
    def change(node: Expr, args: tuple[Expr, ...]) -> Expr:
        if node.op == "param" and node.data in starts:
            return starts[node.data]
        return node.with_args(args)

    return rebuild(expr, change)
