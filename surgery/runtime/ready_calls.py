"""Calls of an operated linear layer, or of experts of a stack, with everything decided that stays the same from call
to call.

    ReadyCall   while serving: the set-up is kept, and every tensor must be the one that it was made with
    ReadyStep   at any other time, in training too: nothing is kept but which program runs, for calls of one kind

Takes an adapter that has run the long way; gives what runs its program on an input. Promises: it answers only where the
long way would run the same program on the same tensors, as far as torch tells, and nobody listens to the calls that it
leaves out; for anything else it gives None, and the call goes the long way, which sees what is different.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from surgery.codegen import autograd_node
from surgery.codegen.program import Program
from surgery.codegen.supposed_device import runs_as_on
from surgery.ir.orthogonal_maps import is_traced
from surgery.runtime.frozen_layers import Frozen, FrozenLinear
from surgery.runtime.serving import Kept, hints

if TYPE_CHECKING:
    from surgery.runtime.adapter import Adapter


@dataclass(frozen=True)
class ReadyCall:
    """`forward(layer, x, *values)` is the program; `stands` says where each tensor was found, by name in a module's
    own; `calls` are the modules whose calls are left out."""

    forward: Callable[..., tuple]
    layer: Frozen
    kept: Kept
    stands: tuple[tuple[Mapping[str, Tensor | None], str, Tensor], ...]
    calls: tuple[nn.Module, ...]

    def run(self, x: Tensor) -> Tensor | None:
        """What the operated layer gives for its input [..., in]; None where it is not known to be as it was."""
        outputs = self.run_each((None,), (x,))
        return None if outputs is None else outputs[0]

    def run_each(self, experts: Sequence[int | None], inputs: Sequence[Tensor]) -> list[Tensor] | None:
        """What experts of a stack give, each for its own input; `None` among them is a layer that is none. None where
        that is not known to be as it was, or an expert has no set-up yet."""
        values = self.kept.values
        if not self._is_for(inputs[0]) or any(expert not in values for expert in experts):
            return None
        outputs, matrices = [], self.layer.layout.matrix(self.layer.stored)  # of the numbers that stand there now
        for expert, x in zip(experts, inputs):
            layer = self.layer.of(matrices if expert is None else matrices[expert])
            is_flat = x.ndim == 2  # as nearly always, and then of a token's time a reshape is a part
            y, _ = self.forward(layer, x if is_flat else x.reshape(-1, x.shape[-1]), *values[expert])
            outputs.append(y if is_flat else y.reshape(*x.shape[:-1], y.shape[-1]))
        return outputs

    def _is_for(self, x: Tensor) -> bool:
        """Whether an input is of those that it answers, and all is known to be as it was."""
        layer = self.layer
        if type(x) is not Tensor or x.dtype is not layer.dtype or x.device != layer.device or torch.is_grad_enabled():
            return False
        if is_traced() or torch.is_autocast_enabled(layer.device.type) or x.shape[-1:] != layer.weight.shape[-1:]:
            return False
        for held, name, tensor in self.stands:
            if held.get(name) is not tensor:
                return False
        return not _are_heard(self.calls) and hints(self.kept.on) == self.kept.hints


def ready_call(adapter: Adapter, program: Program, layer: Frozen, kept: Kept) -> ReadyCall | None:
    """The call of a layer whose set-up is `kept`; None where more than its own tensors decides what it gives."""
    if type(layer) is not FrozenLinear or layer.is_trained:
        return None
    bias_fits = layer.bias is None or layer.bias.dtype == layer.dtype
    step = autograd_node.step(program.plan.written, (False,) * (1 + len(program.plan.values)), layer.device.type)
    if not bias_fits or step is None:
        return None
    places = [(layer.module, adapter.parameter, layer.stored), (layer.module, "bias", layer.bias)]  # or None, as it is
    places += [(adapter._modules[part] if part else adapter.common, name, tensor)
               for (_, part, name), tensor in zip(adapter._paths, kept.on)]
    stands = [(held, name, tensor) for module, name, tensor in places
              for held in (module._parameters, module._buffers) if held.get(name) is tensor]
    if len(stands) < len(places):
        return None
    return ReadyCall(step.forward, layer, kept, tuple(stands), _called(adapter))


@dataclass(frozen=True)
class ReadyStep:
    """`program` is the one of `main`'s for the number of tokens; `facts` is all else that it was chosen by. No tensor
    and no module is held: each call looks at what stands there then."""

    main: Program
    program: Program
    facts: tuple

    def run(self, adapter: Adapter, module: nn.Module, x: Tensor) -> Tensor | None:
        """What the operated layer gives for its input [..., in]; None for a call of another kind."""
        if is_traced():
            return None
        layer, tensors = adapter.frozen(module), _unheard(adapter)
        dtype = layer.dtype_of(x)
        if tensors is None or _facts(adapter, layer, x, dtype, tensors) != self.facts:
            return None
        entered = layer.enter(x, dtype)
        if self.main.at(layer.tokens(entered)) is not self.program:
            return None
        values = adapter.computed(self.program, layer, adapter.shaped(tensors), dtype, [])
        return layer.leave(self.program.run_on(values, layer, entered))


def ready_step(adapter: Adapter, layer: Frozen, x: Tensor, dtype: torch.dtype) -> ReadyStep | None:
    """The step for calls like the one that the layer has just answered; None where such a call does more than run a
    program on its set-up: it draws noise, makes the set-up again in the backward pass, or is marked."""
    if is_traced() or type(layer) is not FrozenLinear or adapter.mark is not None:
        return None
    if layer.module.training and adapter.compiled.noises:
        return None
    program, tensors = adapter.program(layer, layer.tokens(x), dtype), _unheard(adapter)
    if tensors is None or torch.is_grad_enabled() and program.plan.recompute_cost is not None:
        return None
    facts = _facts(adapter, layer, x, dtype, tensors)
    main = adapter.programs((runs_as_on(layer.device.type), dtype))[layer.module.training]
    return None if facts is None else ReadyStep(main, program, facts)


def _unheard(adapter: Adapter) -> dict[str, Tensor] | None:
    """The adapter's tensors by key, as modules hold them; None where something runs with the calls of these modules, or
    something else stands in a tensor's place."""
    if _are_heard(_called(adapter)):
        return None
    found = {}
    for key, part, name in adapter._paths:
        held = adapter._modules[part] if part else adapter.common
        tensor = held._parameters.get(name)
        tensor = held._buffers.get(name) if tensor is None else tensor
        if tensor is None:
            return None
        found[key] = tensor
    return found


