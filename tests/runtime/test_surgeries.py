"""Several named surgeries of one model: switched, stacked in an order, mixed, merged, saved."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from layers import assert_close, perturb
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint

import surgery
from surgery.diagnostics import SurgeryError

EXACT = 1e-10
OUT, IN = 12, 18
TURN = 'spec turn()\ntarget linear "0" { pre block_orthogonal(block = 3) on in }'
TURN_WIDE = 'spec turn_wide()\ntarget linear "0" { pre block_orthogonal(block = 9) on in }'
LORA = 'spec lora()\ntarget linear "**" { add low_rank(rank = 2, alpha = 4) }'
SHIFTED = 'spec shifted()\ntarget linear "0" { add low_rank(rank = 3)  add shift() }'
DORA = 'spec dora()\ntarget linear "**" { add low_rank(rank = 2) dropout(10%)  post magnitude() }'
TRAINED = 'spec trained()\ntarget linear "0" { add low_rank(rank = 2) }\ntrain "1.bias"'


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, OUT), nn.Linear(OUT, 6)).double().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, IN, dtype=torch.float64)


def with_all(model: nn.Module, **texts: str) -> surgery.Surgeries:
    """Surgeries of a model, with parameters away from their starts."""
    surgeries = surgery.Surgeries(model)
    for seed, (name, text) in enumerate(texts.items()):
        surgeries.add(name, surgery.parse(text), dtype=torch.float64)
        surgeries.use(name)
        perturb(model, seed=seed)
        for parameter in surgeries._known[name].trained:
            model.get_parameter(parameter).data += 0.5
    surgeries.use()
    return surgeries


def alone(model: nn.Module, text: str, seed: int) -> Tensor:
    """The first layer's W' of one surgery by itself, on any base."""
    surgery.apply(model, surgery.parse(text), dtype=torch.float64)
    perturb(model, seed=seed)
    return model[0].weight_surgery.weights(model[0])[0].detach()


def test_switching(model, x):
    base = model(x)
    expected = {name: alone(deepcopy(model), text, i) for i, (name, text) in enumerate({"a": TURN, "b": LORA}.items())}
    surgeries = with_all(model, a=TURN, b=LORA)
    assert torch.equal(model(x), base)
    for name in ("b", "a", "b"):
        surgeries.use(name)
        assert surgeries.active == (name,)
        assert_close(model[0].weight_surgery.weights(model[0])[0], expected[name], EXACT)
    surgeries.use()
    assert torch.equal(model(x), base) and surgeries.surgeon is None


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a"), ("a", "c", "b"), ("c", "a")])
def test_a_stack_acts_in_its_order_and_merges_in_it(model, x, order):
    """Rotations that do not commute; DoRA's norm is that of what it is placed on."""
    texts = {"a": TURN, "b": TURN_WIDE, "c": DORA}
    weight = model[0].weight.detach().clone()
    surgeries = with_all(model, **texts)
    for name in order:
        layer = nn.Sequential(deepcopy(model[0]))
        layer[0].weight.data.copy_(weight)
        single = surgery.Surgeries(layer)
        single.add(name, surgery.parse(texts[name]), dtype=torch.float64)
        tensors = surgeries._known[name].surgeon.adapters["0"].tensors()
        for key, tensor in single._known[name].surgeon.adapters["0"].tensors().items():
            tensor_of = tensors[key]
            tensor.data.copy_(tensor_of.data)
        single.use(name)
        weight = layer[0].weight_surgery.weights(layer[0])[0].detach()
    surgeries.use(*order)
    assert_close(model[0].weight_surgery.weights(model[0])[0], weight, EXACT)
    y = model(x)
    surgeries.surgeon.merge()
    assert_close(model[0].weight, weight, EXACT)
    assert_close(model(x), y, EXACT)
    surgeries.surgeon.unmerge()
    assert torch.equal(model(x), y)


def test_the_order_counts(model, x):
    surgeries = with_all(model, a=TURN, b=TURN_WIDE)
    surgeries.use("a", "b")
    y = model(x)
    surgeries.use("b", "a")
    assert (model(x) - y).norm() > 0.1 * y.norm()


