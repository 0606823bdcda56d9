"""What a row of the table of PEFT's methods is: one method of PEFT's beside the spec that says the same.

Takes PEFT's configuration as plain values (`adapter_config.json`, as `modules.resolved` gives it for the module) and tensors
by the name that PEFT saves them under, below the module's own. Gives our spec's parameters and tensors by leaf key, and both
back. Promises: PEFT itself is not imported; a configuration with a switch on that a row does not know fits no row; a tensor
that goes to the other side and back has the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from surgery.sites import Site
from surgery.spec import bind, keywords, load, parse
from surgery.syntax.tree import Spec

Config = Mapping[str, Any]
Tensors = Mapping[str, Tensor]
OFF = (False, None)


@dataclass(frozen=True)
class Place:
    """One module: its layout's name, its weight's sides as a matrix [out, in], and its weight's shape as it is stored."""

    layout: str
    out: int
    in_: int
    shape: tuple[int, ...]

    @classmethod
    def of(cls, site: Site) -> Place:
        return cls(site.layout.name, site.out, site.in_, tuple(site.weight.shape))


# ------------------------------------------------------------------------------------------------------ tensors


class Correspondence(Protocol):
    """How PEFT's tensors of one module map onto ours."""

    def to_ours(self, theirs: Tensors, place: Place) -> dict[str, Tensor]: ...

    def to_peft(self, ours: Tensors, place: Place) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class View:
    """A tensor of PEFT's as ours, and back."""

    to_ours: Callable[[Tensor, Place], Tensor]
    to_peft: Callable[[Tensor, Place], Tensor]


@dataclass(frozen=True)
class Pair:
    """The tensor that PEFT calls `theirs` is our leaf `ours`, seen through a view."""

    theirs: str
    ours: str
    view: View


@dataclass(frozen=True)
class Pairs:
    """A correspondence tensor by tensor."""

    pairs: tuple[Pair, ...]

    def to_ours(self, theirs: Tensors, place: Place) -> dict[str, Tensor]:
        return {p.ours: p.view.to_ours(theirs[p.theirs], place) for p in self.pairs}

    def to_peft(self, ours: Tensors, place: Place) -> dict[str, Tensor]:
        return {p.theirs: p.view.to_peft(ours[p.ours], place) for p in self.pairs}


def pairs(*rows: tuple[str, str, View]) -> Pairs:
    return Pairs(tuple(Pair(*row) for row in rows))


def _upper(stack: Tensor) -> Tensor:
    """What stands above the diagonals of matrices [b, k, k], row by row: [b, k (k - 1) / 2]."""
    rows, columns = torch.triu_indices(stack.shape[-1], stack.shape[-1], 1, device=stack.device)
    return stack[:, rows, columns]


def _skew(upper: Tensor, place: Place) -> Tensor:
    """The skew matrices [b, k, k] with the numbers [b, k (k - 1) / 2] above their diagonals."""
    size = round((1 + (1 + 8 * upper.shape[1]) ** 0.5) / 2)
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    filled = upper.new_zeros(len(upper), size, size).index_put((torch.arange(len(upper))[:, None], rows, columns), upper)
    return filled - filled.mT


SAME = View(lambda t, place: t, lambda t, place: t)
TURNED = View(lambda t, place: t.mT, lambda t, place: t.mT)
# A convolution's kernels [m, channels, ...] as rows [m, channels · ...], and one number for each output as a kernel of size 1.
KERNELS = View(lambda t, place: t.flatten(1), lambda t, place: t.reshape(-1, *place.shape[1:]))
POINTS = View(lambda t, place: t.flatten(1), lambda t, place: t.reshape(*t.shape, *(1 for _ in place.shape[2:])))
CHANNELS = View(lambda t, place: t.flatten(), lambda t, place: t.reshape(1, -1, *(1 for _ in place.shape[2:])))
# Only Q - Qᵀ counts of our stack Q, and PEFT keeps half of that: the numbers above the diagonal.
SKEW = View(_skew, lambda t, place: _upper(t - t.mT) / 2)
SKEW_TURNED = View(lambda t, place: _skew(t, place).mT, lambda t, place: _upper(t.mT - t) / 2)


# --------------------------------------------------------------------------------------------------- parameters


class Translation(Protocol):
    """How PEFT's configuration says our spec's parameters, for one module."""

    def to_ours(self, config: Config, place: Place) -> dict[str, Any]: ...

    def to_peft(self, parameters: Mapping[str, Any]) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Renamed:
    """Our parameters are fields of PEFT's, by our name. A whole number is one on PEFT's side too (`lora_alpha: int`)."""

    names: Mapping[str, str]

    def to_ours(self, config: Config, place: Place) -> dict[str, Any]:
        return {ours: config[theirs] for ours, theirs in self.names.items()}

    def to_peft(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        return {theirs: _whole(parameters[ours]) for ours, theirs in self.names.items() if ours in parameters}


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


# ------------------------------------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class Family:
    """One of PEFT's configuration classes. `plain`: the values of its switches that leave the formula as the family's
    plainest method has it; a field that an older configuration lacks counts as None.

    `lists`: the fields that list modules, which the configuration of one module has as true or false; `patterns`: by field,
    the field that gives other values of it to some modules, by the end of their names; `biases`: what its `bias` says where
    the operated modules' own biases are trained too.
    """

    peft_type: str
    config_class: str
    plain: Mapping[str, tuple[Any, ...]]
    lists: tuple[str, ...] = ()
    patterns: Mapping[str, str] = field(default_factory=dict)
    biases: str = ""


@dataclass(frozen=True)
class Method:
    """A row. `spec`: a shipped name or a text; `settings`: the switches of PEFT's that must stand like this, and what PEFT
    is told beside the parameters; `tensors`: by the name of the layout, for the layouts that PEFT has the method on."""

    name: str
    family: Family
    spec: str
    parameters: Translation
    tensors: Mapping[str, Correspondence]
    settings: Mapping[str, Any] = field(default_factory=dict)
    refuses: Callable[[Place], str] = lambda place: ""

    def fits(self, config: Config) -> bool:
        """Whether a configuration of PEFT's is this method's, whatever its parameters."""
        allowed = {**self.family.plain, **{name: (value,) for name, value in self.settings.items()}}
        return config.get("peft_type") == self.family.peft_type and all(config.get(n) in v for n, v in allowed.items())

    def is_on(self, place: Place) -> bool:
        """Whether PEFT has the method on such a module, with the formula of our spec."""
        return place.layout in self.tensors and not self.refuses(place)

    def given(self, config: Config, place: Place) -> Spec:
        """Our spec for a module, its parameters set from PEFT's configuration. Raises: SurgeryError."""
        return self.of(self.parameters.to_ours(config, place))

    def of(self, parameters: Mapping[str, Any]) -> Spec:
        """Our spec with its parameters set. Raises: SurgeryError."""
        read = parse(self.spec, self.name) if "\n" in self.spec else load(self.spec)
        return bind(read, keywords(parameters))

    def config(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """What PEFT's configuration must say, given our spec's parameters."""
        return {**self.settings, **self.parameters.to_peft(parameters)}
