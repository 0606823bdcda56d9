"""An operated model's tensors are what torch's and Hugging Face's tools take: each held once, real parameters with an
axis, whole numbers as buffers; and what was saved before they were held so still loads."""

from __future__ import annotations

import contextlib
import io
import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from models import assert_held_once, logits, perturbed
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

import surgery
from surgery.models.demo import demo_config
from surgery.runtime.saved_format import META, TENSORS

ONE_NUMBER = """spec one()
update gained(rank: int = 2) {
  shared frozen param A[rank, in] ~ kaiming_uniform()
  shared param g = 1
  param B[out, rank] = 0
  param s = 1
  return g * s * (B @ A)
}
target linear "**.{q,k}_proj" { add gained() }"""


def small() -> nn.Module:
    """A model that every shipped spec fits."""
    config = demo_config("llama:num_hidden_layers=2")
    config.num_key_value_heads, config.attention_bias = config.num_attention_heads, True
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


# What layers share is held at the root; test_minilm.py has every spec that ships.
@pytest.mark.parametrize("name", [name for name, file in surgery.shipped().items() if "shared" in file.read_text(encoding="utf-8")])
def test_each_tensor_is_held_once_and_can_be_sharded(name: str) -> None:
    model = small()
    before = [*model.parameters()]
    assert_held_once(surgery.apply(model, name, check=False), before)


def as_before(surgeon: surgery.Surgeon, tensors: dict[str, torch.Tensor], every: bool) -> dict[str, torch.Tensor]:
    """Tensors as they were called and shaped when each module held the shared ones (`every`, or the first alone)."""
    found = {n: t for n, t in tensors.items() if not n.startswith("shared_surgery.")}
    done: set[str] = set()
    for placed in surgeon.plan.placed:
        for key, value in surgeon.adapters[placed.site.name].values().items():
            if every or surgeon.name_of(placed, key) not in done:
                found[f"{placed.site.weight_name}_surgery.{key}"] = value.detach().clone()
            done.add(surgeon.name_of(placed, key))
    return found


@pytest.mark.parametrize("name", ["vera", "unilora", "delora", "fourierft", "one number"])
def test_what_was_saved_before_still_loads(name: str, tmp_path: Path) -> None:
    spec = surgery.parse(ONE_NUMBER) if name == "one number" else name
    model = small()
    surgeon = perturbed(model, spec, check=False)
    surgeon.save(tmp_path / "a")
    tensors = as_before(surgeon, load_file(tmp_path / "a" / TENSORS), every=False)
    assert name == "fourierft" or {(n, t.ndim) for n, t in tensors.items()} != {
        (n, t.ndim) for n, t in surgeon.named_tensors().items()}
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "a" / TENSORS)
    about = json.loads((tmp_path / "a" / META).read_text())
    about["tensors"] = {n: {"shape": list(t.shape), "dtype": str(t.dtype)[6:]} for n, t in tensors.items()}
    (tmp_path / "a" / META).write_text(json.dumps({**about, "format_version": "1.0"}))
    other = small()
    surgery.attach(other, tmp_path / "a")
    assert torch.equal(logits(other), logits(model))
    whole = as_before(surgeon, dict(model.state_dict()), every=True)
    third = small()
    surgery.apply(third, spec, check=False)
    third.load_state_dict(whole)  # a checkpoint of the whole operated model
    assert torch.equal(logits(third), logits(model))


@pytest.mark.parametrize("copy", ["deepcopy", "pickle"])
def test_a_copy_shares_with_itself_alone(copy: str) -> None:
    model = small()
    surgeon = perturbed(model, "unilora", check=False)
    kept = logits(model)
    if copy == "pickle":
        torch.save(model, file := io.BytesIO())
        file.seek(0)
    other = deepcopy(model) if copy == "deepcopy" else torch.load(file, weights_only=False)
    assert torch.equal(logits(other), kept)
    with torch.no_grad():
        theta = next(p for n, p in surgeon.named_tensors().items() if n.startswith("shared_surgery") and
                     p.requires_grad)
        theta.add_(1.0)
    assert torch.equal(logits(other), kept) and not torch.equal(logits(model), kept)
    ours = [p for n, p in other.named_parameters() if n.startswith("shared_surgery") and p.requires_grad]
    with torch.no_grad():
        ours[0].add_(1.0)
    assert torch.equal(logits(other), logits(model))


