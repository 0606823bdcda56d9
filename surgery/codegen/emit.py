"""Straight-line Python from expressions: one line an instruction.

    schedule    which instructions there are, what is fused into each, and their order
    lifetimes   how long each value is needed; then what is written over which
    emit        the text

Takes a region; gives the lines that compute it. Promises: no branch and no bookkeeping; a product that is added to a
value of which nothing else is needed is accumulated into it; what stands only below `detach` is marked, to be computed
without a gradient. Nothing is decided here. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from surgery.codegen.lifetimes import lifetimes, written_over
from surgery.codegen.schedule import Instruction, Region, scheduled
from surgery.ir.expression import Expr, walk
from surgery.ir.primitives import PRIMITIVES
from surgery.ir.sizes import symbol

TOKENS = symbol("tokens")

_TEMPLATES = {
    "add": "{} + {}", "mul": "{} * {}", "matmul": "{} @ {}", "scale": "{} * {}", "T": "{}.mT",
    "split": "{}.unflatten(-1, {data})", "join": "{}.flatten(-2)", "detach": "{}.detach()", "exp": "{}.exp()",
    "sqrt": "{}.sqrt()", "abs": "{}.abs()", "tanh": "{}.tanh()", "sigmoid": "{}.sigmoid()", "diag": "{}.diag_embed()",
    "cos": "{}.cos()", "sin": "{}.sin()", "total": "{}.sum()", "add_bias": "{} + {}", "param": "leaves[{data!r}]",
    "places": "leaves[{data!r}]", "weight": "layer.matrix(dtype)", "bias": "layer.offset(dtype)",
    "fill": "layer.fill({shape}, {data!r}, dtype)", "eye": "layer.eye({shape}, dtype)", "swap": "swap({}, {data})",
    "mix": "mix({}, {data})", "reshape": "{}.reshape({data})", "columns": "{}[..., :{data[0]}]",
    "between": "{}[:, {data[0]}:{data[1]}]", "dropout": "layer.dropout({}, {data[0]!r})",
    "frozen_back": "layer.frozen_back({})", "run": "layer.run({}, {})", "mask": "mask({}, {data[0]!r})",
    "flat": "{}.flatten(0, -2)", "zeros": "torch.zeros_like({})",
}
# What a line calls by the name of its operation, having no text of its own.
BY_NAME = {name: row.dense for name, row in PRIMITIVES.items() if name not in _TEMPLATES}
_FACTORS = {"addcmul": "value"}  # how the number in front of what is added is called, where it is not `alpha`
_NARROW = 8  # how much wider the other side is than one with few columns


@dataclass(frozen=True)
class Lines:
    """A region's text: each line, and whether it is computed without a gradient; what its outputs are called."""

    lines: list[tuple[bool, str]]
    results: dict[Expr, str]


def emitted(region: Region, names: Mapping[Expr, str], prefix: str,
            let_go: Callable[[Expr], bool] = lambda node: False) -> Lines:
    """The lines of a region whose given values have `names`. What it computes is called `prefix` and a number; a name
    of this form whose value is to be `let_go` of is deleted after the last line that reads it."""
    schedule = scheduled(region)
    alive = lifetimes(region, schedule)
    over = written_over(region, schedule, alive)
    known = dict(names)
    known |= {node: repr(float(node.data)) for node in region.nodes() if node.op == "const" and node not in known}
    known |= {each.node: f"{prefix}{i}" for i, each in enumerate(schedule)}
    lines: list[tuple[bool, str]] = []
    for i, (each, base) in enumerate(zip(schedule, over)):
        text = f"{known[each.node]} = {_text(each, base, known)}  # {list(each.node.shape)}".replace("'", '"')
        ends = [node for node in dict.fromkeys(each.reads) if alive.named[node] == i and node not in region.outputs
                and known[node].startswith(prefix) and let_go(node)]
        lines += [(each.node in region.gradless, line) for line in (text, *(f"del {known[node]}" for node in ends))]
    return Lines(lines, {output: known[output] for output in region.outputs})


def _text(each: Instruction, base: Expr | None, known: Mapping[Expr, str]) -> str:
    """An instruction's expression, in the place of a base or beside it."""
    args = [known[operand] for operand in each.reads]
    number = f", {_FACTORS.get(each.form, 'alpha')}={each.factor!r}" if each.factor != 1.0 else ""
    if each.form in ("add_blocks", "add_masked"):  # these write in any case
        into = args[0] if base is not None else f"{args[0]}.clone()"
        return f"{each.form}({', '.join([into, *args[1:]])}{number})"
    if each.form == "put":
        return f"put({', '.join(args)})"
    if base is not None:
        rest = [name for operand, name in zip(each.reads, args) if operand is not base]
        return f"{known[base]}.{each.form}_({', '.join(rest)}{number})"
    if each.form in ("addmm", "addcmul") or number:
        return f"torch.{each.form}({', '.join(args)}{number})"
    return _plain(each.node, args)


def _plain(node: Expr, args: list[str]) -> str:
    """A node's own operation."""
    if args and all(a.op == "const" for a in node.args):  # a number is no tensor yet
        args = [f"layer.fill((), {number}, dtype)" for number in args]
    if node.op == "frozen":
        from_input = node.args[0].op in ("x", "dropout", "masked")
        call = node.data or ("" if from_input else "flat" if TOKENS in node.shape else "rows")
        return f"layer.{'_'.join(filter(None, ['frozen', call]))}({args[0]})"
    if node.op == "outer":  # aᵀ g, a side with few columns in front: it is read in order, and so is the other
        a, g = args
        return f"({g}.mT @ {a}).mT" if node.shape[0] > _NARROW * node.shape[1] else f"{a}.mT @ {g}"
    if node.op not in _TEMPLATES:
        sizes = [] if node.data is None else [repr(node.data)]
        return f"{node.op}({', '.join([*sizes, *(args or ['layer.like(dtype)'])])})"
    return _TEMPLATES[node.op].format(*args, data=node.data, shape=tuple(node.shape))


def readers(*outputs: Expr) -> dict[Expr, list[Expr]]:
    """The nodes that read each node's value, as often as they do."""
    found: dict[Expr, list[Expr]] = {}
    for node in walk(*outputs):
        for arg in node.args:
            found.setdefault(arg, []).append(node)
    return found


def without_gradient(*outputs: Expr) -> frozenset[Expr]:
    """The nodes that are reached through `detach` alone."""
    live: set[Expr] = set()
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node not in live:
            live.add(node)
            stack += () if node.op == "detach" else node.args
    return frozenset(walk(*outputs)) - live
