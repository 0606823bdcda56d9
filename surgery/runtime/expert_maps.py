"""The maps of the matrices of a stack (fused experts): each runs the program of one layer on its own tokens.

Takes an operated stack and its adapter; gives x W'ₑᵀ for an expert e. Promises: nothing is made for an expert without
tokens; the set-ups of many experts are made at once where they do not read the frozen weight and are smaller than it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from surgery.runtime.frozen_layers import Frozen

if TYPE_CHECKING:
    from surgery.runtime.adapter import Adapter


class ExpertMaps:
    """For one call of the module, with the noise that was drawn for it."""

    def __init__(self, adapter: Adapter, layer: Frozen, noise: Mapping[str, Tensor]):
        self.adapter, self.layer, self.noise = adapter, layer, noise
        self.ready = None if adapter.serving is None else adapter.serving.ready.get(adapter)
        if torch.is_grad_enabled():  # in the mode in which the module is called, whatever its forward does
            _ = self.stacks

    def one(self, expert: int, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] by one expert."""
        if self.ready is not None and (outputs := self.ready.run_each((expert,), (x,))) is not None:
            return outputs[0]
        weights, apart = self._apart
        own = {**self.stacks, **{key: t[expert] for key, t in apart.items()}}
        layer = self.layer.of(weights[expert])
        dtype = layer.dtype_of(x)
        y = self.adapter.run(layer, x, dtype, own, self.held, expert)
        self.adapter.make_ready(self.layer, dtype, self.held)
        return y

    def grouped(self, experts: Sequence[int], counts: Sequence[int], x: Tensor) -> Tensor:
        """Rows x [n, ..., in], the first `counts[0]` of them for `experts[0]`, and so on: [n, ..., out]. What is left
        over at the end is of no expert, and 0."""
        groups = [(e, n) for e, n in zip(experts, counts) if n] or [(0, 0)]
        rest = x.shape[0] - sum(counts)
        *parts, _ = x.split([*(n for _, n in groups), rest])
        outputs = self._many([e for e, _ in groups], parts)
        outputs += [outputs[0].new_zeros(rest, *outputs[0].shape[1:])] * bool(rest)
        return torch.cat(outputs)  # which the caller may change

    def _many(self, experts: Sequence[int], parts: Sequence[Tensor]) -> list[Tensor]:
        """The output of each expert for its part of the tokens."""
        if self.ready is not None and (outputs := self.ready.run_each(experts, parts)) is not None:
            return outputs
        dtype, rows = self.layer.dtype_of(parts[0]), sum(part[..., 0].numel() for part in parts)
        program, weights = self.adapter.program(self.layer, rows // len(parts)), self._apart[0]
        is_large = 2 * program.plan.setup_numbers > weights[0].numel()
        if program.plan.rests_on_layer or is_large and program.plan.recompute_cost is not None:
            return [self.one(expert, part) for expert, part in zip(experts, parts)]  # made one by one, and not held
        values = self.adapter.set_ups(program, self.layer, self.stacks, dtype, self.held, experts)
        outputs, layers = [], (self.layer.of(weights[expert]) for expert in experts)
        for layer, expert, part in zip(layers, experts, parts):
            outputs.append(layer.leave(program.run_on(values[expert], layer, layer.enter(part, dtype))))
        self.adapter.make_ready(self.layer, dtype, self.held)
        return outputs

    @cached_property
    def held(self) -> Mapping[str, Tensor]:
        """The adapter's tensors."""
        return self.adapter.called(self.layer.device)

    @cached_property
    def stacks(self) -> Mapping[str, Tensor]:
        """The same, and the noise, in the shapes of the formula."""
        return {**self.adapter.shaped(self.held), **self.noise}

    @cached_property
    def _apart(self) -> tuple[Sequence[Tensor], dict[str, Sequence[Tensor]]]:
        """The matrices of the stack, and the parts for each of them of the adapter's tensors that are not shared."""
        def apart(stack: Tensor) -> Sequence[Tensor]:
            # one node of autograd for all: each selection would give a gradient of the size of the stack
            is_taken = stack.requires_grad and torch.is_grad_enabled()
            return stack.unbind() if is_taken else cast(Any, stack)  # which is indexed alike

        own = {key: apart(t) for key, t in self.stacks.items() if key not in self.adapter.shared}
        return apart(self.layer.weight), own
