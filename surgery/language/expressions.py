"""Expressions: the small frozen nodes that formulas, dimensions and arguments are made of.

In pydantic models they are held in JSON as their source text. Spans, parentheses and how a number was written never
count in `==`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator, WithJsonSchema

from surgery.diagnostics import Span, SurgeryError, fail
from surgery.language.registry import Registered


@dataclass(frozen=True)
class Expression:
    """Base of the expression nodes; `parens` is how many pairs the writer put around it (kept by the formatter)."""

    span: Span | None = field(default=None, compare=False, repr=False, kw_only=True)
    parens: int = field(default=0, compare=False, repr=False, kw_only=True)


@dataclass(frozen=True)
class Number(Expression):
    """`8`, `1_024`, `0.05`, `1e-4`, `5%` (0.05). `text` is how it was written."""

    value: int | float
    text: str = field(default="", compare=False, repr=False)

    def __eq__(self, other: object) -> bool:  # 1 and 1.0 are different literals
        return type(other) is Number and type(self.value) is type(other.value) and self.value == other.value

    def __hash__(self) -> int:
        return hash((type(self.value), self.value))


@dataclass(frozen=True)
class String(Expression):
    value: str


@dataclass(frozen=True)
class Boolean(Expression):
    value: bool


@dataclass(frozen=True)
class Name(Expression):
    id: str


@dataclass(frozen=True)
class Unary(Expression):
    """`-x`, `not x`."""

    op: str
    operand: Expression


@dataclass(frozen=True)
class Binary(Expression):
    """`+ - * / @`, comparisons `< <= > >= == !=`, `and`, `or`."""

    op: str
    left: Expression
    right: Expression


@dataclass(frozen=True)
class Transpose(Expression):
    """`x.T`."""

    operand: Expression


@dataclass(frozen=True)
class Argument:
    """One argument of a call; `name` is None for a positional one. `name_span` is where the name stands."""

    name: str | None
    value: Expression
    name_span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Call(Expression):
    """`f(x, k = y)`; `name_span` is where `f` stands."""

    function: str
    arguments: tuple[Argument, ...] = ()
    name_span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Matrix(Expression):
    """`[[0, -1], [1, 0]]`: the entries row by row, and how many stand in a row."""

    entries: tuple[Expression, ...]
    columns: int

    @property
    def rows(self) -> tuple[tuple[Expression, ...], ...]:
        return tuple(self.entries[i:i + self.columns] for i in range(0, len(self.entries), self.columns))


@dataclass(frozen=True)
class If(Expression):
    """`if condition then a else b`."""

    condition: Expression
    then: Expression
    otherwise: Expression


def as_expression(value: Any) -> Expression:
    """The expression that Python and JSON mean by a number, a boolean or source text. Raises: SurgeryError."""
    if isinstance(value, Expression):
        return value
    # before the numbers: in Python a bool is an integer
    if isinstance(value, bool):
        return Boolean(value)
    if isinstance(value, (Integral, Real)):  # NumPy's too
        # by the sign and not by `< 0`, so that -0.0 is a minus before a number, as it is in text
        number = int(value) if isinstance(value, Integral) else float(value)
        return Unary("-", Number(-number)) if math.copysign(1, number) < 0 else Number(number)
    if isinstance(value, str):
        return Registered.parse_expression(value)
    raise fail("bad-value", f"{str(value)[:60]!r} is not an expression",
               notes=("give a number, a boolean, or the text of an expression",))


def _as_text(value: Expression) -> str:
    return Registered.expression_text(value)


def _reader(kind: type[Expression]) -> PlainValidator:
    """Checks that a field holds an expression of a kind, or the number, boolean or text that means one."""

    def read(value: Any) -> Expression:
        try:
            expression = as_expression(value)
        except SurgeryError as error:
            raise ValueError("is not an expression") from error  # so that pydantic goes on with the other fields
        if isinstance(expression, kind):
            return expression
        raise ValueError(f"must be a {kind.__name__.lower()}")

    return PlainValidator(read)


# Fields that hold an expression, and are its text in JSON; a number or a boolean is read as one too.
Expr = Annotated[Expression, _reader(Expression), PlainSerializer(_as_text),
                 WithJsonSchema({"type": ["string", "number", "boolean"]})]
CallExpr = Annotated[Call, _reader(Call), PlainSerializer(_as_text), WithJsonSchema({"type": "string"})]
