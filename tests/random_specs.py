"""Random specs that make sense: well-typed formulas over the table of primitives, placed at random, as text.

A `Room` is what an expression can be made of: the shapes in scope (`n` and friends by their texts), and for each shape
the calls of primitives that give it, found by their own shape rules, so that a new primitive takes part by itself. A
definition starts as the identity (or as no update) in one of several ways, unless its target says `shifted`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product

from hypothesis import strategies as st
from operands import OF_STARTS
from torch.nn import Linear

from surgery.diagnostics import SurgeryError
from surgery.ir.expression import Expr, Shape
from surgery.ir.operations import OPERATORS, PRIMITIVES, Operation, ShapeError
from surgery.ir.sizes import symbol
from surgery.language.library import library, parse
from surgery.language.parser import parse_expression
from surgery.language.tree import Definition, Spec
from surgery.rewrite.cheaper_forms import CHEAP
from surgery.rewrite.normal_form import RULES
from surgery.runtime.apply import apply
from surgery.semantics.evaluate import evaluate

SIGNS = {op: sign for sign, op in OPERATORS.items()}

# The shapes of a definition by its place (a transform on a side, an update, an update on the bias), as the texts of
# their dimensions; the sizes of tests are multiples of 6, so that blocks of 3 and factors fit.
ON_SIDE = ("", "n", "n, n", "n, 2", "2, n", "n, 1", "2, 2", "2", "n / 3, 3, 3", "3, 3", "n / 3, n / 3", "3", "n / 3",
           "out, in", "in, out", "out, 2", "2, in", "in, 2", "in", "out")
OF_UPDATE = ("", "out, in", "in, out", "out", "in", "out, 2", "2, in", "in, 2", "2, out", "out, 1", "1, in", "2, 2",
             "2",
             "out / 3, in / 3", "3, 3", "out / 3, 2", "2, in / 3", "out, out", "in, in", "out / 3, 3, 3",
             "out / 3, out / 3")
# The operands of the rules' examples, by the texts of their shapes on a side and in an update.
LETTERS = {"n, n": "AB", "n, 2": "PQ", "n, 1": "pq", "n": "de", "n / 3, 3, 3": "SZ", "3, 3": "K", "n / 3, n / 3": "L",
           "": "gh"}

# What keeps a primitive away from its poles, whatever it is given.
TAMED = {"div": "({0} / (2 + abs({1})))", "sqrt": "sqrt(1 + abs({0}))", "exp": "exp(tanh({0}))",
         "reflect": "reflect(1.5 + tanh({0}))",
         "cayley": "cayley(skew({0}))", "expm": "expm(skew({0}))", "inverse": "inverse(expm(tanh({0}) / 4))"}
OPERANDS_TAMED = {"reflect": "(1.5 + tanh({0}))", "cayley": "(tanh({0}) / 4)", "expm": "(tanh({0}) / 4)",
                  "inverse": "(tanh({0}) / 8)"}
# With poles where singular values or entries are equal, or a jump at 0, which random formulas meet; the zoo has them.
UNTAMED = {"left_singular", "singular", "right_singular", "qr", "top_softmax", "sign"}
SIZES = ("2", "3", "2, 3", "3, 2")  # beside the shapes in scope, for primitives that take sizes
ENTRYWISE = {"neg", "add", "sub", "mul", "div", "min", "max", "exp", "sqrt", "abs", "sigmoid", "tanh", "cos", "sin",
             "relu", "clamp", "detach"}
# Ways to write a tensor with numbers and conditions, over any shape.
DRESSED = ("(2 * {0})", "({0} / 4)", "({0} - 0.5)", "(1 - {0})", "(0 * {0})", "(if r >= 2 then {0} else 3 * {0})",
           "({0} + {0})",
           "({0} - {0})")
STARTS = ("= 0", "= 1", "= 0.3", "~ normal(std = 0.5)", "~ uniform(low = -0.5, high = 0.5)")
STARTS_OF_MATRICES = ("~ kaiming_uniform(a = sqrt(5))", "~ xavier_normal(0.7)")
# How a formula E of shape S starts as Z: the identity or zero.
FROM_START = ("{Z} + gate * {E}", "{Z} + {E} - copy", "{Z} + {E} - detach({E})")


Pattern = tuple[str, dict[str, Shape]]


@dataclass(frozen=True)
class Room:
    """The shapes of a definition with their texts, that of its `W` and of its result, and what gives each: calls of
    primitives, and the examples of the rewriting rules with a place for each operand."""

    texts: dict[Shape, str]
    operand: Shape
    result: Shape
    calls: dict[Shape, dict[str, list[tuple[tuple[Shape, ...], str]]]]
    patterns: dict[Shape, list[Pattern]]


@lru_cache
def room(place: str) -> Room:
    """The room of a transform on a side (`out`, `in`), of an `update` or of one on the `bias`."""
    sizes = {"out": symbol("out"), "in": symbol("in")}
    names = {**sizes, "n": sizes.get(place, sizes["out"])}
    texts: dict[Shape, str] = {}
    for text in ON_SIDE if place in sizes else OF_UPDATE:
        texts.setdefault(sizes_of(text, names), text)
    calls: dict[Shape, dict] = {shape: {} for shape in texts}
    for name, row in PRIMITIVES.items():
        for *chosen, given in product(*[texts] * row.arity, given_sizes(row, texts)) if can_be_random(row) else ():
            with suppress(ShapeError, KeyError):
                # of two places each axis must have two: of none and of an axis of 1 there are no two
                if not row.places or all(chosen[i] == (2,) for i in row.places) and all(
                        shape and 1 not in shape for shape in chosen):
                    calls[row.shape_of(sizes_of(given, names), chosen)].setdefault(name, []).append((tuple(chosen),
                                                                                                     given))
    operand = tuple(sizes.values())
    result = {"update": operand, "bias": operand[:1]}.get(place) or (sizes[place],) * 2
    return Room(texts, operand, result, calls, _patterns(texts, names))


def _patterns(texts: Iterable[Shape], names: dict) -> dict[Shape, list[Pattern]]:
    """The examples of the rules that make sense here, by the shape that they have."""
    shapes = {letter: sizes_of(text, names) for text, letters in LETTERS.items() for letter in letters}
    operands = {letter: Expr("param", (), letter, shape) for letter, shape in shapes.items()}
    found: dict[Shape, list[Pattern]] = {shape: [] for shape in texts}
    for rule in (*RULES, *CHEAP):
        with suppress(SurgeryError, KeyError):
            shape = evaluate(parse_expression(rule.example), {**names, **operands}).shape
            found[shape].append((re.sub(r"(?<!\.)\b([A-Za-z])\b(?!\()", r"{\1}", rule.example), shapes))
    return found


def sizes_of(text: str, names: dict) -> tuple:
    """The values of a list of dimensions."""
    return tuple(evaluate(parse_expression(t), names) for t in text.split(",") if t)


def can_be_random(row: Operation) -> bool:
    # einsum takes any number of tensors, and has tests of its own
    return row.public and row.name not in UNTAMED | OF_STARTS | {"literal"} and row.arity is not None and not row.whole


def given_sizes(row: Operation, texts: dict[Shape, str]) -> list[str]:
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
        if self.room.patterns[shape] and self.one_of(*range(4)) == 0:
            return self.pattern(*self.one_of(*self.room.patterns[shape]), depth)
        name = self.one_of(*sorted(calls), *sorted(set(calls) - ENTRYWISE) * 2)
        shapes, sizes = self.one_of(*calls[name])
        places = PRIMITIVES[name].places
        arguments = [self.places() if i in places else self.expression(s, depth - 1) for i, s in enumerate(shapes)]
        text = call(name, arguments + [sizes] * bool(sizes))
        return self.named(shape, "let", f"= {text}") if self.one_of(*range(4)) == 0 else text

    def pattern(self, text: str, shapes: dict[str, Shape], depth: int) -> str:
        """A rule's example with an expression for each of its operands."""
        used = sorted(set(re.findall(r"{(\w)}", text)) - {"n"})
        tame = next((form for name, form in OPERANDS_TAMED.items() if f"{name}(" in text), "{0}")
        operands = {letter: tame.format(self.expression(shapes[letter], depth - 1)) for letter in used}
        return f"({text.format(n='n' if 'n' in self.room.texts.values() else 'out', **operands)})"

    def places(self) -> str:
        """Two places that every tensor with more than one entry has, perhaps one of them twice."""
        draw = self.one_of("sample(of = 2)", "integers(below = 2)")
        self.lines.append(f"frozen param at{len(self.lines)}[2] ~ {draw}")
        return self.lines[-1].split()[2].partition("[")[0]

    def leaf(self, shape: Shape) -> str:
        """A parameter (an old or a new one), the operand, the identity."""
        names = self.known.get(shape, []) + ["W"] * (shape == self.room.operand)
        names += [f"I({self.room.texts[shape].split(',')[0]})"] * (len(shape) == 2 and shape[0] == shape[1])
        names += ["[[1, -2], [0.5, 3]]"] * (shape == (2, 2))
        return self.one_of(*names) if names and self.one_of(*range(3)) else self.parameter(shape)

    def parameter(self, shape: Shape) -> str:
        starts = STARTS + STARTS_OF_MATRICES * (len(shape) > 1) + tuple(f"= {name}"
                                                                        for name in self.known.get(shape, []))
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
def standard(place: str) -> tuple[str, ...]:
    """Calls of the standard library's definitions that fit weights of multiples of 6 there,
    and start as they should."""
    step = {"update": "add {}", "bias": "add {}"}.get(place, f"post {{}} on {place}")
    found = (_fitting(d, step) for d in library(Spec()).definitions.values() if fits(d, place))
    return tuple(filter(None, found))


