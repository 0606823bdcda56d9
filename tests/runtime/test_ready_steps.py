"""Outside of serving, calls like the last one skip what was decided in it; whatever else a call may be, it is seen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module
from torch.nn.utils import prune

import surgery
from surgery import SurgeryError
from surgery.runtime import adapter as adapters
from surgery.runtime.step_tensors import StepTensors

NOISY = """update noisy() {
  param A[2, in] ~ normal(1)
  param B[out, 2] = 0
  noise m[2] ~ bernoulli(0.5)
  return B @ diag(m) @ A
}
update weighted() {
  param A[2, in] ~ normal(1)
  param B[out, 2] = 0
  param a = 1
  param m[in] = col_norm(W)
  let V = W + a * (B @ A)
  return V @ diag(m / col_norm(V)) - W
}
"""
SPECS = {name: surgery.parse(f'{NOISY}spec s()\ntarget linear "layer" {{ {body} }}') for name, body in {
    "low rank": "add low_rank(rank = 2)", "gain": "pre diagonal()\nadd low_rank(rank = 2)\npost magnitude()",
    "dropout": "add low_rank(rank = 2) dropout(0.5)", "rotation": "post orthogonal(rank = 2)",
    "noise": "add noisy()",
    "by dtype": "add weighted()"}.items()}  # which has another program where activations are narrow


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def operated(spec: str) -> nn.Module:
    torch.manual_seed(0)
    model = Model().train()
    surgery.apply(model, SPECS[spec])
    with torch.no_grad():
        for parameter in model.layer.weight_surgery.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def numbers(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of all that trains (where a gradient is taken)."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_(torch.is_grad_enabled())
    y = model(x)
    if not y.requires_grad:
        return [y]
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return [y, *torch.autograd.grad(y.float().square().sum(), wanted)]


@contextmanager
def long_ways(model: nn.Module) -> Iterator[list[Any]]:
    """Every call inside that goes the long way."""
    calls: list[Any] = []
    adapter, handle = model.get_submodule("layer.weight_surgery"), adapters.Adapter.forward

    def counted(self: Any, *args: Any) -> Tensor:
        calls.append(self)
        return handle(self, *args)

    adapters.Adapter.forward = counted  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        adapters.Adapter.forward = handle  # type: ignore[method-assign]
    assert all(each is adapter for each in calls)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("mode", ["training", "evaluation", "no gradient", "autocast"])
def test_the_second_call_of_a_kind_is_ready_with_the_same_numbers(spec, mode):
    model, x = operated(spec), torch.randn(3, 5, 24)
    model.train(mode == "training")
    inside: Callable[[], AbstractContextManager] = {
        "no gradient": torch.no_grad, "autocast": lambda: torch.autocast("cpu", torch.bfloat16)}.get(mode, nullcontext)
    with inside():
        with long_ways(model) as calls:
            first = numbers(model, x)
        assert len(calls) == 1
        with long_ways(model) as calls:
            second = numbers(model, x)
        assert len(calls) == (spec == "noise" and mode == "training")
    assert all(map(torch.equal, first, second))


def test_under_autocast_a_call_is_ready_with_the_programs_of_its_dtype():
    """Others may be better in bfloat16 than those of the weight's dtype, for one number of rows and not for another."""
    model, x = operated("by dtype"), torch.randn(3, 24)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    adapter = model.layer.weight_surgery
    narrow, wide = (adapter.programs(("cpu", dtype))[True] for dtype in (torch.bfloat16, torch.float32))
    assert narrow is not wide and [step.main for step in adapter.ready.values()] == [narrow]


def halve(model: nn.Module) -> None:
    model.bfloat16()


def unfreeze(model: nn.Module) -> None:
    model.layer.get_parameter("weight").requires_grad_(True)


def freeze_a_factor(model: nn.Module) -> None:
    next(iter(model.layer.weight_surgery.parameters())).requires_grad_(False)


def hear_a_step(model: nn.Module) -> None:
    part = next(iter(model.layer.weight_surgery.children()))
    part.register_forward_hook(lambda module, args, tensors: tuple(2 * t for t in tensors))


def hear_the_adapter(model: nn.Module) -> None:
    model.layer.weight_surgery.register_forward_hook(lambda module, args, y: 2 * y)


def hear_before_the_adapter(model: nn.Module) -> None:
    model.layer.weight_surgery.register_forward_pre_hook(lambda module, args: (args[0], 2 * args[1]))


def wrap_a_step(model: nn.Module) -> None:
    part = next(iter(model.layer.weight_surgery.children()))
    was = part.forward
    part.forward = lambda: tuple(2 * t for t in was())  # as accelerate's hooks do


