"""Operated modules: a module is given a class of its own that lets its adapters act, in place.

Takes a module and its adapter; promises: the module keeps its class (`isinstance` holds), its name and its parameters;
`deepcopy`, pickle and `torch.compile` work; a forward pass leaves nothing on the module; reading `module.weight` gives
W'.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, SupportsIndex
from weakref import ref

import torch
import torch.nn as nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle

from surgery.diagnostics import fail
from surgery.ir.orthogonal_maps import is_traced
from surgery.layers.layouts import TRANSPOSED_EXPERTS, is_direct, is_of_peft, runs_by_torch, weights
from surgery.layers.opaque_linear import (
    BASE,
    SUFFIX,
    call,
    forward_of,
    own_class,
    put_forward_aside,
    put_forward_back,
    stored,
    stored_weight,
    unsuspected,
)
from surgery.runtime.adapter import Adapter
from surgery.runtime.effective_weight import effective_weight, holds_parameters
from surgery.runtime.expert_maps import ExpertMaps
from surgery.runtime.routed_weight import Stack, routed_weight
from surgery.runtime.sharding import refuse_divided
from surgery.runtime.step_tensors import CONTAINERS, SHARED


class _Calls(threading.local):
    """For each thread, what is in the place of the weights of the modules whose own forward it runs just now."""

    def __init__(self) -> None:  # of each thread: a compiler asks whether it is there, and must not find it made since
        self.running: dict[int, dict[str, torch.Tensor]] = {}


_CALLS = _Calls()


if TYPE_CHECKING:  # what it is mixed into
    _Mixin = nn.Module
else:
    _Mixin = object


class Operated(_Mixin):
    """Mixed into the class of an operated module, which was `surgery_base` and whose parameters `surgery_names` are
    operated on. (By names that no class of a user's has: a forward of its own may read what its class calls `base`.)"""

    surgery_base: ClassVar[type[nn.Module]]
    surgery_names: ClassVar[tuple[str, ...]]
    surgery_kind: ClassVar[type[Operated]]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As ever; refuses a part in an operated weight's place, where torch's parallelize_module would put one, and
        what others may have made of W', on which the adapter would act once more. Raises: SurgeryError."""
        if name in type(self).surgery_names:
            refuse_divided(self, name, _words, param)
        adapter = self._modules.get((name if name in type(self).surgery_names else "weight") + SUFFIX)
        acts = isinstance(adapter, Adapter) and adapter.active and not adapter.layout.is_called and (
            name == adapter.parameter or name == "bias" and adapter.formula.changes_bias)
        if acts and param is not self._parameters.get(name) and not holds_parameters():
            raise fail("changed-model", f"another `{name}` was to stand in the operated {_words(self)}: reading "
                       "it gives W', and the adapter would act once more on what is made of that",
                       helps=("merge_and_remove() first, then fuse, quantise or replace it",
                              f"`get_parameter(\"{name}\")` is the frozen one, to write other numbers into"))
        super().register_parameter(name, param)

    def __reduce_ex__(self, protocol: SupportsIndex, /) -> tuple:
        operated = type(self)
        return _blank, (operated.surgery_base, operated.surgery_names, operated.surgery_kind), self.__dict__


def _one(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The input of a layer that takes one, by whatever name (`layer(input=x)`). Raises: TypeError."""
    if len(given) != 1:
        raise TypeError(f"an operated {_words(module)} takes one input, and is given {len(given)}")
    return given


def _words(module: nn.Module) -> str:
    adapters = (a for a in module._modules.values() if isinstance(a, Adapter))
    return next((adapter.words(module) for adapter in adapters), type(module).__name__)


@cache
def _refuse_peft() -> None:
    """From when the first module is operated on, torch tells of each module that is put into another."""

    def check(holder: nn.Module, name: str, module: nn.Module | None) -> None:
        if isinstance(module, Operated) and is_of_peft(holder):
            # it would start from the frozen weight, and merge into it, where the formula acts anew
            raise fail("changed-model", "PEFT was to put an adapter of its own around the operated "
                       f"{_words(module)}, whose frozen weight it would merge into",
                       helps=("merge_and_remove() first, and then PEFT's adapter on what that makes",
                              "or a spec that says both; or leave operated layers out of `target_modules`"))

    register_module_module_registration_hook(check)


def _blank(base: type[nn.Module], names: tuple[str, ...], kind: type[Operated]) -> nn.Module:
    cls = operated_class(base, names, kind)
    return cls.__new__(cls)


class Direct(Operated):
    """A module whose map is known: the program takes the input itself."""

    weight_surgery: Adapter

    def forward(self, *args: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        adapter = self.weight_surgery
        if not adapter.active:
            return forward_of(self)(*args, **named)
        (x,) = args if len(args) == 1 and not named else _one(self, (*args, *named.values()))
        if not torch.compiler.is_compiling() and (y := adapter.run_ready(self, x)) is not None:
            return y
        adapter.refuse_divided(self, (x,))
        return adapter(adapter.frozen(self), x)


class Called(Direct):
    """A module without a plain weight. Reading `weight` gives what it stores under that name, since that is not W."""

    def forward(self, *args: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        if self.weight_surgery.active or not args:
            return super().forward(*args, **named)
        return call(self, *args, **named)


def spare(model: nn.Module) -> list[RemovableHandle]:
    """Have the called layers that no adapter is in, too, not repack themselves for inference: what stands before them
    would get no gradient any more, without a word. Gives what ends it."""
    return [m.register_forward_pre_hook(unsuspected) for m in model.modules()
            if not isinstance(m, Operated) and any(weight.layout.is_called for weight in weights(m))]


class Substituted(Operated):
    """A module that only its own forward knows (fused experts, a subclass with a forward of its own): W', or what acts
    as W', stands in the weight's place while that forward runs in this thread."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if id(self) in _CALLS.running:  # a forward on the instance, which runs now, asks for its class's
            return type(self).surgery_base.forward(self, *args, **kwargs)
        held = (getattr(self, name + SUFFIX) for name in type(self).surgery_names)
        adapters = [adapter for adapter in held if adapter.active]
        for adapter in adapters:
            adapter.refuse_divided(self, args)
        values = [_in_place(adapter, self) for adapter in adapters]
        before = _CALLS.running
        _CALLS.running = {**before, id(self): {name: t for each in values for name, t in each.items()}}
        try:
            return forward_of(self)(*args, **kwargs)
        finally:
            _CALLS.running = before


def _in_place(adapter: Adapter, module: nn.Module) -> Mapping[str, torch.Tensor]:
    """What stands in the place of the weight (and the bias) while the module's own forward runs: W', or what takes the
    tokens of each expert of a stack through its program."""
    layer = adapter.frozen(module)
    noise = adapter.noise(module, layer.device)
    if not adapter.stack or not runs_by_torch(module) or _is_recorded(layer.device):
        return adapter.substitutes(module, noise)
    takes_gradient = torch.is_grad_enabled()
    stack = Stack(ExpertMaps(adapter, layer, noise), lambda: adapter.substitutes(module, noise)[adapter.parameter],
                  takes_gradient)
    trains = takes_gradient and (layer.is_trained or any(t.requires_grad for t in adapter.tensors().values()))
    return {adapter.parameter: routed_weight(stack, layer.stored, adapter.layout is TRANSPOSED_EXPERTS, trains)}


def _is_recorded(device: torch.device) -> bool:
    """Whether the operations of this call are written down to be run again, for tokens that may go elsewhere."""
    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    traced = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]  # torch's documentation names it so
    return captured or traced or is_traced()


def _reading(name: str, owner: str) -> property:
    """The attribute `name`, which the adapter of the parameter `owner` changes."""

    def read(module: nn.Module) -> torch.Tensor | None:
        if not any(name in held for held in (module._parameters, module.__dict__, module._buffers)):
            raise AttributeError(name)  # which nn.Module then words
        was, adapter = stored(module, name), module._modules.get(owner + SUFFIX)
        if was is None or not isinstance(adapter, Adapter) or not adapter.active:
            return was
        running = _CALLS.running.get(id(module), {})
        if name in running:
            return running[name]
        if name == "bias" and not adapter.formula.changes_bias:
            return was
        if torch.compiler.is_compiling():  # which leaves out what is not used
            return _made(adapter, module, name)
        if holds_parameters():
            return was
        trains = was.requires_grad or any(t.requires_grad for t in adapter.parameters())
        return effective_weight(lambda: _made(adapter, module, name), was, trains)

    def write(module: nn.Module, tensor: torch.Tensor) -> None:
        module.__dict__[name] = tensor  # no parameter: a replica's copy, a pruned weight

    def delete(module: nn.Module) -> None:
        if module.__dict__.pop(name, module) is module:
            raise AttributeError(name)

    return property(read, write, delete)


def _made(adapter: Adapter, module: nn.Module, name: str) -> torch.Tensor:
    """W' or b' as the module stores it."""
    try:
        return adapter.substitutes(module)[name]
    except AttributeError as error:  # nn.Module would take it for a missing attribute, and give the frozen weight
        raise RuntimeError(f"the {name} of the operated {_words(module)} cannot be computed") from error


@cache
def operated_class(base: type[nn.Module], names: tuple[str, ...], kind: type[Operated]) -> type[Operated]:
    """The class of operated modules of the class `base`, whose parameters `names` are operated on."""
    _refuse_peft()
    known: dict[str, Any] = {BASE: base, "surgery_names": names, "surgery_kind": kind,
             "__module__": base.__module__, "__qualname__": base.__qualname__}
    owners = {name: name for name in names} | ({"bias": "weight"} if "weight" in names else {})
    readings = {} if kind is Called else {name: _reading(name, owner) for name, owner in owners.items()}
    operated: type = type(base.__name__, (kind, base), {**known, **readings})
    return operated


def install(module: nn.Module, adapter: Adapter) -> None:
    """Make `module` an operated one: nothing is copied. Raises: SurgeryError (unsupported-module)."""
    direct = is_direct(module, adapter.layout)
    # a program without the bias that the layer has would leave it out
    layer = adapter.frozen(module) if direct else None
    assert layer is None or adapter.compiled.has_bias == (layer.bias is not None)
    adapter.prepare(direct, None if layer is None else (layer.device.type, layer.dtype))
    adapter.owner = ref(module)
    adapter.stored_shape = None if adapter.layout.is_called else tuple(stored_weight(module, adapter.parameter).shape)
    names = (*getattr(type(module), "surgery_names", ()), adapter.parameter)
    base = own_class(module)
    kind = Called if adapter.layout.is_called else Direct if direct else Substituted
    module.add_module(adapter.parameter + SUFFIX, adapter)
    try:
        module.__class__ = operated_class(base, names, kind)
    except TypeError as error:  # Python's, of classes whose objects lie otherwise in memory
        raise fail("unsupported-module", f"a {type(module).__name__} of {type(module).__module__} cannot be operated "
                   f"on: Python gives it no other class ({error})",
                   helps=("leave such layers out with `except`, or quantise with bitsandbytes or torchao",)) from None
    put_forward_aside(module)


def hold_common(root: nn.Module, adapters: Iterable[Adapter]) -> None:
    """Put what adapters share, if anything, where what moves, saves or shards the model finds it once: at the model's
    root, whose tensors are there as long as any layer runs; in one adapter where each child of the root is a layer."""
    sharing = next((adapter for adapter in adapters if adapter.shared), None)
    if sharing is not None:  # what one shares all share
        (sharing if isinstance(root, CONTAINERS) else root).add_module(SHARED, sharing.common)


def uninstall_all(root: nn.Module, pairs: Sequence[tuple[nn.Module, Adapter]]) -> None:
    """Give operated modules below `root`, each with an adapter of it, their own classes back and drop the adapters and
    what they share; it need not stand there any more, nor its module below the root."""
    for module, adapter in pairs:  # what a module has lost is put there, to be taken out like the others
        module._modules.setdefault(adapter.parameter + SUFFIX, adapter)
    for module in {id(module): module for module, _ in pairs}.values():
        if BASE in vars(type(module)):
            uninstall(module)
    for module, adapter in pairs:
        module._modules.pop(adapter.parameter + SUFFIX, None)
        adapter._modules.pop(SHARED, None)
    root._modules.pop(SHARED, None)


def uninstall(module: nn.Module) -> None:
    """Give `module` its own class back and drop its adapters."""
    operated = type(module)
    assert issubclass(operated, Operated)  # `install` made it one
    for name in operated.surgery_names:
        delattr(module, name + SUFFIX)
    module.__class__ = operated.surgery_base
    put_forward_back(module, operated.forward)
