"""The one adapter layer: it runs any program in the place of a frozen layer's map.

Takes a module, a formula and its tensors; makes the module an operated one in place. Promises: the module keeps its class
(`isinstance` holds), its name and its parameters; the adapter's tensors stand beside the weight, in `weight_surgery`; a
checkpoint of the base model still loads; `deepcopy`, pickle and `torch.compile` work.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn as nn

from surgery.expr.evaluate import dense
from surgery.expr.ir import Formula
from surgery.layout import Layout, weights
from surgery.lower import lower

SUFFIX = "_surgery"


class Adapter(nn.Module):
    """The tensors and the formula of one operated weight. `active` is False while disabled or merged."""

    def __init__(self, formula: Formula, parameter: str, stack: int | None, tensors: Mapping[str, nn.Parameter]):
        super().__init__()
        self.formula, self.parameter, self.stack, self.active = formula, parameter, stack, True
        for key, tensor in tensors.items():
            step, name = key.split(".")
            if step not in self._modules:
                self.add_module(step, nn.Module())
            self._modules[step].register_parameter(name, tensor)

    def tensors(self) -> dict[str, nn.Parameter]:
        """The adapter's tensors by key (`post_magnitude.m`)."""
        return {leaf.key: self.get_parameter(leaf.key) for leaf in self.formula.leaves}

    def leaves(self, layout: Layout, module: nn.Module) -> dict[str, torch.Tensor]:
        """All that the formula reads, in one dtype: float32, or what is wider among the weight and the parameters."""
        weight = layout.matrix(module._parameters[self.parameter])
        bias = getattr(module, "bias", None) if self.stack is None else None
        found = {"weight": weight, **({"bias": bias} if bias is not None else {}), **self.tensors()}
        dtype = torch.float32
        for tensor in found.values():
            dtype = torch.promote_types(dtype, tensor.dtype)
        return {key: tensor.to(dtype) for key, tensor in found.items()}

    def matrix(self, layout: Layout, module: nn.Module) -> torch.Tensor:
        """W' as [out, in] (or a stack [E, out, in]) in the dtype of `leaves`."""
        with torch.autocast(self._device(module), enabled=False):
            leaves = self.leaves(layout, module)
            if self.stack is None:
                return dense(self.formula.weight, leaves)
            shared = {leaf.key for leaf in self.formula.leaves if leaf.group}
            axes = {key: None if key in shared else 0 for key in leaves}
            return torch.vmap(lambda each: dense(self.formula.weight, each), in_dims=(axes,))(leaves)

    def bias(self, layout: Layout, module: nn.Module) -> torch.Tensor | None:
        """b' (None where the module has no bias)."""
        leaves = self.leaves(layout, module)
        return dense(self.formula.bias, leaves) if "bias" in leaves else None

    def _device(self, module: nn.Module) -> str:
        return module._parameters[self.parameter].device.type

    def extra_repr(self) -> str:
        return f"{self.parameter}{' inactive' if not self.active else ''}"

    def _load_from_state_dict(self, state: dict, prefix: str, *rest: Any) -> None:
        """A checkpoint of the base model has nothing for us: not an error, the adapter stays as it is."""
        if any(key.startswith(prefix) for key in state):
            super()._load_from_state_dict(state, prefix, *rest)


class Operated:
    """Mixed into the class of an operated module."""

    def __reduce_ex__(self, protocol: int) -> tuple:
        operated = type(self)
        return _blank, (operated.base, operated.names), self.__dict__


def _blank(base: type, names: tuple[str, ...]) -> nn.Module:
    cls = operated_class(base, names)
    return cls.__new__(cls)


class Direct(Operated):
    """A module whose map is known: the program takes the input itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        adapter = self.weight_surgery
        if not adapter.active:
            return super().forward(x)
        layout = weights(self)[0].layout
        with torch.autocast(x.device.type, enabled=False):
            leaves = adapter.leaves(layout, self)
        return lower(adapter.formula).run(layout, self, x, leaves)


class Substituted(Operated):
    """A module that only its own forward knows (fused experts, a subclass with a forward of its own): W' is computed once
    and stands in the weight's place while that forward runs."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rows = {w.parameter: w.layout for w in weights(self)}
        chosen = {name: getattr(self, name + SUFFIX) for name in type(self).names}
        self.__dict__["_substitutes"] = {name: _stored(adapter, rows[name], self)
                                         for name, adapter in chosen.items() if adapter.active}
        try:
            return super().forward(*args, **kwargs)
        finally:
            del self.__dict__["_substitutes"]


def _stored(adapter: Adapter, layout: Layout, module: nn.Module) -> torch.Tensor:
    weight = module._parameters[adapter.parameter]
    return layout.unmatrix(adapter.matrix(layout, module), weight.shape).to(weight.dtype)


def _substitute(name: str) -> property:
    return property(lambda self: self.__dict__.get("_substitutes", {}).get(name, self._parameters[name]))


@lru_cache(maxsize=None)
def operated_class(base: type, names: tuple[str, ...]) -> type:
    """The class of operated modules of the class `base`, whose parameters `names` are operated on."""
    known = {"base": base, "names": names, "__module__": base.__module__, "__qualname__": base.__qualname__}
    if is_direct(base):
        return type(base.__name__, (Direct, base), known)
    return type(base.__name__, (Substituted, base), {**known, **{name: _substitute(name) for name in names}})


def is_direct(base: type) -> bool:
    """Whether the layout's map is all that the class's forward does."""
    plain = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    is_conv1d = base.__name__ == "Conv1D" and base.__module__ == "transformers.pytorch_utils"
    return is_conv1d or any(issubclass(base, c) and base.forward is c.forward for c in plain)


def install(module: nn.Module, adapter: Adapter) -> None:
    """Make `module` an operated one: O(1), nothing is copied."""
    names = (*getattr(type(module), "names", ()), adapter.parameter)
    base = getattr(type(module), "base", type(module))
    module.add_module(adapter.parameter + SUFFIX, adapter)
    module.__class__ = operated_class(base, names)


def uninstall(module: nn.Module) -> None:
    """Give `module` its own class back and drop its adapters."""
    for name in type(module).names:
        delattr(module, name + SUFFIX)
    module.__class__ = type(module).base
