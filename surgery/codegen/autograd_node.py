"""The body and its gradients as one node of autograd instead of many.

Takes the expression of a body over `x` and `value` leaves, and which of them take a gradient; gives a `Step`. Promises:
the values and gradients of the plain body; an activation is kept only where a gradient needs it, written over where
nothing reads it any more, and passed over as seldom as the table of `adjoint` allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import torch

from surgery.codegen.cost_model import frozen_last, one_pass
from surgery.codegen.kernel_names import names_called
from surgery.codegen.kernels_one_pass import has_triton
from surgery.codegen.program_text import step_text
from surgery.ir.dense import without_autocast
from surgery.ir.expression import Expr
from surgery.ir.operations import operation
from surgery.ir.orthogonal_maps import is_traced
from surgery.ir.table import Source

_device: ContextVar[str | None] = ContextVar("the type of device whose steps run", default=None)


@contextmanager
def steps_of(device: str) -> Iterator[None]:
    """Inside, programs are chosen and steps run as on this type of device, wherever their tensors are: to count what
    they ask of it, and to compare what a GPU would run."""
    token = _device.set(device)
    try:
        yield
    finally:
        _device.reset(token)


def runs_as_on(device: str) -> str:
    """The type of device whose programs and steps run for tensors that are on `device`."""
    # a compiler traces no ContextVar, and traces for where the tensors are
    return device if is_traced() else _device.get() or device


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
    known, is_counted = runs_as_on(device), _device.get() is not None
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
    a penalty of gradients lost its terms without a word.) Raises: RuntimeError."""

    @wraps(backward)
    def checked(ctx: Any, *grad_outputs: torch.Tensor) -> tuple:
        if torch.is_grad_enabled():
            raise RuntimeError("an operated layer's gradients are written out, and have no second derivative, which "
                               "create_graph=True asks for: torch.func (hessian, jacrev) takes it")
        return backward(ctx, *grad_outputs)

    return checked


class _Node(torch.autograd.Function):
    """The autograd.Function that runs a step."""

    @staticmethod
    def forward(ctx: Any, step: Step, layer: Any, x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        y, kept = step.forward(layer, x, *values)
        ctx.step, ctx.layer = step, layer
        ctx.save_for_backward(layer.weight, *kept)  # the weight too, so that a change of it in between is an error
        return _no_view(y, (x, *values, *kept))

    @staticmethod
    @once
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides the name of `ctx`
            ctx: Any, *grad_outputs: torch.Tensor) -> tuple:
        _, *kept = ctx.saved_tensors
        return None, None, *ctx.step.backward(ctx.layer, *grad_outputs, *kept)


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


def run(body: Expr, layer: Any, x: torch.Tensor, values: tuple) -> torch.Tensor | None:
    """Run the body as one node of autograd; None where autograd must see its parts."""
    needs = tuple(torch.is_grad_enabled() and a.requires_grad for a in (x, *values))
    known = step(body, needs, x.device.type)
    if known is None:
        return None
    with without_autocast(x.device.type):
        return _Node.apply(known, layer, x, *values) if any(needs) else known.forward(layer, x, *values)[0]
