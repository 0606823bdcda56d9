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
from surgery.ir.expression import Expr
from surgery.ir.operations import operation


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
    known |= {node: _plain(node, []) for node in region.nodes() if operation(node).is_inline and node not in known}
    known |= {each.node: f"{prefix}{i}" for i, each in enumerate(schedule)}
    lines: list[tuple[bool, str]] = []
    for i, (each, base) in enumerate(zip(schedule, over)):
        text = f"{known[each.node]} = {_text(each, base, known)}  # {list(each.node.shape)}".replace("'", '"')
        ends = [node for node in dict.fromkeys(each.reads) if alive.named[node] == i and node not in region.outputs
                and known[node].startswith(prefix) and let_go(node)]
        lines += [(each.node in region.gradless, line) for line in (text, *(f"del {known[node]}" for node in ends))]
    return Lines(lines, {output: known[output] for output in region.outputs})


def _text(each: Instruction, base: Expr | None, known: Mapping[Expr, str]) -> str:
    """The right-hand side of an instruction, in place into `base` if there is one."""
    args, form = [known[operand] for operand in each.reads], each.form
    if form is None:
        return _plain(each.node, args)
    number = f", {form.factor}={each.factor!r}" if each.factor != 1.0 else ""
    if form.is_function and (form.is_fused or base is not None):  # one that writes does so in any case
        into = f"{args[0]}.clone()" if form.writes and base is None else args[0]
        return f"{form.name}({', '.join([into, *args[1:]])}{number})"
    if base is not None:
        rest = [name for operand, name in zip(each.reads, args) if operand is not base]
        return f"{known[base]}.{form.name}_({', '.join(rest)}{number})"
    return f"torch.{form.name}({', '.join(args)}{number})" if form.is_fused or number else _plain(each.node, args)


def _plain(node: Expr, args: list[str]) -> str:
    """The text of a node's own operation: its row's template, or a call by its name."""
    if args and all(operation(a).is_inline for a in node.args):  # a number is no tensor yet
        args = [f"layer.fill((), {number}, dtype)" for number in args]
    text = operation(node).text
    if callable(text):
        return text(node, args)
    if text:
        return text.format(*args, data=node.data, shape=tuple(node.shape))
    sizes = [] if node.data is None else [repr(node.data)]
    like = "layer.like()" if operation(node).whole else "layer.like(dtype)"  # a backward pass has no dtype to choose
    return f"{node.op}({', '.join([*sizes, *(args or [like])])})"
