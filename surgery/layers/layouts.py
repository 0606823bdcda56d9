"""Layouts: how a module's weight is seen as matrices [out, in], whatever way it is stored.

Takes a module, gives its `Layout` (one row of a table per family of classes) or the reason why it has none that can be
operated on. Promises: shapes and views only, so it works on the meta device; `unmatrix(matrix(w), w.shape)` is `w`.
A layer whose weight is no plain matrix is called and not read: its sides are those that it says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from torch import Tensor, nn

from surgery.layers import opaque_linear

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """One family of modules: its kind and the view of a weight as [out, in] (or as a stack [E, out, in]). `is_called`:
    there is no weight to view, and W is what the module's calls say."""

    name: str
    kind: str
    view: Callable[[Tensor], Tensor]
    back: Callable[[Tensor, Shape], Tensor]
    is_called: bool = False

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as [..., out, in]: a view wherever its strides allow one."""
        return self.view(weight)

    def unmatrix(self, matrix: Tensor, weight_shape: Shape) -> Tensor:
        """A matrix [..., out, in] in the shape that the module stores: a view where one exists."""
        return self.back(matrix, weight_shape)

    def shape(self, module: nn.Module, parameter: str = "weight") -> tuple[int, int]:
        """(out, in) of the module's weight, read off its shape alone; of a called layer, the sides that it says."""
        if self.is_called:
            return opaque_linear.sides(module)
        out, in_ = self.matrix(opaque_linear.stored(module, parameter).to("meta")).shape[-2:]
        return out, in_


def _as_stored(weight: Tensor, shape: Shape | None = None) -> Tensor:
    return weight


def _transposed(weight: Tensor, shape: Shape | None = None) -> Tensor:
    return weight.mT


def _kernels(weight: Tensor) -> Tensor:
    return weight.flatten(1)


LINEAR = Layout("linear", "linear", _as_stored, _as_stored)
CALLED = Layout("linear", "linear", _as_stored, _as_stored, is_called=True)
CONV1D = Layout("transposed linear", "linear", _transposed, _transposed)
CONV = Layout("convolution", "conv", _kernels, Tensor.reshape)
EMBEDDING = Layout("embedding", "embedding", _as_stored, _as_stored)
EXPERTS = Layout("experts", "linear", _as_stored, _as_stored)
TRANSPOSED_EXPERTS = Layout("transposed experts", "linear", _transposed, _transposed)

TRANSFORMERS_CONV1D = "transformers.pytorch_utils.Conv1D"


class Weight(NamedTuple):
    """A weight that a module holds: its layout, its parameter's name and, in a stack, how many matrices it has."""

    layout: Layout
    parameter: str
    stack: int | None = None


# ------------------------------------------------------------------------------------------ which layout a module has


def _is(*classes: type[nn.Module]) -> Callable[[nn.Module], bool]:
    return lambda module: isinstance(module, classes)


def _is_named(qualified: str) -> Callable[[nn.Module], bool]:
    """Whether a class of that full name is among the module's, without importing it."""
    return lambda module: any(f"{c.__module__}.{c.__qualname__}" == qualified for c in type(module).__mro__)


_is_linear, _is_conv1d = _is(nn.Linear), _is_named(TRANSFORMERS_CONV1D)
_is_conv, _is_embedding = _is(nn.Conv1d, nn.Conv2d, nn.Conv3d), _is(nn.Embedding)


def _is_called(module: nn.Module) -> bool:
    """Whether it is a linear layer without a plain weight: of the classes that are known, or by what it holds."""
    if opaque_linear.sides(module) is None or _is_conv(module) or _is_embedding(module):
        return False
    known = _is_linear(module) or _is_conv1d(module)
    return not (opaque_linear.has_plain_weight(module) or _lazy(module)) if known else opaque_linear.is_packed(module)


def _lazy(module: nn.Module) -> bool:
    return isinstance(module._parameters.get("weight"), nn.UninitializedParameter)


ROWS: tuple[tuple[Callable[[nn.Module], bool], Layout], ...] = (
    (_is_called, CALLED),
    (_is_linear, LINEAR),
    (_is_conv1d, CONV1D),
    (_is_conv, CONV),
    (_is_embedding, EMBEDDING),
)


def weights(module: nn.Module) -> tuple[Weight, ...]:
    """The weights of a module that are seen as matrices: its own one (a called layer's is named `weight` too), or each
    parameter of a stack of experts."""
    for fits, layout in ROWS:
        if fits(module):
            return (Weight(layout, "weight"),)
    return _expert_weights(module)


def _expert_weights(module: nn.Module) -> tuple[Weight, ...]:
    """Every 3-D parameter of a module with transformers' interface of fused experts."""
    if not all(hasattr(module, mark) for mark in ("num_experts", "is_transposed", "has_bias")):
        return ()
    layout = TRANSPOSED_EXPERTS if module.is_transposed else EXPERTS
    stacks = {name: p.shape[0] for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
    return tuple(Weight(layout, name, stack) for name, stack in stacks.items())


# --------------------------------------------------------------------------------------------------- what is refused

_READ_BY_PARENT: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.MultiheadAttention, "nn.MultiheadAttention reads its weight directly and never calls it"),
    (nn.TransformerEncoderLayer, "the fast path of nn.TransformerEncoderLayer reads its weight directly"),
)


def _no_parameter(module: nn.Module) -> bool:
    return "weight" not in module._parameters


def _quantised(module: nn.Module) -> bool:
    return not opaque_linear.is_plain(opaque_linear.stored(module, "weight"))


def _is_true(attribute: str) -> Callable[[nn.Module], bool]:
    return lambda module: bool(getattr(module, attribute))


_UNREADABLE = (
    (_no_parameter, "its weight is computed from other parameters (a parametrisation)"),
    (_lazy, "its weight has no shape yet: run a forward pass first"),
    (_quantised, "its weight is quantised, and only linear layers can be called for their map"),
)
_FAULTS: dict[str, tuple[tuple[Callable[[nn.Module], bool], str], ...]] = {
    "called": (),
    "linear": _UNREADABLE,
    "conv": (
        *_UNREADABLE,
        (lambda m: m.groups != 1, "it has groups, so its weight is not one matrix"),
    ),
    "embedding": (
        *_UNREADABLE,
        (lambda m: m.max_norm is not None, "max_norm rescales its weight in every forward pass"),
        (_is_true("sparse"), "it asks for sparse gradients"),
        (_is_true("scale_grad_by_freq"), "it scales its gradients by frequency"),
    ),
}


def refusal(module: nn.Module, parent: nn.Module | None) -> str:
    """Why a module that has a layout cannot be operated on all the same; empty if it can."""
    found = weights(module)
    if not found or found[0].stack is not None:
        return ""
    by_parent = (why for kind, why in _READ_BY_PARENT if isinstance(parent, kind))
    faults = _FAULTS["called" if found[0].layout.is_called else found[0].layout.kind]
    by_itself = (why for is_so, why in faults if is_so(module))
    return next(chain(by_parent, by_itself), "")
