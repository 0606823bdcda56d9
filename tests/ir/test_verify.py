"""The verifier between the stages of the compiler, for the zoo and every shipped spec;
and each of its laws can fail."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial

import pytest
from each import in_turns, of_some
from zoo import CASES

from surgery.codegen.compiled import Compiled
from surgery.codegen.program import Program
from surgery.codegen.program_text import step_text
from surgery.diagnostics import Collector
from surgery.ir.builders import fill
from surgery.ir.expression import Draw, Expr, Formula, Leaf, NoiseLaw
from surgery.ir.operations import OPERATIONS, constant, make
from surgery.ir.sizes import TOKENS
from surgery.ir.table import Stage
from surgery.ir.verifier import (
    CHEAPEST,
    ELABORATED,
    LOWERED,
    MATERIALISED,
    SIMPLIFIED,
    STEP,
    Malformed,
    laws,
    verify,
    verify_formula,
)
from surgery.language.library import library, load, shipped
from surgery.language.tree import Spec
from surgery.layers.kinds import CONV, EMBEDDING, LINEAR, LayerKind
from surgery.rewrite.cheaper_forms import cheapest
from surgery.rewrite.normal_form import simplify
from surgery.semantics.elaborate import Context, elaborate
from surgery.semantics.resolved_spec import IN, OUT, PLACES, spec_values

SIZES = ((96, 192), (192, 96), (64, 128), (12, 18))
PLACE = {"layer": 1, "depth": 0.5}
SPECS = {**{f"shipped {name}": partial(load, name) for name in shipped()}, **{case.name: case.spec for case in CASES}}


on_every_spec = pytest.mark.parametrize("case", SPECS)


def formulas(spec: Spec, *sizes: tuple, place: dict = PLACE) -> Iterator[list[Formula]]:
    """Of each target, its formula at each size that fits it."""
    scope, values = library(spec), spec_values(spec, Collector())
    for target in spec.targets:
        found = [elaborate(target, Context(scope, {**values, **place}), out, in_, Collector()) for out, in_ in sizes]
        assert any(found)
        yield list(filter(None, found))


@lru_cache(maxsize=8)
def sized(case: str) -> list[list[Formula]]:
    return list(formulas(SPECS[case](), *SIZES))


@in_turns(3)
@on_every_spec
@of_some("at kind has_bias", [(0, LINEAR, True)], [(at, kind, has_bias) for at in range(len(SIZES))
                                                  for kind in (LINEAR, CONV, EMBEDDING)
                                                  for has_bias in ((False,) if kind.takes_ids else (True, False))][1:])
def test_every_stage_keeps_its_laws(case, at, kind, has_bias):
    """At one of the sizes that fit it: which programs are found hangs on them."""
    for formula in (of_target[at % len(of_target)] for of_target in sized(case)):
        verify_formula(formula)
        for expr in (formula.weight, formula.bias, *(leaf.init for leaf in formula.leaves if leaf.init is not None)):
            verify(simplify(expr), SIMPLIFIED)
            verify(cheapest(expr), CHEAPEST)
        for program in dict.fromkeys(programs(formula, kind, has_bias)):  # one of both, where nothing is dropped
            for expr in program.outputs:
                verify(expr, LOWERED if program.body else MATERIALISED)


def programs(formula: Formula, kind: LayerKind, has_bias: bool) -> Iterator[Program]:
    yield Compiled(formula, LINEAR, has_bias).weights
    for training in (True, False):
        best = Compiled(formula, kind, has_bias).program(training)
        yield from (best, *best.over)


@in_turns(3)
@on_every_spec
def test_symbolic_sizes_keep_the_laws(case):
    for formula, in formulas(SPECS[case](), (OUT, IN), place=PLACES):
        verify_formula(formula)
        verify(simplify(formula.weight), SIMPLIFIED)


@in_turns(3)
@on_every_spec
@of_some("at", [], range(2))
def test_gradients_keep_the_laws(case, at):
    for of_target in formulas(SPECS[case](), (96, 192), (64, 128)):
        formula = of_target[at % len(of_target)]
        plan = Compiled(formula, LINEAR, True).candidates()[0]
        text = step_text(plan.written, plan.needs) if plan.has_body and any(plan.needs) else None
        for expr in (text.body, *filter(None, text.gradients), *text.forwarded) if text is not None else ():
            verify(expr, STEP)


# ------------------------------------------------------------------------------------------------- each law can fail

A, D, G = (Expr("param", (), f"own.{name}", shape) for name, shape in (("A", (6, 6)), ("d", (6,)), ("g", ())))
F = Expr("param", (), "own.F", (6, 4))
X = Expr("x", (), None, (TOKENS, 6))
TWO, MASK = constant(2.0), (0.5, "add_own")
NOISE = NoiseLaw("own.m", Draw("bernoulli", (("p", 0.5),)), 0.5)

MALFORMED: dict[str, tuple[Expr, ...]] = {
    "weight": (Expr("weight", (A,), None, (6, 6)), Expr("weight", (), None, (6,)), Expr("weight", (), "w", (6, 6))),
    "bias": (Expr("bias", (A,), None, (6,)), Expr("bias", (), None, (6, 1))),
    "weight_squares": (Expr("weight_squares", (A,), 1, (6,)), Expr("weight_squares", (), 1, (6, 6)),
                       Expr("weight_squares", (), 2, (6,))),
    "gradient": (Expr("gradient", (A,), None, (6, 4)), Expr("gradient", (), None, (6,))),
    "inputs": (Expr("inputs", (A,), None, (6, 6)), Expr("inputs", (), None, (6, 4))),
    "param": (Expr("param", (A,), "own.A", (6, 6)), Expr("param", (), "A", (6, 6)), Expr("param", (), None, (6, 6))),
    "places": (Expr("places", (A,), "own.at", (6,)), Expr("places", (), "at", (6,))),
    "noise": (Expr("noise", (A,), NOISE, (6, 6)), Expr("noise", (), "own.m", (6,))),
    "einsum": (Expr("einsum", (A, A), ("ij,jk->ik",), (99,)), Expr("einsum", (A, F), ("ij,kj->ik",), (6, 6)),
               Expr("einsum", (A,), ("ij,jk->ik",), (6, 6))),
    "undecided": (Expr("undecided", (), "if out < in then A else B", (6, 6)),),
    "swap": (Expr("swap", (X, X), (1, 2, 3, 1), (TOKENS, 6)), Expr("swap", (X,), (1, 2, 2, 1), (TOKENS, 6))),
    "mix": (Expr("mix", (A, A), ((1,),), (6, 6)), Expr("mix", (A,), ((1, 2), (3, 4)), (2, 6))),
    "const": (Expr("const", (A,), 2.0, ()), Expr("const", (), "2", ()), Expr("const", (), 2.0, (1,)),
              Expr("const", (), True, ())),
    "eye": (Expr("eye", (A,), None, (6, 6)), Expr("eye", (), None, (6, 4)), Expr("eye", (), 1, (6, 6))),
    "fill": (Expr("fill", (A,), 1.0, (6,)), Expr("fill", (), 1, (6,)), Expr("fill", (), 1.0, ())),
    "drop": (Expr("drop", (), MASK, (6, 6)), Expr("drop", (A,), 0.5, (6, 6)),
             Expr("drop", (A,), (1.0, "add_own"), (6, 6)),
             Expr("drop", (A,), MASK, (6, 4)), Expr("drop", (D,), MASK, (6,))),
    "x": (Expr("x", (A,), None, (6, 6)), Expr("x", (), None, (6,))),
    "frozen": (Expr("frozen", (), None, (TOKENS, 4)), Expr("frozen", (X,), None, (4,)),
               Expr("frozen", (X,), "bias", (TOKENS, 4))),
    "frozen_back": (Expr("frozen_back", (X, X), None, (TOKENS, 6)), Expr("frozen_back", (X,), None, (6, 6))),
    "value": (Expr("value", (A,), 0, (6, 6)), Expr("value", (), None, (6, 6))),
    "value_at": (Expr("value_at", (A,), 0, (6,)), Expr("value_at", (), None, (6,))),
    "kept": (Expr("kept", (A,), 0, (6, 6)), Expr("kept", (), None, (6, 6))),
    "grad": (Expr("grad", (A,), None, (6, 6)), Expr("grad", (), 0, (6, 6))),
    "run": (Expr("run", (X,), None, (TOKENS, 6)), Expr("run", (X, F), None, (TOKENS, 6)),
            Expr("run", (X, A), None, (TOKENS, 4))),
    "run_alone": (Expr("run_alone", (X,), None, (TOKENS, 6)), Expr("run_alone", (X, F), None, (TOKENS, 6)),
                  Expr("run_alone", (X, A), None, (TOKENS, 4)), Expr("run_alone", (X, A, A), None, (TOKENS, 6)),
                  Expr("run_alone", (X, A, D, D), None, (TOKENS, 6))),
    "dropout": (Expr("dropout", (), MASK, (TOKENS, 6)), Expr("dropout", (X,), 0.5, (TOKENS, 6)),
                Expr("dropout", (X,), MASK, (TOKENS, 4))),
    "split": (Expr("split", (), (2, 3), (TOKENS, 2, 3)), Expr("split", (X,), (2, 2), (TOKENS, 2, 2)),
              Expr("split", (X,), (2, 3), (TOKENS, 3, 2))),
    "join": (Expr("join", (), (), (TOKENS, 6)), Expr("join", (A,), (), (6,))),
    "gained_back": (Expr("gained_back", (X, D, D), (1.0, True), (TOKENS, 6)),
                    Expr("gained_back", (X, D, X), None, (TOKENS, 6))),
    "add_bias": (Expr("add_bias", (X,), None, (TOKENS, 6)), Expr("add_bias", (X, A), None, (TOKENS, 6))),
    "mul": (make("mul", A, TWO), make("mul", TWO, make("mul", TWO, A))),
    "T": (make("T", make("diag", D)), make("T", make("T", A))),
    "matmul": (make("matmul", make("mul", TWO, A), A), make("matmul", Expr("eye", (), None, (6, 6)), A)),
    "add": (make("add", A, fill(0, (6, 6))),),
}
FORMS: dict[str, Stage] = {"elaborated": ELABORATED, "simplified": SIMPLIFIED, "cheapest": CHEAPEST, "lowered": LOWERED,
                           "materialised": MATERIALISED, "step": STEP}


def malformed(op: str) -> tuple[Expr, ...]:
    """Nodes of the operation that no meaning fits: by its shape rule, and listed ones."""
    if OPERATIONS[op].shape is None or OPERATIONS[op].arity is None:
        return MALFORMED[op]
    arity = OPERATIONS[op].arity
    plain = (Expr(op, (A,) * (arity + 1)), Expr(op, (A,) * arity, None, (99,)), Expr(op, (A,) * arity, 1, (6, 6)))
    return plain + MALFORMED.get(op, ())


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_each_law_refuses_what_breaks_it(form):
    for op, row in OPERATIONS.items():
        if form in row.stage:
            said = {fault(node, form) for node in malformed(op)}
            for law in laws(row, form):
                assert law.says in said, f"nothing breaks {op}: {law.says}"


def fault(node: Expr, form: Stage) -> str:
    """The law that a node breaks, whatever its arguments may be (empty for none)."""
    broken = (law.says for law in laws(OPERATIONS[node.op], form) if not law.holds(node))
    return next(broken, "")


def refuses(expr: Expr, form: Stage, what: str) -> None:
    with pytest.raises(Malformed, match=what):
        verify(expr, form)


def test_an_operation_has_its_place():
    refuses(make("neg", A), SIMPLIFIED, "`neg` has no place")
    refuses(X, ELABORATED, "`x` has no place")
    refuses(make("resolvent", A), SIMPLIFIED, "`resolvent` has no place")
    refuses(Expr("frozen", (A,), None, (6, 6)), MATERIALISED, "`frozen` has no place")


def test_sizes_are_whole_numbers():
    refuses(Expr("param", (), "own.A", (2.0, 0)), ELABORATED, "not a whole number")
    refuses(Expr("param", (), "own.A", (True,)), ELABORATED, "not a whole number")


def test_equal_nodes_are_one_object():
    twin = object.__new__(Expr)
    for name in set(Expr.__slots__) - {"__weakref__"}:
        setattr(twin, name, getattr(A, name))
    refuses(make("neg", twin), ELABORATED, "another node is equal")


def test_a_name_has_one_shape():
    refuses(make("matmul", A, Expr("param", (), "own.A", (6, 4))), ELABORATED, r"own.A is \[6, 6\] and \[6, 4\]")


WEIGHT, BIAS = Expr("weight", (), None, (6, 6)), Expr("bias", (), None, (6,))
LEAF = Leaf("own.A", (6, 6), WEIGHT, None)
FORMULA = Formula(make("matmul", A, WEIGHT), BIAS, (LEAF,))


@pytest.mark.parametrize("formula", [
    replace(FORMULA, leaves=()), replace(FORMULA, leaves=(LEAF, LEAF)),
    replace(FORMULA, leaves=(replace(LEAF, shape=(6, 4)),)),
    replace(FORMULA, leaves=(replace(LEAF, init=None),)),
    replace(FORMULA, leaves=(replace(LEAF, draw=Draw("normal")),)),
    replace(FORMULA, leaves=(replace(LEAF, init=A),)), replace(FORMULA, bias=make("matmul", A, D)),
], ids=["a leaf is missing", "a leaf twice", "another shape", "no start", "two starts", "starts from itself",
        "an unknown one"])
def test_leaves_are_known_and_start_once(formula):
    verify_formula(FORMULA)
    with pytest.raises(Malformed):
        verify_formula(formula)
