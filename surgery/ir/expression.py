"""The one expression node that every later stage works on.

An `Expr` is an operation of the primitive table on other expressions, with its shape. Equal expressions are the same
object, so that a shared part is computed once and `is` compares formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import chain
from threading import RLock
from typing import Any
from weakref import WeakValueDictionary

from surgery.diagnostics import Span
from surgery.ir.sizes import Dim, Size

Shape = tuple[Size, ...]
OF_DATA = ("gradient", "inputs")  # the operations whose values data gives, and no model alone
_interned: WeakValueDictionary[tuple, Expr] = WeakValueDictionary()
_making = RLock()
_bits: dict[str, int] = {}  # a bit for each operation's name
_left: ContextVar[list[int] | None] = ContextVar("nodes that may still be made", default=None)
_NESTED_IN_PICKLE = 50  # arguments within arguments, which pickle writes by recursion
_LONGEST_REPR = 2000
# What is longer when it is written out, or deeper, is never taken apart: it is computed node by node, as it stands.
UNFOLDED, DEEP = 10_000, 60  # the largest of the tests, with magnitudes on rotations, has 1,324 nodes, 30 deep
DEEPEST_FORMULA = 100  # operations on one another in a formula: half of what Python's stack holds of the rest
_REMEMBERED = 500  # nodes under one whose order it keeps
_DEEPEST = 4 * DEEP  # what taking apart may make of something that is not deep


class Exhausted(Exception):
    """More nodes were made than `at_most` allows, or deeper ones."""


@contextmanager
def at_most(nodes: int) -> Iterator[None]:
    """Inside, no more than so many nodes are made: what takes a formula apart may make of n nodes 2^n. Raises:
    Exhausted."""
    token = _left.set([nodes])
    try:
        yield
    finally:
        _left.reset(token)


class Expr:
    """`op` of the primitive table, its `args`, what else identifies it (`data`: a name, a number), its `shape`.

    `depth` is how many nodes stand on one another; `unfolded` how many there are when every shared part is written out
    (all beyond 2^60 alike), which is the work of a function that recurses without a memory.
    """

    __slots__ = ("op", "args", "data", "shape", "depth", "unfolded", "_ops", "_below", "__weakref__")
    op: str
    args: tuple[Expr, ...]
    data: Any
    shape: Shape
    depth: int
    unfolded: int
    _ops: int  # the bits of the operations in it
    _below: tuple[Expr, ...] | None  # the nodes under it as `walk` gives them, once somebody has walked

    def __new__(cls, op: str, args: tuple[Expr, ...] = (), data: Any = None, shape: Shape = ()) -> Expr:
        left = _left.get()
        if left is not None:
            left[0] -= 1
            if left[0] < 0:
                raise Exhausted
        key = (op, tuple(map(id, args)), type(data), data, shape)
        node = _interned.get(key)
        if node is None:
            with _making:  # a replica's thread may make programs too, and two objects for one node would be two nodes
                node = _interned.get(key) or cls._made(key, args, left is not None)
        return node

    @classmethod
    def _made(cls, key: tuple, args: tuple[Expr, ...], is_bounded: bool) -> Expr:
        node = object.__new__(cls)
        node.args, (node.op, _, _, node.data, node.shape) = args, key
        node.depth = 1 + max((a.depth for a in args), default=0)
        if is_bounded and node.depth > _DEEPEST:
            raise Exhausted
        node.unfolded = min(1 + sum(a.unfolded for a in args), 2**60)
        node._ops = _bits.setdefault(node.op, 1 << len(_bits))
        for a in args:
            node._ops |= a._ops
        node._below = None
        _interned[key] = node
        return node

    def __reduce__(self) -> tuple:
        if self.depth <= _NESTED_IN_PICKLE:
            return Expr, (self.op, self.args, self.data, self.shape)
        nodes = {node: i for i, node in enumerate(walk(self))}
        rows = [(node.op, tuple(nodes[a] for a in node.args), node.data, node.shape) for node in nodes]
        return _from_rows, (rows,)

    def __deepcopy__(self, memo: dict) -> Expr:
        return self

    @property
    def is_large(self) -> bool:
        """Whether it is too long when written out, or too deep, for what takes formulas apart."""
        return self.unfolded > UNFOLDED or self.depth > DEEP

    def has(self, *ops: str) -> bool:
        """Whether one of these operations stands in it, at its root or below. (Known without a walk.)"""
        asked = 0
        for op in ops:
            asked |= _bits.get(op, 0)
        return bool(self._ops & asked)

    def with_args(self, args: tuple[Expr, ...]) -> Expr:
        """The same operation on other arguments of the same shapes."""
        return self if args == self.args else Expr(self.op, args, self.data, self.shape)

    def __repr__(self) -> str:
        """The node with its arguments in it; of a long one the operation alone."""
        if self.unfolded > _LONGEST_REPR or self.depth > _NESTED_IN_PICKLE:
            return f"{self.op}(... {self.unfolded} nodes)"
        inside = ", ".join([*map(repr, self.args), *([] if self.data is None else [repr(self.data)])])
        return f"{self.op}({inside})"


def _from_rows(rows: list[tuple]) -> Expr:
    """The last of some nodes, each of which names its arguments by their rows."""
    nodes: list[Expr] = []
    for op, args, data, shape in rows:
        nodes.append(Expr(op, tuple(nodes[i] for i in args), data, shape))
    return nodes[-1]


@dataclass(frozen=True)
class Draw:
    """A distribution and its arguments, e.g. `kaiming_uniform(a = 2.2)`."""

    distribution: str
    arguments: tuple[tuple[str, Dim | float | str], ...] = ()


@dataclass(frozen=True)
class Leaf:
    """One parameter of an adapter: its key (`post_magnitude.m`), shape and start.

    `init` is an expression over the weight and earlier leaves; otherwise `draw` says how it is drawn. `group` is the
    same for all that share the tensor within its `scope`, and None when it is the module's own. In the scope `target`
    those are modules that need equal shapes; in any other one, the tensor has the size of the largest along each axis,
    and each takes the first entries of it.
    `whole` numbers are places of entries, never trained. `said` is its name in the spec. How it trains: at `rate` times
    the learning rate, without weight decay unless it `decays`, and kept on a `manifold` (a row of `MANIFOLDS`).
    """

    key: str
    shape: Shape
    init: Expr | None
    draw: Draw | None
    frozen: bool = False
    group: str | None = None
    span: Span | None = None
    whole: bool = False
    rate: Dim | float = 1.0
    decays: bool = True
    manifold: str | None = None
    scope: str = "target"
    said: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        """What its `param` is called; the key of a round's tensor, or of one in a second size, has a number behind."""
        return self.said or self.key.rpartition(".")[2]

    def unlike(self, other: Leaf) -> str:
        """In what two leaves differ that cannot where they are one tensor; empty if they can be one."""
        said = {"the number of dimensions": (len(self.shape), len(other.shape)),
                "`frozen`": (self.frozen, other.frozen),
                "its start": (self.init or self.draw, other.init or other.draw),
                "its rate": (self.rate, other.rate), "`no decay`": (self.decays, other.decays),
                "its manifold": (self.manifold, other.manifold)}
        return next((what for what, (one, another) in said.items() if one != another), "")

    @property
    def is_of_module(self) -> bool:
        """True if it starts at what each module has by itself: its weight, its bias, or other leaves."""
        return self.init is not None and self.init.has("weight", "bias", "param", "places", *OF_DATA)

    @property
    def of_data(self) -> tuple[str, ...]:
        """The operations in its start whose values data gives."""
        return tuple(op for op in OF_DATA if self.init is not None and self.init.has(op))

    @property
    def law(self) -> Draw:
        """How it is drawn: where it has no expression to start at."""
        assert self.draw is not None, f"{self.key} is not drawn"
        return self.draw

    @property
    def expr(self) -> Expr:
        """The leaf as formulas name it."""
        return Expr("places" if self.whole else "param", (), self.key, self.shape)


