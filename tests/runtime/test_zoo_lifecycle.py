"""The zoo through an operated model's life: merged, unmerged, disabled, copied, removed;
shared parameters and layers."""

from __future__ import annotations

from copy import deepcopy
from itertools import product

import pytest
import torch
from case import Parameters
from each import in_turns, of_some
from layers import ALWAYS, IN_TURN, LAYOUTS, Tower, assert_close, gradients, operated, perturb
from torch import nn
from zoo import CASES

from surgery.ir.operations import PRIMITIVES
from surgery.language.library import load, parse
from surgery.runtime.apply import apply

EXACT = 1e-10
WIDE = LAYOUTS["linear 12x18"]
on_every_case = pytest.mark.parametrize("case", CASES, ids=str)


@in_turns(2)
@on_every_case
@of_some("layout", [WIDE], [layout for layout in ALWAYS if layout is not WIDE], IN_TURN)
def test_disabled_merged_and_removed(case, layout):
    """What each puts in place is formula by layout: another one for each, and each with many."""
    op = operated(case, layout)
    before = op.model(op.x)
    with op.surgeon.disabled(), op.surgeon.disabled():
        assert torch.equal(op.model(op.x), op.base(op.x))
    assert torch.equal(op.model(op.x), before) and not torch.equal(before, op.base(op.x))

    op.surgeon.merge()
    assert_close(layout.matrix(op.layer.weight), case.formula(op.weight, op.p), EXACT, "W'")
    if op.bias is not None:
        assert_close(op.layer.bias, case.bias(op.bias, op.p), EXACT, "b'")
    assert_close(op.model(op.x), before, EXACT, "the merged output")

    op.surgeon.remove()
    assert type(op.layer) is type(op.base)
    assert {name: value.tolist() for name, value in op.layer.state_dict().items()} == {
        name: value.tolist() for name, value in op.base.state_dict().items()}
    assert all(p.requires_grad for p in op.model.parameters())
    assert torch.equal(op.model(op.x), op.base(op.x))


@in_turns(3)
@on_every_case
def test_unmerging_restores_every_bit(case):
    op = operated(case, WIDE, torch.bfloat16, adapter=torch.float32)
    before, outputs = bits(op.model), op.model(op.x)
    for _ in range(3):
        op.surgeon.merge()
        assert not torch.equal(op.layer.weight, op.base.weight)
        op.surgeon.unmerge()
    assert all(torch.equal(value, before[name]) for name, value in op.model.state_dict().items())
    assert torch.equal(op.model(op.x), outputs)


@in_turns(3)
@on_every_case
@pytest.mark.parametrize("training", [False, True])
def test_a_batch_of_no_tokens(case, training):
    """What a rank of a distributed run may be given: nothing comes out, and no parameter moves."""
    op = operated(case, WIDE, torch.float32)
    op.model.train(training)
    y = op.model(op.x.flatten(0, -2)[:0].requires_grad_())
    assert y.shape == (0, op.weight.shape[0])
    y.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in op.model.parameters())


def test_no_tokens_through_fourier_transforms():
    """torch has no transform of nothing."""
    model = nn.Sequential(nn.Linear(512, 512))
    apply(model, load("c3a", block=64))
    assert model.eval()(torch.ones(2, 0, 512)).shape == (2, 0, 512)
    a, c = torch.ones(0, 512, requires_grad=True), torch.ones(2, 8, 64, requires_grad=True)
    PRIMITIVES["circulate"].dense(a, c).sum().backward()
    assert a.grad.shape == a.shape and not c.grad.any()


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("merged", [False, True])
def test_an_exception_inside_disabled_leaves_the_mode_as_it_was(merged):
    op = operated(CASES[0], WIDE)
    if merged:
        op.surgeon.merge()
    y = op.model(op.x)
    with pytest.raises(RuntimeError), op.surgeon.disabled():
        assert torch.equal(op.model(op.x), op.base(op.x))
        raise RuntimeError
    assert op.surgeon.merged == merged and torch.equal(op.model(op.x), y)


@in_turns(3)
@on_every_case
def test_a_copy_is_equal_and_independent(case):
    op = operated(case, WIDE)
    before, copy = op.model(op.x), deepcopy(op.model)
    assert torch.equal(copy(op.x), before)
    perturb(copy, seed=9)
    assert torch.equal(op.model(op.x), before) and not torch.equal(copy(op.x), before)
    direction = torch.randn_like(before)
    found = gradients(copy(op.x), direction, dict(copy.named_parameters()))
    assert all(g.norm() > 0 for g in found.values()) and all(p.grad is None for p in op.model.parameters())


@in_turns(3)
@on_every_case
def test_without_dropout_training_and_evaluation_agree(case):
    op = operated(case, WIDE)
    trained = op.model.train()(op.x)
    assert_close(op.model.eval()(op.x), trained, EXACT)


