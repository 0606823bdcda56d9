"""A second reading of the language: W' and b' of a spec in NumPy, from its text and docs/language.md alone.

It shares no code with the package, not even the grammar, so that a mistake of the parser, of elaboration, of a
primitive or of a rewriting is not on both sides of a comparison. `Reading(text).operated(...)` gives W' and b' for
given parameters; `starts=` collects what parameters start at. Gradients are central differences of it, with what
`detach` gave at the point kept.
"""

from __future__ import annotations

import math
import operator
import re
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

STANDARD = (Path(__file__).parent.parent / "specs" / "std.surg").read_text(encoding="utf-8")
TOKEN = re.compile(r"""\s+|\#[^\n]*|(?P<number>\d+(?:_\d+)*(?:\.\d+)?(?:[eE][+-]?\d+|%)?)|(?P<string>"[^"]*")
    |(?P<turn>\.T\b)|(?P<name>[A-Za-z_]\w*)|(?P<sign><=|>=|==|!=|\.\.|[-+*/@()\[\]{}=,:~<>])""", re.VERBOSE)
LEVELS = (("or",), ("and",), ("<=", ">=", "==", "!=", "<", ">"), ("+", "-"), ("*", "/", "@"))  # loosest first


@dataclass
class Step:
    placement: str
    call: tuple
    side: str = "out"
    with_bias: bool = False


@dataclass
class Definition:
    kind: str
    params: list
    side: str = ""
    on_bias: bool = False
    body: list = field(default_factory=list)
    result: tuple = ()


# --------------------------------------------------------------------------------------------------- from text to trees


class Parser:
    """Recursive descent over the tokens of a file: `params`, `definitions` and `targets` are what it says."""

    def __init__(self, text: str):
        self.tokens = [m[0] for m in TOKEN.finditer(text) if m.lastgroup]
        assert "".join(TOKEN.sub("", text).split()) == "", "what is no token"
        self.at, self.params, self.definitions, self.targets = 0, [], {}, []
        while self.at < len(self.tokens):
            getattr(self, self.take().removeprefix("override"), self.pass_over)()

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, *wanted: str) -> str:
        token = self.peek()
        assert not wanted or token in wanted, f"{token} in the place of {wanted}"
        self.at += 1
        return token

    def if_next(self, token: str) -> bool:
        self.at += (found := self.peek() == token)
        return found

    def pass_over(self) -> None:
        """A statement that says nothing of W': use, select, train, check, override."""
        words = {"use", "spec", "check", "select", "transform", "update", "target", "train", "override", ""}
        while self.peek() not in words:
            self.at += 1

    def spec(self) -> None:
        self.take()
        self.params = self.signature()

    def signature(self) -> list:
        found = []
        if self.if_next("("):
            while not self.if_next(")"):
                name = self.take()
                self.take(":"), self.take()
                found.append((name, self.expression() if self.if_next("=") else None))
                self.if_next(",")
        return found

    def transform(self) -> None:
        name, made = self.take(), Definition("transform", self.signature())
        self.take("on")
        made.side = self.take()
        self.definitions[name] = self.body(made)

    def update(self) -> None:
        name, made = self.take(), Definition("update", self.signature())
        if self.if_next("on"):
            made.on_bias = bool(self.take("bias"))
        self.definitions[name] = self.body(made)

    def body(self, made: Definition) -> Definition:
        while self.take() != "{":
            pass
        made.body = self.statements("return")
        made.result = self.expression()
        self.take("}")
        return made

    def statements(self, end: str) -> list:
        """Up to a word; a repetition is (variable, first, end, statements)."""
        found, scope = [], ""
        while (word := self.take()) != end:
            if word == "let":
                name = self.take()
                self.take("=")
                found.append((name, None, self.expression()))
            elif word == "for":
                name = self.take()
                self.take("in")
                bounds = self.expression(), self.take("..") and self.expression()
                found.append((name, *bounds, self.take("{") and self.statements("}")))
            elif word == "param":
                name, dims = f"{scope}{self.take()}", []
                scope = ""
                while self.peek() not in "=~":
                    self.take("[", ","), dims.append(self.expression())
                    self.if_next("]")
                found.append((name, dims, self.expression() if self.take("=", "~") == "=" else self.drawn()))
            elif word == "noise":
                name, dims = self.take(), []
                while self.peek() != "~":
                    self.take("[", ","), dims.append(self.expression())
                    self.if_next("]")
                self.take("~")
                found.append((name, None, ("mean", self.expression(), *dims)))
            elif word == "check":
                self.expression()
            elif word == "shared" and self.if_next("("):
                scope = "" if self.take() == "target" else "shared."  # one tensor for all steps that say its name
                self.take(")")
        return found

    def drawn(self) -> None:
        self.expression()

    def target(self) -> None:
        while self.take() != "{":
            pass
        self.targets.append(self.steps())

    def steps(self) -> list:
        """Up to the end of a block; a repetition is (variable, first, end, steps)."""
        steps: list = []
        while not self.if_next("}"):
            if self.if_next("for"):
                name = self.take()
                self.take("in")
                first = self.expression()
                self.take(".."), (end := self.expression()), self.take("{")
                steps.append((name, first, end, self.steps()))
                continue
            steps.append(Step(self.take("pre", "add", "post"), self.expression()))
            while self.peek() in ("on", "with", "dropout"):
                if (word := self.take()) == "on":
                    steps[-1].side = self.take("out", "in")
                elif word == "with":
                    steps[-1].with_bias = bool(self.take("bias"))
                else:
                    self.atom()
        return steps

    def expression(self, level: int = 0) -> tuple:
        if level == 0 and self.if_next("if"):
            parts = [self.expression()]
            for word in ("then", "else"):
                self.take(word), parts.append(self.expression())
            return ("if", *parts)
        if level == len(LEVELS):
            return ("-", self.expression(level)) if self.if_next("-") else self.atom()
        if level == 2 and self.if_next("not"):
            return ("not", self.expression(level))
        left = self.expression(level + 1)
        while self.peek() in LEVELS[level]:
            left = (self.take(), left, self.expression(level + 1))
        return left

    def atom(self) -> tuple:
        token = self.take()
        if token == "(":
            found = self.expression()
            self.take(")")
        elif token == "[":
            rows = []
            while not self.if_next("]"):
                self.take("["), rows.append(self.sequence("]"))
                self.if_next(",")
            found = ("rows", rows)
        elif token[0] == '"':
            found = ("value", token[1:-1])
        elif token[0].isdigit():
            found = ("value", number(token))
        elif token in ("true", "false"):
            found = ("value", token == "true")
        else:
            found = ("call", token, self.sequence(")")) if self.if_next("(") else ("name", token)
        while self.if_next(".T"):
            found = ("T", found)
        return found

    def sequence(self, end: str) -> list:
        """Expressions, or (name, expression) for arguments by name, up to a bracket."""
        found = []
        while not self.if_next(end):
            if self.tokens[self.at + 1] == "=":
                name = self.take()
                self.take("="), found.append((name, self.expression()))
            else:
                found.append((None, self.expression()))
            self.if_next(",")
        return found


