"""Random specs that make sense: well-typed formulas over the table of primitives, placed at random, as text.

A `Room` is what an expression can be made of: the shapes in scope (`n` and friends by their texts), and for each shape the
calls of primitives that give it, found by their own shape rules, so that a new primitive takes part by itself. A definition
starts as the identity (or as no update) in one of several ways, unless its target says `shifted`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product

from hypothesis import strategies as st
from torch.nn import Linear

from surgery.diagnostics import SurgeryError
from surgery.expr import dims
from surgery.expr.ir import Shape
from surgery.expr.primitives import OPERATORS, PRIMITIVES, Primitive, ShapeError
from surgery.expr.values import evaluate
from surgery.operate import apply
from surgery.spec import library, parse
from surgery.syntax.parser import parse_expression
from surgery.syntax.tree import Definition, Spec

SIGNS = {op: sign for sign, op in OPERATORS.items()}

# Shapes by the texts of their dimensions; the sizes of tests are multiples of 6, so that blocks of 3 and factors fit.
ON_SIDE = ("", "n", "n, n", "n, 2", "2, n", "n, 1", "2, 2", "2", "n / 3, 3, 3", "3, 3", "n / 3, n / 3", "3", "n / 3",
           "out, in", "in, out", "out, 2", "2, in", "in, 2", "in", "out")
OF_UPDATE = ("", "out, in", "in, out", "out", "in", "out, 2", "2, in", "in, 2", "2, out", "out, 1", "1, in", "2, 2", "2",
             "out / 3, in / 3", "3, 3", "out / 3, 2", "2, in / 3", "out, out", "in, in")

# What keeps a primitive away from its poles, whatever it is given.
TAMED = {"div": "({0} / (2 + abs({1})))", "sqrt": "sqrt(1 + abs({0}))", "exp": "exp(tanh({0}))", "reflect": "reflect(1.5 + tanh({0}))",
         "cayley": "cayley(skew({0}))", "expm": "expm(skew({0}))"}
# With poles where singular values or entries are equal, which random formulas meet; the zoo has them.
UNTAMED = {"left_singular", "qr", "top_softmax"}
SIZES = ("2", "3", "2, 3", "3, 2")  # beside the shapes in scope, for primitives that take sizes
ENTRYWISE = {"neg", "add", "sub", "mul", "div", "min", "max", "exp", "sqrt", "abs", "sigmoid", "tanh", "cos", "sin", "detach"}
# Ways to write a tensor with numbers and conditions, over any shape.
DRESSED = ("(2 * {0})", "({0} / 4)", "({0} - 0.5)", "(1 - {0})", "(0 * {0})", "(if r >= 2 then {0} else 3 * {0})", "({0} + {0})",
           "({0} - {0})")
STARTS = ("= 0", "= 1", "= 0.3", "~ normal(std = 0.5)", "~ uniform(low = -0.5, high = 0.5)")
STARTS_OF_MATRICES = ("~ kaiming_uniform(a = sqrt(5))", "~ xavier_normal(0.7)")
# How a formula E of shape S starts as Z: the identity or zero.
FROM_START = ("{Z} + gate * {E}", "{Z} + {E} - copy", "{Z} + {E} - detach({E})")


@dataclass(frozen=True)
class Room:
    """The shapes of a definition with their texts, that of its `W` and of its result, and the calls that give each."""

    texts: dict[Shape, str]
    operand: Shape
    result: Shape
    calls: dict[Shape, dict[str, list[tuple[tuple[Shape, ...], str]]]]


@lru_cache
def room(side: str | None) -> Room:
    """The room of a transform on a side, or of an update (None)."""
    sizes = {"out": dims.symbol("out"), "in": dims.symbol("in")}
    names = {**sizes, "n": sizes[side]} if side else sizes
    texts: dict[Shape, str] = {}
    for text in ON_SIDE if side else OF_UPDATE:
        texts.setdefault(sizes_of(text, names), text)
    calls: dict[Shape, dict] = {shape: {} for shape in texts}
    for name, row in PRIMITIVES.items():
        for *chosen, given in product(*[texts] * row.arity, given_sizes(row, texts)) if can_be_random(row) else ():
            try:
                calls[row.shape_of(sizes_of(given, names), chosen)].setdefault(name, []).append((tuple(chosen), given))
            except (ShapeError, KeyError):
                continue
    operand = tuple(sizes.values())
    return Room(texts, operand, (sizes[side],) * 2 if side else operand, calls)


def sizes_of(text: str, names: dict) -> tuple:
    """The values of a list of dimensions."""
    return tuple(evaluate(parse_expression(t), names) for t in text.split(",") if t)


def can_be_random(row: Primitive) -> bool:
    return row.public and row.name not in UNTAMED | {"literal"} and not row.places and not row.whole


def given_sizes(row: Primitive, texts: dict[Shape, str]) -> list[str]:
    """Sizes for a primitive's call, as text; empty for one that takes none."""
    if not row.sizes:
        return [""]
    if row.sizes[0].startswith("*"):
        return [*SIZES, *filter(None, texts.values())]
    return [t for t in SIZES if t.count(",") + 1 == len(row.sizes)]


