"""The tree of a `.surg` file: the one data model behind text, Python and JSON.

Statements are strict frozen pydantic models; the expressions in them (from `expression`) are their source text in JSON.
Spans, parentheses and comments (`Trivia`) never count in `==`. Of the comments JSON keeps the one above a statement, as
its `doc`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_serializer,
    model_validator,
)

from surgery.language.expressions import (
    Argument,
    Binary,
    Boolean,
    Call,
    CallExpr,
    Expr,
    Expression,
    If,
    Matrix,
    Name,
    Number,
    String,
    Transpose,
    Unary,
    as_expression,
)
from surgery.language.json_errors import as_misfits_of
from surgery.language.json_fields import Comments, Many, Pattern, Place, Reference, Selectors, Trivia
from surgery.language.registry import Registered

__all__ = [
    "Argument",
    "Binary",
    "Boolean",
    "Call",
    "Check",
    "Definition",
    "Expression",
    "If",
    "Let",
    "Many",
    "Matrix",
    "Name",
    "Node",
    "Noise",
    "Number",
    "Param",
    "Parameter",
    "Pattern",
    "Reference",
    "Repeat",
    "Rounds",
    "Select",
    "Spec",
    "Step",
    "String",
    "Target",
    "Train",
    "Transpose",
    "Trivia",
    "Unary",
    "Use",
    "add",
    "as_expression",
    "post",
    "pre",
]

Placement = Literal["pre", "add", "post"]
Side = Literal["out", "in"]
_Init = TypeVar("_Init", bound=Callable[..., None])


def _by_fields(init: _Init) -> _Init:
    """So marked, an `__init__` is for users: pydantic reads a nested node by its fields, and not through it."""
    init.__dict__["__pydantic_base_init__"] = True
    return init


def _with_doc(schema: dict[str, Any]) -> None:
    schema["properties"]["doc"] = {"type": "string", "description": "The comment above it, without its `#`s."}


class Node(BaseModel):
    """A statement: strict, frozen, compared without its place and comments."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", arbitrary_types_allowed=True,
                              json_schema_extra=_with_doc)

    span: Place | None = Field(default=None, exclude=True, repr=False)
    name_span: Place | None = Field(default=None, exclude=True, repr=False)
    trivia: Comments = Field(default=Trivia(), exclude=True, repr=False)

    # A user who builds a spec in Python is told what is wrong as one who writes text is: never by pydantic's own error.
    @_by_fields
    def __init__(self, **fields: Any):
        with as_misfits_of(type(self).__name__):
            super().__init__(**fields)

    @classmethod
    def model_validate(cls, *arguments: Any, **how: Any) -> Self:
        """As pydantic's. Raises: SurgeryError for whatever does not fit."""
        with as_misfits_of(cls.__name__):
            return super().model_validate(*arguments, **how)

    @classmethod
    def model_validate_json(cls, *arguments: Any, **how: Any) -> Self:
        """As pydantic's. Raises: SurgeryError for whatever does not fit."""
        with as_misfits_of(cls.__name__):
            return super().model_validate_json(*arguments, **how)

    @model_validator(mode="before")
    @classmethod
    def _documented(cls, fields: Any) -> Any:
        """A `doc` is the comment above the statement."""
        if not isinstance(fields, dict) or not isinstance(fields.get("doc"), str):
            return fields
        # JSON holds no comments; this one it keeps, since it is what a spec says about itself
        above = tuple(f"# {line}".rstrip() for line in re.split(r"\r\n?|\n", fields["doc"]))
        trivia = {"trivia": Trivia(above)} if fields["doc"].strip() and "trivia" not in fields else {}
        return {**{name: value for name, value in fields.items() if name != "doc"}, **trivia}

    @model_serializer(mode="wrap")
    def _with_its_doc(self, write: Any) -> dict[str, Any]:
        return {**({"doc": self.doc} if self.doc else {}), **write(self)}

    def _meaning(self) -> tuple:
        return tuple(getattr(self, f) for f, info in type(self).model_fields.items() if not info.exclude)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self._meaning() == other._meaning()

    def __hash__(self) -> int:
        return hash((type(self), self._meaning()))

    @property
    def doc(self) -> str:
        """The comment block directly above the declaration, without its `#`s."""
        lines = self.trivia.above
        # a blank line ends the block: a comment above it is about the file, or commented-out code
        block = lines[max((i + 1 for i, line in enumerate(lines) if not line), default=0) :]
        return "\n".join(line.lstrip("#").strip() for line in block)


class Parameter(Node):
    """A formal parameter: `rank: int = 8`. In Python: `Parameter("rank", "int", 8)`."""

    name: str
    type: Literal["int", "float", "bool", "str"]
    default: Expr | None = None

    @_by_fields
    def __init__(self, *parts: Any, **fields: Any):
        super().__init__(**dict(zip(("name", "type", "default"), parts)), **fields)


class Check(Node):
    """`check rank >= 1`."""

    condition: Expr


class Use(Node):
    """`use "file.surg"`."""

    path: str


