"""The text of a program's functions (`once`, `setup`, `body`) and of a step's (`forward`, `backward`).

Takes a candidate, or the expression of a body and what takes a gradient; gives Python. Promises: no torch, so that
`check` can prove the text (`validate`) without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from surgery.codegen.aliases import MemoryUse
from surgery.codegen.candidates import Candidate
from surgery.codegen.emit import Lines, emitted
from surgery.codegen.gradients import gradients
from surgery.codegen.memory_order import in_order
from surgery.codegen.one_pass import fused, gains_fused
from surgery.codegen.operation_counts import size
from surgery.codegen.schedule import Region
from surgery.codegen.two_ways import ways
from surgery.ir.builders import times
from surgery.ir.expression import Expr, rebuild, substituted, walk
from surgery.ir.graph import without_gradient
from surgery.ir.operations import is_whole, make, operation
from surgery.ir.sizes import Dim
from surgery.ir.table import Linear, Memory, Source
from surgery.rewrite.normal_form import simplify

LARGE = 2**16  # numbers of a value that a set-up lets go of as soon as it can


def program_text(plan: Candidate, writes: bool = True) -> str:
    """The functions of a program, as `program.Program` calls them. `writes`: whether the body may write over values."""
    known = {node: f"known[{i}]" for i, node in enumerate(plan.fixed)}
    values = _told_apart(plan.values)
    functions = [_prepared("once", "layer, dtype", plan.fixed, {}, "k"),
                 _prepared("setup", "layer, leaves, known, dtype, cast", values, known, "s", ".to(cast)")]
    if plan.has_body:
        output = plan.outputs[0]
        x = next(node for node in walk(output) if operation(node).source is Source.INPUT)
        names = {**{node: f"a{i}" for i, node in enumerate(plan.values)}, x: "x"}
        region = Region((output,), names.keys(), MemoryUse(writes=writes, is_called=plan.is_called))
        text = emitted(region, names, "y")
        arguments = "".join(f", a{i}" for i in range(len(plan.values)))
        functions.append(_function(f"body(layer, x{arguments})", [line for _, line in text.lines],
                                   text.results[output]))
    return "\n\n".join(functions)


def _told_apart(values: Sequence[Expr]) -> tuple[Expr, ...]:
    """The values of a set-up, with the parameters `apart` that would share the memory of one gradient. That of a sum
    goes to each term as it is, through views as a view of it, and torch keeps what comes as the parameter's own: in
    `A.T + B.T` one memory would be both gradients, to which the next pass, and clipping, would do everything twice."""
    passed: dict[Expr, frozenset[Expr]] = {}  # the leaves to which a node's gradient goes as it is
    shared: set[Expr] = set()
    for node in walk(*values):
        row = operation(node)
        if node.op in ("weight", "bias", "param"):  # a frozen one too, which a user may unfreeze
            passed[node] = frozenset([node])
            continue
        is_passed = row.linear is Linear.TOGETHER or row.linear is Linear.EACH and len(node.args) == 1
        passed[node] = frozenset().union(*(passed[a] for a in node.args)) if is_passed else frozenset()
        if node.op == "add" and len(passed[node]) > 1:  # parts of one memory, as of `stacked`, do no harm
            shared |= passed[node]
    table = {leaf: make("apart", leaf) for leaf in shared if leaf.op == "param"}
    return tuple(substituted(value, table) for value in values)


def _prepared(name: str, arguments: str, results: Sequence[Expr], names: dict[Expr, str], prefix: str,
              cast: str = "") -> str:
    """A function of the set-up: what carries no gradient is computed without one."""
    region = Region(tuple(results), names.keys(), MemoryUse(), without_gradient(*results))
    text = emitted(region, names, prefix, lambda node: size(node, 0) >= LARGE)
    lines: list[str] = []
    for gradless, line in text.lines:
        if gradless and (not lines or not lines[-1].startswith("  ")):
            lines.append("with torch.no_grad():")
        lines.append(("    " if gradless else "") + line)
    as_they_are = {r for r in results if operation(r).is_inline or is_whole(r)}
    returned = "".join(text.results[r] + ("" if r in as_they_are else cast) + ", " for r in results)
    return _function(f"{name}({arguments})", lines, f"({returned})")


def _function(head: str, lines: Sequence[str], result: str) -> str:
    return f"def {head}:\n" + "\n".join(f"    {line}" for line in [*lines, f"return {result}"])


# ------------------------------------------------------------------------------------------- a body and its gradients


@dataclass(frozen=True, eq=False)
class StepText:
    """`source` has `forward` and `backward` of a `body` (its dropout a mask); `gradients` are those that `backward`
    gives, where a leaf `kept` stands for one of the values of the forward pass, `forwarded`. `held` is all that goes
    from the one to the other: leaves first."""

    source: str
    body: Expr
    gradients: tuple[Expr | None, ...]
    forwarded: tuple[Expr, ...]
    held: tuple[Expr, ...]


@cache
def step_text(body: Expr, needs: tuple[bool, ...], frozen_last: bool = False,
              one_pass: bool = False) -> StepText | None:
    """The text of a body where x and its values take gradients as `needs` says; None where an operation of it has no
    gradient in the table. `frozen_last`: as in a `Region`; `one_pass`: whether kernels do in one pass what torch needs
    several for, dropout's mask being a number."""
    def masked(node: Expr, args: tuple[Expr, ...]) -> Expr:
        if node.op != "dropout":
            return node.with_args(args)
        return times(1 / (1 - node.data[0]), make("masked", *args, make(
            "number" if one_pass else "mask", *args, data=node.data)))

    # all that the step is given, of which simplifying may leave some unread: their gradient is zeros
    leaves = {node.data: node for node in walk(body) if operation(node).is_step_input}
    # dropout as a mask, which the backward pass reads again, and a scaling that simplifying gives to a thin factor
    body, second = (simplify(rebuild(way, masked)) for way in ways(body))
    inputs = [leaves[key] for key in (None, *range(len(needs) - 1))]
    runs, second = gains_fused(body, second) if one_pass else (body, second)
    derived = gradients(runs, [leaf for leaf, need in zip(inputs, needs) if need], second)
    if derived is None:
        return None
    used = dict.fromkeys(n for n in walk(*derived.of) if operation(n).is_step_input)
    of = iter(derived.of)
    wanted = tuple(next(of) if need else None for need in needs)
    kept = [Expr("kept", (), i, e.shape) for i, e in enumerate(derived.kept)]
    # where no gradient is taken, and a token or a few are all, nothing is turned
    lay_out = fused if one_pass else in_order if any(needs) and not frozen_last else _as_they_are
    source = "\n\n".join((_forward(runs, inputs, (*used, *derived.kept), frozen_last, lay_out),
                          _backward(wanted, (*used, *kept), frozen_last, lay_out)))
    return StepText(source, body, wanted, derived.kept, (*used, *derived.kept))


