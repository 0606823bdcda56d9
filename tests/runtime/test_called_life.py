"""Layers with a packed weight through an operated model's life: applied, trained, saved, attached, off, removed."""

from __future__ import annotations

import pickle
from copy import deepcopy

import pytest
import torch
from called import IN, OUT, named, operated
from layers import Tower, assert_close, perturb
from packed import Int4Linear, Int8Linear
from torch import nn

from surgery.analysis.spectra import spectrum
from surgery.diagnostics import SurgeryError
from surgery.language.library import load, parse
from surgery.models.demo import load_demo
from surgery.planning.compile import compile
from surgery.planning.figures import Report
from surgery.runtime.apply import apply
from surgery.runtime.attach import attach
from surgery.runtime.stack import Surgeries


def packed_llama() -> nn.Module:
    torch.manual_seed(0)
    model = load_demo("llama")
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    part.add_module(name, Int8Linear.of(linear))
    return model


@pytest.mark.parametrize("name", ["sora", "dora"])
def test_a_packed_llama_from_start_to_end(name, tmp_path):
    model, again, dense = packed_llama(), packed_llama(), load_demo("llama")
    ids = torch.randint(100, (2, 8))
    base = model(ids).logits
    surgeon = apply(model, load(name, rank=4, dropout=0.0))
    assert len(surgeon.plan.placed) == 28 and not surgeon.plan.warnings
    assert_close(model(ids).logits, base, 1e-5)
    optimizer = torch.optim.AdamW(surgeon.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    tuned = model(ids).logits
    with surgeon.disabled():
        assert torch.equal(model(ids).logits, base)
    surgeon.save(tmp_path / "adapter")
    attach(again, tmp_path / "adapter")
    assert torch.equal(again(ids).logits, tuned)
    attach(dense, tmp_path / "adapter").merge()
    change = dense(ids).logits - load_demo("llama")(ids).logits
    assert_close(change, tuned - base, 0.1)  # the weights differ by their rounding
    surgeon.remove()
    assert type(model.model.layers[0].self_attn.q_proj) is Int8Linear and torch.equal(model(ids).logits, base)


def test_copied_pickled_and_removed():
    base = Tower(Int8Linear(IN, OUT))
    model = deepcopy(base)
    surgeon = apply(model, named("sora").spec(), dtype=torch.float64)
    perturb(model)
    x = torch.randn(5, IN, dtype=torch.float64)
    y = model(x)
    assert torch.equal(deepcopy(model)(x), y) and torch.equal(pickle.loads(pickle.dumps(model))(x), y)
    with surgeon.disabled():
        assert torch.equal(model(x), base(x))
    surgeon.remove()
    assert type(model.layers[0]) is Int8Linear and torch.equal(model(x), base(x))
    assert model.state_dict().keys() == base.state_dict().keys()


def test_a_merge_is_refused_and_changes_nothing():
    model, surgeon = operated(named("lora"), Int8Linear(IN, OUT))
    x = torch.randn(5, IN, dtype=torch.float64)
    y = model(x)
    with pytest.raises(SurgeryError, match=r"`layers.0 \(Int8Linear\)`: no plain weight is kept there") as error:
        surgeon.merge()
    assert error.value.diagnostics[0].code == "merge-error" and torch.equal(model(x), y)


def test_there_is_nothing_to_untie_where_nothing_is_written():
    shared = Int4Linear(IN, OUT)
    model = Tower(shared, nn.Linear(OUT, IN), Int4Linear(IN, OUT))
    model.layers[2].weight = shared.weight
    with pytest.raises(SurgeryError, match="tied-weight"):
        apply(model, parse('target linear "layers.0" { add low_rank(2) }'))
    surgeon = apply(model, parse('target linear "layers.0" untie { add low_rank(2) }'))
    assert not surgeon.untied and model.layers[0].weight is model.layers[2].weight
    surgeon.remove()
    apply(Tower(Int8Linear(IN, OUT)), parse('target linear untie { add low_rank(2) }'))


def test_what_starts_from_the_weight_starts_from_what_the_calls_say():
    torch.manual_seed(1)
    layer = Int8Linear(IN, OUT)
    plain = nn.Linear(IN, OUT)
    plain.weight.data = layer.dequantised(torch.float32)
    for name in ("pissa", "olora", "dora"):
        packed, dense = (apply(Tower(deepcopy(each)), named(name).spec(), seed=3) for each in (layer, plain))
        for key, tensor in packed.state().items():
            assert_close(tensor, dense.state()[key], 1e-4, key)


def test_its_spectrum_is_that_of_the_dense_layer():
    model, surgeon = operated(named("sora"), Int8Linear(IN, OUT))
    plain = Tower(nn.Linear(IN, OUT).double())
    plain.layers[0].weight.data = model.layers[0].dequantised()
    dense = apply(plain, named("sora").spec(), seed=3, dtype=torch.float64)
    dense.load(surgeon.state())
    (found,), (wanted,) = (spectrum(each).rows for each in (surgeon, dense))
    assert found.spectrum.entropy == pytest.approx(wanted.spectrum.entropy, rel=1e-4)


def test_the_spectrum_between_a_packed_model_and_its_dense_one_is_of_the_rounding():
    torch.manual_seed(1)
    plain = Tower(nn.Linear(IN, OUT, bias=False))
    packed = Tower(Int8Linear.of(plain.layers[0]))
    rounding = packed.layers[0].dequantised(torch.float32) - plain.layers[0].weight.detach()
    wanted = spectrum(rounding)
    for pair in ((plain, packed), (packed, plain), (deepcopy(packed), packed)):
        (row,) = spectrum(*pair).rows
        assert row.spectrum.entropy == pytest.approx(wanted.entropy if plain in pair else 0, rel=1e-3)


def test_several_surgeries_of_a_packed_layer():
    model = Tower(Int8Linear(IN, OUT))
    x = torch.randn(5, IN)
    surgeries = Surgeries(model)
    for name in ("lora", "dora"):
        surgeries.add(name, named(name).spec())
    surgeries.use("lora", "dora")
    perturb(model)
    y = model(x)
    surgeries.use()
    assert not torch.equal(model(x), y)
    surgeries.use("lora", "dora")
    assert torch.equal(model(x), y)


def test_a_plan_of_a_skeleton_needs_no_numbers():
    with torch.device("meta"):
        model = Tower(Int8Linear(IN, OUT), Int4Linear(OUT, IN))
    plan = compile(model, parse('target linear { add low_rank(2)  post magnitude() }'))
    assert plan.trainable == 4 * (OUT + IN) + OUT + IN
    assert "2 weights operated on" in str(Report(plan)) and Report(plan).memory["base"]


@pytest.mark.parametrize(("layer", "name", "given"), [
    (nn.Linear(6, 4), "input", torch.randn(5, 6)), (nn.Conv1d(6, 4, 3), "input", torch.randn(2, 6, 5)),
    (nn.Embedding(6, 4), "input", torch.arange(5)), (Int8Linear(6, 4), "x", torch.randn(5, 6))],
    ids=["linear", "convolution", "embedding", "called"])
def test_the_input_may_be_given_by_its_name(layer, name, given):
    model = Tower(layer)
    before = layer(given)
    surgeon = apply(model, parse("target { add low_rank(2) }"), check=False)
    perturb(model)
    operated_layer = model.layers[0]
    assert torch.equal(operated_layer(**{name: given}), operated_layer(given))
    assert not torch.equal(operated_layer(given), before)
    with surgeon.disabled():
        assert torch.equal(operated_layer(**{name: given}), before)
    with pytest.raises(TypeError, match="takes one input, and is given 2"):
        operated_layer(given, given)
