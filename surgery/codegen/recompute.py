"""Recompute the set-up in the backward pass instead of holding it from the forward pass on (activation checkpointing).

Takes a program's body with its gradients (`step`) and what makes its values from an adapter's tensors; gives the output
as one node of autograd around both. Promises: the values and gradients of the program; between the passes nothing of
the set-up is held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.codegen.autograd_node import Step, once, rows_of, step
from surgery.codegen.candidates import Candidate
from surgery.ir.dense import without_autocast

Make = Callable[[Sequence[Tensor]], tuple]


class _Node(torch.autograd.Function):
    """Set-up and body as autograd sees them: a function of the input and of the adapter's tensors."""

    @staticmethod
    def forward(ctx: Any, step: Step, layer: Any, make: Make, x: Tensor, *tensors: Tensor) -> Tensor:
        with torch.enable_grad():  # as in training, of tensors that take no gradient
            values = make([tensor.detach() for tensor in tensors])
        y, kept = step.forward(layer, rows_of(layer, x), *values)
        ctx.step, ctx.layer, ctx.make, ctx.shape = step, layer, make, x.shape
        # What the set-up reads is saved too, so that a change of it in between is an error: as the module holds it,
        # since `layer` may be a cast of that.
        others = (k for k, i in zip(kept, step.values) if i is None)
        ctx.save_for_backward(*tensors, *others, layer.weight, *layer.held)
        return y

    @staticmethod
    @once
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides the name of `ctx`
            ctx: Any, *grad_outputs: Tensor) -> tuple:
        saved, (grad,) = ctx.saved_tensors, grad_outputs
        needs = ctx.needs_input_grad[4:]
        tensors = [t.detach().requires_grad_(need) for t, need in zip(saved, needs)]
        with torch.enable_grad():
            values = ctx.make(tensors)
        kept = iter(saved[len(needs):])
        of_x, *of_values = ctx.step.backward(
            ctx.layer, grad, *(next(kept) if i is None else values[i].detach() for i in ctx.step.values))
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        of_tensors = iter(setup_backward(values, of_values, wanted))
        of_x = None if of_x is None else of_x.reshape(ctx.shape)
        return None, None, None, of_x, *(next(of_tensors) if t.requires_grad else None for t in tensors)


def setup_backward(values: Sequence[Tensor], of_values: Sequence[Tensor | None],
                   wanted: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """From the gradients of a set-up's values to those of the tensors that they are made of."""
    differentiable = [i for i, gradient in enumerate(of_values) if gradient is not None and values[i].requires_grad]
    outputs, of_outputs = [values[i] for i in differentiable], [of_values[i] for i in differentiable]
    return torch.autograd.grad(outputs, wanted, of_outputs, allow_unused=True)


def run(plan: Candidate, layer: Any, x: Tensor, make: Make, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The output of a program, its values made of the tensors by `make`; None where no tensor takes a gradient, or
    autograd must see the parts."""
    trained = frozenset(key for key, tensor in tensors.items() if tensor.requires_grad)
    needs = (x.requires_grad, *plan.reached(trained))
    known = step(plan.written, needs, x.device.type) if trained else None
    if known is None:
        return None
    with without_autocast(x.device.type):
        return _Node.apply(known, layer, make, x, *tensors.values())