def _called(adapter: Adapter) -> tuple[nn.Module, ...]:
    """The modules that a layer's call calls for the adapter and its tensors."""
    return (adapter, adapter.common, *adapter._modules.values())


# Hooks that are registered for all modules (`torch.nn.modules.module.register_module_forward_hook` and its like).
_OF_ALL = (modules._global_forward_pre_hooks, modules._global_forward_hooks,
           modules._global_backward_pre_hooks, modules._global_backward_hooks)


def _are_heard(called: Iterable[nn.Module]) -> bool:
    """Whether something runs with the calls of some of these modules, or of all modules that there are."""
    return any(_OF_ALL) or any(map(_is_heard, called))


def _is_heard(module: nn.Module) -> bool:
    """Whether something runs with a module's calls: a hook, or a forward that was put on the module itself."""
    return bool(module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks
                or module._backward_hooks or "forward" in module.__dict__)


def _facts(adapter: Adapter, layer: Frozen, x: Tensor, dtype: torch.dtype,
           tensors: Mapping[str, Tensor]) -> tuple | None:
    """What decides how a layer is called, beside the adapter and the number of rows: which programs there are for the
    machine and the mode, and whether the call is refused. None where a call does more than run a program."""
    is_elsewhere = any(tensors[key].device != layer.device for key in adapter.shared)  # they are copied in each call
    if is_elsewhere or adapter.batches is not None or layer.is_trained:
        return None
    return (layer.module.training, torch.is_grad_enabled(), runs_as_on(layer.device.type), layer.dtype,
            dtype, type(x), type(layer.stored), layer.stored.shape, layer.bias is None)
