"""What a row of the table of PEFT's methods is: one method of PEFT's beside the spec that says the same.

Takes PEFT's configuration as plain values (`adapter_config.json`, as `modules.resolved` gives it for the module) and
tensors as `surgery.peft.tensor_mapping` says. Gives our spec's parameters and tensors by leaf key, and both back.
Promises: PEFT itself is not imported; a configuration with a switch on that a row does not know fits no row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

from surgery.language.library import bind, keywords, load, parse
from surgery.language.tree import Spec
from surgery.peft.tensor_mapping import Correspondence, Place, Tensors

Config = Mapping[str, Any]
OFF = (False, None)
NO_BIAS = ("none", None)


class Translation(Protocol):
    """How PEFT's configuration says our spec's parameters, for one module; `fields`: those it reads, all numbers."""

    @property
    def fields(self) -> tuple[str, ...]: ...

    def to_ours(self, config: Config, place: Place) -> dict[str, Any]: ...

    def to_peft(self, parameters: Mapping[str, Any]) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Renamed:
    """Our parameters are fields of PEFT's, by our name. A whole number is one on PEFT's side too (`lora_alpha: int`).
    `placed` gives the parameters that follow from the configuration and the module together."""

    names: Mapping[str, str]
    placed: Callable[[Config, Place], dict[str, Any]] = lambda config, place: {}

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(self.names.values())

    def to_ours(self, config: Config, place: Place) -> dict[str, Any]:
        return {**{ours: config[theirs] for ours, theirs in self.names.items()}, **self.placed(config, place)}

    def to_peft(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        values = {theirs: parameters[ours] for ours, theirs in self.names.items() if ours in parameters}
        return {name: int(v) if isinstance(v, float) and v.is_integer() else v for name, v in values.items()}


@dataclass(frozen=True)
class Family:
    """One of PEFT's configuration classes. `plain`: the values of its switches that leave the formula as the family's
    plainest method has it; a field that an older configuration lacks counts as None.

    `lists`: the fields that list modules, which the configuration of one module has as true or false; `patterns`: by
    field, the field that gives other values of it to some modules, by the end of their names; `biases`: what its `bias`
    says where the operated modules' own biases are trained too.
    """

    peft_type: str
    config_class: str
    plain: Mapping[str, tuple[Any, ...]]
    lists: tuple[str, ...] = ()
    patterns: Mapping[str, str] = field(default_factory=dict)
    biases: str = ""


def without_bias(config: Config, place: Place) -> str:
    """Why a method that adds a bias is on no layer without one: PEFT adds it all the same, and then cannot merge it."""
    return "" if place.has_bias else "the layer has no bias to add to"


@cache  # a model has hundreds of modules of one row
def _read(spec: str, name: str) -> Spec:
    return parse(spec, name) if "\n" in spec else load(spec)


@dataclass(frozen=True)
class Method:
    """A row. `spec`: a shipped name or a text, of which the target number `target` is meant; `settings`: the switches
    of PEFT's that must stand like this, and what PEFT is told beside the parameters; `tensors`: by the name of the
    layout, for the layouts that PEFT has the method on, the correspondence or how it follows from the configuration;
    `refuses`: why PEFT or our spec has no such layer, if so.

    `again`: the tensors of each module (in the model's order) that PEFT draws again from a seed rather than saves;
    `shared`: the shapes of the tensors that PEFT keeps once and of which no one module may need the whole; `derived`:
    those that it saves and, where they are missing, works out from the frozen weight; `rebased`: what our trained
    tensors are where those that PEFT works out from the frozen weight and never saves stand in the place of ours, given
    both; `rewrites`: whether PEFT takes what the adapter starts as off the frozen weight; `needs_cuda`: whether PEFT
    does another method where there is none; `pads_as_layer`: whether PEFT leaves the padding of a convolution to the
    layer itself, and pads no update with zeros.
    """

    name: str
    family: Family
    spec: str
    parameters: Translation
    tensors: Mapping[str, Correspondence | Callable[[Config], Correspondence]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    refuses: Callable[[Config, Place], str] = lambda config, place: ""
    target: int = 0
    again: Callable[[Config, Sequence[Place]], Sequence[Tensors]] = lambda config, places: [{} for _ in places]
    shared: Callable[[Config, Sequence[Place]], Mapping[str, tuple[int, ...]]] = lambda config, places: {}
    derived: tuple[str, ...] = ()
    rebased: Callable[[Tensors, Tensors], Tensors] | None = None
    rewrites: bool = False
    needs_cuda: bool = False
    pads_as_layer: bool = False

    def fits(self, config: Config) -> bool:
        """Whether a configuration of PEFT's is this method's, whatever its parameters."""
        allowed = {**self.family.plain, **{name: (value,) for name, value in self.settings.items()}}
        return config.get("peft_type") == self.family.peft_type and all(config.get(n) in v for n, v in allowed.items())

    def is_on(self, config: Config, place: Place) -> bool:
        """Whether PEFT has the method on such a module, with the formula of our spec."""
        return place.layout in self.tensors and not self.why_not(config, place)

    def why_not(self, config: Config, place: Place) -> str:
        """Why there is no such layer, if so, where the method is on the module's layout."""
        if place.pads_otherwise and not self.pads_as_layer:
            return "PEFT pads what its update sees with zeros, whatever the layer pads with"
        return self.refuses(config, place)

    def map(self, config: Config, place: Place) -> Correspondence:
        """How PEFT's tensors of a module are ours."""
        correspondence = self.tensors[place.layout]
        return correspondence(config) if callable(correspondence) else correspondence

    def given(self, config: Config, place: Place) -> Spec:
        """Our spec for a module, its parameters set from PEFT's configuration. Raises: SurgeryError."""
        return self.of(self.parameters.to_ours(config, place))

    def of(self, parameters: Mapping[str, Any]) -> Spec:
        """Our spec with its parameters set and the one target that is meant. Raises: SurgeryError."""
        bound = bind(_read(self.spec, self.name), keywords(parameters))
        return bound.model_copy(update={"targets": bound.targets[self.target:self.target + 1]})

    def config(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """What PEFT's configuration must say, given our spec's parameters."""
        return {**self.settings, **self.parameters.to_peft(parameters)}
