"""Straight-line Python from expressions: one line a node.

Takes expressions; gives the lines that compute them. Promises: no branch and no bookkeeping; a product that is added to a
fresh value is accumulated into it; what stands only below `detach` is marked, to be computed without a gradient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from surgery.expr.ir import Expr, walk
from surgery.rewrite.terms import scaled, value_of

TEMPLATES = {
    "add": "{} + {}", "mul": "{} * {}", "div": "{} / {}", "matmul": "{} @ {}", "scale": "{} * {}", "T": "{}.mT",
    "split": "{}.unflatten(-1, {data})", "join": "{}.flatten(-2)", "detach": "{}.detach()", "exp": "{}.exp()",
    "sqrt": "{}.sqrt()", "abs": "{}.abs()", "tanh": "{}.tanh()", "sigmoid": "{}.sigmoid()", "diag": "{}.diag_embed()",
    "total": "{}.sum()", "add_bias": "{} + {}", "param": "leaves[{data!r}]", "places": "leaves[{data!r}]", "weight": "layer.matrix(dtype)",
    "bias": "layer.offset(dtype)", "fill": "layer.fill({shape}, {data!r}, dtype)", "eye": "layer.eye({shape}, dtype)",
    "swap": "swap({}, {data})", "reshape": "{}.reshape({data})", "columns": "{}[..., :{data[0]}]", "cos": "{}.cos()", "sin": "{}.sin()",
    "dropout": "layer.dropout({}, {data[0]!r})", "frozen_back": "layer.frozen_back({})", "run": "layer.run({}, {})",
}
FRESH = {"frozen", "matmul", "add", "scale", "run", "frozen_back"}  # values that nothing else holds and no backward pass reads


@dataclass
class Emitter:
    """Writes lines for one region. `names` are the values known so far; `gradless` the nodes that carry no gradient."""

    names: dict[Expr, str]
    prefix: str
    uses: Counter[Expr] = field(default_factory=Counter)
    gradless: frozenset[Expr] = frozenset()
    in_place: bool = False
    lines: list[tuple[bool, str]] = field(default_factory=list)

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

    def _text(self, node: Expr) -> str:
        rule: Callable[[Expr], str | None] = {"add": self._sum, "add_bias": self._bias, "frozen": self._frozen}.get(
            node.op, lambda node: None)
        return rule(node) or self._plain(node)

    def _plain(self, node: Expr) -> str:
        args = [self.value(a) for a in node.args]
        if node.op not in TEMPLATES:
            sizes = [] if node.data is None else [repr(node.data)]
            return f"{node.op}({', '.join([*sizes, *(args or ['layer.like(dtype)'])])})"
        return TEMPLATES[node.op].format(*args, data=node.data, shape=tuple(node.shape))

    def _frozen(self, node: Expr) -> str:
        from_input = node.args[0].op in ("x", "dropout")
        call = f"frozen_{node.data}" if node.data else "frozen" if from_input else "frozen_rows"
        return f"layer.{call}({self.value(node.args[0])})"

    def _sum(self, node: Expr) -> str | None:
        """y + c h M, accumulated into y when y is fresh."""
        for y, term in (node.args, node.args[::-1]):
            scalar, product = scaled(term)
            factor = 1.0 if scalar is None else value_of(scalar)
            if factor is not None and self._is_product(product, node) and self.uses[term] == 1:
                base = self.value(y)
                h, m = map(self.value, product.args)
                alpha = "" if factor == 1.0 else f", alpha={factor!r}"
                fresh = self._is_fresh(y)
                return f"{base}.addmm_({h}, {m}{alpha})" if fresh else f"torch.addmm({base}, {h}, {m}{alpha})"
        return None

    def _is_product(self, term: Expr, node: Expr) -> bool:
        flat = term.op == "matmul" and term.shape == node.shape and all(len(a.shape) == 2 for a in term.args)
        return flat and self.uses[term] == 1 and term not in self.names

    def _bias(self, node: Expr) -> str | None:
        """y + b, in one pass with a scaling of y."""
        y, b = node.args
        if y.op == "scale" and self.uses[y] == 1 and y not in self.names:
            z, d = map(self.value, y.args)
            return f"torch.addcmul({self.value(b)}, {z}, {d})"
        return f"{self.value(y)}.add_({self.value(b)})" if self._is_fresh(y) else None

    def _is_fresh(self, y: Expr) -> bool:
        return self.in_place and y.op in FRESH and self.uses[y] == 1


def count_uses(*outputs: Expr) -> Counter[Expr]:
    """How often each node's value is read, by other nodes or as an output."""
    uses = Counter(outputs)
    seen: set[Expr] = set()
    for output in outputs:
        for node in walk(output):
            if node not in seen:
                seen.add(node)
                uses.update(node.args)
    return uses


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
