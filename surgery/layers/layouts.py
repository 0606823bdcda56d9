"""Layouts: how a module's weight is seen as matrices [out, in], whatever way it is stored.

Takes a module, gives its `Layout` (one row of a table per family of classes) or the reason why it has none that can be
operated on. Promises: shapes and views only, so it works on the meta device; `unmatrix(matrix(w), w.shape)` is `w`.
A layer whose weight is no plain matrix is called and not read: its sides are those that it says.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

from torch import Tensor, nn

from surgery.layers import kinds, opaque_linear
from surgery.layers.kinds import LayerKind

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """One family of modules: its kind and the view of a weight as [out, in] (or as a stack [E, out, in])."""

    name: str
    kind: LayerKind
    view: Callable[[Tensor], Tensor]
    back: Callable[[Tensor, Shape], Tensor]

    @property
    def is_called(self) -> bool:
        """True if no weight is stored that could be viewed, and W is known by calls alone."""
        return self.kind.is_called

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as [..., out, in]: a view wherever its strides allow one."""
        return self.view(weight)

    def unmatrix(self, matrix: Tensor, weight_shape: Shape) -> Tensor:
        """A matrix [..., out, in] in the shape that the module stores: a view where one exists."""
        return self.back(matrix, weight_shape)

    def shape(self, module: nn.Module, parameter: str = "weight") -> tuple[int, int]:
        """(out, in) of the module's weight, read off its shape alone; of a called layer, the sides that it says."""
        if self.is_called:
            return opaque_linear.said_sides(module)
        out, in_ = self.matrix(opaque_linear.stored_weight(module, parameter).to("meta")).shape[-2:]
        return out, in_


def _as_stored(weight: Tensor, shape: Shape | None = None) -> Tensor:
    return weight


def _transposed(weight: Tensor, shape: Shape | None = None) -> Tensor:
    return weight.mT


def _kernels(weight: Tensor) -> Tensor:
    return weight.flatten(1)


def _column(weight: Tensor) -> Tensor:
    return weight[..., None]


LINEAR = Layout("linear", kinds.LINEAR, _as_stored, _as_stored)
CALLED = Layout("linear", kinds.CALLED, _as_stored, _as_stored)
CONV1D = Layout("transposed linear", kinds.LINEAR, _transposed, _transposed)
CONV = Layout("convolution", kinds.CONV, _kernels, Tensor.reshape)
GROUPED = Layout("grouped convolution", kinds.GROUPED, _kernels, Tensor.reshape)
EMBEDDING = Layout("embedding", kinds.EMBEDDING, _as_stored, _as_stored)
EXPERTS = Layout("experts", kinds.LINEAR, _as_stored, _as_stored)
TRANSPOSED_EXPERTS = Layout("transposed experts", kinds.LINEAR, _transposed, _transposed)

NORM = Layout("norm", kinds.NORM, _column, Tensor.reshape)

TRANSFORMERS_CONV1D = "transformers.pytorch_utils.Conv1D"


class Weight(NamedTuple):
    """A weight that a module holds: its layout, its parameter's name and, in a stack, how many matrices it has."""

    layout: Layout
    parameter: str
    stack: int | None = None


# ------------------------------------------------------------------------------------------ which layout a module has