def number(token: str) -> Any:
    if token.endswith("%"):
        return float(token[:-1]) / 100
    return int(token) if re.fullmatch(r"[\d_]+", token) else float(token)


# ------------------------------------------------------------------------------------------------------- the primitives


def whole(x: Any) -> Any:
    return int(x) if isinstance(x, Fraction) and x.denominator == 1 else x


def divide(a: Any, b: Any) -> Any:
    if not (is_tensor(a) or is_tensor(b)):
        return whole(Fraction(a) / b) if isinstance(b, (int, Fraction)) and isinstance(a, (int, Fraction)) else a / b
    a, b = np.broadcast_arrays(np.asarray(a, float), np.asarray(b, float))
    return np.divide(a, b, out=np.zeros(a.shape), where=b != 0)


def cayley(a):
    eye = np.eye(a.shape[-1])
    return np.linalg.solve(eye - a / 2, np.broadcast_to(eye, a.shape) + a / 2)


def expm(a):
    halvings = max(0, math.ceil(math.log2(np.abs(a).sum() + 1e-30)) + 2)
    term = result = np.broadcast_to(np.eye(a.shape[-1]), a.shape)
    for k in range(1, 19):
        term = term @ a / (k * 2.0**halvings)
        result = result + term
    for _ in range(halvings):
        result = result @ result
    return result


def reflect(u):
    result = np.eye(len(u))
    for column in u.T:
        if column.any():
            result = result - 2 * np.outer(result @ column, column) / (column @ column)
    return result


def block_diag(blocks):
    count, rows, columns = blocks.shape
    result = np.zeros((count * rows, count * columns))
    for i, block in enumerate(blocks):
        result[i * rows:(i + 1) * rows, i * columns:(i + 1) * columns] = block
    return result


