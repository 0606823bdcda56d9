"""One layer twice: operated on by us and adapted by PEFT, as a row of `surgery.peft.table.methods` says.

The base layer starts in float32, for which PEFT's singular vectors are written, and both then go on in float64.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import peft
import peft.tuners.boft.layer
import torch
from layers import gradients
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from surgery.language.library import retarget
from surgery.language.tree import Spec
from surgery.layers.survey import sites
from surgery.peft.table.method import Config, Method
from surgery.peft.table.methods import METHODS
from surgery.peft.tensor_mapping import Correspondence, Place
from surgery.runtime.apply import apply
from surgery.runtime.surgeon import Surgeon

PREFIX = "base_model.model.layer."


@dataclass(frozen=True)
class Layer:
    """A layer that PEFT may adapt, and its input."""

    name: str
    build: Callable[[], nn.Module]
    x: Callable[[], Tensor]

    def __str__(self) -> str:
        return self.name

    @cached_property
    def place(self) -> Place:
        return place_of(self.build())


LAYERS = (
    Layer("linear 12x18", lambda: nn.Linear(18, 12), lambda: torch.randn(2, 3, 18)),
    Layer("linear 18x12 without bias", lambda: nn.Linear(12, 18, bias=False), lambda: torch.randn(2, 3, 12)),
    Layer("linear 12x12", lambda: nn.Linear(12, 12), lambda: torch.randn(2, 3, 12)),
    Layer("Conv1D 12x18", lambda: Conv1D(12, 18), lambda: torch.randn(2, 3, 18)),
    Layer("Conv1D 12x12", lambda: Conv1D(12, 12), lambda: torch.randn(2, 3, 12)),
    Layer("Conv2d 3x3", lambda: nn.Conv2d(4, 12, 3, stride=2, padding=1), lambda: torch.randn(2, 4, 5, 6)),
    Layer("Conv2d 1x1 without bias", lambda: nn.Conv2d(18, 12, 1, bias=False), lambda: torch.randn(2, 18, 3, 2)),
    Layer("Conv1d 3", lambda: nn.Conv1d(6, 12, 3), lambda: torch.randn(2, 6, 5)),
    Layer("Embedding 18x12", lambda: nn.Embedding(18, 12), lambda: torch.randint(18, (2, 4))),
)


class One(nn.Module):
    """A model with one layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Blocks:
    """What PEFT's CUDA extension for BOFT does, on any device: stacks [n, b, k, k] along the diagonals of [n, b k, b
    k].
    """

    def forward(self, stacks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*stack) for stack in stacks])]

    def backward(self, gradient: Tensor, stacks: Tensor) -> list[Tensor]:
        n, b, k, _ = stacks.shape
        return [gradient.reshape(n, b, k, b, k).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)]