def prune_a_factor(model: nn.Module) -> None:
    part = next(iter(model.layer.weight_surgery.children()))
    prune.random_unstructured(part, next(iter(part._parameters)), amount=0.5)


def write_other_numbers(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 2


def put_other_parameters(model: nn.Module) -> None:
    for part in (model.layer, *model.layer.weight_surgery.children()):
        for name, parameter in list(part._parameters.items()):
            part._parameters[name] = nn.Parameter(2 * parameter.detach(), parameter.requires_grad)


CHANGES = {each.__name__.replace("_", " "): each for each in (
    halve, unfreeze, freeze_a_factor, hear_a_step, hear_the_adapter, hear_before_the_adapter, wrap_a_step,
    prune_a_factor, write_other_numbers, put_other_parameters, nn.Module.eval)}
CHANGES["double"] = lambda model: model.double()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("spec", SPECS)
def test_whatever_changes_after_a_call_is_seen_in_the_next(spec, change):
    model, x = operated(spec), torch.randn(3, 5, 24)
    numbers(model, x)
    fresh = copy.deepcopy(model)  # which has had no call
    for each in (model, fresh):
        torch.manual_seed(2)
        CHANGES[change](each)
    x = x.to(model.layer.get_parameter("weight").dtype)
    found, wanted = numbers(model, x), numbers(fresh, x)
    assert len(found) == len(wanted) and all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("serving", [False, True])
@pytest.mark.parametrize("register", [
    module.register_module_forward_pre_hook, module.register_module_forward_hook,
    module.register_module_full_backward_pre_hook, module.register_module_full_backward_hook])
def test_who_listens_to_the_calls_of_all_modules_hears_those_of_a_ready_layer(register, serving):
    """Profilers and counters of operations do."""
    model, x, heard = Model().eval(), torch.randn(3, 24), set()
    surgeon = surgery.apply(model, SPECS["low rank"])
    with surgeon.serving() if serving else nullcontext(), torch.set_grad_enabled(not serving):
        model(x), model(x)
        handle = register(lambda module, *args: heard.add(type(module)))
        try:
            with long_ways(model) as calls:
                y = model(x)
            if not serving:
                y.sum().backward()
        finally:
            handle.remove()
    assert len(calls) == 1 and (serving or adapters.Adapter in heard)
    assert "forward" not in register.__name__ or {adapters.Adapter, StepTensors} <= heard


@pytest.mark.parametrize("shape", [(24,), (3, 24), (3, 5, 24)])
@pytest.mark.parametrize("spec", ["low rank", "gain"])
def test_an_input_that_is_written_over_is_told_as_with_a_plain_layer(spec, shape):
    model, x = operated(spec), torch.randn(shape, requires_grad=True)
    for _ in range(2):
        y = model(given := x * 1)
        given.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_another_number_of_rows_runs_the_program_for_that_number():
    model = operated("low rank")
    main = model.layer.weight_surgery.programs()[True]
    most = int(main.up_to[0][0])
    assert 0 < most < 5000 and main.at(most).source != main.at(most + 1).source
    for rows in (1, most, most + 1, 2 * most, 1):
        fresh, x = copy.deepcopy(model), torch.randn(rows, 24)
        assert all(map(torch.equal, numbers(model, x), numbers(fresh, x)))


def lose_the_bias(model: nn.Module) -> None:
    model.layer.bias = None


def cut_the_weight(model: nn.Module) -> None:
    model.layer.get_parameter("weight").data = torch.randn(16, 12)


@pytest.mark.parametrize("change", [lose_the_bias, cut_the_weight])
def test_what_a_layer_refuses_it_refuses_after_a_call_too(change):
    model, x = operated("low rank"), torch.randn(3, 24)
    model(x)
    change(model)
    with pytest.raises(SurgeryError):
        model(x[:, :model.layer.get_parameter("weight").shape[1]])


def test_transforms_serving_and_batches_take_calls_that_are_ready_elsewhere():
    model, x = operated("gain"), torch.randn(3, 24)
    model.eval()
    wanted = numbers(model, x)[0]
    of_x = torch.func.jacrev(lambda x: model(x).sum(0))(x)
    again = torch.autograd.functional.jacobian(lambda x: model(x).sum(0), x)
    torch.testing.assert_close(of_x, again)
    tensors = {name: 2 * p.detach() for name, p in model.named_parameters()}
    twice = copy.deepcopy(model)
    twice.load_state_dict(tensors, strict=False)
    torch.testing.assert_close(torch.func.functional_call(model, tensors, (x,)), twice(x))
    assert torch.equal(numbers(model, x)[0], wanted)
