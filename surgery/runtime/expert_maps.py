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
        if x.ndim != 2:
            size, flat = x.shape[1:-1].numel(), x.reshape(-1, x.shape[-1])
            y = self.grouped(experts, [n * size for n in counts], flat)
            return y.reshape(*x.shape[:-1], y.shape[-1])
        own = [(expert, count) for expert, count in zip(experts, counts) if count] or [(0, 0)]
        used = sum(counts)
        y = self._many([e for e, _ in own], [n for _, n in own], x if used == len(x) else x[:used])
        return y if used == len(x) else torch.cat([y, y.new_zeros(len(x) - used, y.shape[1])])

    def _many(self, experts: list[int], counts: list[int], x: Tensor) -> Tensor:
        """Rows x [n, in], all of them some expert's: [n, out], which the caller may change."""
        if self.ready is not None and (outputs := self.ready.run_each(experts, x.split(counts))) is not None:
            return torch.cat(outputs)
        dtype = self.layer.dtype_of(x)
        program = self.adapter.program(self.layer, len(x) // len(experts), dtype)
        weights = self._apart[0]
        is_large = 2 * program.plan.setup_numbers > weights[0].numel()
        if program.plan.rests_on_layer or is_large and program.plan.recompute_cost is not None:
            # made one by one, and not held
            return torch.cat([self.one(expert, rows) for expert, rows in zip(experts, x.split(counts))])
        layers, x = [self.layer.of(weights[expert]) for expert in experts], self.layer.enter(x, dtype)
        if self.adapter.serving is None or torch.is_grad_enabled():
            values, apart = self.adapter.set_ups(program, self.layer, self.stacks, dtype, experts)
            return program.run_grouped(values, apart, layers, counts, x)
        known = self.adapter.kept_set_ups(program, self.layer, self.stacks, dtype, self.held, experts)
        self.adapter.make_ready(self.layer, dtype, self.held)
        return torch.cat([program.run_on(known[expert], layer, rows)
                          for expert, layer, rows in zip(experts, layers, x.split(counts))])

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
