"""A body with its gradients written out: one node of autograd in the place of many.

Takes the expression of a body over `x` and `value` leaves, and which of them take a gradient; gives a `Step`. Promises:
the values and gradients of the plain body; an activation is kept only where a gradient needs it, written over where
nothing reads it any more, and passed over as seldom as the table of `adjoint` allows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from surgery.expr.dims import Dim
from surgery.expr.ir import Expr, rebuild, walk
from surgery.lower.adjoint import LEAVES, gradients
from surgery.lower.emit import BY_NAME, Emitter
from surgery.lower.kernels import KERNELS
from surgery.lower.moves import MOVES
from surgery.rewrite.algebra import simplify
from surgery.rewrite.terms import times

_SCOPE = {"torch": torch, **MOVES, **BY_NAME, **KERNELS}


@dataclass(frozen=True, eq=False)
class Step:
    """`forward(layer, x, *values)` gives y and what is kept, `backward(layer, grad, *kept)` a gradient for x and each
    value (None where none is taken). `values`: of each thing kept, which value it is (None for one that is none).
    `source` is the text of both."""

    source: str
    values: tuple[int | None, ...]
    forward: Callable[..., tuple]
    backward: Callable[..., tuple]


@lru_cache(maxsize=None)
def step(body: Expr, needs: tuple[bool, ...]) -> Step | None:
    """The step of a body where x and its values take gradients as `needs` says; None for a body without such code."""
    body = _with_masks(body)
    inputs = _inputs(body, len(needs))
    found = gradients(body, [leaf for leaf, need in zip(inputs, needs) if need])
    if found is None:
        return None
    used = dict.fromkeys(n for e in found.of for n in walk(e) if n.op in ("x", "value"))
    of = iter(found.of)
    wanted = [next(of) if need else None for need in needs]
    kept = [Expr("kept", (), i, e.shape) for i, e in enumerate(found.kept)]
    text = f"{_forward(body, inputs, (*used, *found.kept))}\n\n{_backward(wanted, (*used, *kept))}"
    scope: dict[str, Any] = dict(_SCOPE)
    exec(compile(text, "<surgery step>", "exec"), scope)
    values = [leaf.data if leaf.op == "value" else None for leaf in (*used, *found.kept)]
    return Step(text, tuple(values), scope["forward"], scope["backward"])


def _with_masks(body: Expr) -> Expr:
    """Dropout as a mask, and a scaling that goes to a thin factor."""
    def change(node: Expr, args: tuple[Expr, ...]) -> Expr:
        if node.op != "dropout":
            return node.with_args(args)
        mask = Expr("mask", args, node.data, node.shape)
        return times(1 / (1 - node.data[0]), Expr("masked", (*args, mask), None, node.shape))

    return simplify(rebuild(body, change))


def _inputs(body: Expr, count: int) -> list[Expr]:
    """x and the values in their order."""
    leaves = {node.data: node for node in walk(body) if node.op in ("x", "value")}
    return [leaves[key] for key in (None, *range(count - 1))]


def _forward(body: Expr, inputs: Sequence[Expr], kept: Sequence[Expr]) -> str:
    names = {leaf: "x" if leaf.op == "x" else f"a{leaf.data}" for leaf in inputs}
    emitter = Emitter(dict(names), "y", (body, *(k for k in kept if k.op not in LEAVES)), in_place=True, owner=True)
    result = emitter.value(body)
    returned = "".join(f"{emitter.value(k)}, " for k in kept)
    return _function(f"forward(layer, {', '.join(names.values())})", emitter, f"{result}, ({returned})")


def _backward(wanted: Sequence[Expr | None], kept: Sequence[Expr]) -> str:
    names = {leaf: f"k{i}" for i, leaf in enumerate(kept)}
    arguments = ", ".join(["layer", "grad", *names.values()])
    outputs = tuple(e for e in wanted if e is not None)
    grads = {node: "grad" for e in outputs for node in walk(e) if node.op == "grad"}
    emitter = Emitter({**names, **grads}, "g", outputs, in_place=True, owner=True)
    returned = "".join("None, " if e is None else f"{emitter.value(e)}, " for e in wanted)
    return _function(f"backward({arguments})", emitter, f"({returned})")


def _function(head: str, emitter: Emitter, result: str) -> str:
    """The text; an activation is let go of after the last line that reads it."""
    lines = [line for _, line in emitter.letting_go(_is_activation, result)]
    return f"def {head}:\n" + "\n".join(f"    {line}" for line in [*lines, f"return {result}"])


def _is_activation(node: Expr) -> bool:
    return any(isinstance(size, Dim) for size in node.shape)


class _Node(torch.autograd.Function):
    """The step as autograd sees it."""

    @staticmethod
    def forward(ctx: Any, step: Step, layer: Any, x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        y, kept = step.forward(layer, x, *values)
        ctx.step, ctx.layer = step, layer
        ctx.save_for_backward(layer.weight, *kept)  # the weight too, so that a change of it in between is an error
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        _, *kept = ctx.saved_tensors
        return None, None, *ctx.step.backward(ctx.layer, grad, *kept)


def run(body: Expr, layer: Any, x: torch.Tensor, values: tuple) -> torch.Tensor | None:
    """The body's value, with its step as its gradient; None where autograd must see the parts."""
    needs = tuple(torch.is_grad_enabled() and a.requires_grad for a in (x, *values))
    found = step(body, needs)
    if found is None:
        return None
    with torch.autocast(x.device.type, enabled=False):
        return _Node.apply(found, layer, x, *values) if any(needs) else found.forward(layer, x, *values)[0]
