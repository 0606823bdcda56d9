"""How an adapter's tensors are held: a module for the tensors of a step, and one for what adapters share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn

from surgery.diagnostics import fail
from surgery.layers.opaque_linear import SUFFIX

SHARED = f"shared{SUFFIX}"  # the module of a model's root that holds what several adapters read
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # to their users, each child is one of the layers


def as_held(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in the shape in which adapters hold it: a number [] as [1]."""
    return tensor if tensor.ndim else tensor.reshape(1)


class StepTensors(nn.Module):
    """The tensors of one step, or those that adapters share. It is called for them, so that what hangs on a module's
    call (offloading, pruning, a hook of the user's) runs before they are read.

    What shards and flattens a model's tensors takes parameters alone that are real numbers and have an axis: so whole
    numbers (places) are a buffer, and a number [] is held as [1].

    `in_use`: whether the adapters run. While they are merged or switched off the modules' weights are those of a
    plain model, and so is a state: W' with the tensors that made it would be W' twice wherever both are loaded."""

    in_use = True

    def __init__(self) -> None:
        super().__init__()
        self.names: tuple[str, ...] = ()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if name in self.names:
            return
        if not tensor.is_floating_point():
            self.register_buffer(name, tensor.detach())
        elif tensor.ndim:
            assert isinstance(tensor, nn.Parameter)  # the real numbers of an adapter are
            self.register_parameter(name, tensor)
        else:
            self.register_parameter(name, nn.Parameter(tensor.detach().reshape(1), tensor.requires_grad))
        self.names += (name,)

    def forward(self) -> tuple[torch.Tensor, ...]:
        return tuple([getattr(self, name) for name in self.names])

    def extra_repr(self) -> str:
        return ", ".join(f"{name} {list(getattr(self, name).shape)}" for name in self.names)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        if self.in_use:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any, **more: Any) -> None:
        if not self.in_use:
            return refuse_unused(key for key in state_dict if key.startswith(prefix))
        for name in self.names:  # older versions saved a number as []
            if (saved := state_dict.get(prefix + name)) is not None:
                state_dict[prefix + name] = as_held(saved)
        super()._load_from_state_dict(state_dict, prefix, *rest, **more)


class SharedTensors(StepTensors):
    """The tensors that the adapters of a model share, each held once: a second name for a parameter is a crash in
    safetensors and a second, diverging copy for what shards a model by layers."""

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any, **more: Any) -> None:
        """Keep the tensors that a checkpoint lacks: one of the base model has none of them, and in one of an older
        version each adapter has them under its own names and hands them over."""
        for name in self.names if self.in_use else ():
            state_dict.setdefault(prefix + name, getattr(self, name))
        super()._load_from_state_dict(state_dict, prefix, *rest, **more)


def refuse_unused(names: Iterable[str]) -> None:
    """Raises: SurgeryError (wrong-mode), if a state gives values to such tensors of adapters that do not run: they
    would go with the weights of another mode."""
    if name := next(iter(names), ""):
        raise fail("wrong-mode", f"the state holds an adapter's tensors (`{name}`), and this model is merged or "
                   "switched off", helps=("load it after unmerge(), or outside of the block of disabled()",))


_KNOWN = frozenset((*dir(StepTensors()), *dir(nn.Module)))


def held_at(key: str) -> tuple[str, str]:
    """The module of a step and the name in it that hold the tensor of a key. What every module of torch calls something
    else (`to`, `type`) has a hyphen behind it, as no name of a spec's has."""
    step, name = (f"{part}-" if part in _KNOWN else part for part in key.split("."))
    return step, name
