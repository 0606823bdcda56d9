"""What expressions mean, as terms of symbols that the text of a program is compared with.

Takes expressions; gives for each node the number of a term, and of one for its gradient. Promises: equal terms are
equal numbers; sums and products are commutative, what is turned twice is itself, and nothing else is rewritten. The
table is its own on purpose: from the table of operations `validate` would hear what the emitter heard, and a row that
is wrong would prove itself right. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice, permutations, product
from typing import Any, NamedTuple

from surgery.ir.expression import Expr, walk

DRAWS = {"dropout", "mask", "number"}
_MOST_ORDERS = 1000  # in which draws of one kind are tried


class Meaning(NamedTuple):
    """Symbols of a value: as a number, and as a function of what takes a gradient (what is detached is a constant)."""

    value: int
    live: int


class Symbols:
    """Terms by number, so that equal ones are equal numbers and a shared part is written once."""

    def __init__(self) -> None:
        self.numbers: dict[tuple, int] = {}
        self.names: list[str] = []  # of the operation that each comes of
        self.shapes: dict[int, tuple] = {}  # of values that the expressions name
        self._turned: dict[Meaning, Meaning] = {}  # of each transpose what it is of

    def _number(self, key: tuple) -> int:
        if key not in self.numbers:
            self.names.append(key[0])
        return self.numbers.setdefault(key, len(self.numbers))

    def of(self, name: str, *parts: Any) -> Meaning:
        """An operation on meanings and on known data."""
        if name == "T" and parts[0] in self._turned:
            return self._turned[parts[0]]
        values, lives = [], []
        for part in parts:
            value, live = part if isinstance(part, Meaning) else (f"{part!r}",) * 2
            values.append(value)
            lives.append(live)
        if name in ("+", "*"):
            values.sort()
            lives.sort()
        meaning = Meaning(self._number((name, *values)), self._number((name, *lives)))
        if name == "T":
            self._turned[meaning] = parts[0]
        return meaning

    def number(self, value: Any) -> Meaning:
        return self.of("number", float(value))

    def times(self, factor: Any, a: Meaning) -> Meaning:
        """c a; a factor of 1 is none."""
        known = not isinstance(factor, Meaning)
        return a if known and factor == 1 else self.of("*", self.number(factor) if known else factor, a)

    def constant(self, a: Meaning) -> Meaning:
        """Without a gradient."""
        return Meaning(a.value, self._number(("constant", a.value)))


# ------------------------------------------------------------------------------------------- what expressions mean

_Rule = Callable[[Symbols, Expr, list[Meaning]], Meaning]


def _as(name: str, *data: Any) -> _Rule:
    return lambda symbols, node, args: symbols.of(name, *args, *data)


def _with_data(name: str, wrap: Callable[[Any], tuple]) -> _Rule:
    return lambda symbols, node, args: symbols.of(name, *args, *wrap(node.data))


def _gain(symbols: Symbols, factor: float, inside: bool, y: Meaning, d: Meaning, *low: Meaning) -> Meaning:
    """d (y + c h m) or d y + c h m; d y without h and m."""
    term = symbols.times(factor, symbols.of("@", *low)) if low else None
    if term is None or not inside:
        scaled = symbols.of("*", y, d)
        return scaled if term is None else symbols.of("+", scaled, term)
    return symbols.of("*", symbols.of("+", y, term), d)


def one_pass(symbols: Symbols, name: str, data: tuple, args: Sequence[Meaning]) -> list[Meaning]:
    """What an operation of one pass gives, said by the operations that it is made of."""
    def sum_of(factor: float, g: Meaning, y: Meaning, *low: Meaning) -> Meaning:
        term = symbols.times(factor, symbols.of("@", *low)) if low else None
        return symbols.of("column_dot", g, y if term is None else symbols.of("+", y, term))

    match name, args:
        case "gained", [y, d, h, m]:
            return [_gain(symbols, *data, y, d, h, m)]
        case "gained_dot", [g, y, h, m]:
            return [sum_of(data[0], g, y, h, m)]
        case "gained_back", [g, d, y, *low]:
            factor, inside = data
            return [_gain(symbols, factor, False, g, d, *([] if inside else low)),
                    sum_of(factor, g, y, *(low if inside else []))]
        case "masked_times", [a, mask, m]:
            return [symbols.of("@", symbols.of("masked", a, mask), m)]
        case "times_masked", [h, m, mask]:
            return [symbols.of("masked", symbols.of("@", h, m), mask)]
        case "masked_outer", [a, mask, g]:
            kept = symbols.of("masked", a, mask)
            left, right = (g, kept) if data[0] else (kept, g)
            return [symbols.of("@", symbols.of("T", left), right)]
    raise ValueError(f"{name} of {len(args)}")


def _of_one_pass(symbols: Symbols, node: Expr, args: list[Meaning]) -> Meaning:
    (meaning,) = one_pass(symbols, node.op, node.data, args)
    return meaning


def _some_columns(node: Expr) -> str:
    """As an index says them, of a matrix or of anything else."""
    first, end = node.data
    return f"{':' if len(node.shape) == 2 else '...'}, {first}:{end}"


OF_PLACES = ("top", "row_top", "row_of", "column_of")  # take no gradient, whether autograd sees what they are of or not
_MEANINGS: dict[str, _Rule] = {
    "const": lambda symbols, node, args: symbols.number(node.data),
    "add": _as("+"), "add_bias": _as("+"), "mul": _as("*"), "scale": _as("*"), "matmul": _as("@"),
    "outer": lambda symbols, node, args: symbols.of("@", symbols.of("T", args[0]), args[1]),
    "detach": lambda symbols, node, args: symbols.constant(args[0]),
    "sign": lambda symbols, node, args: symbols.of("sign", symbols.constant(args[0])),
    **{name: lambda symbols, node, args: symbols.of(node.op, node.data, symbols.constant(args[0]))
       for name in OF_PLACES},
    "split": _with_data("unflatten", lambda data: (-1, data)),
    "join": _as("flatten", -2), "flat": _as("flatten", 0, -2),
    "between": lambda symbols, node, args: symbols.of("index", *args, _some_columns(node)),
    "reshape": _with_data("reshape", lambda data: (data,)),
    "diag": _as("diag_embed"), "total": _as("sum"), "zeros": _as("zeros_like"),
    "param": _with_data("leaf", lambda data: (data,)), "places": _with_data("leaf", lambda data: (data,)),
    "weight": _as("layer.matrix"), "bias": _as("layer.offset"),
    "weight_squares": _with_data("layer.squares", lambda axis: (axis,)),
    "fill": lambda symbols, node, args: symbols.of("layer.fill", tuple(node.shape), node.data),
    "eye": lambda symbols, node, args: symbols.of("layer.eye", tuple(node.shape)),
    "frozen": lambda symbols, node, args: symbols.of("frozen_biased" if node.data == "biased" else "frozen", *args),
    "frozen_back": lambda symbols, node, args: symbols.of("frozen_back", *args),
    "run": _as("layer.run"), "run_alone": _as("layer.run_alone"), "x": _as("x"), "grad": _as("grad"),
    "value": _with_data("value", lambda data: (data,)), "value_at": _with_data("value", lambda data: (data,)),
    "gained": _of_one_pass, "gained_dot": _of_one_pass,
    "swap": _with_data("swap", lambda data: (data,)), "mix": _with_data("mix", lambda data: (data,)),
}


def meanings(symbols: Symbols, outputs: Collection[Expr], given: Mapping[Expr, Meaning],
              turns: Mapping[Expr, int]) -> dict[Expr, Meaning]:
    """What each node means; `turns` says which of several draws of one kind a node is."""
    means = dict(given)
    for node in walk(*outputs):
        if node in means:
            continue
        args = [means[a] for a in node.args]
        if node in turns:
            means[node] = symbols.of(node.op, *args, node.data[0], turns[node])
        elif node.op in _MEANINGS:
            means[node] = _MEANINGS[node.op](symbols, node, args)
        else:
            sizes = [] if node.data is None else [node.data]
            means[node] = symbols.of(node.op, *sizes, *(args or [symbols.of("like")]))
        symbols.shapes.setdefault(means[node].value, tuple(node.shape))
    return means


def orders(outputs: Collection[Expr]) -> Iterator[dict[Expr, int]]:
    """The ways in which draws from the same chance can be numbered: which of them comes first is all the same."""
    alike: dict[tuple, list[Expr]] = {}
    for node in walk(*outputs):
        if node.op in DRAWS:
            alike.setdefault((node.op, node.args, node.data[0]), []).append(node)
    first = (islice(permutations(range(len(group))), _MOST_ORDERS) for group in alike.values())
    ways = product(*first)  # which holds all that it is given
    for _, way in zip(range(_MOST_ORDERS), ways):
        yield {node: turn for group, turns in zip(alike.values(), way) for node, turn in zip(group, turns)}