@dataclass(frozen=True)
class Pair:
    """One layer, operated on by us and adapted by PEFT. `config`: PEFT's, resolved for the layer."""

    method: Method
    config: Config
    place: Place
    surgeon: Surgeon
    theirs: peft.PeftModel
    x: Tensor

    @property
    def mine(self) -> nn.Module:
        return self.surgeon.model

    @property
    def map(self) -> Correspondence:
        return self.method.map(self.config, self.place)

    def saved(self) -> dict[str, Tensor]:
        """PEFT's tensors of the adapter by the name that PEFT saves them under, those that train as its own parameters.
        """
        state = self.theirs.state_dict(keep_vars=True)
        found = peft.get_peft_model_state_dict(self.theirs, state, save_embedding_layers=False)
        return {name.removeprefix(PREFIX): tensor for name, tensor in found.items()}

    def again(self) -> dict[str, Tensor]:
        """Those that PEFT draws again instead of saving them."""
        return dict(self.method.again(self.config, [self.place])[0])

    def give(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors into PEFT's layer."""
        own = {name: tensor for name, tensor in tensors.items() if name not in self.again()}
        named = {name if name.startswith("base_model.") else PREFIX + name: tensor for name, tensor in own.items()}
        found = peft.set_peft_model_state_dict(self.theirs, named)
        assert not found.unexpected_keys

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors into our layer; those that are not given stay as they are."""
        assert tensors.keys() <= self.ours().keys()
        assert all(key in tensors for key, tensor in self.ours().items() if tensor.requires_grad)
        mine = {f"layer.weight_surgery.{key}": value.detach().clone() for key, value in tensors.items()}
        self.surgeon.load({**self.surgeon.state(), **self.surgeon.as_named(mine)})

    def ours(self) -> dict[str, Tensor]:
        """Our tensors by key, in the shapes of the formula."""
        return self.surgeon.adapters["layer"].values()

    def held(self) -> dict[str, Tensor]:
        """Our tensors as the layer holds them, for their gradients."""
        return self.surgeon.adapters["layer"].tensors()


def pair(method: Method, layer: Layer, config: Mapping[str, Any]) -> Pair:
    """Both layers as they start, in float64."""
    torch.manual_seed(0)
    base = One(layer.build())
    if getattr(base.layer, "bias", None) is not None:
        nn.init.normal_(base.layer.bias)
    theirs = adapted(base, full(method, config))
    resolved = resolve(method, theirs.peft_config["default"])
    surgeon = apply(base, spec_of(method, resolved, base.layer))
    place, x = place_of(base.layer), layer.x()
    base.double()
    return Pair(method, resolved, place, surgeon, theirs.double(), x.double() if x.is_floating_point() else x)


def adapted(base: nn.Module, config: peft.PeftConfig) -> peft.PeftModel:
    """PEFT's model on a copy of the base model."""
    peft.tuners.boft.layer._FBD_CUDA = Blocks()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of blocks that do not divide, of Conv1D's storage, of a layer without a bias
        return peft.get_peft_model(deepcopy(base), config)


def full(method: Method, config: Mapping[str, Any]) -> peft.PeftConfig:
    """PEFT's configuration of one layer."""
    lists = {name: ["layer"] if method.settings.get(name) else [] for name in method.family.lists}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = getattr(peft, method.family.config_class)
        return made(**{**config, **method.settings, **lists, "target_modules": ["layer"]})


def resolve(method: Method, config: peft.PeftConfig) -> Config:
    """The configuration as plain values, for one layer."""
    plain = config.to_dict()
    return {**plain, **{name: "layer" in (plain[name] or ()) for name in method.family.lists}}


def place_of(layer: nn.Module) -> Place:
    return Place.of(sites(One(layer))[0])


def spec_of(method: Method, config: Config, layer: nn.Module) -> Spec:
    """The spec that the one row says that fits the configuration."""
    assert [m.name for m in METHODS if m.fits(config) and m.is_on(config, place_of(layer))] == [method.name]
    spec = retarget(method.given(config, place_of(layer)), "layer")
    return spec.model_copy(update={"targets": tuple(t.model_copy(update={"kind": "any"}) for t in spec.targets)})


def run(model: nn.Module, x: Tensor, parameters: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients of the parameters that train and of the input."""
    leaves = {**parameters, **({"x": x.clone().requires_grad_()} if x.is_floating_point() else {})}
    y = model(leaves.get("x", x))
    direction = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(5))
    return y, gradients(y, direction, leaves)


def pulled_back(both: Pair, saved: Mapping[str, Tensor], mine: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our gradients as gradients of PEFT's tensors, through the map from theirs to ours."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in saved.items() if t.requires_grad}
    ours = both.map.to_ours({**both.again(), **saved, **leaves}, both.place)
    total = sum((ours[key] * gradient).sum() for key, gradient in mine.items())
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()))))


def perturb(parameters: Iterator[Tensor], seed: int = 1, size: float = 0.3) -> None:
    """Move the parameters that train away from where they start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)


@dataclass(frozen=True)
class Compared:
    """What PEFT's layer and ours gave, by what it is of: the output, the gradients."""

    actual: dict[str, Tensor]
    expected: dict[str, Tensor]

    def without(self, names: Iterable[str]) -> Compared:
        """What is left without some of it."""
        return Compared({name: t for name, t in self.actual.items() if name not in names}, self.expected)

    @property
    def error(self) -> float:
        """The largest relative difference of all."""
        return max(relative(a, self.expected[name]) for name, a in self.actual.items())


def compare(both: Pair) -> Compared:
    """The same parameters, PEFT's moved away from where they start, in both layers."""
    perturb(both.theirs.parameters())
    saved = both.saved()
    both.take(both.map.to_ours({**both.again(), **saved}, both.place))
    y, mine = run(both.mine, both.x, both.held())
    mine = {key: value.reshape(both.ours()[key].shape) if key in both.ours() else value for key, value in mine.items()}
    wanted, theirs = run(both.theirs, both.x, {name: t for name, t in saved.items() if t.requires_grad})
    inputs = {"x": mine.pop("x")} if "x" in mine else {}
    found = {"the output": y, **inputs, **pulled_back(both, saved, mine)}
    return Compared(found, {"the output": wanted, **theirs})


def relative(actual: Tensor, expected: Tensor) -> float:
    size = expected.detach().double().norm().item() or 1.0
    return (actual.detach().double() - expected.detach().double()).norm().item() / size