@dataclass
class Body:
    """A definition's body in the making: its statements, and the names of tensors that later ones can read."""

    draw: Callable
    room: Room
    lines: list[str] = field(default_factory=list)
    known: dict[Shape, list[str]] = field(default_factory=dict)

    def one_of(self, *choices):
        return self.draw(st.sampled_from(choices))

    def expression(self, shape: Shape, depth: int) -> str:
        """A random expression of a shape."""
        calls = self.room.calls[shape]
        if not depth or not calls or self.one_of(*range(5)) == 0:
            return self.leaf(shape)
        if self.one_of(*range(6)) == 0:
            return self.one_of(*DRESSED).format(self.expression(shape, depth - 1))
        name = self.one_of(*sorted(calls), *sorted(set(calls) - ENTRYWISE) * 2)
        shapes, sizes = self.one_of(*calls[name])
        text = call(name, [self.expression(s, depth - 1) for s in shapes] + [sizes] * bool(sizes))
        return self.named(shape, "let", f"= {text}") if self.one_of(*range(4)) == 0 else text

    def leaf(self, shape: Shape) -> str:
        """A parameter (an old or a new one), the operand, the identity."""
        names = self.known.get(shape, []) + ["W"] * (shape == self.room.operand)
        names += [f"I({self.room.texts[shape].split(',')[0]})"] * (len(shape) == 2 and shape[0] == shape[1])
        names += ["[[1, -2], [0.5, 3]]"] * (shape == (2, 2))
        return self.one_of(*names) if names and self.one_of(*range(3)) else self.parameter(shape)

    def parameter(self, shape: Shape) -> str:
        starts = STARTS + STARTS_OF_MATRICES * (len(shape) > 1) + tuple(f"= {name}" for name in self.known.get(shape, []))
        return self.named(shape, self.one_of(*["param"] * 4, "frozen param"), self.one_of(*starts), self.dims(shape))

    def dims(self, shape: Shape) -> str:
        return f"[{self.room.texts[shape]}]" if shape else ""

    def named(self, shape: Shape, word: str, start: str, dims: str = "") -> str:
        """The name of a new statement."""
        name = f"{'xyz'[len(shape) % 3]}{len(self.lines)}"
        self.lines.append(f"{word} {name}{dims} {start}")
        self.known.setdefault(shape, []).append(name)
        return name

    def result(self, shifted: bool, depth: int) -> str:
        """The definition's result: a random expression, or what starts as the identity (or as nothing)."""
        shape = self.room.result
        text = self.expression(shape, depth)
        if shifted:
            return text
        way = self.one_of(*FROM_START)
        if "gate" in way:
            self.lines.append("param gate = 0")
        if "copy" in way:
            self.lines.append(f"frozen param copy{self.dims(shape)} = {text}")
        return way.format(Z="I(n)" if self.room.texts[shape] == "n, n" else "0", E=text)


def call(name: str, texts: list[str]) -> str:
    """A primitive's call as text."""
    if name in TAMED:
        return TAMED[name].format(*texts)
    if name in SIGNS:
        return f"({texts[0]} {SIGNS[name]} {texts[1]})"
    return {"neg": "(-{0})", "T": "{0}.T"}.get(name, f"{name}({', '.join(texts)})").format(*texts)


# ------------------------------------------------------------------------------------------------------ whole specs


@lru_cache
def standard(placement: str, side: str) -> tuple[str, ...]:
    """Calls of the standard library's definitions that fit weights of multiples of 6 there, and start as they should."""
    kind = "update" if placement == "add" else "transform"
    found = (_fitting(d, f"{placement} {{}}" + f" on {side}" * (kind == "transform"))
             for d in library(Spec()).definitions.values() if d.kind == kind)
    return tuple(filter(None, found))


def _fitting(definition: Definition, step: str) -> str:
    """The definition's call with numbers that fit (empty if none do)."""
    for number in (3, 2, 1):
        call = f"{definition.name}({', '.join(f'{p.name} = {number}' for p in definition.params if p.type == 'int')})"
        try:
            apply(Linear(18, 12), parse(f'spec s()\ntarget any "**" {{ {step.format(call)} }}'))
        except SurgeryError:
            continue
        return call
    return ""


@st.composite
def specs(draw, depth: int = 4):
    """The text of a spec with one target on every module."""
    shifted = draw(st.booleans())
    definitions: list[str] = []
    steps = [step(draw, shifted, depth, definitions) for _ in range(draw(st.integers(1, 3)))]
    flag = "shifted " if shifted else ""
    return "\n\n".join(["spec random()", *definitions, f'target any "**" {flag}{{\n  ' + "\n  ".join(steps) + "\n}\n"])


def step(draw: Callable, shifted: bool, depth: int, definitions: list[str]) -> str:
    """A step, of the standard library or of a definition that is added to `definitions`."""
    placement, side = draw(st.sampled_from(["pre", "add", "post"])), draw(st.sampled_from(["out", "in"]))
    kind, side = ("update", "out") if placement == "add" else ("transform", side)
    clause = f"on {side}" + draw(st.sampled_from(["", " with bias"])) * (side == "out")
    clause = draw(st.sampled_from(["", "dropout(0)", "dropout(10%)"])) if kind == "update" else clause
    if draw(st.integers(0, 2)) == 0:
        call = draw(st.sampled_from(standard(placement, side)))
        on_bias = library(Spec()).definitions[call.partition("(")[0]].bias  # there is no input to drop
        return f"{placement} {call} {'' if on_bias else clause}"
    name = f"own_{len(definitions)}"
    body = Body(draw, room(None if kind == "update" else side))
    result = body.result(shifted, depth)
    head = f"{kind} {name}(r: int = 2)" + " on n" * (kind == "transform")
    definitions.append(f"{head} {{\n  " + "\n  ".join([*body.lines, f"return {result}"]) + "\n}")
    return f"{placement} {name}({draw(st.sampled_from(['', '1', 'r = 3']))}) {clause}"
