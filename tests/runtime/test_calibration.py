"""What a start may name that data gives: G and C, against sums made by hand; the model is left as it was."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from interrupted import Interrupt
from models import perturbed
from packed import Int8Linear
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

import surgery
from surgery.diagnostics import SurgeryError
from surgery.models.demo import load_demo
from surgery.runtime import calibration

SMALL = "llama:num_hidden_layers=2,hidden_size=32,intermediate_size=64"
WHOLE = surgery.parse("""spec whole
update both() {
  frozen param g[out, in] = G
  frozen param c[in, in] = C
  param k = 0
  return k * (g @ c)
}
target linear { add both() }""")


def only(name: str) -> surgery.Spec:
    """A spec that starts at G, or at C, alone."""
    sides = {"G": "out, in", "C": "in, in"}[name]
    result = {"G": "k * g", "C": "k * W @ g"}[name]
    return surgery.parse(f"spec s\nupdate u() {{ frozen param g[{sides}] = {name}  param k = 0  return {result} }}\n"
                         "target linear { add u() }")


def tensor(surgeon: surgery.Surgeon, site: str, name: str) -> torch.Tensor:
    placed = next(p for p in surgeon.plan.placed if p.site.name == site)
    key = next(leaf.key for leaf in placed.formula.leaves if leaf.key.endswith(f".{name}"))
    return surgeon.adapters[site].tensors()[key].detach()


def batches(count: int = 3, pad: bool = False) -> list[dict]:
    draw = torch.Generator().manual_seed(4)
    found = []
    for _ in range(count):
        ids = torch.randint(0, 256, (2, 7), generator=draw)
        mask = torch.ones_like(ids)
        if pad:
            mask[1, 4:] = 0
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return found


class Two(nn.Module):
    """Two layers whose inputs and gradients are easily said."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.one, self.two = nn.Linear(6, 5), nn.Linear(5, 4)
        for p in self.parameters():
            nn.init.normal_(p, generator=draw)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x).tanh())


def pairs() -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(3, 6, generator=draw), torch.randn(3, 4, generator=draw)) for _ in range(4)]


def squared(model: nn.Module, batch: tuple) -> torch.Tensor:
    return mse_loss(model(batch[0]), batch[1])


def test_two_layers_by_hand() -> None:
    model, data = Two(), pairs()
    surgeon = surgery.apply(model, WHOLE, data=(pair for pair in data), loss=squared, check=False)
    base = Two()
    gradients, inputs = [torch.zeros(5, 6), torch.zeros(4, 5)], [torch.zeros(6, 6), torch.zeros(5, 5)]
    with torch.no_grad():
        for x, y in data:
            h = base.one(x).tanh()
            error = 2 * (base.two(h) - y) / y.numel()
            gradients[1] += error.T @ h / len(data)
            gradients[0] += ((error @ base.two.weight) * (1 - h**2)).T @ x / len(data)
            for total, rows in zip(inputs, (x, h)):
                total += sum(torch.outer(row, row) for row in rows)
    for site, gradient, of_inputs in zip(("one", "two"), gradients, inputs):
        torch.testing.assert_close(tensor(surgeon, site, "g"), gradient)
        torch.testing.assert_close(tensor(surgeon, site, "c"), of_inputs)


@pytest.mark.parametrize("name, room", [(SMALL, 1 << 27), (SMALL, 1), ("gpt2:n_layer=2", 1 << 27),
                                        ("mixtral:num_hidden_layers=1", 1 << 27)])
