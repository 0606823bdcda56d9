"""The maps of the matrices of a stack (fused experts): each runs the program of one layer on its own tokens.

Takes an operated stack and its adapter; gives x W'ₑᵀ for an expert e. Promises: nothing is made for an expert without
tokens; the set-ups of many experts are made at once where they do not read the frozen weight and are worth holding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from surgery.codegen.program import Program
from surgery.runtime.frozen_layers import Frozen

if TYPE_CHECKING:
    from surgery.runtime.adapter import Adapter


class ExpertMaps:
    """For one call of the module, with the noise that was drawn for it."""

    def __init__(self, adapter: Adapter, module: nn.Module, noise: Mapping[str, Tensor]):
        self.adapter, self.layer = adapter, adapter.frozen(module)
        self.held = adapter.called(self.layer.device)
        self.stacks = {**adapter.shaped(self.held), **noise}

    def one(self, expert: int, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] by one expert."""
        weights, apart = self._apart
        own = {**self.stacks, **{key: t[expert] for key, t in apart.items()}}
        layer = self._single(weights[expert])
        return self.adapter.run(layer, x, layer.dtype_of(x), own, self.held, expert)

    def grouped(self, experts: Sequence[int], counts: Sequence[int], x: Tensor) -> Tensor:
        """Rows x [n, ..., in], the first `counts[0]` of them for `experts[0]`, and so on: [n, ..., out]. What is left
        over at the end is of no expert, and 0."""
        groups = [(e, n) for e, n in zip(experts, counts) if n] or [(0, 0)]
        rest = x.shape[0] - sum(counts)
        *parts, _ = x.split([*(n for _, n in groups), rest])
        outputs = self._many([e for e, _ in groups], parts)
        return torch.cat([*outputs, outputs[0].new_zeros(rest, *outputs[0].shape[1:])])  # which the caller may change

    def _many(self, experts: Sequence[int], parts: Sequence[Tensor]) -> list[Tensor]:
        """The output of each expert for its part of the tokens."""
        dtype, rows = self.layer.dtype_of(parts[0]), sum(part[..., 0].numel() for part in parts)
        program = self.adapter.program(self.layer, rows // len(parts))
        plan = program.plan
        if plan.rests_on_layer or plan.computes and plan.recompute_cost is not None:  # made one by one, and not held
            return [self.one(expert, part) for expert, part in zip(experts, parts)]
        values = self.adapter.set_ups(program, self.layer, self.stacks, dtype, self.held, experts)
        weights = self._apart[0]
        return [self._run(program, self._single(weights[e]), part, dtype, values[e])
                for e, part in zip(experts, parts)]

    def _run(self, program: Program, layer: Frozen, x: Tensor, dtype: torch.dtype, values: tuple) -> Tensor:
        return layer.leave(program.run(layer, layer.enter(x, dtype), lambda _: values, {}))

    def _single(self, weight: Tensor) -> Frozen:
        layer = copy(self.layer)
        layer.weight = weight
        return layer

    @cached_property
    def _apart(self) -> tuple[Sequence[Tensor], dict[str, Sequence[Tensor]]]:
        """The matrices of the stack, and the parts for each of them of the adapter's tensors that are not shared."""
        def apart(stack: Tensor) -> Sequence[Tensor]:
            # one node of autograd for all: each selection would give a gradient of the size of the stack
            is_taken = stack.requires_grad and torch.is_grad_enabled()
            return stack.unbind() if is_taken else cast(Any, stack)  # which is indexed alike

        own = {key: apart(t) for key, t in self.stacks.items() if key not in self.adapter.shared}
        return apart(self.layer.weight), own
