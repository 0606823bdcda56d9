"""What a row of the table of operations holds, and how a node is made by its row.

`operations` has the rows. A row is read by whoever asks a question about a node: the verifier reads `shape` and `law`,
the dense meaning `dense` and `evaluate`, rewriting what is known of the map (`linear`, `transpose`, ...), code
generation how it is computed, differentiated and counted, the printer `notation`. `codegen.validate` reads none: it
checks what is made of the rows, and so has tables of its own.

No torch: what computes is a function that imports it when it runs, a text, or the name of a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, Flag, auto
from typing import Any

from surgery.ir.expression import Expr, Shape
from surgery.ir.shape_rules import ShapeError


class Stage(Flag):
    """Forms of an expression between the stages of the compiler. A row says in which of them it may stand."""

    ELABORATED = auto()  # what a spec says, as it says it
    SIMPLIFIED = auto()  # in normal form
    CHEAPEST = auto()  # with small cores in the place of large solves
    MATERIALISED = auto()  # a program of the weight itself
    LOWERED = auto()  # a program of activations
    STEP = auto()  # a body and its gradients
    NONE = 0  # inside one pass alone


_LATE = Stage.MATERIALISED | Stage.LOWERED | Stage.STEP
OF_A_SPEC = Stage.ELABORATED | Stage.SIMPLIFIED | Stage.CHEAPEST
EVERYWHERE = OF_A_SPEC | _LATE
SUGAR = Stage.ELABORATED  # the normal form says it in another way
CORE = Stage.CHEAPEST | _LATE  # the compiler's own, on matrices
ACTING = _LATE  # the compiler's own, on activations and on the rows of matrices
ON_INPUT = Stage.LOWERED | Stage.STEP
IN_STEP = Stage.STEP


class Source(Enum):
    """Where a leaf's tensor comes from. One name has one tensor."""

    LAYER = auto()
    ADAPTER = auto()
    DRAWN = auto()  # noise, in every training step
    INPUT = auto()
    SETUP = auto()
    FORWARD = auto()  # what a backward pass reads of the forward pass
    BACKWARD = auto()  # the gradient of the output


class Memory(Enum):
    """Where a result lies. What is not known to be new memory is never written over; what is not known to be a view is
    counted as computed."""

    GIVEN = auto()  # it is there already: a leaf
    VIEW = auto()  # it shows its operand (`reshape` and its like copy what is not contiguous)
    EITHER = auto()  # a copy, or a view of any operand: it depends on sizes, or nobody has looked
    NEW = auto()  # memory that nothing else had before
    OF_LAYER = auto()  # what the layer gives: new, but for a module of someone else's, which may give a view


class Linear(Enum):
    """How a result depends on the arguments, and so what its gradient needs of them."""

    NOT = auto()  # the gradient may need the arguments and the result
    TOGETHER = auto()  # f(a + c, b + d) = f(a, b) + f(c, d): nothing
    EACH = auto()  # linear in each argument while the others stay: of each the others


class Transpose(Enum):
    """What becomes of f(x, y)ᵀ in normal form."""

    STAYS = auto()  # it is written as a transpose
    INSIDE = auto()  # f(xᵀ, yᵀ)
    KNOWN = auto()  # a rule of its own says it without one


class Orthogonal(Enum):
    """When f(x, y) is known to be orthogonal."""

    UNKNOWN = auto()
    ALWAYS = auto()
    OF_SKEW = auto()  # where x is skew
    OF_ORTHOGONAL = auto()  # where every argument is


class When(Enum):
    """Where a fused instruction computes a term: it depends on whether autograd records it."""

    ALWAYS = auto()
    WITHOUT_GRADIENT = auto()  # where no gradient is taken of the term, or it is written out
    IN_STEP = auto()  # where gradients are written out


@dataclass(frozen=True)
class Form:
    """How a line of a program is called that computes more than one node, or writes over an operand: a method of
    torch's (`y.addmm_(a, b, alpha=2.0)`) or, where `kernel` names one, a function of ours. `factor` is the name of the
    argument for the number in front; a form that does not `write` gives a new value in any case. Of the layer's own
    methods the name says so."""

    name: str
    factor: str = "alpha"
    kernel: str = ""
    writes: bool = True
    is_fused: bool = True

    @property
    def is_function(self) -> bool:
        """Whether it is called with what it writes over as its first argument, and is no method of that."""
        return bool(self.kernel) or self.name.startswith("layer.")


ADD, MUL = Form("add", is_fused=False), Form("mul", is_fused=False)
ADDMM, ADDCMUL = Form("addmm"), Form("addcmul", factor="value")


@dataclass(frozen=True)
class Added:
    """y + c z as one instruction, z being no value of its own. `form` computes it, `fits` says of which z, `takes`
    which arguments of z are computed in it too, `when` where; `scales` whether c may be another number than 1;
    `is_product` whether it sums into y what it multiplies, so that z costs no pass of its own."""

    form: Form
    fits: Callable[[Expr], bool] = lambda z: True
    takes: Callable[[Expr], tuple[Expr, ...]] = lambda z: ()
    when: When = When.ALWAYS
    scales: bool = True
    is_product: bool = False


