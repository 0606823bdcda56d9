"""The compiled form of a formula: three regions of straight-line code.

    once   what depends on the frozen weight alone
    setup  what depends on the adapter's parameters, in float32 or wider, then cast to the activations' dtype
    body   what depends on the input (`step` has its gradients written out)

Takes a candidate; gives a `Program`. Promises: values and gradients are those of the dense formula, to dtype
tolerance; the frozen layer is called and not read unless `reads_weight` says otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, cached_property
from types import CodeType
from typing import Any

import torch

from surgery.codegen import autograd_node, recompute
from surgery.codegen.candidates import Candidate
from surgery.codegen.cost_model import TOKENS_SUPPOSED, Cost
from surgery.codegen.kernel_names import names_called
from surgery.codegen.program_text import program_text
from surgery.ir.dense import without_autocast
from surgery.ir.expression import Expr
from surgery.ir.orthogonal_maps import is_traced, is_transformed


@dataclass(frozen=True, eq=False)
class Program:
    """Compiled code. `once(layer, dtype)` and `setup(layer, leaves, known, dtype, cast)` give tuples;
    `body(layer, x, *values)` the output (None in a program of weights, whose outputs are the set-up's values). `source`
    is the text of all three; `others` are the candidates that it was chosen over (programs in `over`, made when asked
    for), and `up_to` says which of them all is the cheapest up to how many tokens.

    `reads_weight`: the code reads the frozen weight itself at every step; `rests_on_layer`: the set-up depends on the
    frozen layer's tensors; `given`: the keys of the adapter's tensors that are the values, where the set-up makes
    nothing of them. (All three are found here, since no compiler of torch's can trace what finds them.) `plain`: the
    program in the place of one that pays only as one node of autograd, and in the dtype of its set-up."""

    source: str
    once: Callable[..., tuple]
    setup: Callable[..., tuple]
    body: Callable[..., torch.Tensor] | None
    plan: Candidate
    reads_weight: bool
    rests_on_layer: bool
    given: tuple[str, ...] | None
    others: tuple[Candidate, ...] = ()
    up_to: tuple[tuple[float, Program], ...] = ()
    plain: Program | None = None

    def at(self, tokens: int | None) -> Program:
        """The cheapest program for so many tokens (itself where they are not known)."""
        if tokens is not None:
            for limit, program in self.up_to:
                if tokens <= limit:
                    return program
        return self

    @cached_property
    def unwritten(self) -> Callable[..., torch.Tensor]:
        """The body with no value written over: what is the same for all items of a `vmap` cannot hold a sum with what
        each item has of its own."""
        return _scope(program_text(self.plan, writes=False))["body"]

    @property
    def over(self) -> tuple[Program, ...]:
        return tuple(map(_compile, self.others))

    @property
    def outputs(self) -> tuple[Expr, ...]:
        return self.plan.outputs

    @property
    def fixed(self) -> tuple[Expr, ...]:
        return self.plan.fixed

    @property
    def strategy(self) -> str:
        return self.plan.strategy

    def run(self, layer: Any, x: torch.Tensor, make: recompute.Make,
            tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The body on the values that `make` makes of the adapter's tensors: as one node of autograd where the layer's
        map and its transpose are products with a weight at hand; the set-up too where it is better made again than
        held."""
        if torch.is_grad_enabled() and self.plan.recompute_cost is not None and self._is_known(layer):
            y = recompute.run(self.plan, layer.as_dtype(x.dtype), x, make, tensors)
            if y is not None:
                return y
        return self.run_on(make(tuple(tensors.values())), layer, x)

    def run_on(self, values: tuple, layer: Any, x: torch.Tensor) -> torch.Tensor:
        """The body on values of the set-up that were made before."""
        y = autograd_node.run(self.plan.written, layer.as_dtype(x.dtype), x, values) if self._is_known(layer) else None
        if y is not None:
            return y
        with nullcontext() if layer.follows_autocast else without_autocast(layer.device.type):
            assert self.body is not None  # a program of W' alone has none, and is not run
            body = self.body if torch.compiler.is_compiling() or not is_transformed() else self.unwritten
            return body(layer, layer.rows(x), *values)

    def run_grouped(self, values: Sequence[torch.Tensor], apart: Sequence[bool], layers: Sequence[Any],
                    counts: list[int], x: torch.Tensor) -> torch.Tensor:
        """The body on rows, `counts[i]` of them of `layers[i]`. `apart`: which values have a part for each layer."""
        if self._is_known(layers[0]):
            cast = [layer.as_dtype(x.dtype) for layer in layers]
            y = autograd_node.run_grouped(self.plan.written, cast, counts, x, values, apart)
            if y is not None:
                return y
        each = autograd_node.of_each(values, apart, len(layers))
        return torch.cat([self.run_on(own, layer, rows) for own, layer, rows in zip(each, layers, x.split(counts))])

    def _is_known(self, layer: Any) -> bool:
        """Whether the layer's map and its transpose are products with a weight at hand."""
        # what `train` has unfrozen takes a gradient that autograd finds, and a node of ours does not give
        return layer.layout.kind.is_product and not (is_traced() or layer.is_trained)

    def cost(self, tokens: int = TOKENS_SUPPOSED) -> Cost:
        """What a training step costs."""
        return self.plan.cost(tokens)


@cache
def compiled(plan: Candidate, others: tuple[Candidate, ...] = (),
             up_to: tuple[tuple[float, Candidate], ...] = ()) -> Program:
    """The code of a candidate, which was chosen over `others` and gives way to those of `up_to`."""
    return replace(_compile(plan), others=others, up_to=tuple((end, _compile(other)) for end, other in up_to))


_COMMENT = re.compile(r"  # .*")  # a value's shape: programs of layers of other sizes are often one but for that


@cache
def _code(text: str) -> CodeType:
    return compile(text, "<surgery program>", "exec")


def _scope(text: str) -> dict[str, Any]:
    """The functions of a program's text by name."""
    scope = names_called(in_step=False)
    exec(_code(_COMMENT.sub("", text)), scope)
    return scope


@cache
def _compile(plan: Candidate) -> Program:
    text = program_text(plan)
    scope = _scope(text)
    plain = None if plan.plain is None else _compile(plan.plain)
    return Program(text, scope["once"], scope["setup"], scope.get("body"), plan, plan.reads_weight,
                   plan.rests_on_layer, plan.given, plain=plain)