def test_gradients_of_models_are_those_of_a_backward_pass(name: str, room: int, monkeypatch) -> None:
    """Of transposed weights and stacks of experts too, however many are measured at once."""
    monkeypatch.setattr(calibration, "ROOM", room)
    surgeon = surgery.apply(load_demo(name), only("G"), data=batches(), check=False)
    model = load_demo(name).eval()
    for batch in batches():
        (model(**batch).loss / 3).backward()
    for placed in surgeon.plan.placed:
        wanted = placed.site.layout.matrix(model.get_parameter(placed.site.weight_name).grad)
        torch.testing.assert_close(tensor(surgeon, placed.site.name, "g"), wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("pad", [False, True])
def test_inputs_are_those_of_all_tokens_but_padding(pad: bool, monkeypatch) -> None:
    monkeypatch.setattr(calibration, "ROOM", 3000)
    surgeon = surgery.apply(load_demo(SMALL), only("C"), data=batches(pad=pad), check=False)
    model, wanted = load_demo(SMALL).eval(), {}
    for batch in batches(pad=pad):
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                def note(layer, args, result, name=name, mask=batch["attention_mask"].bool()) -> None:
                    rows = [row for row, is_there in zip(args[0].flatten(0, 1), mask.flatten()) if is_there]
                    wanted[name] = wanted.get(name, 0) + sum(torch.outer(row, row) for row in rows)
                module._forward_hooks.clear()
                module.register_forward_hook(note)
        with torch.no_grad():
            model(**batch)
    for placed in surgeon.plan.placed:
        torch.testing.assert_close(tensor(surgeon, placed.site.name, "g"), wanted[placed.site.name], rtol=1e-4,
                                   atol=1e-4)


def state_of(model: nn.Module) -> list:
    return [[(n, m.training, list(m._forward_pre_hooks), list(m._forward_hooks)) for n, m in model.named_modules()],
            [(n, p.requires_grad, id(p), id(p.grad), None if p.grad is None else p.grad.clone())
             for n, p in model.named_parameters()], torch.is_grad_enabled()]


def marked() -> nn.Module:
    """A model with modes, flags, gradients and a hook of its own."""
    model = Two()
    model.one.train()
    model.two.eval()
    model.one.bias.requires_grad_(False)
    model.two.weight.grad = torch.ones(4, 5)
    model.one.register_forward_pre_hook(lambda module, args: None)
    return model


def same(one: list, other: list) -> bool:
    return one[0] == other[0] and one[2] == other[2] and all(
        a[:4] == b[:4] and (a[4] is None or torch.equal(a[4], b[4])) for a, b in zip(one[1], other[1]))


def test_the_model_is_left_as_it_was() -> None:
    model = marked()
    before = state_of(model)
    surgery.apply(model, WHOLE, data=pairs(), loss=squared, check=False).remove()
    assert same(state_of(model), before)


@pytest.mark.parametrize("fault", ["loss", "nan", "none", "empty", "half"])
def test_it_is_so_after_a_fault_which_is_told(fault: str) -> None:
    model = marked()
    before = state_of(model)
    data: list = pairs() if fault != "empty" else []
    losses = {"nan": lambda m, b: squared(m, b) * float("nan"), "loss": lambda m, b: m(b[0][:, :2]).sum(),
              "none": lambda m, b: None, "half": lambda m, b: m.one(b[0]).sum()}
    words = {"nan": "one finite number", "loss": "does not take batch 0", "none": "one finite number",
             "empty": "no batch", "half": "no batch of the data reaches `two`"}
    with pytest.raises(SurgeryError, match=words[fault]):
        surgery.apply(model, WHOLE, data=data, loss=losses.get(fault, squared))
    assert same(state_of(model), before) and type(model.one) is nn.Linear


def test_it_is_so_after_an_interrupt_at_any_line() -> None:
    placed, model = surgery.plan(model := marked(), WHOLE).placed, model
    before = state_of(model)

    def measure() -> None:
        [*calibration.of_data(model, placed, pairs()[:2], squared)]

    with Interrupt() as told:
        measure()
    lines = [at for at in told.chosen if at[0].endswith(("calibration.py", "transaction.py"))]
    assert len(lines) > 60
    for at in lines:
        with pytest.raises(KeyboardInterrupt), Interrupt(at):
            measure()
        assert same(state_of(model), before), at


def test_without_data_that_is_told_and_what_needs_none_goes_on() -> None:
    with pytest.raises(SurgeryError, match="needs-data.*`g` starts at what data gives: `G`, the gradient") as told:
        surgery.apply(Two(), only("G"))
    assert "--data FILE" in str(told.value) and "data=batches" in str(told.value)
    assert surgery.plan(Two(), WHOLE).frozen == 5 * 6 + 4 * 5 + 6 * 6 + 5 * 5
    assert surgery.check(WHOLE) == []
    with pytest.raises(SurgeryError, match="needs-data"):
        surgery.Surgeries(Two()).add("one", WHOLE)
    surgeries = surgery.Surgeries(Two())
    surgeries.add("one", WHOLE, data=pairs(), loss=squared)


def test_what_data_made_is_saved_and_attached_without_it(tmp_path: Path) -> None:
    surgeon = perturbed(load_demo(SMALL), WHOLE, data=batches())
    surgeon.save(tmp_path / "a")
    assert load_file(tmp_path / "a/adapter.safetensors").keys() == surgeon.state().keys()
    again = surgery.attach(load_demo(SMALL), tmp_path / "a")
    state = again.state()
    assert all(torch.equal(t, state[n]) for n, t in surgeon.state().items())


def test_the_same_data_gives_the_same_numbers() -> None:
    one, two = (surgery.apply(load_demo(SMALL), WHOLE, data=batches(), check=False).state() for _ in range(2))
    assert all(torch.equal(t, two[n]) for n, t in one.items())


@pytest.mark.parametrize("text, words", [
    ("update u() { param k = 0  return k * G }", "what a definition returns is not"),
    ("update u() { let g = G @ C  param k = 0  return k * g }", "what a definition returns is not"),
    ("update u() { shared(model) param g[out, in] = G  return 0 * g }", "made of what each has by itself"),
    ("update u() { param g[in, out] = G  return 0 * g.T }", "starts at"),
])
def test_only_a_start_of_a_modules_own_is_made_of_them(text: str, words: str) -> None:
    with pytest.raises(SurgeryError, match=words):
        surgery.plan(Two(), surgery.parse(f"spec s\n{text}\ntarget linear {{ add u() }}"))


def test_names_of_a_definitions_own_come_first() -> None:
    spec = surgery.parse("""spec s(G: float = 2)
    update u(G: float = 2) { param C[out, in] = 0  let D = G * C  return D }
    target linear { add u(G) }""")
    surgery.apply(Two(), spec)


def test_what_cannot_be_measured_is_refused() -> None:
    model = Two()
    model.one = Int8Linear.of(model.one)
    with pytest.raises(SurgeryError, match="no `G` is known of `one`: they have no plain weight"):
        surgery.apply(model, only("G"), data=pairs(), loss=squared)
    surgeon = surgery.apply(model, only("C"), data=[x for x, _ in pairs()], check=False)
    assert tensor(surgeon, "one", "g").shape == (6, 6)
    embedding = only("C").model_copy(update={"targets": tuple(t.model_copy(update={"kind": "embedding"})
                                                              for t in only("C").targets)})
    with pytest.raises(SurgeryError, match="no `C` is known of .*: it is measured of linear layers"):
        surgery.apply(load_demo(SMALL), embedding, data=batches())
    untied = surgery.parse('spec s\nupdate u() { frozen param g[out, in] = G  param k = 0  return k * g }\n'
                           'target embedding "**.wte" untie { add u() }')
    with pytest.raises(SurgeryError, match="used in other places of the model too"):
        surgery.apply(load_demo("gpt2:n_layer=1"), untied, data=batches())


class Recomputed(Two):
    """Whose first layer runs again in the backward pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def first(x: torch.Tensor) -> torch.Tensor:
            return self.one(x).tanh()

        return self.two(checkpoint(first, x, use_reentrant=False))


def test_what_a_checkpoint_computes_again_is_read_once() -> None:
    plain, again = (surgery.apply(model, WHOLE, data=pairs(), loss=squared, check=False)
                    for model in (Two(), Recomputed()))
    assert torch.equal(tensor(again, "one", "c"), tensor(plain, "one", "c"))
    torch.testing.assert_close(tensor(again, "one", "g"), tensor(plain, "one", "g"))


def test_sums_under_autocast_are_of_float32() -> None:
    plain = surgery.apply(Two(), only("C"), data=pairs(), loss=squared, check=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = surgery.apply(Two(), only("C"), data=pairs(), loss=squared, check=False)
    assert torch.equal(tensor(mixed, "one", "g"), tensor(plain, "one", "g"))


class Shaped(nn.Module):
    """A layer that gets its tokens in other shapes than the mask has."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.layer, self.shape = nn.Linear(5, 3), shape

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.layer(x.reshape(*self.shape, 5))


@pytest.mark.parametrize("shape", [(2, 4), (8,), (4, 2)])
def test_padding_is_left_out_in_any_shape_or_refused(shape: tuple[int, ...]) -> None:
    x, mask = torch.randn(2, 4, 5), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    data = [{"x": x, "attention_mask": mask}]
    if shape == (4, 2):
        with pytest.raises(SurgeryError, match="which inputs of layer are padding is not known"):
            surgery.apply(Shaped(shape), only("C"), data=data, check=False)
        return
    surgeon = surgery.apply(Shaped(shape), only("C"), data=data, check=False)
    rows = x[mask.bool()]
    torch.testing.assert_close(tensor(surgeon, "layer", "g"), rows.T @ rows)


@pytest.mark.parametrize("form", ["tuple", "object", "inside", "four", "added", "none"])
def test_padding_is_left_out_or_refused_however_a_batch_says_it(form: str) -> None:
    x, mask = torch.randn(2, 4, 5), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    named = {"x": x, "attention_mask": mask}
    batch, loss = {
        "tuple": ((x, mask), None), "none": ((x, torch.zeros(2, 1, 4, 4)), None),  # nothing added to any score
        "object": (SimpleNamespace(**named), lambda model, each: model(each.x, each.attention_mask).sum()),
        "inside": ((named, 1), lambda model, each: model(**each[0]).sum()),
        "four": ({**named, "attention_mask": mask[:, None, None]}, None),
        "added": ({**named, "attention_mask": (1.0 - mask) * -1e9}, None)}[form]

    def found() -> torch.Tensor:
        return tensor(surgery.apply(Shaped((2, 4)), only("C"), data=[batch], loss=loss, check=False), "layer", "g")

    if form in ("four", "added"):
        with pytest.raises(SurgeryError, match="which inputs of layer are padding is not known.*not one of 0 and 1"):
            found()
        return
    rows = x.flatten(0, 1) if form == "none" else x[mask.bool()]
    torch.testing.assert_close(found(), rows.T @ rows)


def test_the_mask_of_an_encoder_is_not_that_of_the_decoder() -> None:
    model, ids = load_demo("t5:num_layers=1"), torch.randint(3, 200, (2, 6))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    data = [{"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids}]
    surgery.apply(model, only("C").retarget("encoder.**.q"), data=data, check=False).remove()
    with pytest.raises(SurgeryError, match="are padding is not known"):
        surgery.apply(model, only("C").retarget("decoder.**.q"), data=data, check=False)
    whole, cut = {"input_ids": ids, "decoder_input_ids": ids}, ids.masked_fill(mask == 0, -100)
    for padded in ({**whole, "decoder_attention_mask": mask}, {"input_ids": ids, "labels": cut}):
        surgery.apply(model, only("C").retarget("encoder.**.q"), data=[padded], check=False).remove()
        with pytest.raises(SurgeryError, match="what the decoder reads is padded"):
            surgery.apply(model, only("C").retarget("decoder.**.q"), data=[padded], check=False)
    surgery.apply(model, only("C").retarget("decoder.**.q"), data=[{**whole, "labels": cut}], check=False)
