"""Detect changes of the model: what a surgery operates on must still be there.

Takes the plan of a surgery and its adapters; gives, in words, what was replaced, resized, tied or taken out since.
Promises: no numbers of the model are written or kept; names are looked up in the model as it is now.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from surgery.diagnostics import SurgeryError, fail
from surgery.layers.opaque_linear import BASE, SUFFIX
from surgery.layers.wrappers import named_modules, own_parameter, submodule
from surgery.planning.compile import Placed
from surgery.runtime.sharding import gather_up, refuse_elsewhere, refuse_flattened, refuse_unseen, refuse_unshared
from surgery.runtime.tensor_names import TensorNames
from surgery.text import listed, some_lines


@dataclass(frozen=True)
class Spot:
    """A parameter by its owner, as it was when the surgery was prepared. `shape`: None of one that is no plain
    parameter; `placed`: None of one that `train` names."""

    name: str
    module: nn.Module
    parameter: str
    shape: tuple[int, ...] | None
    placed: Placed | None = None

    @property
    def tensor(self) -> nn.Parameter | None:
        """The parameter that stands there now."""
        return self.module._parameters.get(self.parameter)

    @property
    def present(self) -> nn.Parameter:
        """The parameter, where one stands there. Raises: KeyError."""
        return own_parameter(self.module, self.parameter)


class Standing:
    """The tensors of a surgery, of the model and of its adapters, and where each was."""

    def __init__(self, names: TensorNames):
        self.names, self.model, self.adapters = names, names.model, names.adapters
        self.spots: dict[str, Spot] = {}
        self._objects: dict[str, ref[Tensor]] = {}  # the tensors that were there when it was operated on
        for placed in names.plan.placed:
            site = placed.site  # a called layer's tensors are its own affair: whatever it stores, it is called
            shape = None if site.layout.is_called else site.stored_shape
            self.spots[site.weight_name] = Spot(site.weight_name, site.module, site.parameter, shape, placed)
        for name in names.plan.train:
            path, _, own = name.rpartition(".")
            owner = names.plan.selection.survey.modules[path]
            self.spots[name] = Spot(name, owner, own, tuple(own_parameter(owner, own).shape))

    def tensors(self) -> dict[str, Tensor]:
        """Every adapter tensor and every `train` tensor by its name, as they stand now. Raises: KeyError, for a `train`
        tensor that does not."""
        return self.names.tensors() | {name: self.spots[name].present for name in self.names.plan.train}

    @property
    def written(self) -> dict[str, Tensor]:
        """The tensors that verbs write into, as they stand now."""
        spots = {name: spot.tensor for name, spot in self.spots.items() if spot.shape and spot.tensor is not None}
        return {**spots, **self.tensors()}

    def remember(self) -> None:
        """Note which objects the tensors are now, to know them again."""
        # what torch moves by exchanging tensors, as it can be asked to, nothing may refer to
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        self._objects = {} if swaps else {name: ref(tensor) for name, tensor in self.written.items()}

    def __getstate__(self) -> dict[str, Any]:
        """In a copy, or in another process, the tensors are other objects."""
        return {**vars(self), "_objects": dict.fromkeys(self._objects)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._objects:
            self.remember()

    def refuse_away(self, operated: bool, reads: bool) -> None:
        """Raises: SurgeryError (unsupported-module) where this process does not hold the tensors as they can be used:
        in parts, in other tensors than it was operated on with or, where numbers are read or written (`reads`),
        offloaded."""
        gather_up(self.model)
        weights = {name: spot.tensor for name, spot in self.spots.items()}
        refuse_elsewhere({**weights, **self.names.tensors()})
        refuse_flattened(weights.items())
        refuse_unseen(self.written, self._objects)
        if operated:
            refuse_unshared(self.written)
            if reads:
                refuse_offloaded(self.model, self.written)

    def faults(self, operated: bool) -> dict[str, str]:
        """By the name of each parameter that was changed, what changed. `operated`: adapters must be on."""
        owners: dict[int, list[tuple[nn.Module, str]]] = {}  # by the parameter's id: all the places where it stands
        for path, module in named_modules(self.model):
            for name, parameter in module._parameters.items():
                owners.setdefault(id(parameter), []).append((module, f"{path}.{name}".lstrip(".")))
        faults = {name: next(self._faults(spot, owners, operated), "") for name, spot in self.spots.items()}
        return {name: fault for name, fault in faults.items() if fault}

    def _faults(self, spot: Spot, owners: Mapping[int, list[tuple[nn.Module, str]]], operated: bool) -> Iterator[str]:
        path = spot.name.rpartition(".")[0]
        now = submodule(self.model, path)
        if now is None:
            yield f"there is no module `{path}` any more"
        elif now is not spot.module:
            yield f"`{path}` is another module now ({type(now).__name__})"
        if operated and spot.placed is not None:
            adapter = spot.module._modules.get(spot.parameter + SUFFIX)
            if adapter is not self.adapters[spot.placed.site.name] or BASE not in vars(type(spot.module)):
                yield f"`{path}` has lost its adapter"
        site = spot.placed.site if spot.placed is not None else None
        if site is not None and site.stack is None and site.has_bias != self.adapters[site.name].compiled.has_bias:
            yield f"`{path}` has {'a bias now' if site.has_bias else 'no bias any more'}"
        if spot.shape is None:
            return
        if spot.tensor is None:
            yield f"`{spot.name}` is no plain parameter any more"
        elif tuple(spot.tensor.shape) != spot.shape:
            yield f"`{spot.name}` is {list(spot.tensor.shape)} now, and was {list(spot.shape)}"
        elif spot.placed is not None and (operated or not spot.placed.target.untie):
            # At two modules, it is tied: a merge would change the other one too.
            yield from (f"`{spot.name}` is tied to `{name}` now" for module, name in owners.get(id(spot.tensor), ())
                        if module is not spot.module)


def changed(faults: Mapping[str, str], *helps: str) -> SurgeryError:
    """The error of a verb that would act on a changed model."""
    first, *rest = dict.fromkeys(faults.values())
    return fail("changed-model", f"the model was changed after it was operated on: {first}",
                notes=tuple(some_lines(rest)), helps=helps)


def refuse_empty(spots: Iterable[Spot]) -> None:
    """Raises: SurgeryError (unsupported-module) for weights that have no numbers yet: what starts from a tensor on the
    meta device, and what is put beside one, would be NaN later."""
    empty = [spot.name for spot in spots if (spot.placed.site.is_meta if spot.placed else spot.present.is_meta)]
    if empty:
        raise fail("unsupported-module", f"{listed(empty)} {'have' if len(empty) > 1 else 'has'} no numbers yet "
                   "(the meta device)",
                   helps=("load the weights first, without offloading them; `surgery.plan` needs none",))


def refuse_offloaded(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raises: SurgeryError (unsupported-module) for tensors whose numbers are kept elsewhere: what is written into the
    ones that stand here is lost."""
    away = [name for name, tensor in tensors.items() if tensor.is_meta]
    if away:
        offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
        why, back = (("accelerate keeps them elsewhere (offloading)",
                      "accelerate.hooks.remove_hook_from_submodules(model) brings them back") if offloaded else
                     ("on the meta device tensors have none", "bring the weights back first"))
        raise fail("unsupported-module", f"{listed(away)} {'have' if len(away) > 1 else 'has'} no numbers here: {why}",
                   helps=(back,))
