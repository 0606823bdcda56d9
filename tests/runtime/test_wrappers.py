"""What torch.compile, DataParallel and DistributedDataParallel put around a model is seen through."""

from __future__ import annotations

import pytest
import torch
from models import perturbed
from torch import distributed, nn

import surgery
from surgery.models.demo import demo_inputs, load_demo


class Holder(nn.Module):
    """A plain module of a user's that holds the model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.held = model
        self.value = nn.Linear(64, 1)

    def forward(self, **batch: torch.Tensor):
        return self.held(**batch)


@pytest.fixture
def group(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def inner(model: nn.Module) -> nn.Module:
    """Each layer compiled by itself."""
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    for i, layer in enumerate(layers):
        layers[i] = compiled(layer)
    return model


WRAPPERS = {"compiled": compiled, "parallel": nn.DataParallel, "distributed": nn.parallel.DistributedDataParallel,
            "twice": lambda model: nn.DataParallel(compiled(model)),
            "the other way": lambda model: compiled(nn.DataParallel(model)), "inner": inner}
SMALL = "llama:num_hidden_layers=1"
OTHERS = ("bert:num_hidden_layers=1", "gpt2:n_layer=1", "t5:num_layers=1,num_decoder_layers=1",
          "mixtral:num_hidden_layers=1")


@pytest.mark.parametrize("wrapper, family", [
    *((wrapper, SMALL) for wrapper in WRAPPERS),
    *(("compiled", family) for family in OTHERS), ("distributed", OTHERS[2])])
def test_a_wrapper_is_seen_through(wrapper, family, group, tmp_path):
    model, wanted = load_demo(family), surgery.plan(load_demo(family), "lora")
    wrapped = WRAPPERS[wrapper](model)
    surgeon = perturbed(wrapped, "lora")
    assert [p.site.name for p in surgeon.plan.placed] == [p.site.name for p in wanted.placed]
    assert {left.name for left in surgeon.plan.selection.left_out} == {x.name for x in wanted.selection.left_out}
    surgeon.save(tmp_path / "saved")
    other = load_demo(family)
    attached = surgery.attach(other, tmp_path / "saved")
    batch = demo_inputs(model)
    with torch.no_grad():
        y = model(**batch).logits
        assert torch.equal(other(**batch).logits, y)
        surgeon.merge()
        attached.merge()
        assert torch.equal(model(**batch).logits, other(**batch).logits)
    assert "not stand" not in str(surgeon.report())
    assert surgeon.remove() is wrapped
    again = surgery.attach(wrapped, tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, y)
    again.remove()


@pytest.mark.parametrize("text, count", [('"model.layers.1.mlp.up_proj"', 1), ('"model.layers.*.mlp.up_proj"', 4)])
@pytest.mark.parametrize("wrapper", ["compiled", "parallel", "inner"])
def test_patterns_match_as_on_the_bare_model(text, count, wrapper):
    spec = surgery.parse(f'spec p()\ntarget linear {text} {{ add low_rank(rank = 2) }}\ntrain "model.norm.weight"')
    plan = surgery.plan(WRAPPERS[wrapper](load_demo("llama")), spec)
    assert len(plan.placed) == count and plan.train == ("model.norm.weight",)
    assert surgery.Report(plan).unfrozen == {"model.norm.weight": 64}


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "vit"])
def test_the_head_of_a_model_that_another_module_holds_is_left_out(family):
    spec = surgery.parse('spec p()\ntarget linear { add low_rank(rank = 2) }')
    wanted = [f"held.{p.site.name}" for p in surgery.plan(load_demo(family), spec).placed]
    plan = surgery.plan(Holder(load_demo(family)), spec)
    assert [p.site.name for p in plan.placed] == [*wanted, "value"]
    assert [p.site.name for p in surgery.plan(nn.ModuleList([Holder(load_demo(family))]), spec).placed
            ] == [f"0.{name}" for name in [*wanted, "value"]]


def test_a_compiled_model_that_ran_runs_the_adapters():
    """Programs are compiled for classes: another class, another program."""
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).eval(), torch.randn(3, 6)
    wrapped = compiled(model)
    with torch.no_grad():
        base = wrapped(x)
        surgeon = perturbed(wrapped, "lora")
        y = wrapped(x)
        assert torch.allclose(y, model(x)) and not torch.allclose(y, base)
        with surgeon.disabled():
            assert torch.allclose(wrapped(x), base)
        surgeon.merge()
        assert torch.allclose(wrapped(x), y, atol=1e-5)
        surgeon.remove()
        assert torch.equal(wrapped(x), base)


def test_several_processes_would_not_average_what_comes_after_the_wrapper(group, monkeypatch):
    model = nn.parallel.DistributedDataParallel(load_demo("llama"))
    monkeypatch.setattr(type(model.process_group), "size", lambda self: 2)
    with pytest.raises(surgery.SurgeryError, match="operate on the model first, then wrap it"):
        surgery.apply(model, "lora")
    assert not any("_surgery" in name for name in model.state_dict())