def test_training_a_stack_trains_the_named_tensors(model, x):
    surgeries = with_all(model, a=TURN, c=DORA)
    surgeries.use("a", "c")
    model.train()
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in surgeries.surgeon.parameters())
    q = surgeries._known["a"].surgeon.adapters["0"].tensors()["pre_block_orthogonal.Q"]
    assert q.grad is not None and q is model[0].weight_surgery.tensors()["a:pre_block_orthogonal.Q"]


@pytest.mark.parametrize("share", [float("nan"), float("inf"), "half"])
def test_a_share_is_a_finite_number(model, share):
    surgeries = surgery.Surgeries(model)
    surgeries.add("one", "lora")
    with pytest.raises(surgery.SurgeryError, match="the share of `one` must be a finite number"):
        surgeries.mix({"one": share})


def test_a_mix_is_a_weighted_sum(model, x):
    surgeries = with_all(model, b=LORA, d=SHIFTED)
    weight, bias, made = model[0].weight.detach().clone(), model[0].bias.detach().clone(), {}
    for name in ("b", "d"):
        surgeries.use(name)
        made[name] = [t.detach() for t in model[0].weight_surgery.weights(model[0])]
    surgeries.mix({"b": 0.25, "d": -2.0})
    for i, base in enumerate((weight, bias)):
        wanted = base + 0.25 * (made["b"][i] - base) - 2 * (made["d"][i] - base)
        assert_close(model[0].weight_surgery.weights(model[0])[i], wanted, EXACT)
    y = model(x)
    surgeries.surgeon.merge()
    assert_close(model(x), y, EXACT)
    with pytest.raises(SurgeryError, match="does more than add"):
        with_all(nn.Sequential(nn.Linear(IN, OUT)), a=TURN).mix({"a": 0.5})


def test_each_of_a_mix_drops_entries_of_its_own():
    """Two equal updates of opposite signs: by one mask they would cancel."""
    model = nn.Sequential(nn.Linear(IN, OUT)).double()
    surgeries = with_all(model, **dict.fromkeys("ab", 'spec s()\ntarget linear "**" { add low_rank(2) dropout(50%) }'))
    one, other = (surgeries._known[name].surgeon.adapters["0"].tensors() for name in "ab")
    with torch.no_grad():
        for key, tensor in one.items():
            other[key].copy_(tensor)
    surgeries.mix({"a": 1.0, "b": -1.0})
    x = torch.randn(5, IN, dtype=torch.float64)
    frozen = nn.functional.linear(x, model[0].get_parameter("weight"), model[0].bias)
    assert_close(model.eval()(x), frozen, EXACT)
    assert (model.train()(x) - frozen).abs().max() > 1e-3


def test_each_is_saved_and_attached_by_itself(model, x, tmp_path: Path):
    base = deepcopy(model)
    surgeries = with_all(model, a=TURN, e=TRAINED)
    surgeries.use("e")
    y = model(x)
    surgeries.use("a", "e")
    surgeries.save("e", tmp_path / "e")
    assert surgeries.active == ("a", "e")
    fresh = deepcopy(base)
    surgery.attach(fresh, tmp_path / "e")
    assert_close(fresh(x), y, EXACT)
    again = surgery.Surgeries(deepcopy(base))
    again.add("saved", tmp_path / "e")
    again.use("saved")
    assert_close(again.model(x), y, EXACT)


def test_what_was_trained_of_the_model_goes_and_comes_with_its_surgery(model):
    start = model[1].bias.detach().clone()
    surgeries = with_all(model, e=TRAINED, a=TURN)
    assert torch.equal(model[1].bias, start)
    surgeries.use("a", "e")
    assert torch.equal(model[1].bias, start + 0.5)
    surgeries.use("a")
    assert torch.equal(model[1].bias, start)
    surgeries.add("f", surgery.parse(TRAINED))
    with pytest.raises(SurgeryError, match="both train 1.bias"):
        surgeries.use("e", "f")
    assert surgeries.active == ("a",)


def test_remove_gives_the_model_back(model, x):
    base, kind = model(x), type(model[0])
    surgeries = with_all(model, a=TURN, b=LORA)
    surgeries.use("a", "b")
    assert surgeries.remove() is model
    assert type(model[0]) is kind and torch.equal(model(x), base) and not surgeries.names