def _is(*classes: type[nn.Module]) -> Callable[[nn.Module], bool]:
    return lambda module: isinstance(module, classes)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether transformers' class is among the module's: by its full name, since it may not be installed."""
    return any(f"{c.__module__}.{c.__qualname__}" == TRANSFORMERS_CONV1D for c in type(module).__mro__)


_is_linear = _is(nn.Linear)
_is_conv, _is_embedding = _is(nn.Conv1d, nn.Conv2d, nn.Conv3d), _is(nn.Embedding)


def _is_called(module: nn.Module) -> bool:
    """True for a linear layer without a plain weight: of a known class, or recognised by what it holds."""
    if opaque_linear.sides(module) is None or _is_conv(module) or _is_embedding(module):
        return False
    known = _is_linear(module) or _is_conv1d(module)
    return not (opaque_linear.has_plain_weight(module) or _lazy(module)) if known else opaque_linear.is_packed(module)


def _lazy(module: nn.Module) -> bool:
    return isinstance(module._parameters.get("weight"), nn.UninitializedParameter)


def _no_parameter(module: nn.Module) -> bool:
    return "weight" not in module._parameters


def _quantised(module: nn.Module) -> bool:
    return not opaque_linear.is_plain(opaque_linear.stored(module, "weight"))


def _is_true(attribute: str) -> Callable[[nn.Module], bool]:
    return lambda module: bool(getattr(module, attribute))


PACKED = "its weight is quantised, and only linear layers can be called for their map"
Faults = tuple[tuple[Callable[[nn.Module], bool], str], ...]
_UNREADABLE: Faults = (
    (_no_parameter, "its weight is computed from other parameters (a parametrisation)"),
    (_lazy, "its weight has no shape yet: run a forward pass first"),
    (_quantised, PACKED),
)


def _convolution(module: nn.Module) -> Layout:
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))  # as `_is_conv` says
    groups = module.groups
    return CONV if groups == 1 else replace(GROUPED, kind=replace(kinds.GROUPED, groups=groups))


class Family(NamedTuple):
    """A family of module classes: which modules `fits` accepts, their layout, and reasons why one of them cannot be
    operated on."""

    fits: Callable[[nn.Module], bool]
    layout: Callable[[nn.Module], Layout]
    faults: Faults = _UNREADABLE


FAMILIES = (
    Family(_is_called, lambda module: CALLED, ()),
    Family(_is_linear, lambda module: LINEAR),
    Family(_is_conv1d, lambda module: CONV1D),
    Family(_is_conv, _convolution),
    Family(_is_embedding, lambda module: EMBEDDING, (
        *_UNREADABLE,
        (lambda m: getattr(m, "max_norm", None) is not None, "max_norm rescales its weight in every forward pass"),
        (_is_true("sparse"), "it asks for sparse gradients"),
        (_is_true("scale_grad_by_freq"), "it scales its gradients by frequency"),
    )),
)


def _family(module: nn.Module) -> Family | None:
    return next((family for family in FAMILIES if family.fits(module)), None)


def weights(module: nn.Module) -> tuple[Weight, ...]:
    """The weights of a module that are seen as matrices: its own one (a called layer's is named `weight` too), or each
    parameter of a stack of experts."""
    family = _family(module)
    if family is not None:
        return (Weight(family.layout(module), "weight"),)
    layout = _stacked(module)
    if layout is None:
        return ()
    stacks = {name: p.shape[0] for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
    return tuple(Weight(layout, name, stack) for name, stack in stacks.items())


# Experts of transformers that do not say by its interface how they lie.
_BY_CLASS = {"jetmoe.modeling_jetmoe.JetMoeParallelExperts": EXPERTS,
             "llama4.modeling_llama4.Llama4TextExperts": TRANSPOSED_EXPERTS,
             "step3p7.modeling_step3p7.Step3p7Experts": EXPERTS}


def _stacked(module: nn.Module) -> Layout | None:
    """How a module of fused experts holds them, where every 3-D parameter is a stack; None for another module."""
    if all(hasattr(module, mark) for mark in ("num_experts", "is_transposed", "has_bias")):  # transformers' interface
        return TRANSPOSED_EXPERTS if module.is_transposed else EXPERTS
    names = (f"{c.__module__}.{c.__qualname__}".removeprefix("transformers.models.") for c in type(module).__mro__)
    return next((_BY_CLASS[name] for name in names if name in _BY_CLASS), None)


# --------------------------------------------------------------------------------------------------- what is refused

_READ_BY_PARENT: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.MultiheadAttention, "nn.MultiheadAttention reads its weight directly and never calls it"),
    (nn.TransformerEncoderLayer, "the fast path of nn.TransformerEncoderLayer reads its weight directly"),
)


def is_of_peft(module: object) -> bool:
    """Whether a layer of PEFT's holds a base layer, and an adapter that it merges into that layer's weight."""
    return isinstance(module, getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", ()))


def refusal(module: nn.Module, above: Sequence[nn.Module]) -> str:
    """The reason why a module with a layout cannot be operated on; empty if it can. `above`: the modules that hold it,
    outermost first."""
    family = _family(module)
    if family is None:
        # of packed experts the scales lie beside them, and are stacks too
        stacked = (module._parameters[weight.parameter] for weight in weights(module))
        return "" if all(map(opaque_linear.is_plain, stacked)) else PACKED
    if any(map(is_of_peft, above)):  # of the base layer and of the adapter it takes, adds to and writes plain weights
        return "PEFT computes with its weight and merges into it: merge_and_unload() first, or surgery.import_peft"
    by_parent = (why for cls, why in _READ_BY_PARENT if isinstance(above[-1] if above else None, cls))
    by_itself = (why for is_so, why in family.faults if is_so(module))
    return next(chain(by_parent, by_itself), "")


# What torch's own classes do in a forward pass is their layout's map; what a subclass does that has its own, is not.
_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


def is_direct(module: nn.Module, layout: Layout) -> bool:
    """Whether the layout's map is all that the module's forward does. (A forward on the instance does what it likes,
    unless it is a hook that moves tensors and then runs the class's.)"""
    base = opaque_linear.own_class(module)
    is_conv1d = f"{base.__module__}.{base.__name__}" == TRANSFORMERS_CONV1D
    is_plain = is_conv1d or any(issubclass(base, c) and base.forward is c.forward for c in _PLAIN)
    return layout.is_called or is_plain and not opaque_linear.has_forward_of_its_own(module)


# The ways in which transformers runs fused experts by products of torch's own. Others (kernels) take W in memory.
_BY_TORCH = {None, "eager", "batched_mm", "grouped_mm"}


def runs_by_torch(module: nn.Module) -> bool:
    """Whether the forward of fused experts, as the model's config now chooses it, is known to use torch's operations
    alone, so that a tensor class of ours can stand in the place of their weights."""
    config = getattr(module, "config", None)
    base = opaque_linear.own_class(module)
    is_known = getattr(opaque_linear.forward_of(module), "__func__", None) is base.forward
    return is_known and getattr(config, "_experts_implementation", "") in _BY_TORCH
