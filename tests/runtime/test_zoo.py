"""The zoo times the invariants of meaning: an operated layer gives x W'ᵀ + b' for the oracle's W',
values and gradients."""

from __future__ import annotations

from functools import lru_cache

import oracle as o
import pytest
import torch
from case import Case
from each import of_each, of_some
from layers import (
    ALWAYS,
    IN_TURN,
    LAYOUTS,
    OBLONG,
    Layout,
    Operated,
    Tower,
    assert_close,
    assert_starts,
    compare,
    operated,
    perturb,
)
from torch import nn
from zoo import CASES

from surgery.codegen.supposed_device import steps_of
from surgery.ir.dense import dense
from surgery.language.library import load
from surgery.runtime import adapter
from surgery.runtime.apply import apply

EXACT = 1e-10
MANY = Layout("linear 96x144, 100 tokens", lambda: nn.Linear(144, 96), lambda: torch.randn(100, 144))
BY_ROWS = ("lora", "dora", "pissa", "oft", "hra", "vera", "loha", "sora_input")  # W' is made of rows of W alone
on_every_case = pytest.mark.parametrize("case", CASES, ids=str)
on_linears = of_each(layout=OBLONG)


@lru_cache(maxsize=len(LAYOUTS))
def standing(case: Case, layout: Layout) -> Operated:
    """For tests that change nothing of it, which run one after the other for a case. Before its parameters are moved it
    must be the base layer."""
    op = operated(case, layout, noise=0.0)
    assert_starts(op)
    perturb(op.model)
    return op


# A convolution or an embedding: the other one runs with this case in test_zoo_dtypes.py, by the same oracle.
@on_every_case
@of_some("layout", OBLONG, [layout for layout in ALWAYS if layout not in OBLONG], IN_TURN)
def test_the_layer_is_the_oracles_map(case, layout):
    op = standing(case, layout)
    x, leaves = op.input(), op.leaves()
    compare(op, op.oracle(x["x"], leaves), x, leaves)


@on_every_case
@on_linears
def test_the_layer_is_the_dense_formula(case, layout):
    compare_with_dense(standing(case, layout))


def compare_with_dense(op: Operated) -> None:
    x, leaves = op.input(), op.leaves()
    formula = op.adapter.formula
    frozen = {"weight": op.weight, **({"bias": op.bias} if op.bias is not None else {})}
    bias = dense(formula.bias, {**frozen, **leaves}) if op.bias is not None else None
    compare(op, torch.nn.functional.linear(x["x"], dense(formula.weight, {**frozen, **leaves}), bias), x, leaves)


@on_every_case
@on_linears
def test_rows_of_the_weight_are_those_of_all_of_it(case, layout):
    """W' in runs of rows, where a row of it rests on no other row of W."""
    op = standing(case, layout)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        whole, width = op.adapter.weights(op.layer), op.weight.shape[1]
        patch.setattr(adapter, "BLOCK", 3 * width)
        patch.setattr(adapter, "TILE", 1)
        parts = [*op.adapter.weights_by_rows(op.layer)]
    for values, wanted in zip(zip(*(values for _, values in parts), strict=True), whole, strict=True):
        assert_close(torch.cat(values), wanted, EXACT)
    if str(case) in BY_ROWS:
        assert len(parts) == -(-len(op.weight) // 3)


@on_every_case
def test_what_a_gpu_would_run_is_the_dense_formula(case):
    """The programs and the kernels that are chosen for CUDA, which a GPU's numbers make others than a CPU's."""
    with steps_of("cuda"):
        compare_with_dense(standing(case, MANY))


@on_every_case
@on_linears
def test_the_number_of_parameters(case, layout):
    op = standing(case, layout)
    trained = sum(p.numel() for p in op.surgeon.parameters())
    assert trained == case.count(*op.weight.shape) == op.surgeon.plan.trainable


@on_every_case
@on_linears
def test_claims_hold_after_training(case, layout):
    op = standing(case, layout)
    leaves = {"weight": op.weight, **op.leaves()}
    assert len(op.adapter.formula.claims) == case.claims
    for claim in op.adapter.formula.claims:
        assert_close(*PROPERTY[claim.name](dense(claim.expr, leaves)), EXACT, claim.name)


PROPERTY = {
    "orthogonal": lambda t: (o.mul(t, o.t(t)), o.eye(len(t))),
    "diagonal": lambda t: (t, o.diag(t.diagonal())),
    "symmetric": lambda t: (t, o.t(t)),
}


@on_every_case
def test_only_declared_parameters_train_and_all_of_them_do(case):
    op = operated(case, LAYOUTS["linear 12x18"])
    y = op.model(op.x)
    (y * torch.randn_like(y)).sum().backward()  # not ‖y‖², which a rotation leaves alone
    frozen = {leaf.key for leaf in op.adapter.formula.leaves if leaf.frozen}
    for name, parameter in op.model.named_parameters():
        key = name.removeprefix("layers.0.weight_surgery.")
        # what modules share stands at the root, under names of its own
        shared = {s for key, s in op.adapter.shared.items() if key not in frozen}
        is_ours = key != name or name.rpartition("shared_surgery.")[2] in shared
        if not is_ours or key in frozen:
            assert not parameter.requires_grad and parameter.grad is None, name
        else:
            assert parameter.grad.isfinite().all() and parameter.grad.norm() > 1e-6, name


@on_every_case
def test_all_of_the_input_is_seen(case):
    """Inputs of one axis and of several; an empty batch."""
    op = operated(case, LAYOUTS["linear 12x18"])
    batch = torch.randn(2, 1, 3, 18, dtype=torch.float64)
    assert_close(op.model(batch)[1, 0, 2], op.model(batch[1, 0, 2]), EXACT)
    assert op.model(batch[:0]).shape == (0, 1, 3, 12)


def test_three_factors_of_a_butterfly_reach_every_entry():
    """Blocks of 2 with partners 1, 2 and 4 entries away: of 8 entries each is mixed with each."""
    spec = load("boft", block=2, factors=3)
    layer = nn.Linear(8, 8, bias=False).double()
    nn.init.eye_(layer.weight)
    surgeon = apply(Tower(layer), spec.retarget("**"), dtype=torch.float64)
    perturb(surgeon.model)
    surgeon.merge()
    assert layer.weight.abs().min() > 1e-4


def test_what_runs_as_on_a_gpu_is_chosen_by_its_numbers():
    """`bench --count --device cuda` counted the programs that a CPU's numbers choose."""
    op = operated(next(case for case in CASES if case.name == "sora"), MANY)
    with steps_of("cuda"):
        op.model(op.x)
    assert {device for device, _ in op.adapter._programs} == {"cpu", "cuda"}