_OWN = MemoryUse(recorded=False, writes=True)


_LayOut = Callable[..., tuple[Expr, ...]]  # the outputs of a pass in the operations that its device is best at


def _as_they_are(*outputs: Expr) -> tuple[Expr, ...]:
    return outputs


def _forward(body: Expr, inputs: Sequence[Expr], kept: Sequence[Expr], frozen_last: bool,
             lay_out: _LayOut) -> str:
    names = {leaf: "x" if operation(leaf).source is Source.INPUT else f"a{leaf.data}" for leaf in inputs}
    outputs = (body, *(k for k in kept if not operation(k).is_leaf))
    computed = lay_out(*outputs)
    text = _let_go(Region(computed, names.keys(), _OWN, frozen_last=frozen_last), names, "y")
    called = {**names, **{output: text.results[as_fused] for output, as_fused in zip(outputs, computed)}}
    returned = "".join(f"{called[k]}, " for k in kept)
    return _function(f"forward(layer, {', '.join(names.values())})", [line for _, line in text.lines],
                     f"{called[body]}, ({returned})")


def _backward(wanted: Sequence[Expr | None], kept: Sequence[Expr], frozen_last: bool, lay_out: _LayOut) -> str:
    outputs = tuple(e for e in wanted if e is not None)
    computed = lay_out(*outputs)
    names = {leaf: f"k{i}" for i, leaf in enumerate(kept)}
    arguments = ", ".join(["layer", "grad", *names.values()])
    names |= {node: "grad" for node in walk(*computed) if operation(node).source is Source.BACKWARD}
    text = _let_go(Region(computed, names.keys(), _OWN, frozen_last=frozen_last), names, "g")
    results = iter(_apart(computed, text.results))
    returned = "".join("None, " if e is None else f"{next(results)}, " for e in wanted)
    return _function(f"backward({arguments})", [line for _, line in text.lines], f"({returned})")


def _apart(outputs: Sequence[Expr], called: Mapping[Expr, str]) -> Iterator[str]:
    """What is returned as gradients: of several that show one memory, copies of all but the first."""
    seen = set()
    for output in outputs:
        held = output
        while operation(held).memory is Memory.VIEW:
            held = held.args[0]
        yield f"{called[output]}.clone()" if held in seen else called[output]
        seen.add(held)


def _let_go(region: Region, names: dict[Expr, str], prefix: str) -> Lines:
    """The lines; an activation is let go of after the last that reads it."""
    return emitted(region, names, prefix, lambda node: any(isinstance(size, Dim) for size in node.shape))