class Select(Node):
    """`select attention = "...", "..."`."""

    name: str
    patterns: Selectors


class Param(Node):
    """`[frozen] [shared(SCOPE)] param NAME[dims] = init` or `~ draw`, then how it trains: `rate 16`, `no decay`, `on
    stiefel`. `shared`: true for the modules of a target, else the scope.
    """

    what: Literal["param"] = "param"
    name: str
    dims: Many[Expr] = ()
    init: Expr | None = None
    draw: CallExpr | None = None
    frozen: bool = False
    shared: bool | Literal["module", "layer", "model"] = False
    rate: Expr | None = None
    decay: bool = True
    manifold: Literal["stiefel"] | None = None


class Noise(Node):
    """`noise NAME[dims] ~ draw`: drawn anew in every training step, its mean otherwise."""

    what: Literal["noise"] = "noise"
    name: str
    dims: Many[Expr] = ()
    draw: CallExpr


class Let(Node):
    """`let NAME = value`."""

    what: Literal["let"] = "let"
    name: str
    value: Expr


Statement = Param | Noise | Let


class For(Node):
    """What is said once for each whole number from `first` up to `end`, without `end`."""

    name: str
    first: Expr
    end: Expr


class Rounds(For):
    """`for i in 0..count { statements }` in a definition: a `let` of a name that stands above gives it its next value.

    In Python: `Rounds("i", 0, "count", Param(...), Let(...))`.
    """

    what: Literal["for"] = "for"
    body: Many[Annotated[Param | Noise | Let | Rounds, Field(discriminator="what")]] = ()

    @_by_fields
    def __init__(self, *parts: Any, **fields: Any):
        super().__init__(**dict(zip(("name", "first", "end"), parts)), **({"body": parts[3:]} if parts[3:] else {}),
                         **fields)


class Definition(Node):
    """A transform (`on` its dimension's name) or an update, with its body and the expression that it returns.

    `bias`: an update `on bias` is added to the bias. `claims_spans` are the places of the claims, in order.
    """

    kind: Literal["transform", "update"]
    name: str
    params: Many[Parameter] = ()
    dim: str | None = None
    bias: bool = False
    claims: Many[str] = ()
    checks: Many[Check] = ()
    body: Many[Annotated[Param | Noise | Let | Rounds, Field(discriminator="what")]] = ()
    result: Expr
    result_trivia: Comments = Field(default=Trivia(), exclude=True, repr=False)
    claims_spans: tuple[Place, ...] = Field(default=(), exclude=True, repr=False)


class Step(Node):
    """One line of a target: `pre diagonal() on out with bias`, `add low_rank(rank) dropout(p)`, `post orthogonal()`."""

    placement: Placement
    call: CallExpr
    side: Side = "out"
    bias: bool = False
    dropout: Expr | None = None


def _kind_of_step(value: Any) -> str:
    """For pydantic: what names a variable is a repetition, anything else is read as a step."""
    return "for" if isinstance(value, Repeat) or isinstance(value, dict) and "name" in value else ""


AnyStep = Annotated[Annotated[Step, Tag("")] | Annotated["Repeat", Tag("for")], Discriminator(_kind_of_step)]


class Repeat(For):
    """`for i in 0..count { steps }`: the steps once for each whole number from `first` up to `end`, without `end`.

    In Python: `Repeat("i", 0, "count", pre("turns", "i"))`.
    """

    steps: Many[AnyStep] = ()

    @_by_fields
    def __init__(self, *parts: Any, **fields: Any):
        super().__init__(**dict(zip(("name", "first", "end"), parts)), **({"steps": parts[3:]} if parts[3:] else {}),
                         **fields)


def every_step(steps: Iterable[Step | Repeat]) -> Iterator[Step]:
    """The steps as they are written, each once, those that are repeated too."""
    for each in steps:
        yield from every_step(each.steps) if isinstance(each, Repeat) else (each,)


def every_statement(body: Iterable[Statement | Rounds]) -> Iterator[Statement]:
    """The statements of a definition as they are written, each once, those of its rounds too."""
    for each in body:
        yield from every_statement(each.body) if isinstance(each, Rounds) else (each,)


def every_selector(spec: Spec) -> list[Pattern | Reference]:
    """The selectors as they are written: those of targets, then those of each `select` and `train`."""
    in_targets = [s for target in spec.targets for s in (*target.selectors, *target.exclude)]
    return [*in_targets, *(s for each in (*spec.selects, *spec.train) for s in each.patterns)]


def _call(definition: str, values: tuple[Any, ...], named: dict[str, Any]) -> Call:
    pairs = [*((None, value) for value in values), *named.items()]
    return Call(definition, tuple(Argument(name, as_expression(value)) for name, value in pairs))


