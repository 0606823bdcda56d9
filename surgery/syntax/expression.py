"""Expressions: the small frozen nodes that formulas, dimensions and arguments are made of.

In pydantic models they are held in JSON as their source text. Spans, parentheses and how a number was written never
count in `==`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BeforeValidator, InstanceOf, PlainSerializer, WithJsonSchema

from surgery.diagnostics import Span


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
class If(Expression):
    """`if condition then a else b`."""

    condition: Expression
    then: Expression
    otherwise: Expression


def as_expression(value: Any) -> Any:
    """Python and JSON give numbers, booleans, or source text."""
    if isinstance(value, bool):
        return Boolean(value)
    if isinstance(value, (int, float)):
        return _signed(value)
    if isinstance(value, str):
        from surgery.syntax.parser import parse_expression

        return parse_expression(value)
    return value


def _signed(value: float) -> Expression:
    return Unary("-", Number(-value)) if math.copysign(1, value) < 0 else Number(value)


def _as_text(value: Expression) -> str:
    from surgery.syntax.printer import expression_text

    return expression_text(value)


def _model_type(python: type, before: Callable, after: Callable) -> Any:
    return Annotated[InstanceOf[python], BeforeValidator(before), PlainSerializer(after), WithJsonSchema({"type": "string"})]


Expr = _model_type(Expression, as_expression, _as_text)


def _as_call(value: Any) -> Any:
    return as_expression(value) if isinstance(value, str) else value


CallExpr = _model_type(Call, _as_call, _as_text)