@dataclass(frozen=True)
class Part:
    """What a step of a target returned (under `drop` if it says dropout), and the operand that it calls `W`. `step` is
    its node in the tree of the spec; `times` says how often it stands there, where no size has decided that."""

    step: Any = field(compare=False)
    expr: Expr
    operand: Expr
    times: str = field(default="", compare=False)


@dataclass(frozen=True)
class Claim:
    """`expr` is said to have the property `name`, at `span` in the definition `owner`."""

    name: str
    expr: Expr
    owner: str
    span: Span | None = None


@dataclass(frozen=True)
class Formula:
    """What a target makes of one module: W' and b' over the leaves, which are in order of evaluation; `parts` are what
    its steps made, in the order in which they act."""

    weight: Expr
    bias: Expr
    leaves: tuple[Leaf, ...]
    claims: tuple[Claim, ...] = ()
    parts: tuple[Part, ...] = ()

    @property
    def of_data(self) -> set[str]:
        """The operations in the starts of its leaves whose values data gives."""
        return {op for leaf in self.leaves for op in leaf.of_data}

    @property
    def symbols(self) -> dict[Expr, str]:
        """The last part of each leaf's key, `B` of `add_low_rank.B`, by which a formula is written for a reader."""
        return {leaf.expr: leaf.key.rpartition(".")[2] for leaf in self.leaves}

    @property
    def changes_bias(self) -> bool:
        """Whether b' is anything but b."""
        return self.bias.op != "bias"


