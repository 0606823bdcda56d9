"""The one adapter layer: it runs any program in the place of a frozen layer's map.

Takes a module, a formula and its tensors; makes the module an operated one in place. Promises: the module keeps its
class (`isinstance` holds), its name and its parameters; the adapter's tensors stand beside the weight, in
`weight_surgery`; a checkpoint of the base model still loads; `deepcopy`, pickle and `torch.compile` work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import copy
from functools import lru_cache, reduce
from typing import Any

import torch
import torch.nn as nn

from surgery.called import ADAPTER, forward_of, put_forward_aside, put_forward_back
from surgery.expr.evaluate import in_dtype
from surgery.expr.ir import Formula
from surgery.layout import Layout
from surgery.lower.called import frozen
from surgery.lower.frozen import Frozen
from surgery.lower.program import Program, activations, weights

SUFFIX = ADAPTER
Tensors = dict[str, torch.Tensor]


class Adapter(nn.Module):
    """The tensors and the programs of one operated weight. `active` is False while disabled or merged."""

    def __init__(self, formula: Formula, layout: Layout, parameter: str, stack: int | None,
                 tensors: Mapping[str, nn.Parameter], gives_gradient: bool = True):
        super().__init__()
        self.gives_gradient = gives_gradient
        self.formula, self.layout, self.parameter, self.stack, self.active = formula, layout, parameter, stack, True
        self.has_bias: bool | None = None
        self.shared = frozenset(leaf.key for leaf in formula.leaves if leaf.group)
        self._paths = tuple((leaf.key, *leaf.key.split(".")) for leaf in formula.leaves)
        self._programs: dict[bool, Program] = {}
        self._kept: dict[tuple, tuple[tuple, tuple]] = {}
        for key, tensor in tensors.items():
            step, name = key.split(".")
            if step not in self._modules:
                self.add_module(step, nn.Module())
            self._modules[step].register_parameter(name, tensor)

    def frozen(self, module: nn.Module) -> Frozen:
        """The module's frozen map, as programs call it."""
        return frozen(module, self.layout, self.parameter, self.gives_gradient)

    def tensors(self) -> dict[str, nn.Parameter]:
        """The adapter's tensors by key (`post_magnitude.m`)."""
        return {key: self._modules[step]._parameters[name] for key, step, name in self._paths}

    def prepare(self, has_bias: bool) -> None:
        """Compile the programs of the layer's output, in training and in evaluation, before any forward pass."""
        self.has_bias = has_bias
        layout = self.layout
        self._programs = {training: activations(self.formula, layout.kind, training, has_bias, layout.is_called)
                          for training in (True, False)}

    def output(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """What the operated layer gives for its input. Raises: SurgeryError (no-gradient)."""
        layer = self.frozen(module)
        dtype = layer.dtype_of(x)
        entered, tensors = layer.enter(x, dtype), self.tensors()
        program = self._programs[module.training].at(layer.tokens(entered))

        def make(given: Iterable[torch.Tensor]) -> tuple:
            return self._values(program, layer, dict(zip(tensors, given)), dtype)

        return layer.leave(program.run(layer, entered, make, tensors))

    def _values(self, program: Program, layer: Frozen, leaves: Tensors, cast: torch.dtype | None) -> tuple:
        """The set-up of a program: what does not depend on the input. Small solves stay in float32 under autocast."""
        dtype = reduce(torch.promote_types, (t.dtype for t in leaves.values() if t.is_floating_point()), layer.dtype)
        dtype = torch.promote_types(dtype, torch.float32)

        def once() -> tuple:
            return program.once(layer, dtype)

        def setup() -> tuple:
            known = self._keep((program, "once"), layer.held, (dtype,), once) if program.fixed else ()
            return program.setup(layer, {k: in_dtype(t, dtype) for k, t in leaves.items()}, known, dtype, cast or dtype)

        with torch.autocast(layer.device.type, enabled=False):
            if cast is None or torch.is_grad_enabled():
                layer.weight = self._whole(program, layer, cast or dtype, cast is not None)
                return setup()
            held = layer.held if layer.bias is None else (*layer.held, layer.bias)
            return self._keep((program, "setup"), (*held, *leaves.values()), (dtype, cast), setup)

    def _whole(self, program: Program, layer: Frozen, dtype: torch.dtype, keeps: bool) -> torch.Tensor | None:
        """W where it stands, or where a program reads all of it: then what calls say, made once if it is to be kept."""
        if layer.weight is not None or not program.reads_weight:
            return layer.weight
        if not keeps:
            return layer.read(dtype)
        return self._keep(("weight",), layer.held, (dtype,), lambda: (layer.read(dtype),))[0]

    def _keep(self, key: tuple, on: Iterable[torch.Tensor], more: tuple, compute: Callable[[], tuple]) -> tuple:
        """`compute()`, done again only when a tensor that it rests `on` has changed."""
        if self.stack is not None or torch.compiler.is_compiling():
            return compute()
        stamp = (*more, *((t.data_ptr(), t._version, t.device) for t in on))
        if key not in self._kept or self._kept[key][0] != stamp:
            with torch.no_grad():
                self._kept[key] = (stamp, compute())
        return self._kept[key][1]

    def weights(self, module: nn.Module) -> tuple[torch.Tensor, ...]:
        """(W',) or (W', b'), W' as [out, in] or a stack [E, out, in], in float32 or wider."""
        layer = self.frozen(module)
        program = weights(self.formula, layer.bias is not None)
        if self.stack is None:
            return self._values(program, layer, self.tensors(), None)
        return self._stacked(program, layer)

    def _stacked(self, program: Program, layer: Frozen) -> tuple[torch.Tensor, ...]:
        leaves = self.tensors()
        axes = {key: None if key in self.shared else 0 for key in leaves}

        def one(weight: torch.Tensor, each: dict[str, torch.Tensor]) -> tuple:
            single = copy(layer)
            single.weight = weight
            return self._values(program, single, each, None)

        return torch.vmap(one, in_dims=(0, axes))(layer.weight, leaves)

    def train(self, mode: bool = True) -> Adapter:
        """Sets the mode, and forgets what was kept: a write through `.data` leaves no trace that `_keep` could see.
        What a called layer tells once outlives the `train()` that a trainer says at every step."""
        if not (self.layout.is_called and mode == self.training):
            self._kept.clear()
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"{self.parameter}{'' if self.active else ', inactive'}"

    def __getstate__(self) -> dict:
        """Programs are code: they are compiled again where the adapter comes to."""
        return {**self.__dict__, "_programs": {}, "_kept": {}}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if self.has_bias is not None:
            self.prepare(self.has_bias)

    def _load_from_state_dict(self, state: dict, prefix: str, *rest: Any) -> None:
        """A checkpoint of the base model has nothing for us: not an error, the adapter stays as it is."""
        if any(key.startswith(prefix) for key in state):
            super()._load_from_state_dict(state, prefix, *rest)


class Operated:
    """Mixed into the class of an operated module."""

    def __reduce_ex__(self, protocol: int) -> tuple:
        operated = type(self)
        return _blank, (operated.base, operated.names, operated.is_direct), self.__dict__


def _blank(base: type, names: tuple[str, ...], is_direct: bool) -> nn.Module:
    cls = operated_class(base, names, is_direct)
    return cls.__new__(cls)


class Direct(Operated):
    """A module whose map is known: the program takes the input itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        adapter = self.weight_surgery
        return adapter.output(self, x) if adapter.active else forward_of(self)(x)


class Substituted(Operated):
    """A module that only its own forward knows (fused experts, a subclass with a forward of its own): W' is computed
    once and stands in the weight's place while that forward runs."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        adapters = [getattr(self, name + SUFFIX) for name in type(self).names]
        stored = [_stored(adapter, self) for adapter in adapters if adapter.active]
        self.__dict__["_substitutes"] = {name: value for values in stored for name, value in values.items()}
        try:
            return forward_of(self)(*args, **kwargs)
        finally:
            del self.__dict__["_substitutes"]


def _stored(adapter: Adapter, module: nn.Module) -> dict[str, torch.Tensor]:
    """W' (and b') as the module stores them, by parameter name."""
    values = dict(zip((adapter.parameter, "bias"), adapter.weights(module)))
    shape = module._parameters[adapter.parameter].shape
    values[adapter.parameter] = adapter.layout.unmatrix(values[adapter.parameter], shape)
    return {name: value.to(module._parameters[name].dtype) for name, value in values.items()}


def _substitute(name: str) -> property:
    return property(lambda self: self.__dict__.get("_substitutes", {}).get(name, self._parameters[name]))


@lru_cache(maxsize=None)
def operated_class(base: type, names: tuple[str, ...], is_direct: bool) -> type:
    """The class of operated modules of the class `base`, whose parameters `names` are operated on."""
    known = {"base": base, "names": names, "is_direct": is_direct,
             "__module__": base.__module__, "__qualname__": base.__qualname__}
    if is_direct:
        return type(base.__name__, (Direct, base), known)
    return type(base.__name__, (Substituted, base), {**known, **{name: _substitute(name) for name in (*names, "bias")}})


def is_direct(module: nn.Module, layout: Layout) -> bool:
    """Whether the layout's map is all that the module's forward does."""
    base = getattr(type(module), "base", type(module))
    plain = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    is_conv1d = base.__name__ == "Conv1D" and base.__module__ == "transformers.pytorch_utils"
    return layout.is_called or is_conv1d or any(issubclass(base, c) and base.forward is c.forward for c in plain)


def install(module: nn.Module, adapter: Adapter) -> None:
    """Make `module` an operated one: nothing is copied. The programs are found here, as no compiler can trace that."""
    direct = is_direct(module, adapter.layout)
    if direct:
        adapter.prepare(adapter.frozen(module).bias is not None)
    names = (*getattr(type(module), "names", ()), adapter.parameter)
    base = getattr(type(module), "base", type(module))
    module.add_module(adapter.parameter + SUFFIX, adapter)
    module.__class__ = operated_class(base, names, direct)
    put_forward_aside(module)


def uninstall(module: nn.Module) -> None:
    """Give `module` its own class back and drop its adapters."""
    for name in type(module).names:
        delattr(module, name + SUFFIX)
    module.__class__ = type(module).base
    put_forward_back(module)
