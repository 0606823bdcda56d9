"""The layers that the zoo is put on, and the operation itself: a model with one operated layer beside its untouched
copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import oracle as o
import torch
from case import Case, Parameters
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from surgery.runtime.apply import apply
from surgery.runtime.surgeon import Surgeon

EXACT = 1e-10


@dataclass(frozen=True)
class Layout:
    """A layer to operate on: how it is built, fed, and seen as a matrix, and the oracle's map for it."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    run: Callable[[Tensor, Tensor, Tensor | None], Tensor] = o.linear
    matrix: Callable[[Tensor], Tensor] = lambda w: w

    def __str__(self) -> str:
        return self.name


def _rows(width: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, 3, width)


def _linear(in_: int, out: int, bias: bool = True) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(in_, out, bias)


def _kernels(weight: Tensor) -> Tensor:
    return weight.reshape(weight.shape[0], -1)


LAYOUTS = {layout.name: layout for layout in (
    Layout("linear 12x18", _linear(18, 12), _rows(18)),
    Layout("linear 18x12 without bias", _linear(12, 18, False), _rows(12)),
    Layout("linear 12x12", _linear(12, 12), _rows(12)),
    Layout("Conv1D 18x12", lambda: Conv1D(18, 12), _rows(12), matrix=o.t),
    Layout("Conv1D 12x12", lambda: Conv1D(12, 12), _rows(12), matrix=o.t),
    Layout("Conv2d 12x18", lambda: nn.Conv2d(2, 12, 3), lambda: torch.randn(2, 2, 4, 5), o.convolution, _kernels),
    Layout("Conv1d 12x12", lambda: nn.Conv1d(4, 12, 3, bias=False), lambda: torch.randn(2, 4, 5), o.convolution,
           _kernels),
    Layout("Conv2d 12x18 in 2 groups", lambda: nn.Conv2d(4, 12, 3, groups=2), lambda: torch.randn(2, 4, 4, 5),
           o.in_groups(2), _kernels),
    Layout("Embedding 18x12", lambda: nn.Embedding(18, 12), lambda: torch.randint(18, (2, 4)), o.embedding),
)}
LINEARS = [layout for name, layout in LAYOUTS.items() if name.startswith("linear")]
OBLONG = [layout for layout in LINEARS if layout.name != "linear 12x12"]
# Of each kind of layer, and of each side that can be the longer one; the rest are square, or see their weight as a matrix
# in a way of their own, which is the same for any formula.
ALWAYS = [*OBLONG, LAYOUTS["Conv2d 12x18"], LAYOUTS["Embedding 18x12"]]
IN_TURN = [layout for layout in LAYOUTS.values() if layout not in ALWAYS]


class Tower(nn.Module):
    """A list of layers in a row, so that `layer` and `depth` mean something."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def perturb(module: nn.Module, size: float = 0.3, seed: int = 0) -> None:
    """Move every adapter parameter, frozen ones too (but for places), away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            if "_surgery." in name and parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += (size * noise).to(parameter.dtype)


def _double(tensor: Tensor) -> Tensor:
    """In float64, unless it holds places."""
    return tensor.detach().double() if tensor.is_floating_point() else tensor.detach()


@dataclass(frozen=True)
class Operated:
    """A model with one operated layer, that layer's own copy from before, and an input."""

    case: Case
    layout: Layout
    model: Tower
    surgeon: Surgeon
    base: nn.Module
    x: Tensor

    @property
    def layer(self) -> nn.Module:
        return self.model.layers[0]

    @property
    def adapter(self) -> nn.Module:
        return self.surgeon.adapters["layers.0"]

    @property
    def weight(self) -> Tensor:
        """The frozen weight as a matrix in float64."""
        return self.layout.matrix(self.base.weight.detach().double())

    @property
    def bias(self) -> Tensor | None:
        bias = getattr(self.base, "bias", None)
        return None if bias is None else bias.detach().double()

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The adapter's own tensors, by key."""
        return self.adapter.tensors()

    @property
    def p(self) -> Parameters:
        """The adapter's tensors as they are, in float64, for the oracle."""
        return Parameters.of({key: _double(value) for key, value in self.parameters.items()})

    def leaves(self) -> dict[str, Tensor]:
        """The adapter's tensors in float64, as fresh leaves of autograd where they are trained."""
        return {key: _double(value).requires_grad_(value.requires_grad) for key, value in self.parameters.items()}

    def input(self) -> dict[str, Tensor]:
        """A fresh copy of the input; a leaf of autograd unless it is token ids."""
        return {"x": self.x.clone().requires_grad_(self.x.is_floating_point())}

    def oracle(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The output that the oracle computes, in float64."""
        p, bias = Parameters.of(tensors), self.bias
        weight = self.case.formula(self.weight, p)
        return self.layout.run(x, weight, None if bias is None else self.case.bias(bias, p))


def operated(case: Case, layout: Layout, dtype: torch.dtype = torch.float64, noise: float = 0.3, adapter: Any = None,
             **settings: Any) -> Operated:
    """The case applied to the layer, its parameters moved by `noise`; everything in `dtype`,
    the adapter if not said else."""
    torch.manual_seed(1)
    model = Tower(layout.build().to(dtype))
    if getattr(model.layers[0], "bias", None) is not None:
        nn.init.normal_(model.layers[0].bias)
    torch.nn.init.normal_(model.layers[0].weight, std=0.5)
    base, x = Tower(layout.build().to(dtype)), layout.inputs()
    base.load_state_dict(model.state_dict())
    surgeon = apply(model, case.spec(**settings), seed=3, dtype=adapter or dtype)
    perturb(model, noise)
    return Operated(case, layout, model, surgeon, base.layers[0], x.to(dtype) if x.is_floating_point() else x)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """‖actual - expected‖ <= tolerance ‖expected‖ (or tolerance itself, where nothing is expected),
    and equal shapes."""
    assert actual.shape == expected.shape, f"{what} {tuple(actual.shape)} is not {tuple(expected.shape)}"
    size = expected.detach().double().norm().item() or 1.0
    error = (actual.detach().double() - expected.detach().double()).norm().item() / size
    assert error <= tolerance, f"{what} is off by {error:.1e}, relative"


def assert_starts(op: Operated) -> None:
    """With its parameters as they start, the layer is the base layer, unless its case says that it is not."""
    with torch.no_grad():
        change = (op.model(op.x) - op.base(op.x)).double().norm() / op.base(op.x).double().norm()
    assert (change > 1e-3) if op.case.shifted else (change < 1e-5)


def gradients(y: Tensor, direction: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of <y, direction> in the leaves that take one; zero where nothing reaches them."""
    taking = {key: leaf for key, leaf in leaves.items() if leaf.requires_grad}
    found = torch.autograd.grad((y * direction).sum(), list(taking.values()), allow_unused=True)
    return {key: torch.zeros_like(leaf) if g is None else g for (key, leaf), g in zip(taking.items(), found)}


def compare(op: Operated, expected: Tensor, x: dict[str, Tensor], leaves: dict[str, Tensor],
            tolerance: float = EXACT) -> None:
    """The layer's output and gradients against those of another program over `leaves` and the input `x`."""
    mine = op.input()
    y = op.model(mine["x"])
    assert_close(y, expected, tolerance, "the output")
    direction = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(5))
    actual = gradients(y, direction, {**mine, **op.parameters})
    wanted = gradients(expected, direction.double(), {**x, **leaves})
    assert actual.keys() == wanted.keys()
    for key, gradient in wanted.items():
        assert_close(actual[key], gradient, tolerance, f"the gradient of {key}")