@pytest.mark.parametrize("wrong, message", [
    (lambda s: s.use("aa"), "did you mean `a`"), (lambda s: s.use("a", "a"), "named twice"),
    (lambda s: s.add("a", "lora"), "`a` is taken"), (lambda s: s.add("a b", "lora"), "not a name"),
    (lambda s: s.add("c", surgery.parse('spec c()\ntarget linear "q" { add low_rank() }')), "matches no"),
])
def test_a_mistake_leaves_things_as_they_were(model, x, wrong, message):
    surgeries = with_all(model, a=TURN, b=LORA)
    surgeries.use("a")
    y = model(x)
    with pytest.raises(SurgeryError, match=message):
        wrong(surgeries)
    assert surgeries.names == ("a", "b") and surgeries.active == ("a",)
    assert_close(model(x), y, EXACT)


def test_the_command_line_merges_a_stack(tmp_path: Path):
    from click.testing import CliRunner

    from surgery.cli.main import main
    from surgery.models.demo import demo_inputs, load_demo

    surgeries = surgery.Surgeries(load_demo("llama"))
    for name, spec in (("a", "oft"), ("b", "sora")):
        surgeries.add(name, surgery.load(spec).retarget("**.q_proj"))
        surgeries.use(name)
        perturb(surgeries.model)
        surgeries.save(name, tmp_path / name, base_model="demo:llama")
    surgeries.use("b", "a")
    y = surgeries.model(**demo_inputs("llama")).logits
    with pytest.raises(SurgeryError, match=r"surgeries\.save\(name, folder\) writes each"):
        surgeries.model.save_pretrained(tmp_path / "both")  # which no one spec says
    told = CliRunner().invoke(main, ["merge", str(tmp_path / "b"), "--then", str(tmp_path / "a"), "-o",
                                     str(tmp_path / "out")])
    assert told.exit_code == 0, told.output
    merged = type(surgeries.model).from_pretrained(tmp_path / "out")
    assert_close(merged(**demo_inputs("llama")).logits, y, 1e-5)


LAYERS = {"linear": (lambda: nn.Linear(IN, OUT), lambda: torch.randn(5, IN, dtype=torch.float64)),
          "conv": (lambda: nn.Conv2d(4, 6, 3), lambda: torch.randn(2, 4, 5, 5, dtype=torch.float64)),
          "embedding": (lambda: nn.Embedding(IN, OUT), lambda: torch.randint(IN, (2, 5)))}
SWITCHES = {"another": (lambda s: s.use("a"), lambda s: s.use("b")),
            "the other order": (lambda s: s.use("a", "b"), lambda s: s.use("b", "a")),
            "another share": (lambda s: s.mix({"a": 0.5}), lambda s: s.mix({"a": 0.7})),
            "mixed": (lambda s: s.use("a"), lambda s: s.mix({"a": 0.5}))}


class Checkpointed(nn.Module):
    """A layer that runs again in the backward pass, between others that do not."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.scale = layer, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale if x.is_floating_point() else x
        return checkpoint(self.layer, x, use_reentrant=False) * self.scale


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("kind, trains", [  # ids take no gradient: an embedding has one by what trains alone
    ("linear", True), ("linear", False), ("conv", True), ("conv", False), ("embedding", True)])
def test_a_checkpoint_refuses_gradients_of_surgeries_that_were_switched(kind, switch, trains):
    """What runs again in the backward pass is what is in use then; back in use, it has the gradients of one pass."""
    torch.manual_seed(0)
    build, inputs = LAYERS[kind]
    model, x = Checkpointed(build().double()).train(), inputs()
    lora = f'spec lora()\ntarget {kind} "layer" {{ add low_rank(rank = 2) }}'
    surgeries, (first, second) = with_all(model, a=lora, b=lora), SWITCHES[switch]
    for name in "ab":
        surgeries.use(name)
        for parameter in surgeries.surgeon.parameters():
            parameter.requires_grad_(trains)
    first(surgeries)
    trained = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(model(x).square().sum(), trained)
    y = model(x)
    second(surgeries)
    with pytest.raises(CheckpointError):
        y.square().sum().backward()
    first(surgeries)
    y = model(x)
    second(surgeries), first(surgeries)
    for found, gradient in zip(torch.autograd.grad(y.square().sum(), trained), wanted):
        assert_close(found, gradient, EXACT)
