"""One module of a PEFT adapter: the row that says what PEFT does to it, and the tensors that it has for it.

Takes a configuration and sites; gives `Taken` modules. Promises: a configuration with a switch on that no row has heard
of fits none; why no row fits is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from surgery.language.tree import Spec
from surgery.layers.opaque_linear import SUFFIX
from surgery.layers.survey import Site
from surgery.peft.folder import SHARED
from surgery.peft.table.method import Config, Method
from surgery.peft.table.methods import METHODS
from surgery.peft.target_modules import resolved
from surgery.peft.tensor_mapping import Correspondence, Place, Tensors
from surgery.runtime.saved_format import Shapes, shapes

WHOLE = "trained"  # the layout of a module of any class that is trained as a whole
# Fields that say how an adapter began, is trained or is kept, and nothing of what it does.
_ASIDE = frozenset((
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config",
    "megatron_config", "megatron_core", "modules_to_save", "peft_type", "peft_version", "revision", "runtime_config",
    "target_modules", "target_parameters", "task_type"))
_ASIDE_BEFORE = ("init_", "save_")


@dataclass(frozen=True)
class Taken:
    """A module that PEFT adapts, or a parameter, by its name there and by that of our site; `config` is PEFT's as it
    holds here, `tensors` are PEFT's by name: the module's own (in a file below the name `holder`), the model's, and
    those that PEFT draws again."""

    name: str
    site: str
    holder: str
    weight_name: str
    method: Method
    place: Place
    config: Config
    tensors: Tensors

    @cached_property
    def map(self) -> Correspondence:
        return self.method.map(self.config, self.place)

    @cached_property
    def spec(self) -> Spec:
        """The row's spec for it. Raises: SurgeryError; KeyError for a field that the configuration lacks."""
        return self.method.given(self.config, self.place)

    def ours(self) -> dict[str, Tensor]:
        """The tensors by their names in an operated model."""
        before = f"{self.name}." if self.place.layout == WHOLE else f"{self.weight_name}{SUFFIX}."
        return {before + key: tensor.contiguous() for key, tensor in self.map.to_ours(self.tensors, self.place).items()}

    def shapes(self, ours: Tensors) -> tuple[Shapes, Shapes]:
        """The shapes of the tensors that PEFT gives and of those that it must give, where ours are as they are: by
        PEFT's names. What PEFT can work out may be there or not; what the model shares has the shape that some module
        needs."""
        theirs, derived = self.map.to_peft(ours, self.place), self.method.derived
        wanted = {n: t for n, t in theirs.items() if n not in derived or n in self.tensors}
        given = {n: t for n, t in self.tensors.items() if n in wanted or not (n in derived or n.startswith(SHARED))}
        return _named(self.holder, _without_shapes(given)), _named(self.holder, _without_shapes(wanted))


def _without_shapes(tensors: Tensors) -> Shapes:
    """The shapes of tensors, but of the model's shared ones the fact that they are there."""
    return {name: [] if name.startswith(SHARED) else shape for name, shape in shapes(tensors).items()}


def _named(module: str, shapes: Shapes) -> Shapes:
    return {name if name.startswith(SHARED) else f"{module}.{name}": shape for name, shape in shapes.items()}


def drawn_again(taken: Sequence[Taken]) -> list[Tensors]:
    """The tensors of each module that PEFT draws again. Raises: KeyError for a seed that the configuration lacks."""
    places = [each.place for each in taken]
    # Some methods draw for all modules in turn from one generator, so a row is asked once for all of them. The list is
    # searched, since configurations have no hash.
    known: list[tuple[Taken, Sequence[Tensors]]] = []
    for each in taken:
        if not any(other.method is each.method and other.config == each.config for other, _ in known):
            known.append((each, each.method.again(each.config, places)))
    return [next(again[i] for other, again in known if other.method is each.method and other.config == each.config)
            for i, each in enumerate(taken)]


# ---------------------------------------------------------------------------------------------------------- rows


def row(config: Config, name: str, place: Place) -> tuple[Method, Config] | None:
    """The row that says what PEFT does to a module, and the configuration as it holds there."""
    for method in METHODS:
        here = at(config, method, name)
        if method.fits(here) and method.is_on(here, place) and not _unknown(config, method):
            return method, here
    return None


def at(config: Config, method: Method, name: str) -> dict[str, Any]:
    """The configuration for one module. What it says of the model's own biases is another matter than its formula."""
    return {**resolved(config, method.family, name), "bias": "none"}


def no_row(config: Config, site: Site, place: Place) -> str:
    """Why no row says what PEFT does to a module: the layer, or switches that no row knows."""
    if unheard := unheard_of(config, site.name):
        return unheard
    kind = config["peft_type"]
    fitting = [m for m in METHODS if not _misfits(at(config, m, site.name), m) and m.family.peft_type == kind]
    there = (m.why_not(at(config, m, site.name), place) for m in fitting if place.layout in m.tensors)
    why = next(filter(None, there), "no spec here says what it does there")
    layer = f"{'stack of ' * place.layout.endswith('experts')}{place.layout}"
    return f"PEFT's {kind} on a {layer}: {why}"


def unheard_of(config: Config, name: str) -> str:
    """What no row knows of the switches of a configuration as it holds for a module; nothing where some row does."""
    kind = config["peft_type"]
    nearest = min((_misfits(at(config, m, name), m) for m in METHODS if m.family.peft_type == kind), key=len)
    switches = ", ".join(f"{name} = {value!r}" for name, value in nearest.items())
    return f"no spec here says what PEFT's {kind} does with {switches}" * bool(nearest)


def _misfits(config: Config, method: Method) -> dict[str, Any]:
    """The fields in which a configuration is not the row's."""
    allowed = {**method.family.plain, **{name: (value,) for name, value in method.settings.items()}}
    return {**{n: config.get(n) for n, v in allowed.items() if config.get(n) not in v}, **_unknown(config, method)}


def _unknown(config: Config, method: Method) -> Mapping[str, Any]:
    """The switches that are on and that the row has not heard of."""
    family = method.family
    known = {*_ASIDE, *family.plain, *method.settings, *family.patterns.values(), *family.lists}
    # A newer PEFT may have a switch that changes the formula: whatever is on must be one that a row has heard of.
    on = {name: value for name, value in config.items() if value is True or (isinstance(value, dict) and value)}
    return {name: value for name, value in on.items() if name not in known and not name.startswith(_ASIDE_BEFORE)}
