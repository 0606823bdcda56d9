"""A call of an operated linear layer, or of experts of a stack, while serving, with everything decided that stays the
same from token to token.

Takes an adapter whose set-up is kept; gives what runs its program on an input. Promises: it answers only while every
tensor is the one that it was made with, as far as torch tells, and nobody listens to the calls that it leaves out; for
anything else it gives None, and the call goes the long way, which sees what is different.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
        for module in self.calls:
            if module._forward_pre_hooks or module._forward_hooks:
                return False
        return hints(self.kept.on) == self.kept.hints


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
    return ReadyCall(step.forward, layer, kept, tuple(stands), (adapter, *adapter._modules.values()))