ONTO, BACK_ONTO = (Form(f"layer.{name}", factor="beta") for name in ("frozen_onto", "frozen_back_onto"))


@dataclass(frozen=True)
class InPlace:
    """`form` computes the operation in the memory of one of `bases`, the best first, where gradients are written
    out."""

    form: Form
    bases: Callable[[Expr], tuple[Expr, ...]]


@dataclass(frozen=True)
class Law:
    """What must hold of a node, said in words."""

    says: str
    holds: Callable[[Expr], bool]


@dataclass(frozen=True)
class Operation:
    """A row: all that is known about an operation. What is left out has a default that is safe: the operation is called
    by its name, keeps for its gradient all that it read, may be a view, costs one operation for each number.

    What it is. `shape(*shapes)` gives the result's shape, `dense(*tensors)` its value; `doc` is one line of maths.
    `sizes` are the names of what a call gives after its tensors (the last with `*` for any number of them), a tuple
    that is the node's `data`; with them, `shape` and `dense` take it first, and a `dense` without a tensor takes one
    whose dtype and device the result gets. `places` says which arguments are whole numbers, places of entries, and
    `into(node)` the shape of what those point into; `whole` whether the result is; `counts` whether a spec may say a
    number k for the first k places. `sign`: how the language writes it
    where that is no call. Where several operations are parts of one computation on the same arguments,
    `jointly(*tensors)` is that, and `part(data, computed)` the operation's own. An operation whose shape does not
    follow from its arguments has a `law`, and is made as an
    `Expr`; a leaf whose tensor is given has a `source`. Where the value needs the node, or the leaves' tensors:
    `evaluate(node, args, leaves)`.

    What is known of the map: `linear`, `transpose`, `orthogonal`; `number(*numbers)`, what it makes of known numbers;
    `is_structured`, whether acting with it is cheaper than building it; `is_transparent`, whether its value is its
    argument's; `is_solve`, whether it factorises a matrix, so that it pays to do so once; `stops_gradient`; `jumps`,
    whether its value or its gradient does, so that a rounding of what it is taken of decides it.

    How it is computed: `text`, a template of its arguments, `data` and `shape`, or a function of the node and the
    arguments' texts. Without one it is called by its name: by the function `kernel` ("module.name" of codegen) or, in
    code that no gradient is taken of, `step_kernel`; without those by `dense`. Where its result lies (`memory`), and
    whether autograd is known to keep it for no gradient, neither when it is made nor when a sum reads it
    (`is_unkept`); how it is computed over an operand (`in_place`), by the sum that reads it (`added`), with a number in
    front (`times`), or as the last thing that is summed into another value, which has the number in front (`onto`).
    `is_inline`: it is written where it is read. `is_matmul`: torch computes it as one product of matrices.
    `of_layer`: it rests on the frozen weight. `rows`: what some rows of it are made of (`row_rules`); without, of all
    its arguments.

    What it costs: `flops(node, count)`, `count` giving the numbers in a node's value; `passes` over memory that make it
    again in a backward pass (a view takes none), None if it is kept instead.

    `derivative(node, g)` has a term for each argument that may take a gradient, g being that of the node; None where
    autograd must see it. `notation(maths, node)` is its text with how tightly that binds (else: a call).
    """

    name: str
    arity: int | None
    shape: Callable[..., Shape] | None
    dense: Callable[..., Any] | None
    doc: str
    stage: Stage = EVERYWHERE
    sizes: tuple[str, ...] = ()
    places: tuple[int, ...] = ()
    into: Callable[[Expr], Shape] | None = None
    whole: bool = False
    counts: bool = False
    sign: str = ""
    law: Law | None = None
    source: Source | None = None
    evaluate: Callable[[Expr, list, Mapping[str, Any]], Any] | None = None
    jointly: Callable[..., Any] | None = None
    part: Callable[[Any, Any], Any] | None = None
    linear: Linear = Linear.NOT
    transpose: Transpose = Transpose.STAYS
    orthogonal: Orthogonal = Orthogonal.UNKNOWN
    number: Callable[..., float] | None = None
    is_structured: bool = False
    is_transparent: bool = False
    is_solve: bool = False
    stops_gradient: bool = False
    jumps: bool = False
    text: str | Callable[[Expr, list[str]], str] = ""
    kernel: str = ""
    step_kernel: str = ""
    memory: Memory = Memory.EITHER
    is_unkept: bool = False
    in_place: InPlace | None = None
    added: Added | None = None
    times: Form | None = None
    onto: Form | None = None
    is_inline: bool = False
    is_matmul: bool = False
    of_layer: bool = False
    rows: Callable[[Expr, int], tuple[int | None, ...] | None] | None = None
    flops: Callable[[Expr, Callable[[Expr], float]], float] | None = None
    passes: int | None = None
    derivative: Callable[[Expr, Expr], tuple[Expr, ...]] | None = None
    notation: Callable[[Any, Expr], tuple[str, int]] | None = None

    @property
    def public(self) -> bool:
        """Whether a spec can say it: as a call, or by a sign."""
        return bool(Stage.ELABORATED & self.stage) and self.shape is not None and not self.is_transparent

    @property
    def call(self) -> str:
        """How a spec calls it: `scatter(a, places, m, n)`."""
        tensors = ["places" if i in self.places else "abc"[i] for i in range(self.arity or 0)]
        return f"{self.name}({', '.join((*tensors, *self.sizes))})"

    @property
    def is_leaf(self) -> bool:
        """Whether it is a tensor or a number that is there already."""
        return self.memory is Memory.GIVEN

    @property
    def is_step_input(self) -> bool:
        """Whether a body reads it: the input, or a value of the set-up."""
        return self.source in (Source.INPUT, Source.SETUP)

    @property
    def is_view(self) -> bool:
        return self.memory is Memory.VIEW

    @property
    def is_free(self) -> bool:
        """Whether nothing is computed and nothing moved."""
        return self.memory in (Memory.GIVEN, Memory.VIEW)

    def shape_of(self, data: Any, shapes: tuple[Shape, ...]) -> Shape:
        """The shape of the result for a node's data and its arguments' shapes. Raises: ShapeError."""
        assert self.shape is not None, f"the shape of `{self.name}` is given, and does not follow"
        return self.shape(data, *shapes) if self.sizes else self.shape(*shapes)

    def value(self, data: Any, args: list, like: Any) -> Any:
        """The value for a node's data and its arguments' values; `like` has the dtype and device of what has none."""
        assert self.dense is not None, f"the value of `{self.name}` is given, and does not follow"
        if not self.sizes:
            return self.dense(*args)
        return self.dense(data, *(args or [like]))

    def laws(self) -> tuple[Law, ...]:
        """What must hold of every node of it."""
        fitting = self.law or Law("the shape of its rule, and its sizes for data", self._keeps_rule)
        if self.arity is None:
            return (fitting,)
        words = f"{self.arity} argument{'s' * (self.arity > 1)}" if self.arity else "no arguments"
        return Law(words, lambda node: len(node.args) == self.arity), fitting

    def _keeps_rule(self, node: Expr) -> bool:
        try:
            fits = node.shape == self.shape_of(node.data, tuple(a.shape for a in node.args))
            return fits and (node.data is not None) == bool(self.sizes)
        except (ShapeError, TypeError):
            return False