@in_turns(3)
@on_every_case
def test_the_model_keeps_its_class_and_names_and_a_base_checkpoint_loads(case):
    op = operated(case, WIDE)
    assert isinstance(op.layer, nn.Linear) and {"layers.0.weight", "layers.0.bias"} < set(op.model.state_dict())
    y = op.model(op.x)
    with torch.no_grad():
        op.layer.weight.zero_()
    op.model.load_state_dict(Tower(op.base).state_dict())
    assert torch.equal(op.model.get_parameter("layers.0.weight"), op.base.weight) and torch.equal(op.model(op.x), y)


@in_turns(3)
@on_every_case
def test_a_changed_base_layer_is_seen(case):
    """Whatever is kept of the frozen weight and bias, between training steps or in evaluation, it follows them."""
    op = operated(case, WIDE)
    for keeping, name in product((True, False), ("weight", "bias")):
        with torch.set_grad_enabled(not keeping):
            op.model(op.x)
            with torch.no_grad():
                getattr(op.base, name).normal_()
                getattr(op.layer, name).copy_(getattr(op.base, name))
            assert_close(op.model(op.x), op.oracle(op.x, op.leaves()), EXACT)


# ----------------------------------------------------------------------------------------------- several modules


VERA = next(case for case in CASES if case.name == "own vera")


def test_a_shared_parameter_is_one_tensor_for_equal_shapes():
    model = Tower(nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 18)).double()
    surgeon = apply(model, VERA.spec("layers.*"), dtype=torch.float64)
    first, second, other = (surgeon.adapters[f"layers.{i}"].tensors() for i in range(3))
    a, b = "add_own.A", "add_own.b"
    assert first[a] is second[a] and first[b] is not second[b]
    assert other[a] is first[a]  # [2, in] is the same shape there
    assert other["add_own.B"] is not first["add_own.B"]
    assert len(list(model.parameters())) == len(list(model.named_parameters(remove_duplicate=False)))
    assert surgeon.plan.trainable == 12 + 2 + 12 + 2 + 18 + 2


def test_a_shared_parameter_gathers_the_gradients_of_all():
    text = VERA.spec("layers.*").to_surg().replace("frozen shared", "shared")
    model = Tower(nn.Linear(12, 12), nn.Linear(12, 12)).double()
    apply(model, parse(text), dtype=torch.float64)
    perturb(model)
    adapters = [layer.weight_surgery for layer in model.layers]
    leaves = [{k: t.detach().clone().requires_grad_() for k, t in a.tensors().items()} for a in adapters]
    leaves[1].update({k: leaves[0][k] for k in ("add_own.A", "add_own.B")})
    x = torch.randn(5, 12, dtype=torch.float64)
    y = x
    for layer, each in zip(model.layers, leaves):
        weight = VERA.formula(layer.get_parameter("weight").detach(), Parameters.of(each))
        y = y @ weight.T + layer.bias.detach()
    direction = torch.randn_like(y)
    wanted = gradients(y, direction, leaves[0])
    actual = gradients(model(x), direction, adapters[0].tensors())
    for key, gradient in wanted.items():
        assert_close(actual[key], gradient, EXACT, key)


def test_compile_time_layer_and_depth():
    text = """
    transform one_gain() on n { param g = 1  return g * I(n) }
    spec deep()
    target any "layers.*" {
      pre one_gain()
      add low_rank(rank = if depth < 0.5 then 2 else 3 + layer, alpha = 1 + depth)
    }"""
    model = Tower(*(nn.Linear(12, 12) for _ in range(3))).double()
    surgeon = apply(model, parse(text), dtype=torch.float64)
    perturb(model)
    tensors = [surgeon.adapters[f"layers.{i}"].tensors() for i in range(3)]
    assert [t["add_low_rank.A"].shape[0] for t in tensors] == [2, 4, 5]
    x = torch.randn(4, 12, dtype=torch.float64)
    for layer, t, alpha, rank in zip(model.layers, tensors, (1, 1.5, 2), (2, 4, 5)):
        update = alpha / rank * t["add_low_rank.B"] @ t["add_low_rank.A"]
        weight = t["pre_one_gain.g"] * layer.get_parameter("weight") + update
        assert_close(layer(x), x @ weight.T + layer.bias, EXACT)


def test_train_unfreezes_by_name_and_nothing_else():
    model = Tower(nn.Linear(12, 12), nn.LayerNorm(12), nn.Linear(12, 12))
    surgeon = apply(model, parse('spec s()\ntarget linear "layers.0" { add low_rank(2) }\ntrain "layers.1.*"'))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"layers.0.weight_surgery.add_low_rank.A", "layers.0.weight_surgery.add_low_rank.B",
                       "layers.1.weight", "layers.1.bias"}
    assert {id(p) for p in surgeon.parameters()} == {id(p) for n, p in model.named_parameters() if n in trained}
