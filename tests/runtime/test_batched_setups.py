"""Inside `batched_setups` the set-ups of like layers are made at once, with the values and gradients of the dense
formula; whatever was promised and is not so is seen, or makes each layer compute its own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from case import Case, Parameters
from layers import OBLONG, Layout, assert_close, gradients, perturb
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint
from zoo import CASES

import surgery
from surgery import SurgeryError
from surgery.codegen.candidates import Candidate
from surgery.codegen.cost_model import Cost, Machine
from surgery.runtime import adapter
from surgery.runtime import batched_setups as module

COUNT = 3
SQUARE = Layout("linear 96x96", lambda: nn.Linear(96, 96), lambda: torch.randn(6, 96))


class Beside(nn.Module):
    """Layers that read one input."""

    gradient_checkpointing: Any = False
    layers: Any

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers])


def operated(spec: str | surgery.Spec, layout: Layout, dtype: torch.dtype = torch.float64,
             own: torch.dtype = torch.float64) -> tuple[Beside, surgery.Surgeon]:
    torch.manual_seed(1)
    model = Beside([layout.build() for _ in range(COUNT)]).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    surgeon = surgery.apply(model, spec, seed=3, dtype=own, check=False)
    perturb(model)
    return model, surgeon


@contextmanager
def batches() -> Iterator[list[int]]:
    """How many layers each batch that is made inside has."""
    sizes, make = [], module._batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_batch", lambda *args: (sizes.append(len(args[2])), make(*args))[1])
        yield sizes


def own(model: Beside) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def of_own(model: Beside, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output and its gradients."""
    x = x.clone().requires_grad_()
    y = model(x)
    return y, gradients(y, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape), {**own(model), "x": x})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_zoo_is_the_dense_formula(case: Case, monkeypatch: pytest.MonkeyPatch):
    layout = OBLONG[CASES.index(case) % len(OBLONG)]
    # no built weight where thin factors do: of that there is no batch
    monkeypatch.setattr(adapter, "machine", lambda *on: Machine(1.0, 0.0, 0.0))
    model, surgeon = operated(case.spec("layers.*"), layout)
    x = layout.inputs().double().requires_grad_()
    with batches() as sizes, surgeon.batched_setups():
        y = model(x)
    of_first = model.layers[0].weight_surgery
    program = of_first.program(of_first.frozen(model.layers[0]), len(x.flatten(0, -2)))
    assert sizes == ([] if program.reads_weight else [COUNT])
    expected = []
    for i, layer in enumerate(model.layers):
        p = Parameters.of(surgeon.adapters[f"layers.{i}"].values())
        weight, bias = layer.weight_surgery.frozen(layer).stored, layer.weight_surgery.frozen(layer).bias
        expected.append(layout.run(x, case.formula(weight, p), None if bias is None else case.bias(bias, p)))
    assert_close(y, torch.stack(expected), 1e-10)
    direction, leaves = torch.randn_like(y), {**own(model), "x": x}
    wanted = gradients(torch.stack(expected), direction, leaves)
    for name, gradient in gradients(y, direction, leaves).items():
        assert_close(gradient, wanted[name], 1e-8, name)


def test_what_draws_noise_is_made_by_each_layer():
    """In evaluation, where its mean stands in its place, at once."""
    model, surgeon = operated(surgery.parse("""update dropped() {
      param A[8, in] ~ normal() param B[out, 8] = 0 noise m[8] ~ bernoulli(0.5) return B @ diag(m) @ A }
    target linear { add dropped() }"""), SQUARE)
    x = SQUARE.inputs().double()
    for training, made in ((True, []), (False, [COUNT])):
        model.train(training)
        torch.manual_seed(4)
        y, alone = of_own(model, x)
        torch.manual_seed(4)
        with batches() as sizes, surgeon.batched_setups():
            batched, gradient = of_own(model, x)
        assert sizes == made
        assert_close(batched, y, 1e-12)
        for name in alone:
            assert_close(gradient[name], alone[name], 1e-10, name)


