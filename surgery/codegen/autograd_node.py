"""The body and its gradients as one node of autograd instead of many.

Takes the expression of a body over `x` and `value` leaves, and which of them take a gradient; gives a `Step`. Promises:
the values and gradients of the plain body; an activation is kept only where a gradient needs it, written over where
nothing reads it any more, and passed over as seldom as the table of `gradients` allows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import torch

from surgery.codegen.cost_model import frozen_last, one_pass
from surgery.codegen.kernel_names import names_called
from surgery.codegen.kernels_one_pass import has_triton
from surgery.codegen.program_text import step_text
from surgery.codegen.supposed_device import runs_as_on, supposed
from surgery.ir.dense import without_autocast
from surgery.ir.expression import Expr
from surgery.ir.operations import operation
from surgery.ir.orthogonal_maps import is_traced
from surgery.ir.table import Source


@dataclass(frozen=True, eq=False)
class Step:
    """`forward(layer, x, *values)` gives y and what is kept, `backward(layer, grad, *kept)` a gradient for x and each
    value (None where none is taken). `values`: of each thing kept, which value it is (None for one that is none).
    `source` is the text of both."""

    source: str
    values: tuple[int | None, ...]
    forward: Callable[..., tuple]
    backward: Callable[..., tuple]


def step(body: Expr, needs: tuple[bool, ...], device: str = "cpu") -> Step | None:
    """The compiled step of a body where x and its values take gradients as `needs` says, on a type of device; None if
    an operation has no gradient in the table."""
    known, is_counted = runs_as_on(device), supposed() is not None
    return _compiled(body, needs, frozen_last(known), one_pass(known) and (is_counted or has_triton()))


@cache
def _compiled(body: Expr, needs: tuple[bool, ...], frozen_last: bool, one_pass: bool) -> Step | None:
    text = step_text(body, needs, frozen_last, one_pass)
    if text is None:
        return None
    scope = names_called(in_step=True)
    exec(compile(text.source, "<surgery step>", "exec"), scope)
    values = [leaf.data if operation(leaf).source is Source.SETUP else None for leaf in text.held]
    return Step(text.source, tuple(values), scope["forward"], scope["backward"])


def once(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """The `backward` of a node whose gradients have no derivative, and which therefore refuses to be one of those of
    `create_graph=True`. (Torch's `once_differentiable` refuses at the derivative, and only where it comes by this node:
    a penalty of gradients lost its terms without a word.) It runs without autocast, as the forward pass did, wherever
    `.backward()` is called. Raises: RuntimeError."""

    @wraps(backward)
    def checked(ctx: Any, *grad_outputs: torch.Tensor) -> tuple:
        if torch.is_grad_enabled():
            raise RuntimeError("an operated layer's gradients are written out, and have no second derivative, which "
                               "create_graph=True asks for: torch.func (hessian, jacrev) takes it")
        with without_autocast(grad_outputs[0].device.type):
            return backward(ctx, *grad_outputs)

    return checked


def rows_of(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The rows of a node's input, inside of the node, where a reshape is none of its own. Of an input that is written
    over later the backward pass says so, and not that a view of it was made where no gradient is taken."""
    return layer.rows(x if x.ndim == 2 else x.detach())


class _Node(torch.autograd.Function):
    """The autograd.Function that runs a step."""

    @staticmethod
    def forward(ctx: Any, step: Step, layer: Any, x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        y, kept = step.forward(layer, rows_of(layer, x), *values)
        ctx.step, ctx.layer, ctx.shape = step, layer, x.shape
        ctx.save_for_backward(layer.weight, *kept)  # the weight too, so that a change of it in between is an error
        return _no_view(y, (x, *values, *kept))

    @staticmethod
    @once
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides the name of `ctx`
            ctx: Any, *grad_outputs: torch.Tensor) -> tuple:
        _, *kept = ctx.saved_tensors
        of_x, *of_values = ctx.step.backward(ctx.layer, *grad_outputs, *kept)
        return None, None, None if of_x is None else of_x.reshape(ctx.shape), *of_values