def fits(definition: Definition, place: str) -> bool:
    return {"update": definition.kind == "update" and not definition.bias, "bias": definition.bias}.get(
        place, definition.kind == "transform")


def _fitting(definition: Definition, step: str) -> str:
    """The definition's call with numbers that fit (empty if none do)."""
    for number in (3, 2, 1):
        call = f"{definition.name}({', '.join(f'{p.name} = {number}' for p in definition.params if p.type == 'int')})"
        with suppress(SurgeryError):
            apply(Linear(18, 12), parse(f'spec s()\ntarget any "**" {{ {step.format(call)} }}'))
            return call
    return ""


# How the steps of a place are written, how a definition for it begins, and what it can name besides `W`.
STEPS = {"out": ("pre {} on out", "post {} on out", "pre {} on out with bias", "post {} on out with bias"),
         "in": ("pre {} on in", "post {} on in"), "bias": ("add {}",),
         "update": ("add {}", "add {} dropout(0)", "add {} dropout(10%)")}
HEADS = {"out": "transform {} on n", "in": "transform {} on n", "update": "update {}", "bias": "update {} on bias"}
BIAS = {"bias": {(symbol("out"),): ["b"]}}


@st.composite
def specs(draw, has_bias: bool = True, depth: int = 4):
    """The text of a spec with one target on every module, all of which have a bias or not."""
    shifted = draw(st.booleans())
    definitions: list[str] = []
    steps = [step(draw, has_bias, shifted, depth, definitions) for _ in range(draw(st.integers(1, 3)))]
    flag = "shifted " if shifted else ""
    return "\n\n".join(["spec random()", *definitions, f'target any "**" {flag}{{\n  ' + "\n  ".join(steps) + "\n}\n"])


def step(draw: Callable, has_bias: bool, shifted: bool, depth: int, definitions: list[str]) -> str:
    """A step, of the standard library or of a definition that is added to `definitions`."""
    place = draw(st.sampled_from(["out", "in", "update", "update", "bias"][:4 + has_bias]))
    written = draw(st.sampled_from(STEPS[place]))
    if draw(st.integers(0, 2)) == 0:
        return written.format(draw(st.sampled_from(standard(place))))
    body = Body(draw, room(place), known={shape: [*names] for shape, names in BIAS.get(place, {}).items()})
    result, name = body.result(shifted, depth), f"own_{len(definitions)}"
    lines = [HEADS[place].format(f"{name}(r: int = 2)") + " {", *body.lines, f"return {result}"]
    definitions.append("\n  ".join(lines) + "\n}")
    return written.format(f"{name}({draw(st.sampled_from(['', '1', 'r = 3']))})")
