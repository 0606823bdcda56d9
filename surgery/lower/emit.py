"""Straight-line Python from expressions: one line a node.

Takes expressions; gives the lines that compute them. Promises: no branch and no bookkeeping; a product that is added to
a fresh value is accumulated into it, after everything else that reads that value; what stands only below `detach` is
marked, to be computed without a gradient.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from surgery.expr.dims import symbol
from surgery.expr.ir import Expr, walk
from surgery.expr.primitives import PRIMITIVES
from surgery.rewrite.terms import scaled, value_of

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
# Values that nothing else holds, and that no backward pass of autograd's reads. (Where autograd does not look on, all
# that are computed and no views.)
FRESH = {"frozen", "matmul", "blocks", "add", "scale", "mul", "masked", "run", "frozen_back"}
# What is added to a value without being one itself, and how the factor of it is called.
_FACTORS = {"matmul": ("addmm", "alpha"), "mul": ("addcmul", "value"), "scale": ("addcmul", "value"),
            "blocks": ("add_blocks", "alpha")}
_PRODUCTS = {"matmul", "frozen", "frozen_back"}
_NARROW = 8  # how much wider the other side is than one with few columns
VIEWS = {"T", "split", "join", "flat", "between", "swap"}


@dataclass
class Emitter:
    """Writes lines for one region. `names` are the values known so far; `gradless` the nodes that carry no gradient.

    `in_place` allows a sum to be accumulated into a term that nothing else reads; `owner` too whatever is read no more,
    which holds only where autograd does not look on.
    """

    names: dict[Expr, str]
    prefix: str
    outputs: tuple[Expr, ...]
    gradless: frozenset[Expr] = frozenset()
    in_place: bool = False
    owner: bool = False
    lines: list[tuple[bool, str]] = field(default_factory=list)
    overwritten: set[Expr] = field(default_factory=set)
    fused: set[Expr] = field(default_factory=set)  # computed inside of what reads them

    def __post_init__(self) -> None:
        self.given = frozenset(self.names)
        self.readers = readers(*self.outputs)
        self.uses = Counter({node: len(found) for node, found in self.readers.items()}) + Counter(self.outputs)

    def value(self, node: Expr) -> str:
        """The name of a node's value, after the lines that compute it."""
        if node not in self.names:
            number = value_of(node) if node.op == "const" else None
            self.names[node] = repr(number) if number is not None else self._assign(node, self._text(node))
        return self.names[node]

    def _assign(self, node: Expr, text: str) -> str:
        name = f"{self.prefix}{len(self.lines)}"
        self.lines.append((node in self.gradless, f"{name} = {text}  # {list(node.shape)}".replace("'", '"')))
        return name

    def letting_go(self, wide: Callable[[Expr], bool], result: str) -> list[tuple[bool, str]]:
        """The lines, and after the last that reads a `wide` value one that lets go of it (but not of the result's)."""
        found = [[line] for line in self.lines]
        for node, name in self.names.items():
            if name.startswith(self.prefix) and wide(node) and not _reads(result, name):
                last = max(i for i, (_, line) in enumerate(self.lines) if _reads(line, name))
                found[last].append((self.lines[last][0], f"del {name}"))
        return [line for lines in found for line in lines]

    def _text(self, node: Expr) -> str:
        rules: dict[str, Callable[[Expr], str | None]] = {
            "add": self._sum, "add_bias": self._bias, "frozen": self._frozen, "scale": self._scale, "mul": self._times,
            "outer": self._outer}
        return rules.get(node.op, lambda node: None)(node) or self._plain(node)

    def _plain(self, node: Expr) -> str:
        args = [self.value(a) for a in node.args]
        if args and all(a.op == "const" for a in node.args):  # a number is no tensor yet
            args = [f"layer.fill((), {number}, dtype)" for number in args]
        if node.op not in _TEMPLATES:
            sizes = [] if node.data is None else [repr(node.data)]
            return f"{node.op}({', '.join([*sizes, *(args or ['layer.like(dtype)'])])})"
        return _TEMPLATES[node.op].format(*args, data=node.data, shape=tuple(node.shape))

    def _frozen(self, node: Expr) -> str:
        from_input = node.args[0].op in ("x", "dropout", "masked")
        call = node.data or ("" if from_input else "flat" if TOKENS in node.shape else "rows")
        return f"layer.{'_'.join(filter(None, ['frozen', call]))}({self.value(node.args[0])})"

    def _outer(self, node: Expr) -> str:
        """aᵀ g, a side with few columns in front: it is read in order, and so is the other."""
        a, g = map(self.value, node.args)
        return f"({g}.mT @ {a}).mT" if node.shape[0] > _NARROW * node.shape[1] else f"{a}.mT @ {g}"

    def _sum(self, node: Expr) -> str | None:
        """y + z, with what z is a product or a multiple of, or sparse, taken into the same pass, and into a fresh y."""
        if not node.shape or not all(a.shape == node.shape for a in node.args):
            return None
        ways = (self._taken_in, self._masked_in, self._with_multiple, self._in_place)
        both = (node.args, node.args[::-1])
        return next((text for way in ways for y, z in both if (text := way(node, y, z))), None)

    def _taken_in(self, node: Expr, y: Expr, term: Expr) -> str | None:
        """y + c z for a z that is then no value of its own: a product, of matrices or entries, or a sparse matrix."""
        factor, z = _multiple(term)
        if factor is None or self.uses[term] != 1 or not self._is_taken_in(z) or factor != 1.0 and z.op not in _FACTORS:
            return None
        base, *args = map(self.value, (y, *z.args))
        if z in self.names:  # it was needed early, before something that it reads was written over
            return None
        self.fused |= {term, z}
        if z.op == "scatter":
            return f"put({base}, {', '.join(args)})"
        name, word = _FACTORS[z.op]
        overwrites = z not in self._reading(y) and self._may_overwrite(y, node)
        if z.op == "blocks":
            return f"add_blocks({base}{'' if overwrites else '.clone()'}, {', '.join(args)}{_factor(factor, word)})"
        into = f"{base}.{name}_(" if overwrites else f"torch.{name}({base}, "
        return f"{into}{', '.join(args)}{_factor(factor, word)})"

    def _is_taken_in(self, z: Expr) -> bool:
        fits = all(a.shape == z.shape for a in z.args) if z.op == "mul" else len(z.shape) == 2
        # autograd does not see through a kernel of ours, and makes a matrix more for the gradient of `addcmul`
        fits = fits and (z.op not in ("blocks", "mul", "scale") or self.owner or z in self.gradless)
        return z.op in ("scatter", *_FACTORS) and fits and self.uses[z] == 1 and z not in self.names

    def _masked_in(self, node: Expr, y: Expr, term: Expr) -> str | None:
        """y + c masked(a m), no matrix of the size of y made for a m."""
        factor, z = _multiple(term)
        product = z.args[0] if z.op == "masked" else z
        fits = z.op == "masked" and product.op == "matmul" and self.uses[z] == self.uses[product] == 1
        if factor is None or not fits:
            return None
        base, *args = map(self.value, (y, *product.args, z.args[1]))
        if not (self.owner and self._may_overwrite(y, node)):
            return None
        self.fused |= {term, z, product}
        return f"add_masked({base}, {', '.join(args)}{_factor(factor, 'alpha')})"

    def _with_multiple(self, node: Expr, y: Expr, term: Expr) -> str | None:
        """y + c z. Not of a product where a compiler may look on: torch 2.13's forgets the factor."""
        factor, z = _multiple(term)
        is_hidden = self.owner or z.op not in _PRODUCTS
        if factor in (None, 1.0) or self.uses[term] != 1 or term in self.names or not is_hidden:
            return None
        base, added = map(self.value, (y, z))
        if term in self.names:
            return None
        self.fused.add(term)
        into = f"{base}.add_(" if self.owner and self._may_overwrite(y, node) else f"torch.add({base}, "
        return f"{into}{added}{_factor(factor, 'alpha')})"

    def _in_place(self, node: Expr, y: Expr, z: Expr) -> str | None:
        return f"{self.value(y)}.add_({self.value(z)})" if self.owner and self._may_overwrite(y, node) else None

    def _scale(self, node: Expr) -> str | None:
        y, d = node.args
        return f"{self.value(y)}.mul_({self.value(d)})" if self.owner and self._may_overwrite(y, node) else None

    def _times(self, node: Expr) -> str | None:
        c, y = node.args
        fits = self.owner and y.shape == node.shape and not c.shape
        return f"{self.value(y)}.mul_({self.value(c)})" if fits and self._may_overwrite(y, node) else None

    def _bias(self, node: Expr) -> str | None:
        """y + b, in one pass with a scaling of y."""
        y, b = node.args
        if y.op == "scale" and self.uses[y] == 1 and y not in self.names:
            z, d = map(self.value, y.args)
            self.fused.add(y)
            return f"torch.addcmul({self.value(b)}, {z}, {d})"
        return f"{self.value(y)}.add_({self.value(b)})" if self._may_overwrite(y, node) else None

    def _may_overwrite(self, y: Expr, node: Expr) -> bool:
        """Whether `node` may be written into y. What else reads y is then computed before."""
        if not (self.in_place and self._is_fresh(y)) or self._is_output(y) or y in self.overwritten:
            return False
        if not self.owner:
            return self.uses[y] == 1
        reading = list(self._reading(y))
        others = [r for r in reading if r is not node and r not in self.names and r not in self.fused]
        if reading.count(node) > 1 or any(node in walk(r) or self._is_accumulated(r) for r in others):
            return False
        self.overwritten.add(y)
        for other in others:
            self.value(other)
        return True

    def _is_fresh(self, y: Expr) -> bool:
        return bool(y.args) and y.op not in VIEWS and y not in self.given if self.owner else y.op in FRESH

    def _is_output(self, y: Expr) -> bool:
        """Whether y or a view of it is one."""
        return y in self.outputs or any(r.op in VIEWS and self._is_output(r) for r in self.readers.get(y, ()))

    def _is_accumulated(self, node: Expr) -> bool:
        """Whether it is what a sum may take in without its being a value of its own."""
        return node.op in _FACTORS and any(reader.op in ("add", "mul") for reader in self.readers.get(node, ()))

    def _reading(self, y: Expr) -> Iterator[Expr]:
        """What computes with the numbers of y, be it through a view."""
        for reader in self.readers.get(y, ()):
            yield from self._reading(reader) if reader.op in VIEWS else (reader,)


def _reads(line: str, name: str) -> bool:
    return re.search(rf"\b{name}\b", line) is not None


def _multiple(term: Expr) -> tuple[float | None, Expr]:
    """(c, z) of c z for a known number c, which is 1 for what has no scalar in front; (None, z) for an unknown one."""
    scalar, rest = scaled(term)
    return 1.0 if scalar is None else value_of(scalar), rest


def _factor(factor: float, word: str) -> str:
    return "" if factor == 1.0 else f", {word}={factor!r}"


def readers(*outputs: Expr) -> dict[Expr, list[Expr]]:
    """The nodes that read each node's value, as often as they do."""
    found: dict[Expr, list[Expr]] = {}
    for node in dict.fromkeys(node for output in outputs for node in walk(output)):
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
    return frozenset(n for output in outputs for n in walk(output)) - live