@pytest.mark.parametrize("spec", ["lora", "dora", "sora", "oft", "hra", "c3a"])
def test_a_pass_makes_one_batch_and_the_numbers_of_each_alone(spec: str):
    model, surgeon = operated(spec_of(spec), SQUARE, torch.bfloat16, torch.float32)
    x = torch.randn(5, 96, dtype=torch.bfloat16)
    y, alone = of_own(model, x)
    with batches() as sizes, surgeon.batched_setups():
        for _ in range(2):  # nothing is left from the first
            batched, gradient = of_own(model, x)
            assert_close(batched, y, 1e-2)
            for name in alone:
                assert_close(gradient[name], alone[name], 3e-2, name)
        with surgeon.batched_setups(), torch.no_grad():
            model(x)
        assert sizes == [COUNT] * 3
        model.layers[0](x)  # not a pass of the model
        assert sizes == [COUNT] * 3
    model(x)
    assert sizes == [COUNT] * 3 and not model._forward_hooks and not model._forward_pre_hooks


def spec_of(name: str) -> surgery.Spec:
    settings = {"oft": {"block": 3}, "hra": {"rank": 4}, "c3a": {"block": 3}}
    small = settings.get(name, {"rank": 3, "dropout": 0.0})
    return surgery.load(name, **small).retarget("layers.*")


@pytest.mark.parametrize(("is_held", "made"), [(True, [COUNT]), (False, [])])
def test_where_nobody_asked_what_would_hold_more_stays_alone(is_held: bool, made: list[int], monkeypatch):
    """A set-up that is better made again in the backward pass than held."""
    monkeypatch.setattr(Candidate, "recompute_cost", property(lambda plan: None if is_held else Cost()))
    model, surgeon = operated(spec_of("sora"), SQUARE)
    x = torch.randn(5, 96, dtype=torch.float64)
    y, alone = of_own(model, x)
    with batches() as sizes, module.batched_setups(model, list(surgeon.adapters.values()), frugal=True):
        batched, gradient = of_own(model, x)
    assert sizes == made
    assert_close(batched, y, 1e-12)
    for name in alone:
        assert_close(gradient[name], alone[name], 1e-10, name)


def test_what_is_unlike_makes_its_own():
    model, surgeon = operated(spec_of("sora"), SQUARE)
    next(model.layers[1].weight_surgery.parameters()).requires_grad_(False)
    y, alone = of_own(model, x := torch.randn(5, 96, dtype=torch.float64))
    with batches() as sizes, surgeon.batched_setups():
        batched, gradient = of_own(model, x)
        assert sizes == [COUNT - 1]
        with surgeon.disabled():
            model(x)
        assert sizes == [COUNT - 1]
    assert_close(batched, y, 1e-12)
    for name in alone:
        assert_close(gradient[name], alone[name], 1e-10, name)


@pytest.mark.parametrize("clause", ["", "dropout(10%)"])
def test_a_formula_that_comes_to_nothing_has_no_set_up(clause: str):
    spec = surgery.parse(f"""update nothing() {{ param g = 0 param A[out, in] = 1 return g * (sin(A) - sin(A)) }}
    target any "**" {{ add nothing() {clause} }}""")
    model, surgeon = operated(spec, SQUARE)
    x = SQUARE.inputs().double()
    with surgeon.batched_setups():
        assert torch.equal(model(x), torch.stack([layer(x) for layer in model.layers]))