def pre(definition: str, /, *values: Any, on: Side = "out", with_bias: bool = False, **named: Any) -> Step:
    """`pre definition(values, name = value) on SIDE [with bias]`. A text is an expression: `rank="2 * rank"`.

    >>> import surgery
    >>> print(surgery.Spec(targets=[surgery.Target("**.q_proj", surgery.pre("diagonal", on="in"))]))
    target "**.q_proj" {
      pre diagonal() on in
    }
    <BLANKLINE>
    """
    return Step(placement="pre", call=_call(definition, values, named), side=on, bias=with_bias)


def post(definition: str, /, *values: Any, on: Side = "out", with_bias: bool = False, **named: Any) -> Step:
    """`post definition(values, name = value) on SIDE [with bias]`. A text is an expression: `rank="2 * rank"`."""
    return Step(placement="post", call=_call(definition, values, named), side=on, bias=with_bias)


def add(definition: str, /, *values: Any, dropout: Any = None, **named: Any) -> Step:
    """`add definition(values, name = value) [dropout(p)]`. A text is an expression: `rank="2 * rank"`.

    >>> import surgery
    >>> surgery.Target(surgery.add("low_rank", rank=8), kind="linear")
    <target linear { add low_rank(rank = 8) }>
    """
    return Step(placement="add", call=_call(definition, values, named), dropout=dropout)


def inside(loop: Node) -> tuple[Node, ...]:
    """What a `for` repeats; nothing of another node."""
    return loop.steps if isinstance(loop, Repeat) else loop.body if isinstance(loop, Rounds) else ()


class Target(Node):
    """`[override] target [KIND [in CLASS]] selectors [except selectors] [shifted] [untie] { steps }`.

    In Python: `Target("**.q_proj", pre("diagonal"), add("low_rank", rank=8), kind="linear")`.
    No selector at all means every module of the kind (the output head left out).
    """

    kind: Literal["linear", "conv", "embedding", "norm", "any"] = "any"
    ancestor: str | None = None
    selectors: Selectors = ()
    exclude: Selectors = ()
    override: bool = False
    shifted: bool = False
    untie: bool = False
    steps: Many[AnyStep] = ()

    @_by_fields
    def __init__(self, *parts: str | Pattern | Reference | Step | Repeat, **fields: Any):
        # told apart by their type, so that a target is written in Python in the order in which it stands in a spec
        steps = tuple(p for p in parts if isinstance(p, (Step, Repeat)))
        selectors = tuple(p for p in parts if not isinstance(p, (Step, Repeat)))
        super().__init__(**({"selectors": selectors} if selectors else {}), **({"steps": steps} if steps else {}),
                         **fields)

    def __repr__(self) -> str:
        """`<target linear { add low_rank(8) }>`."""
        return f"<{' '.join(Spec(targets=(self,)).to_surg().split())}>"


def _place(selector: Pattern | Reference) -> str:
    return f'"{selector.text}"' if isinstance(selector, Pattern) else selector.name


class Train(Node):
    """`train "**.norm.weight"`: parameters to unfreeze, by name."""

    patterns: Selectors


class Spec(Node):
    """A whole file: its signature, its definitions and what it does to a model. `name` is None for a library file;
    `language` the version of the language that it says it is written in, if it does."""

    name: str | None = None
    language: int | None = None
    language_trivia: Comments = Field(default=Trivia(), exclude=True, repr=False)
    params: Many[Parameter] = ()
    uses: Many[Use] = ()
    checks: Many[Check] = ()
    selects: Many[Select] = ()
    definitions: Many[Definition] = ()
    targets: Many[Target] = ()
    train: Many[Train] = ()

    @_by_fields
    def __init__(self, name: str | None = None, **fields: Any):
        super().__init__(name=name, **fields)

    @model_validator(mode="after")
    def _well_formed(self) -> Spec:
        Registered.check_spec(self).raise_errors()
        return self

    def __str__(self) -> str:
        return self.to_surg()

    def __repr__(self) -> str:
        """`<Spec dora(rank, alpha): target linear>`."""
        parts = [f"{len(self.definitions)} definition{'s' * (len(self.definitions) != 1)}"] * bool(self.definitions)
        parts += [f"target {t.kind} {', '.join(map(_place, t.selectors))}".rstrip() for t in self.targets]
        parts += [f"train {', '.join(map(_place, t.patterns))}" for t in self.train]
        return (f"<Spec {self.name or 'without a name'}({', '.join(p.name for p in self.params)}): "
                f"{'; '.join(parts) or 'empty'}>")

    def to_surg(self) -> str:
        """The spec as formatted `.surg` text; `parse` of it gives an equal spec.

        >>> import surgery
        >>> spec = surgery.load("sora")
        >>> surgery.parse(spec.to_surg()) == spec
        True
        """
        return Registered.spec_text(self)

    def retarget(self, *patterns: str, at: int | None = None) -> Spec:
        """The spec with a target's patterns replaced, which is what `--target` does: of its only target, or of number
        `at`, from 1. A bare name is a selector.

        >>> import surgery
        >>> surgery.load("lora").retarget("**.q_proj", "**.v_proj")
        <Spec lora(rank, alpha, dropout): target linear "**.q_proj", "**.v_proj">
        """
        return Registered.retarget(self, *patterns, at=at)
