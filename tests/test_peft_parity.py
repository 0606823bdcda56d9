"""PEFT's layers as a second opinion: given the same parameters, PEFT's layer and ours give the same output and gradients.

Parametrised over the rows of `surgery.peft.methods`: a new row needs its configurations in `CONFIGS` here and no more.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from layers import assert_close, gradients, perturb
from surgery.compile import compile
from surgery.operate import Surgeon, apply
from surgery.peft.match import match
from surgery.peft.method import Method, Place
from surgery.peft.methods import METHODS
from surgery.sites import sites
from surgery.spec import parse, retarget
from surgery.syntax.tree import Spec

EXACT = 1e-10
PREFIX = "base_model.model.layer."
CONFIGS: dict[str, tuple[dict[str, Any], ...]] = {
    "lora": ({"r": 1, "lora_alpha": 3}, {"r": 4, "lora_alpha": 4}),
    "dora": ({"r": 1, "lora_alpha": 3}, {"r": 4, "lora_alpha": 4}),
    "dora on embeddings": ({"r": 1, "lora_alpha": 3}, {"r": 4, "lora_alpha": 4}),
    "oft": ({"oft_block_size": 3, "r": 0}, {"oft_block_size": 6, "r": 0}, {"oft_block_size": 0, "r": 2},
            {"oft_block_size": 5, "r": 0}),
}


@dataclass(frozen=True)
class Layer:
    """A layer that PEFT may adapt, and its input."""

    name: str
    build: Callable[[], nn.Module]
    x: Callable[[], Tensor]

    def __str__(self) -> str:
        return self.name


LAYERS = (
    Layer("linear 12x18", lambda: nn.Linear(18, 12), lambda: torch.randn(2, 3, 18)),
    Layer("linear 18x12 without bias", lambda: nn.Linear(12, 18, bias=False), lambda: torch.randn(2, 3, 12)),
    Layer("linear 12x12", lambda: nn.Linear(12, 12), lambda: torch.randn(2, 3, 12)),
    Layer("Conv1D 12x18", lambda: Conv1D(12, 18), lambda: torch.randn(2, 3, 18)),
    Layer("Conv1D 12x12", lambda: Conv1D(12, 12), lambda: torch.randn(2, 3, 12)),
    Layer("Conv2d 3x3", lambda: nn.Conv2d(2, 12, 3, stride=2, padding=1), lambda: torch.randn(2, 2, 5, 6)),
    Layer("Conv2d 1x1 without bias", lambda: nn.Conv2d(18, 12, 1, bias=False), lambda: torch.randn(2, 18, 3, 2)),
    Layer("Embedding 18x12", lambda: nn.Embedding(18, 12), lambda: torch.randint(18, (2, 4))),
)


class One(nn.Module):
    """A model with one layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@dataclass(frozen=True)
class Pair:
    """One layer, operated on by us and adapted by PEFT."""

    method: Method
    place: Place
    surgeon: Surgeon
    theirs: peft.PeftModel
    x: Tensor

    @property
    def mine(self) -> nn.Module:
        return self.surgeon.model

    def saved(self, of: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        """Something of each of PEFT's adapter tensors, by the name that PEFT saves it under."""
        values = {name: of(p) for name, p in self.theirs.named_parameters() if p.requires_grad}
        found = peft.get_peft_model_state_dict(self.theirs, values, save_embedding_layers=False)
        return {name.removeprefix(PREFIX): value for name, value in found.items()}

    def give(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors into PEFT's layer."""
        named = {PREFIX + name: value for name, value in tensors.items()}
        found = peft.set_peft_model_state_dict(self.theirs, named)
        assert not found.unexpected_keys

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors into our layer."""
        self.surgeon.load({f"layer.weight_surgery.{key}": value for key, value in tensors.items()})

    def ours(self) -> dict[str, Tensor]:
        return self.surgeon.adapters["layer"].tensors()


def pair(method: Method, layer: Layer, config: Mapping[str, Any]) -> Pair:
    torch.manual_seed(0)
    base = One(layer.build()).double()
    if getattr(base.layer, "bias", None) is not None:
        nn.init.normal_(base.layer.bias)
    full = getattr(peft, method.family.config_class)(**{**config, **method.settings, "target_modules": ["layer"]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of blocks that do not divide and of Conv1D's storage
        theirs = peft.get_peft_model(deepcopy(base), full).double()
    surgeon = apply(base, _spec(method, full, base.layer), dtype=torch.float64)
    x = layer.x()
    return Pair(method, _place(base.layer), surgeon, theirs, x.double() if x.is_floating_point() else x)


def _place(layer: nn.Module) -> Place:
    return Place.of(sites(One(layer))[0])


def _spec(method: Method, full: peft.PeftConfig, layer: nn.Module) -> Spec:
    config = full.to_dict()
    assert [m.name for m in METHODS if m.fits(config) and m.is_on(_place(layer))] == [method.name]
    spec = retarget(method.given(config, _place(layer)), "layer")
    return spec.model_copy(update={"targets": tuple(t.model_copy(update={"kind": "any"}) for t in spec.targets)})


ROWS = [pytest.param(method, layer, config, id=f"{method.name}, {layer}, {config}") for method in METHODS
        for layer in LAYERS if method.is_on(_place(layer.build())) for config in CONFIGS[method.name]]
on_every_row = pytest.mark.parametrize("method, layer, config", ROWS)


def run(model: nn.Module, x: Tensor, parameters: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients of the parameters and the input."""
    leaves = {**parameters, **({"x": x.clone().requires_grad_()} if x.is_floating_point() else {})}
    y = model(leaves.get("x", x))
    direction = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(5))
    return y, gradients(y, direction, leaves)


@on_every_row
def test_the_same_parameters_give_the_same_output_and_gradients(method, layer, config):
    both = pair(method, layer, config)
    _perturb(both.theirs)
    saved = both.saved(lambda p: p.detach())
    both.take(method.tensors[both.place.layout].to_ours(saved, both.place))
    y, mine = run(both.mine, both.x, both.ours())
    wanted, theirs = run(both.theirs, both.x, {n: p for n, p in both.theirs.named_parameters() if p.requires_grad})
    assert_close(y, wanted, EXACT, "the output")
    if "x" in theirs:
        assert_close(mine.pop("x"), theirs.pop("x"), EXACT, "the gradient of the input")
    for name, gradient in _pulled_back(both, saved, mine).items():
        assert_close(gradient, both.saved(lambda p: theirs[_name_of(both, p)])[name], EXACT, f"the gradient of {name}")


def _name_of(both: Pair, parameter: nn.Parameter) -> str:
    return next(name for name, p in both.theirs.named_parameters() if p is parameter)


def _pulled_back(both: Pair, saved: Mapping[str, Tensor], mine: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our gradients as gradients of PEFT's tensors, through the map from theirs to ours."""
    leaves = {name: value.clone().requires_grad_() for name, value in saved.items()}
    ours = both.method.tensors[both.place.layout].to_ours(leaves, both.place)
    total = sum((ours[key] * mine[key]).sum() for key in ours)
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()))))