def test_the_children_of_a_container_are_its_layers() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    x = torch.randn(3, 8)
    surgeon = surgery.apply(model, surgery.load("unilora").retarget("**"))
    assert len(model) == 3
    with torch.no_grad():
        for p in surgeon.parameters():
            p += 0.1
    y, held = model(x), {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(held[n] is t for n, t in surgeon.named_tensors().items())
    surgeon.load({n: t.clone() for n, t in surgeon.state().items()})
    assert torch.equal(model(x), y)
    surgeon.remove()
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_two_surgeries_share_nothing_with_each_other() -> None:
    model = small()
    surgeries = surgery.Surgeries(model)
    surgeries.add("a", "unilora", seed=1)
    surgeries.add("b", "unilora", seed=2)
    both = surgeries.use("a", "b")
    names = [n for n in both.named_tensors() if n.startswith("shared_surgery")]
    assert {n.partition(":")[0] for n in names} == {"shared_surgery.a", "shared_surgery.b"}
    held = both.named_tensors()
    assert len({id(held[n]) for n in names}) == len(names)
    surgeries.remove()
    assert not any("surgery" in n for n in model.state_dict())


def test_shared_parameters_whose_names_join_to_one_stay_two() -> None:
    """`x` with `y_z` and `x_y` with `z`, of one shape: both are held, start and train by themselves."""
    spec = surgery.parse("""update x() { shared param y_z[out, in] = 0 return y_z }
update x_y() { shared param z[out, in] = 0 return 2 * z }
target linear "**" { add x() add x_y() }""")
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(3, 4)
    weights = [layer.weight.detach().clone() for layer in model]
    surgeon = surgery.apply(model, spec)
    assert len(surgeon.named_tensors()) == 2
    first, second = surgeon.named_tensors().values()
    with torch.no_grad():
        first += 0.1
        second += 0.3
    wanted = x
    for layer, weight in zip(model, weights):
        wanted = nn.functional.linear(wanted, weight + 0.1 + 2 * 0.3, layer.bias)
    assert torch.allclose(model(x), wanted, atol=1e-5)


NAMED = """
update module() { param to[out, in] = 0 return to }
update u() {
  frozen param training[2] ~ sample(of = in)
  shared param type[in] ~ normal()
  param names = 1
  param half[out, 2] = 0
  return names * (half @ rows(I(in), training)) @ diag(type)
}
target linear { add module() add u() }
"""


def test_parameters_may_be_called_what_modules_of_torch_call_something_else(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    surgeon = perturbed(model, surgery.parse(NAMED), check=False)
    assert {"0.weight_surgery.add_module-.to-", "0.weight_surgery.add_u.training-"} <= surgeon.named_tensors().keys()
    wanted = model(x).detach()
    surgeon.save(tmp_path / "a")
    torch.testing.assert_close(deepcopy(model).to(torch.float64)(x.double()).float(), wanted)
    surgeon.remove()
    surgery.attach(model, tmp_path / "a")
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("mode", ["merged", "base"])
def test_the_state_of_a_model_whose_adapters_do_not_run_is_a_plain_ones(mode: str, tmp_path: Path) -> None:
    """W' beside the tensors that made it would act twice where both are loaded, and such tensors would go with the
    weights of another mode."""
    model, plain = small(), small()
    spec = surgery.parse(f'{ONE_NUMBER}\ntrain "model.norm.weight"')
    surgeon = perturbed(model, spec)
    trained, y = model.state_dict(), logits(model)
    with contextlib.ExitStack() as off:
        if mode == "merged":
            surgeon.merge()
        else:
            off.enter_context(surgeon.disabled())
        state, wanted = {name: t.clone() for name, t in model.state_dict().items()}, logits(model)
        assert state.keys() == plain.state_dict().keys()
        model.load_state_dict(state)
        assert torch.equal(logits(model), wanted)
        adapter = {name: trained[name] for name in surgeon.named_tensors()}
        alone = {"weight_surgery." + name.rpartition("weight_surgery.")[2]: t for name, t in adapter.items()
                 if "layers.1.self_attn.k_proj" in name}
        for load in (lambda: model.load_state_dict(trained), lambda: model.load_state_dict(adapter),
                     lambda: model.model.layers[1].self_attn.k_proj.load_state_dict(alone, strict=False),
                     lambda: model.save_pretrained(tmp_path / "given", state_dict=trained)):
            with pytest.raises(surgery.SurgeryError, match="wrong-mode.*merged or switched off"):
                load()
        model.load_state_dict(state)
        assert not (tmp_path / "given").exists()
    plain.load_state_dict(state)
    assert torch.equal(logits(plain), wanted)
    other = surgery.apply(small(), spec, check=False).model
    other.load_state_dict(state)  # a plain model's, beside adapters that start as nothing
    torch.testing.assert_close(logits(other), wanted, rtol=1e-4, atol=1e-5)
    if surgeon.merged:
        surgeon.unmerge()
    assert torch.equal(logits(model), y) and model.state_dict().keys() == trained.keys()
