"""The compiled form of a formula: three regions of straight-line code.

    once   what depends on the frozen weight alone
    setup  what depends on the adapter's parameters, in float32 or wider, then cast to the activations' dtype
    body   what depends on the input

Takes a formula and a layout's kind; gives a `Program`. Promises: the same values and gradients as the dense formula, to
dtype tolerance; the frozen layer is called and not read unless `reads_weight` says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from surgery.expr.ir import Expr, Formula, rebuild, walk
from surgery.expr.primitives import PRIMITIVES, make
from surgery.lower.activate import TOKENS, apply, enter_in_parts, matrix, run, split_dropout, swap, turned, without_dropout
from surgery.lower.cost import TOKENS as TOKENS_SUPPOSED
from surgery.lower.cost import Cost, step_cost
from surgery.lower.emit import TEMPLATES, Emitter, count_uses, without_gradient
from surgery.rewrite.cheap import cheapest
from surgery.rewrite.structure import is_thin
from surgery.rewrite.terms import depends_on, summands, total

_SCOPE = {"torch": torch, "swap": swap, **{name: row.dense for name, row in PRIMITIVES.items() if name not in TEMPLATES}}


@dataclass(frozen=True, eq=False)
class Program:
    """Compiled code. `once(layer, dtype)` and `setup(layer, leaves, known, dtype)` give tuples; `body(layer, x, *values)`
    the output (None in a program of weights, whose outputs are the set-up's values). `source` is the text of all three."""

    source: str
    once: Callable[..., tuple]
    setup: Callable[..., tuple]
    body: Callable[..., torch.Tensor] | None
    outputs: tuple[Expr, ...]
    fixed: tuple[Expr, ...]
    strategy: str = "weights"
    over: tuple[Program, ...] = ()

    def cost(self, tokens: int = TOKENS_SUPPOSED) -> Cost:
        """What a training step costs."""
        return step_cost(self.outputs, self.fixed, tokens)

    @property
    def reads_weight(self) -> bool:
        """Whether the code reads the frozen weight itself at every step."""
        return "layer.matrix" in self.source.split("def setup")[1]


@lru_cache(maxsize=None)
def activations(formula: Formula, kind: str, training: bool, has_bias: bool, tokens: int = TOKENS_SUPPOSED) -> Program:
    """The program of a layer's output, the cheapest of those known for so many tokens. `kind`: linear, conv, embedding."""
    weight = cheapest(formula.weight if training else without_dropout(formula.weight))
    operand = turned(weight) if kind == "embedding" else weight
    x = Expr("x", (), None, (TOKENS, operand.shape[1]))
    bias = cheapest(formula.bias) if has_bias else None
    programs = [_compile((_with_bias(make_output(operand, x, kind), bias, kind),), _unread, name)
                for name, make_output in STRATEGIES.items()]
    best, *rest = sorted(programs, key=lambda program: program.cost(tokens).seconds)
    return replace(best, over=tuple(rest))


def _spread(operand: Expr, x: Expr, kind: str) -> Expr:
    """W' acts on the activations factor by factor."""
    return (apply if kind == "linear" else enter_in_parts)(operand, x)


def _built(operand: Expr, x: Expr, kind: str) -> Expr:
    """W' is built, and acts as one matrix; what sees the input through dropout acts by itself."""
    kept, dropped = split_dropout(operand)
    parts = [_spread(part, x, kind) for part in dropped]
    if kept is not None:
        whole = matrix(kept)
        parts.insert(0, make("matmul", x, turned(whole)) if kind == "linear" else run(kept, x))
    return total(parts, (TOKENS, operand.shape[0]))


STRATEGIES = {"activations": _spread, "built weight": _built}


@lru_cache(maxsize=None)
def weights(formula: Formula, has_bias: bool) -> Program:
    """The program of W' (and b') themselves: for merging, and for layers that only their own forward knows."""
    outputs = (matrix(cheapest(without_dropout(formula.weight))),)
    return _compile(outputs + ((_offset(cheapest(formula.bias)),) if has_bias else ()), _read)


def _offset(bias: Expr) -> Expr:
    """b' = T (b + u), the transforms acting on b as on a row of activations."""
    if bias.op == "add":
        return make("add", *map(_offset, bias.args))
    return apply(bias.args[0], _offset(bias.args[1])) if bias.op == "matmul" else bias


def _with_bias(y: Expr, bias: Expr | None, kind: str) -> Expr:
    """y + b'; the frozen layer adds its own bias where its output is a term of y."""
    if bias is None:
        return y
    if bias.op != "bias":
        return Expr("add_bias", (y, _offset(bias)), None, y.shape)
    terms = list(summands(y))
    plain = [t for t in terms if t.op == "frozen" and (kind == "linear" or t.args[0].op == "x")]
    if not plain:
        return Expr("add_bias", (y, bias), None, y.shape)
    full = Expr("frozen", plain[0].args, "biased", y.shape)
    rest = [t for t in terms if t is not plain[0]]
    for term in rest:
        full = make("add", full, term)
    return full


def _unread(expr: Expr) -> Expr:
    """W M as the frozen layer run on the rows of Mᵀ, for a thin M, so that the weight is not read."""
    def change(node: Expr, args: tuple[Expr, ...]) -> Expr:
        new = Expr(node.op, args, node.data, node.shape)
        if node.op != "matmul" or len(node.shape) != 2 or TOKENS in node.shape:
            return new
        left, right = args
        if left.op == "weight" and is_thin(right.shape[1], *left.shape):
            return make("T", Expr("frozen", (turned(right),), None, (right.shape[1], left.shape[0])))
        if right.op == "weight" and is_thin(left.shape[0], *right.shape):
            return Expr("frozen_back", (left,), None, (left.shape[0], right.shape[1]))
        return new

    return rebuild(expr, change)


def _read(expr: Expr) -> Expr:
    """The frozen layer's calls as products with its weight, in the dtype of the set-up: a merge rounds once."""
    def change(node: Expr, args: tuple[Expr, ...]) -> Expr:
        if node.op == "frozen":
            return make("matmul", args[0], make("T", Expr("weight", (), None, (node.shape[-1], args[0].shape[-1]))))
        if node.op == "frozen_back":
            return make("matmul", args[0], Expr("weight", (), None, (args[0].shape[-1], node.shape[-1])))
        return Expr(node.op, args, node.data, node.shape)

    return rebuild(expr, change)


# ------------------------------------------------------------------------------------------------- regions


def _compile(outputs: tuple[Expr, ...], prepare: Callable[[Expr], Expr], strategy: str = "weights") -> Program:
    outputs = tuple(map(prepare, outputs))
    on_input: dict[Expr, bool] = {}
    is_body = depends_on(outputs[0], "x", on_input)
    values = _frontier(outputs, on_input) if is_body else outputs
    fixed = _fixed(values)
    text = "\n\n".join([_region("once", "layer, dtype", fixed, {}, "k"),
                        _setup(values, fixed), *([_body(outputs[0], values)] if is_body else [])])
    scope: dict[str, Any] = dict(_SCOPE)
    exec(compile(text, "<surgery program>", "exec"), scope)
    return Program(text, scope["once"], scope["setup"], scope.get("body"), outputs, fixed, strategy)


def _frontier(outputs: Sequence[Expr], on_input: dict[Expr, bool]) -> tuple[Expr, ...]:
    """What the body reads that does not depend on the input, in order (numbers are written into it)."""
    found: dict[Expr, None] = {}
    for output in outputs:
        for node in walk(output):
            if depends_on(node, "x", on_input):
                found.update(dict.fromkeys(a for a in node.args if not depends_on(a, "x", on_input) and a.op != "const"))
    return tuple(found)


def _fixed(values: Sequence[Expr]) -> tuple[Expr, ...]:
    """The largest parts of the set-up that depend on the frozen weight alone and are smaller than it."""
    on_weight: dict[Expr, bool] = {}
    on_leaf: dict[Expr, bool] = {}
    found: dict[Expr, None] = {}
    stack = list(reversed(values))
    while stack:
        node = stack.pop()
        is_fixed = depends_on(node, "weight", on_weight) and not depends_on(node, "param", on_leaf)
        if is_fixed and node.op != "weight" and len(node.shape) < 2:
            found[node] = None
        else:
            stack += reversed(node.args)
    return tuple(found)


def _region(name: str, arguments: str, results: Sequence[Expr], names: dict[Expr, str], prefix: str, cast: str = "") -> str:
    emitter = Emitter(dict(names), prefix, count_uses(*results), without_gradient(*results))
    returned = [emitter.value(r) + (cast if r.op != "const" else "") for r in results]
    lines: list[str] = []
    for gradless, line in emitter.lines:
        if gradless and (not lines or not lines[-1].startswith("  ")):
            lines.append("with torch.no_grad():")
        lines.append(("    " if gradless else "") + line)
    body = [*lines, f"return ({''.join(r + ', ' for r in returned)})"]
    return f"def {name}({arguments}):\n" + "\n".join("    " + line for line in body)


def _setup(values: Sequence[Expr], fixed: Sequence[Expr]) -> str:
    known = {node: f"known[{i}]" for i, node in enumerate(fixed)}
    return _region("setup", "layer, leaves, known, dtype, cast", values, known, "s", ".to(cast)")


def _body(output: Expr, values: Sequence[Expr]) -> str:
    names = {node: f"a{i}" for i, node in enumerate(values)}
    x = next(node for node in walk(output) if node.op == "x")
    emitter = Emitter({**names, x: "x"}, "y", count_uses(output), in_place=True)
    result = emitter.value(output)
    arguments = "".join(f", a{i}" for i in range(len(values)))
    return f"def body(layer, x{arguments}):\n" + "\n".join(
        "    " + line for line in [*(line for _, line in emitter.lines), f"return {result}"])


