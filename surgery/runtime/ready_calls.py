"""A call of an operated linear layer while serving, with everything decided that stays the same from token to token.

Takes an adapter whose set-up is kept; gives what runs its program on an input. Promises: it answers only while every
tensor is the one that it was made with, as far as torch tells, and nobody listens to the calls that it leaves out; for
anything else it gives None, and the call goes the long way, which sees what is different.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from surgery.codegen import autograd_node
from surgery.codegen.program import Program
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
        layer = self.layer
        if type(x) is not Tensor or x.dtype is not layer.dtype or x.device != layer.device or torch.is_grad_enabled():
            return None
        if is_traced() or torch.is_autocast_enabled(layer.device.type) or x.shape[-1:] != layer.weight.shape[-1:]:
            return None
        for held, name, tensor in self.stands:
            if held.get(name) is not tensor:
                return None
        for module in self.calls:
            if module._forward_pre_hooks or module._forward_hooks:
                return None
        if hints(self.kept.on) != self.kept.hints:
            return None
        y, _ = self.forward(layer, x.reshape(-1, x.shape[-1]), *self.kept.values[None])
        return y.reshape(*x.shape[:-1], y.shape[-1])


def ready_call(adapter: Adapter, program: Program, layer: Frozen, kept: Kept) -> ReadyCall | None:
    """The call of a layer whose set-up is `kept`; None where more than its own tensors decides what it gives."""
    if type(layer) is not FrozenLinear or layer.is_trained or None not in kept.values:
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
    return ReadyCall(step.forward, layer, kept, tuple(stands), (adapter, *adapter._modules.values()))