@pytest.mark.parametrize("spec", ["lora", "sora", "oft"])
def test_a_layer_that_a_pass_does_not_use_gets_no_gradient(spec: str):
    """As alone. Of zeros AdamW would decay the weights of a layer that was skipped, and move them by its momentum."""
    model, surgeon = operated(spec_of(spec), SQUARE)
    first, second, third = model.layers
    x = torch.randn(5, 96, dtype=torch.float64, requires_grad=True)

    def skipped(x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            unused = second(x)
        return [first(x), unused, third(x)]

    def each(x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in model.layers]

    for forward, passes in ((skipped, [[0, 2]]), (each, [[1]]), (each, [[0], [2, 1], [2]])):
        model.forward, found = forward, []  # pyright: ignore[reportAttributeAccessIssue]
        for context in (nullcontext, surgeon.batched_setups):
            with batches() as sizes, context():
                y = model(x)
            assert COUNT in sizes or context is nullcontext
            for used in passes:  # each a backward pass of its own through the one graph
                model.zero_grad()
                torch.stack([y[i] for i in used]).square().sum().backward(retain_graph=True)
                found.append({name: p.grad for name, p in own(model).items()})
        for wanted, gradient in zip(found[:len(passes)], found[len(passes):], strict=True):
            assert None in wanted.values()
            assert [n for n in wanted if wanted[n] is None] == [n for n in wanted if gradient[n] is None]
            for name, g in wanted.items():
                if g is not None:
                    assert_close(gradient[name], g, 1e-10, name)


@pytest.mark.parametrize("change", ["in place", "another tensor"])
def test_a_tensor_that_changes_in_a_pass_is_seen_where_torch_tells(change: str):
    model, surgeon = operated(spec_of("sora"), SQUARE)
    held = model.layers[2].weight_surgery.pre_diagonal

    def edit(*args: object) -> None:
        with torch.no_grad():
            if change == "in place":
                held.d.mul_(1.5)
            else:
                held.d = nn.Parameter(held.d * 1.5)

    x = torch.randn(5, 96, dtype=torch.float64)
    model.layers[0].register_forward_hook(edit)
    with surgeon.batched_setups():
        y = model(x)
    assert_close(y[2], model.layers[2](x), 1e-12)


def test_copies_pickles_and_calls_with_other_tensors():
    model, surgeon = operated(spec_of("sora"), SQUARE)
    x = torch.randn(5, 96, dtype=torch.float64)
    others = {name: p + 0.1 for name, p in own(model).items()}
    y, of_others = model(x), torch.func.functional_call(model, others, x)
    with surgeon.batched_setups():
        for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
            assert_close(same(x), y, 1e-12)
        assert_close(torch.func.functional_call(model, others, x), of_others, 1e-12)
        per_item = torch.func.vmap(model)(x[:, None])
    assert_close(per_item[:, :, 0].transpose(0, 1), y, 1e-12)


def test_an_error_in_a_pass_ends_it():
    model, surgeon = operated(spec_of("lora"), SQUARE)
    hook = model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with batches() as sizes, surgeon.batched_setups():
        with pytest.raises(ZeroDivisionError):
            model(torch.randn(5, 96, dtype=torch.float64))
        hook.remove()
        model.layers[0](torch.randn(5, 96, dtype=torch.float64))
    assert sizes == [COUNT]


def test_checkpointing():
    """Of a model that says so it is refused; where a layer is run again all the same, it makes its own set-up, or torch
    says that the two runs differ."""
    model, surgeon = operated(spec_of("sora"), SQUARE)
    model.gradient_checkpointing = True
    with pytest.raises(SurgeryError, match="checkpoints gradients"), surgeon.batched_setups():
        pass
    model.gradient_checkpointing = False
    with batches() as sizes, surgeon.batched_setups():
        model.gradient_checkpointing = True  # as a Trainer does
        model(x := torch.randn(5, 96, dtype=torch.float64, requires_grad=True))
    assert not sizes
    model.gradient_checkpointing = False
    for reentrant in (True, False):
        model.forward = lambda x: torch.stack([checkpoint(each, x, use_reentrant=reentrant) for each in model.layers])
        model.zero_grad()
        model(x).sum().backward()
        wanted: dict[str, Any] = {name: p.grad for name, p in own(model).items()}
        model.zero_grad()
        with surgeon.batched_setups():
            y = model(x)
        if reentrant:
            y.sum().backward()
            for name, parameter in own(model).items():
                gradient: Any = parameter.grad
                assert_close(gradient, wanted[name], 1e-12, name)
        else:
            with pytest.raises(CheckpointError):
                y.sum().backward()
