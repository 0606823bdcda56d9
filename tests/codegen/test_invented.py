"""Variants of a user's own get structured programs, and those are the dense formula."""

from __future__ import annotations

import pytest
import torch
from dense_formula import error, lowered, meant, operated
from each import in_turns, of_some
from formulas import formula
from invented import INVENTED, spec
from watched import ALLOWED, IN, OUT, largest

import surgery
from surgery.codegen.compiled import Compiled
from surgery.layers.kinds import LINEAR
from surgery.planning.check import check
from surgery.planning.cost_estimates import Estimate

on_each = pytest.mark.parametrize("name", INVENTED)


@on_each
def test_it_is_in_order_and_has_a_cheap_program(name):
    assert {d.code for d in check(spec(name))} <= {"unused"}
    estimate = Estimate(Compiled.supposed(formula(spec(name), OUT, IN)))
    assert not estimate.built and estimate.candidates[0].strategy != "built weight"


@in_turns(2)
@on_each
def test_no_large_matrix_is_made(name):
    what, size = largest(spec(name, "0"))
    assert size <= ALLOWED, f"{what} has {size} numbers, and {ALLOWED} are allowed"


@pytest.mark.parametrize("name", ["dora", "pre_diag", "post_diag"])
def test_gains_of_a_vocabulary_are_looked_up(name):
    assert not Estimate(Compiled.supposed(formula(surgery.load(name), 4 * OUT, IN), "embedding")).built


def test_a_rotation_and_its_transpose_are_one_solve():
    found = formula(spec("gains in a turned basis"), OUT, IN)
    assert Compiled(found, LINEAR, True).program().source.count("rotation(") == 1


@pytest.mark.parametrize("case", INVENTED)
@of_some("layer", ["linear 12x18"], ["Conv1D 18x12", "Conv2d 12x18", "Embedding 18x12", "experts 12x18"])
def test_it_is_the_dense_formula(case, layer):
    op = operated(spec(case), layer, torch.float64, torch.float64)
    found, wanted = lowered(op), meant(op, torch.float64, torch.float64)
    for what, value in wanted.items():
        assert error(found[what], value) <= 1e-8, f"{what} is off by {error(found[what], value):.1e}"
    model = op.surgeon.model.eval()
    y = model(op.x)
    op.surgeon.merge()
    assert error(model(op.x), y) <= 1e-8


CANCELLED = """
update own() {
  param Z[out, in] = 0
  param c = 0
  return (Z - 0.5) - (Z + c) + 0.5
}
target "**" { add own() }
"""


@in_turns(2)
@pytest.mark.parametrize("name", [*INVENTED, "terms that cancel"])
def test_so_is_every_program_that_was_found_for_it(name):
    op = operated(spec(name) if name in INVENTED else surgery.parse(CANCELLED), "linear 12x18", torch.float64, torch.float64)
    (adapter,), wanted = op.surgeon.adapters.values(), meant(op, torch.float64, torch.float64)
    best = adapter.programs()[True]
    for program in (best, *best.over):
        adapter.programs()[True] = program
        found = lowered(op)
        for what, value in wanted.items():
            assert error(found[what], value) <= 1e-8, f"{what} by {program.strategy}"