def _perturb(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)


@on_every_row
def test_our_parameters_in_pefts_layer_give_the_same_output(method, layer, config):
    both = pair(method, layer, config)
    perturb(both.mine)
    both.give(method.tensors[both.place.layout].to_peft({k: v.detach() for k, v in both.ours().items()}, both.place))
    assert_close(both.theirs(both.x), both.mine(both.x), EXACT)


@on_every_row
def test_pefts_tensors_come_back_bit_for_bit(method, layer, config):
    both = pair(method, layer, config)
    _perturb(both.theirs)
    saved, maps = both.saved(lambda p: p.detach()), method.tensors[both.place.layout]
    ours = maps.to_ours(saved, both.place)
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in both.ours().items()}
    back = maps.to_peft(ours, both.place)
    assert back.keys() == saved.keys()
    assert all(torch.equal(back[name], saved[name]) for name in saved)


@on_every_row
def test_a_plan_is_told_by_its_formula(method, layer, config):
    both = pair(method, layer, config)
    found = match(both.surgeon.plan)
    assert found.methods == {"layer": method}
    said, meant = (method.parameters.to_ours(c, both.place) for c in (found.config, both.theirs.peft_config["default"].to_dict()))
    assert said == meant


@pytest.mark.parametrize("steps", [
    "add low_rank(rank, alpha) dropout(dropout)\n  post diagonal()", "add low_rank(rank, 2 * alpha) dropout(dropout)",
    "add low_rank(rank, alpha)\n  pre diagonal() with bias"])
def test_a_spec_that_only_bears_a_name_is_no_match(steps):
    text = f'spec lora(rank: int = 2, alpha: float = 4, dropout: float = 0.0)\ntarget linear "layer" {{\n  {steps}\n}}'
    assert match(compile(One(nn.Linear(12, 12)), parse(text))) is None


def test_the_name_of_a_spec_does_not_count():
    text = """spec mine(rank: int = 2, alpha: float = 4, dropout: float = 0.1)
    target linear "layer" {
      add  low_rank(rank, alpha) dropout(dropout)
      post magnitude()
    }"""
    found = match(compile(One(nn.Linear(12, 12)), parse(text)))
    assert found.config == {"use_dora": True, "r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": ["layer"]}


def test_a_configuration_with_an_unknown_switch_fits_no_row():
    plain = peft.LoraConfig(r=2).to_dict()
    assert [m.name for m in METHODS if m.fits(plain)] == ["lora"]
    for switch in ({"use_rslora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}, {"use_qalora": True}):
        assert not any(m.fits({**plain, **switch}) for m in METHODS)


@pytest.mark.parametrize("config", [{}, {"coft": True}, {"block_share": True}])
def test_oft_fits_only_where_it_is_a_rotation(config):
    assert not any(m.fits(peft.OFTConfig(**config).to_dict()) for m in METHODS)


def test_pefts_oft_on_a_larger_kernel_is_not_the_base_layer_at_its_start():
    """Why the row refuses it."""
    torch.manual_seed(0)
    base, x = One(nn.Conv2d(2, 12, 3)), torch.randn(2, 2, 4, 5)
    config = peft.OFTConfig(oft_block_size=3, r=0, use_cayley_neumann=False, target_modules=["layer"])
    change = (peft.get_peft_model(deepcopy(base), config)(x) - base(x)).norm() / base(x).norm()
    assert change > 1