def walk(*exprs: Expr) -> Iterator[Expr]:
    """Every distinct node below and including `exprs`, arguments first."""
    if len(exprs) != 1:
        return _walked(exprs)
    (root,) = exprs
    if root._below is None:  # a node never changes, and most are walked again and again
        *below, _ = _walked(exprs)
        if len(below) > _REMEMBERED:
            return chain(below, exprs)
        root._below = tuple(below)
    return chain(root._below, exprs)


def _walked(exprs: tuple[Expr, ...]) -> Iterator[Expr]:
    entered: set[Expr] = set()  # those whose arguments are on the stack, above them
    done: set[Expr] = set()
    stack = list(exprs[::-1])  # and no recursion: a formula may be deeper than Python's stack
    while stack:
        node = stack[-1]
        if node.args and node not in entered:
            entered.add(node)
            stack += node.args[::-1]
            continue
        stack.pop()
        if node not in done:
            done.add(node)
            yield node


def rebuild(expr: Expr, change: Callable[[Expr, tuple[Expr, ...]], Expr]) -> Expr:
    """The expression with `change(node, new arguments)` in place of each node, arguments first."""
    done: dict[int, Expr] = {}  # each distinct node once, however often it is written out
    for node in walk(expr):
        done[id(node)] = change(node, tuple(done[id(a)] for a in node.args))
    return done[id(expr)]


def substituted(expr: Expr, table: Mapping[Expr, Expr]) -> Expr:
    """The expression with other ones in the place of some of its leaves."""
    return rebuild(expr, lambda node, args: table.get(node) or node.with_args(args))


@dataclass(frozen=True)
class NoiseLaw:
    """What identifies noise that is drawn anew in every training step: its key (as of a parameter), its law, and the
    mean, which stands in its place at any other time."""

    key: str
    law: Draw
    mean: float


def in_evaluation(expr: Expr) -> Expr:
    """The expression in evaluation mode: nothing is dropped, and noise is its mean."""

    def change(node: Expr, args: tuple[Expr, ...]) -> Expr:
        if node.op == "noise":
            return Expr("fill", (), node.data.mean, node.shape) if node.shape else Expr("const", (), node.data.mean)
        return args[0] if node.op == "drop" else node.with_args(args)

    return rebuild(expr, change) if expr.has("drop", "noise") else expr


def in_training(expr: Expr) -> Expr:
    """The expression with noise as a leaf that is given, like a parameter that does not train."""
    drawn = {node: Expr("param", (), node.data.key, node.shape) for node in noises(expr)}
    return substituted(expr, drawn) if drawn else expr


def noises(*exprs: Expr) -> tuple[Expr, ...]:
    """The noise that expressions read."""
    return tuple(node for node in walk(*exprs) if node.op == "noise") if any(e.has("noise") for e in exprs) else ()