class _GroupedNode(torch.autograd.Function):
    """A step on rows of several layers of one shape, such as experts. It is one node since with one for each, joining
    their outputs, and the gradients of the rows and the values, takes as long as some of the products."""

    @staticmethod
    def forward(ctx: Any, step: Step, layers: Sequence[Any], counts: list[int], apart: Sequence[bool],
                x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        y, kept = x.new_empty(len(x), layers[0].weight.shape[0]), []
        each = of_each(values, apart, len(layers))
        for layer, rows, own, place in zip(layers, x.split(counts), each, y.split(counts)):
            part, saved = step.forward(layer, rows, *own)
            place.copy_(part)  # while it is in the cache
            kept += saved
        ctx.step, ctx.layers, ctx.counts, ctx.apart = step, layers, counts, apart
        ctx.save_for_backward(layers[0].stored, *kept)  # what they are matrices of, so that its change is an error
        return y

    @staticmethod
    @once
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides the name of `ctx`
            ctx: Any, *grad_outputs: torch.Tensor) -> tuple:
        (grad,), (_, *kept) = grad_outputs, ctx.saved_tensors
        of_x = grad.new_empty(len(grad), ctx.layers[0].weight.shape[1]) if ctx.needs_input_grad[4] else None
        places = [None] * len(ctx.layers) if of_x is None else of_x.split(ctx.counts)
        size, each = len(kept) // len(ctx.layers), []
        for i, (layer, rows, place) in enumerate(zip(ctx.layers, grad.split(ctx.counts), places)):
            of_rows, *of_values = ctx.step.backward(layer, rows, *kept[i * size:(i + 1) * size])
            each.append(of_values)
            if place is not None:
                place.copy_(of_rows)
        of_values = (None if parts[0] is None else torch.stack(parts) if own else sum(parts[1:], parts[0])
                     for parts, own in zip(zip(*each), ctx.apart))
        return None, None, None, None, of_x, *of_values


def of_each(values: Sequence[torch.Tensor], apart: Sequence[bool], count: int) -> list[tuple[torch.Tensor, ...]]:
    """The values of each of several layers: parts of those that they have `apart`, and the others themselves."""
    parts = [value.unbind() if own else [value] * count for value, own in zip(values, apart)]
    return [tuple(part[i] for part in parts) for i in range(count)]


def _no_view(y: torch.Tensor, others: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
    """y, as no view where it is one of memory that nothing else is in, such as blocks seen as rows: torch refuses to
    write into a view that a node gives, as `ReLU(inplace=True)` does. A view of what is kept stays one, for the same
    write would spoil a gradient."""
    if y._base is None or is_traced() or type(y) is not torch.Tensor:  # were `_base` wrong, such a write would raise
        return y
    memory = y.untyped_storage().data_ptr()  # 0: of no numbers
    if memory and any(each is not None and each.untyped_storage().data_ptr() == memory for each in others):
        return y
    return y.new_empty(0).set_(y)  # pyright: ignore[reportArgumentType]  # torch's stubs know storages alone


def run_grouped(body: Expr, layers: Sequence[Any], counts: list[int], x: torch.Tensor, values: Sequence[torch.Tensor],
                apart: Sequence[bool]) -> torch.Tensor | None:
    """Run the body on rows, `counts[i]` of them of `layers[i]`, as one node of autograd; None where there is none, or
    autograd must see its parts. `apart`: which values have a part for each layer."""
    needs = tuple(torch.is_grad_enabled() and a.requires_grad for a in (x, *values))
    known = step(body, needs, x.device.type) if any(needs) else None
    if known is None:
        return None
    with without_autocast(x.device.type):
        return _GroupedNode.apply(known, layers, counts, apart, x, *values)


def run(body: Expr, layer: Any, x: torch.Tensor, values: tuple) -> torch.Tensor | None:
    """Run the body as one node of autograd; None where autograd must see its parts."""
    needs = tuple(torch.is_grad_enabled() and a.requires_grad for a in (x, *values))
    known = step(body, needs, x.device.type)
    if known is None:
        return None
    with without_autocast(x.device.type):
        return _Node.apply(known, layer, x, *values) if any(needs) else known.forward(layer, layer.rows(x), *values)[0]
