"""Every row of the rewriting tables against the dense meaning: it fires on its example, and what it gives is equal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import combinations_with_replacement, permutations, product

import pytest
import torch
from operands import MIXED, NAMES, every_call, expression, tensors, value_and_gradients

from surgery.ir.dense import dense
from surgery.ir.expression import Expr, substituted, walk
from surgery.ir.operations import constant, make
from surgery.rewrite.cheaper_forms import CHEAP, JOINED, cheapest
from surgery.rewrite.engine import Rule, rewrite, table
from surgery.rewrite.normal_form import RULES, simplify
from surgery.rewrite.prove_identity import IN_VALUE

EXACT = 1e-10
NAMED = {"the normal form": RULES, "joined forms": JOINED, "cheap forms": CHEAP, "in value": IN_VALUE}
ROWS = [pytest.param(rule, id=f"{name}: {rule.op}: {rule.states}") for name, rows in NAMED.items() for rule in rows]
Firing = tuple[Rule, Expr, Expr]


def firings(expr: Expr, rules: Iterable[Rule]) -> list[Firing]:
    """Each change that a rule makes while an expression is rewritten: the rule, the node before and after."""
    seen: list[Firing] = []

    def watched(rule: Rule) -> Rule:
        def change(node: Expr) -> Expr | None:
            better = rule.change(node)
            if better is not None and better is not node:
                seen.append((rule, node, better))
            return better

        return replace(rule, change=change)

    rewrite(expr, table(*map(watched, rules)))
    return seen


FORMS = (simplify, cheapest)


def agree(before: Expr, *forms: Expr, only_in_value: bool = False) -> bool:
    """Equal shapes, values and gradients on random operands and on special ones, wherever they are finite (whether they
    are somewhere)."""
    assert all(after.shape == before.shape for after in forms)
    points = [(leaves, value_and_gradients(before, leaves))
              for leaves in (tensors(0), tensors(1), tensors(2, alike=True))]
    finite = [(leaves, wanted) for leaves, wanted in points if all(value.isfinite().all() for value in wanted.values())]
    others = dict.fromkeys(after for after in forms if after is not before)  # what is the same node has the same value
    for after, (leaves, wanted) in product(others, finite):
        found = value_and_gradients(after, leaves)
        for what in ["the value"] if only_in_value else wanted:
            error = (found[what] - wanted[what]).norm() / (1 + wanted[what].norm())
            assert error <= EXACT, f"{what} of {after} for {before} is off by {error:.1e}"
    return bool(finite)


@pytest.mark.parametrize("rule", ROWS)
def test_a_rule_holds_on_its_example(rule):
    in_value = rule in IN_VALUE
    rows = next((*RULES, *more) for more in (IN_VALUE, JOINED, CHEAP, ()) if rule in more or not more)
    fired = [(before, after) for r, before, after in firings(expression(rule.example), rows)
             if (r.op, r.states) == (rule.op, rule.states)]
    assert fired, f"`{rule.example}` is no example of {rule.states}"
    for before, after in fired:
        assert before.op == rule.op
        assert agree(before, after, only_in_value=in_value)


@pytest.mark.parametrize("part", range(3))
def test_formulas_keep_their_meaning_as_a_whole(part):
    for text in (*MIXED, *(rule.example for rule in (*RULES, *JOINED, *CHEAP)))[part::3]:
        formula = expression(text)
        assert agree(formula, *(form(formula) for form in FORMS)), text


def varied(text: str) -> Iterator[Expr]:
    """A formula with each of its operands scaled by a number and by a trained one, and made a sum; with all of them
    scaled and negated, each by its own number; and itself scaled. What a rule does with a scalar or a sum in front of
    an operand is not seen on the operand alone."""
    expr = expression(text)
    found = [node for node in walk(expr) if node.op == "param"]
    scalar, others = NAMES["h"], {a: b for a, b in zip("ABFPQpqdeSZKghG", "BAFQPqpedZSKhgG")}

    def put(table: dict[Expr, Expr]) -> Expr:
        return substituted(expr, table)

    for node in found:
        other = NAMES[others.get(node.data.removeprefix("own."), node.data.removeprefix("own."))]
        yield from (put({node: new}) for new in (make("mul", constant(3.0), node), make("mul", scalar, node),
                                                 make("add", node, other)))
    yield put({node: make("neg", make("mul", constant(2.0 + i), node)) for i, node in enumerate(found)})
    yield make("div", expr, constant(-2.0))


VARIED = [*dict.fromkeys([*(rule.example for rows in (RULES, JOINED, CHEAP) for rule in rows), *MIXED])]


@pytest.mark.parametrize("part", range(6))
def test_rules_hold_whatever_stands_in_front_of_an_operand(part):
    leaves = tensors(0)
    for text in VARIED[part::6]:
        for before in varied(text):
            if (after := cheapest(before)) is before:
                continue
            wanted, found = (value_and_gradients(e, leaves) for e in (before, after))
            for what, value in wanted.items():
                error = (found[what] - value).norm() / (1 + value.norm())
                assert error <= 1e-9 or not value.isfinite().all(), f"{what} of {text}, as {before}: off by {error:.1e}"


SPLITS = (  # twelve rows and twelve columns, each in another way
    "kron(P, ones(1, 6))", "kron(ones(1, 6), Q)", "kron(ones(12, 1), p.T)", "kron(columns(A, 3).T, ones(4, 1))",
    "block_diag(S)", "block_diag(reshape(d, n, 1, 1))", "kron(I(n), reshape(g, 1, 1))",
    "block_diag(reshape(P, 2, 6, 2)) @ block_diag(reshape(q, 4, 1, 3))",
    "block_diag(reshape(Q, 2, 6, 2)) @ block_diag(reshape(P, 2, 2, 6))",
)


def test_rules_do_not_take_one_split_of_a_matrix_for_another():
    for (a, b), sign in product(combinations_with_replacement(SPLITS, 2), "*@+"):
        before = expression(f"diag(row_norm(({a}) {sign} ({b})))")
        assert agree(before, cheapest(before)), before


def test_every_primitive_keeps_its_meaning_on_all_that_it_takes():
    compared = {call.op for call in every_call() if agree(call, *(form(call) for form in FORMS))}
    assert compared == {call.op for call in every_call()}


def test_every_primitive_keeps_its_meaning_when_it_is_turned():
    turned = [make("T", call) for call in every_call() if len(call.shape) > 1]
    assert {node.args[0].op for node in turned} > {"shuffle", "literal", "kron", "skew"}
    leaves = tensors(0)
    for node in turned:
        wanted, found = (dense(e, leaves) for e in (node, simplify(node)))
        assert torch.allclose(found, wanted, rtol=EXACT, atol=EXACT, equal_nan=True), node


def test_three_factors_are_multiplied_in_the_cheaper_order():
    for m, k, j, n in permutations((2, 3, 5, 40)):
        a, b, c = (Expr("param", (), f"own.{key}", shape) for key, shape in {"a": (m, k), "b": (k, j), "c": (j, n)}.items())
        left, right = make("matmul", make("matmul", a, b), c), make("matmul", a, make("matmul", b, c))
        best = left if m * k * j + m * j * n < k * j * n + m * k * n else right
        assert cheapest(left) is best and cheapest(right) is best, (m, k, j, n)