def shuffle(p, q):
    result = np.zeros((p * q, p * q))
    for i in range(p):
        for j in range(q):
            result[j * p + i, i * q + j] = 1
    return result


def circulant(c):
    p, q, b = c.shape
    result = np.zeros((p * b, q * b))
    for i in range(p * b):
        for j in range(q * b):
            result[i, j] = c[i // b, j // b, (j % b - i % b) % b]
    return result


def scatter(values, places, m, n):
    result = np.zeros(m * n)
    for value, place in zip(values, places):
        result[place] += value
    return result.reshape(m, n)


def singular_parts(a):
    """The largest entry of each left vector is positive."""
    u, s, v = np.linalg.svd(a, full_matrices=False)
    signs = np.sign(u[np.abs(u).argmax(0), range(len(s))])
    return u * signs, s, v * signs[:, None]


def top(a, k):
    return np.sort(np.argsort(-a.ravel(), kind="stable")[:k])


def row_top(a, k):
    return np.concatenate([top(row, k) + i * a.shape[1] for i, row in enumerate(a)])


def top_softmax(a, k):
    result = np.zeros(a.shape)
    for at in np.ndindex(a.shape[:-1]):
        best = np.argsort(-a[at], kind="stable")[:k]
        share = np.exp(a[at][best] - a[at].max())
        result[at][best] = share / share.sum()
    return result


def on_numbers(plain, entrywise):
    """A function of compile-time numbers, and of the entries of tensors."""
    return lambda *xs: (entrywise(*(float(x) if isinstance(x, Fraction) else x for x in xs))
                        if any(map(is_tensor, xs)) else plain(*xs))


def divisor(n, most=None):
    return max(d for d in range(1, n + 1) if n % d == 0 and (d * d <= n if most is None else d <= most))


def power(a, b):
    if is_tensor(a):
        return a**b
    return whole(Fraction(a) ** b) if isinstance(a, (int, Fraction)) and isinstance(b, int) else float(a) ** float(b)


def log2(x):
    return next((k for k in range(64) if 2**k == x), math.log2(x))


def is_tensor(x: Any) -> bool:
    return isinstance(x, np.ndarray)


OPERATORS = {"+": lambda a, b: whole(a + b), "-": lambda a, b: whole(a - b), "*": lambda a, b: whole(a * b),
             "/": divide, "@": lambda a, b: a @ b, **{sign: lambda a, b, compare=compare: compare(a, b) * 1.0 if is_tensor(a) or is_tensor(b) else compare(a, b)
                for sign, compare in (("<", operator.lt), ("<=", operator.le), (">", operator.gt), (">=", operator.ge))},
              "==": lambda a, b: a == b, "!=": lambda a, b: a != b,
             "and": lambda a, b: a and b, "or": lambda a, b: a or b}
FUNCTIONS = {
    "I": np.eye, "ones": lambda *sizes: np.ones(sizes), "floor": math.floor, "divisor": divisor,
    "log2": log2, "pow": power,
    "min": on_numbers(min, np.minimum), "max": on_numbers(max, np.maximum), "abs": on_numbers(abs, np.abs),
    **{name: on_numbers(getattr(math, name), getattr(np, name)) for name in ("exp", "cos", "sin", "sqrt", "tanh")},
    "sigmoid": on_numbers(lambda x: 1 / (1 + math.exp(-x)), lambda a: 1 / (1 + np.exp(-a))),
    "norm": lambda a: np.asarray(np.sqrt((a * a).sum())), "row_norm": lambda a: np.sqrt((a * a).sum(-1)),
    "col_norm": lambda a: np.sqrt((a * a).sum(-2)), "diag": lambda a: a[..., None] * np.eye(a.shape[-1]),
    "block_diag": block_diag, "kron": np.kron, "skew": lambda a: a - a.swapaxes(-1, -2), "cayley": cayley,
    "expm": expm, "reflect": reflect, "side_by_side": lambda a, b: np.concatenate([a, b], -1),
    "reshape": lambda a, *sizes: a.reshape(sizes), "shuffle": shuffle, "range": np.arange, "indices": np.arange,
    "columns": lambda a, at: a[..., at] if is_tensor(at) else a[..., :at],
    "rows": lambda a, at: a[..., at, :] if is_tensor(at) else a[..., :at, :],
    "circulant": circulant, "scatter": scatter, "take": lambda a, places: a.ravel()[places], "top": top, "row_top": row_top,
    "top_softmax": top_softmax, "left_singular": lambda a, k: singular_parts(a)[0][:, :k],
    "singular": lambda a, k: singular_parts(a)[1][:k], "right_singular": lambda a, k: singular_parts(a)[2][:k],
    "inverse": lambda a: np.linalg.solve(a, np.broadcast_to(np.eye(a.shape[-1]), a.shape)),
    "stacked": lambda a, b: np.concatenate([a, b], -2), "relu": on_numbers(lambda a: max(a, 0), lambda a: a * (a > 0)),
    "sign": on_numbers(lambda a: int(a > 0) - int(a < 0), np.sign),
    "clamp": on_numbers(lambda a, b, c: min(max(a, b), c), lambda a, b, c: np.minimum(np.maximum(a, b), c)),
    "numbers": lambda places: np.asarray(places, float), "einsum": np.einsum, "qr": lambda a: np.linalg.qr(a)[0], "ifft2": lambda a: np.fft.ifft2(a).real,
}


# ----------------------------------------------------------------------------------------------------- what a spec says


class Reading:
    """A spec's text, read. `settings` are the values of its parameters where they are not the defaults."""

    def __init__(self, text: str, **settings: Any):
        file = Parser(text)
        self.definitions = Parser(STANDARD).definitions | file.definitions
        self.targets, self.detached, self.replaying = file.targets, [], None
        self.settings: dict[str, Any] = {}
        for name, default in file.params:
            self.settings[name] = settings[name] if name in settings else self.value(default, self.settings)

    def operated(self, weight, bias, tensors, target: int = 0, place=None, starts=None, data=None) -> tuple:
        """(W', b') of a matrix and a bias (or None) by a target's steps; `tensors` by key, `place` the layer and the
        depth, `data` what G and C are. What parameters start at is put into `starts`."""
        sizes = dict(zip(("out", "in"), weight.shape))
        names, around = [], {**sizes, **(place or {}), **self.settings}
        steps = list(self.written_out(self.targets[target], around))
        for step, _ in steps:
            base = f"{step.placement}_{step.call[1]}"
            seen = sum(name == base or re.fullmatch(rf"{base}_\d+", name) is not None for name in names)
            names.append(f"{base}_{seen + 1}" if seen else base)
        x, b, added = weight, bias, 0.0
        for placement in ("pre", "add", "post"):
            for (step, variables), name in zip(steps, names):
                definition = self.definitions[step.call[1]]
                if step.placement != placement or definition.on_bias and bias is None:
                    continue
                arguments = self.arguments(definition, step.call[2], {**around, **variables})
                scope = {**(data or {}), **arguments, **sizes, "W": weight if placement == "add" else x}
                scope |= {definition.side: sizes[step.side]} if definition.side else {}
                scope |= {"b": bias} if definition.on_bias else {}
                made = self.instance(definition, name, scope, tensors, starts)
                if placement == "add":
                    b, added = (b + made, added) if definition.on_bias else (b, added + made)
                else:
                    x = made @ x if step.side == "out" else x @ made
                    b = made @ b if step.with_bias and b is not None else b
            x = x + added if placement == "add" else x
        return x, b

    def written_out(self, steps: list, scope: dict, variables: dict | None = None):
        """Each step with the variables around it."""
        for step in steps:
            if isinstance(step, Step):
                yield step, variables or {}
            else:
                name, first, end, inner = step
                for i in range(self.value(first, scope), self.value(end, scope)):
                    yield from self.written_out(inner, {**scope, name: i}, {**(variables or {}), name: i})

    def arguments(self, definition: Definition, given: list, scope: dict) -> dict:
        names = [name for name, _ in definition.params]
        values = {name or names[i]: self.value(e, scope) for i, (name, e) in enumerate(given)}
        found: dict[str, Any] = {}
        for name, default in definition.params:
            found[name] = values[name] if name in values else self.value(default, found)
        return found

    def instance(self, definition: Definition, prefix: str, scope: dict, tensors, starts):
        calls: dict[str, int] = {}

        def called(name: str, given: list):
            """What another definition returns, with tensors of its own for each call."""
            calls[name] = calls.get(name, 0) + 1
            inner = self.definitions[name]
            sides = {inner.side: self.value(dict(given).get(inner.side, ("name", definition.side)), scope)} if inner.side else {}
            arguments = self.arguments(inner, [(n, e) for n, e in given if n is None or n not in sides], scope)
            outer = {each: scope[each] for each in ("out", "in", "W", "b") if each in scope}
            return self.instance(inner, f"{prefix}-{name}" + f"_{calls[name]}" * (calls[name] > 1),
                                 {**outer, **sides, **arguments}, tensors, starts)

        scope["()"] = called
        self.read(definition.body, prefix, scope, tensors, starts, {})
        return self.value(definition.result, scope)

    def read(self, body: list, prefix: str, scope: dict, tensors, starts, seen: dict) -> None:
        for name, dims, start, *inner in body:
            if inner:  # a repetition, whose bounds these are; a tensor of its second round is called A_2
                for number in range(self.value(dims, scope), self.value(start, scope)):
                    scope[name] = number
                    self.read(*inner, prefix, scope, tensors, starts, seen)
            elif dims is None:
                scope[name] = self.value(start, scope)
            else:
                seen[name] = seen.get(name, 0) + 1
                key = (name if "." in name else f"{prefix}.{name}") + f"_{seen[name]}" * (seen[name] > 1)
                name, shape = name.rpartition(".")[2], tuple(self.value(d, scope) for d in dims)
                scope[name] = tensors[key]
                assert scope[name].shape == shape, f"{key} is {scope[name].shape}, not {shape}"
                if starts is not None and start is not None:
                    starts[key] = np.broadcast_to(np.asarray(self.value(start, scope), float), shape)

    def value(self, node: tuple, scope: dict) -> Any:
        kind, *parts = node
        if kind == "value":
            return parts[0]
        if kind == "name":
            return scope.get(parts[0], math.pi) if parts[0] == "pi" else scope[parts[0]]
        if kind == "mean":  # of noise, which stands for it outside of training
            (_, law, given), *dims = parts
            p = [self.value(e, scope) for _, e in given]
            mean = {"bernoulli": lambda: p[0], "normal": lambda: p[0], "uniform": lambda: (p[0] + p[1]) / 2}[law]()
            return np.full(tuple(self.value(d, scope) for d in dims), float(mean))
        if kind == "if":
            return self.value(parts[1 if self.value(parts[0], scope) else 2], scope)
        if kind == "rows":
            return np.array([[float(self.value(e, scope)) for _, e in row] for row in parts[0]])
        if kind == "call" and parts[0] not in FUNCTIONS and parts[0] != "detach":
            return scope["()"](*parts)
        if kind == "call":
            values = [self.value(e, scope) for _, e in parts[1]]
            return self.constant(values[0]) if parts[0] == "detach" else FUNCTIONS[parts[0]](*values)
        values = [self.value(e, scope) for e in parts]
        if kind == "T":
            return values[0].swapaxes(-1, -2)
        if kind in ("-", "not") and len(values) == 1:
            return -values[0] if kind == "-" else not values[0]
        if any(map(is_tensor, values)):
            values = [float(v) if isinstance(v, Fraction) else v for v in values]
        return OPERATORS[kind](*values)

    def constant(self, value):
        """What `detach` gives: where differences are taken, what it gave at the point."""
        if self.replaying is not None:
            return self.detached[self.replaying.pop(0)]
        self.detached.append(value)
        return value

    def differences(self, scalar, tensors: dict, entries: list, step: float) -> list[float]:
        """The central differences of `scalar(tensors)` in entries (key, index). `scalar` runs this reading once."""
        self.detached, self.replaying = [], None
        scalar(tensors)
        found = []
        for key, at in entries:
            sides = []
            for moved in (step, -step):
                other = tensors[key].copy()
                other[at] += moved
                self.replaying = list(range(len(self.detached)))
                sides.append(scalar({**tensors, key: other}))
            found.append((sides[0] - sides[1]) / (2 * step))
        self.replaying = None
        return found


def compare_gradients(reading: Reading, scalar, tensors: dict, gradients: dict, count: int = 2) -> int:
    """Asserts that gradients are the central differences in a few entries of each tensor, and says in how many that
    could be told: not at a kink, where differences of two steps are two numbers."""
    draw, told = np.random.default_rng(0), 0
    for key, gradient in gradients.items():
        entries = [(key, tuple(int(draw.integers(size)) for size in gradient.shape)) for _ in range(count)]
        size = np.abs(gradient).max() + 1
        for entry, rough in zip(entries, reading.differences(scalar, tensors, entries, 1e-5)):
            if abs(rough - gradient[entry[1]]) > 1e-5 * size:
                (fine,) = reading.differences(scalar, tensors, [entry], 1e-6)
                is_kink = abs(fine - rough) > 1e-5 * size
                assert is_kink, f"the gradient of {key} in {entry[1]} is {gradient[entry[1]]:.8g}, not {rough:.8g}"
            else:
                told += 1
    return told
