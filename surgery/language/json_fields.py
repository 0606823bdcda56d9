"""What the fields of a statement hold besides expressions: comments, places, patterns, lists.

Gives the types that `tree` builds its models from. Promises: JSON can neither give a place nor a comment but a `doc`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, PlainSerializer, PlainValidator, WithJsonSchema
from pydantic.json_schema import SkipJsonSchema

from surgery.diagnostics import Span


@dataclass(frozen=True)
class Trivia:
    """What the formatter must keep: whole-line comments above, one at the end of the line, those at the end of a block
    (or of the list that a parameter ends), with "" for a blank line among them;
    and whether a blank line stood before it all."""

    above: tuple[str, ...] = ()
    beside: str = ""
    inside: tuple[str, ...] = ()
    blank: bool = False


def instance_of(kind: type) -> Any:
    """Checks that a field holds such an object, which JSON cannot give."""

    def check(value: Any) -> Any:
        if isinstance(value, kind):
            return value
        raise ValueError(f"must be a {kind.__name__.lower()}")

    return PlainValidator(check)


Place = SkipJsonSchema[Annotated[Span, instance_of(Span)]]
Comments = SkipJsonSchema[Annotated[Trivia, instance_of(Trivia)]]


@dataclass(frozen=True)
class Pattern:
    """A glob as written in a spec."""

    text: str
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Reference:
    """The name of a `select`, used in place of a pattern."""

    name: str
    span: Span | None = field(default=None, compare=False, repr=False)


def _as_selector(value: Any) -> Pattern | Reference:
    if isinstance(value, str):
        return Pattern(value)
    if isinstance(value, dict) and set(value) == {"select"} and isinstance(value["select"], str):
        return Reference(value["select"])
    if isinstance(value, (Pattern, Reference)):
        return value
    raise ValueError('must be a pattern or {"select": name}')


def _selector_json(value: Pattern | Reference) -> Any:
    return value.text if isinstance(value, Pattern) else {"select": value.name}


# A pattern is a text, since nearly all selectors are; the name of a `select` is the one that must be told apart.
_SELECTOR_SCHEMA = {"anyOf": [{"type": "string"},
                              {"type": "object", "properties": {"select": {"type": "string"}}, "required": ["select"],
                               "additionalProperties": False}]}
Selector = Annotated[Pattern | Reference, PlainValidator(_as_selector), PlainSerializer(_selector_json),
                     WithJsonSchema(_SELECTOR_SCHEMA)]

_Kind = TypeVar("_Kind")
#: A tuple field that takes a list too (JSON and Python users write lists): `Many[Step]`.
Many = Annotated[tuple[_Kind, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]
Selectors = Many[Selector]