OPERATIONS: dict[str, Operation] = {}


def operation(node: Expr) -> Operation:
    """The row of a node."""
    return OPERATIONS[node.op]


def names(is_such: Callable[[Operation], bool]) -> tuple[str, ...]:
    """The operations whose rows are such: what `Expr.has` is asked for."""
    return tuple(name for name, row in OPERATIONS.items() if is_such(row))


# --------------------------------------------------------------------------------------------------- making nodes


def make(op: str, *args: Expr, data: Any = None) -> Expr:
    """The node of an operation on its arguments, `data` its sizes. Raises: ShapeError."""
    row = OPERATIONS[op]
    for argument in args:
        if argument.op == "undecided":
            return undecided(args, (op, data))
    for i, argument in enumerate(args):
        if (whole := OPERATIONS[argument.op].whole) == (i in row.places):
            continue
        if whole:
            raise ShapeError("cannot compute with places, which say what rows, columns or entries are meant",
                             i if row.places else None, (f"the call is `{row.call}`",) * bool(row.places))
        raise ShapeError("needs places here, and this is a tensor", i, (
            "places are what `range`, `indices` and `top` give, and a `frozen param` that starts at one of them or "
            "is drawn from `sample` or `integers`",))
    return Expr(op, args, data, row.shape_of(data, tuple(a.shape for a in args)))


def is_whole(node: Expr) -> bool:
    """Whether a node's values are whole numbers: places of entries, with which nothing is computed."""
    return operation(node).whole


def undecided(args: tuple[Expr, ...], data: Any, shape: Shape = ()) -> Expr:
    """What has no shape as long as a condition on sizes is not decided: an `if` (its text) or an operation on one."""
    return Expr("undecided", args, data, shape)


def is_undecided(node: Expr) -> bool:
    """Whether a node has no shape yet."""
    return node.op == "undecided"


def ones(*shape: Any) -> Expr:
    """A tensor of ones."""
    return Expr("fill", (), 1.0, shape)


def constant(value: Any) -> Expr:
    """A scalar known at compile time."""
    return Expr("const", (), value, ())


def eye(n: Any) -> Expr:
    """The identity matrix [n, n]."""
    return Expr("eye", (), None, (n, n))
