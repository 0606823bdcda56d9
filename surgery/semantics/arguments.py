"""The values that parameters have: those that a call or a user gives, or the defaults, each of its type.

Takes parameters and calls with a scope of names; gives values by name. Promises: every mistake is reported at its
place, and what rests on one is reported no second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from surgery.diagnostics import Collector, Span, SurgeryError, fail
from surgery.ir import sizes
from surgery.ir.expression import Expr
from surgery.ir.sizes import Dim
from surgery.language.formatter import expression_text
from surgery.language.other_languages import instead_of_argument
from surgery.language.tree import (
    Argument,
    Binary,
    Call,
    Check,
    Definition,
    Expression,
    Name,
    Parameter,
    Spec,
    Step,
    as_expression,
)
from surgery.semantics.evaluate import evaluate, here, truth
from surgery.semantics.scope import NUMBERS, POISON, UNDECIDED, Poisoned, describe

_EXAMPLES = {"int": 2, "float": 0.5, "bool": True, "str": '"text"'}

_TYPES = {"int": (int, Dim), "float": NUMBERS, "bool": (bool,), "str": (str,)}


def typed(value: Any, parameter: Parameter, span: Span | None) -> Any:
    """The value, if it is of the parameter's type; a whole number is one of a float too. Raises:
    SurgeryError (wrong-type)."""
    # In Python a bool is an int: without this, `rank = true` would pass for 1.
    is_bool = isinstance(value, bool) and parameter.type != "bool"
    is_other = is_bool or (parameter.type == "int" and sizes.is_real(value))
    if value is UNDECIDED or (isinstance(value, _TYPES[parameter.type]) and not is_other):
        return sizes.real(value) if parameter.type == "float" and value is not UNDECIDED else value
    raise fail("wrong-type", f"`{parameter.name}` is of type {parameter.type}, not {describe(value)}", span)


def defaults(params: Iterable[Parameter], given: dict[str, Any], report: Collector,
             missing: Callable[[Parameter], SurgeryError]) -> dict[str, Any]:
    """The values of formal parameters: those given, else their defaults; one with neither is the error `missing`."""
    values: dict[str, Any] = {}
    for p in params:
        with guard(report, values, p.name):
            if p.name in given:
                values[p.name] = given[p.name]
            elif p.default is not None:
                # a default may name the parameters before it: `alpha: float = 2 * rank`
                values[p.name] = _default(p, p.default, values)
            else:
                raise missing(p)
    return values


def _default(parameter: Parameter, default: Expression, before: Mapping[str, Any]) -> Any:
    return typed(evaluate(default, before), parameter, default.span or parameter.span)


def assert_defaults(params: Iterable[Parameter], report: Collector) -> None:
    """Reports each default that is not of its parameter's type, whatever the parameters before it are: also where every
    call gives another value."""
    values: dict[str, Any] = {}
    for p in params:
        with guard(report):
            if p.default is not None:
                _default(p, p.default, values)
        values |= unknowns([p])


class guard:
    """Reports the diagnostics of its block, and poisons `names` in `values` when the block failed."""

    def __init__(self, report: Collector, values: dict[str, Any] | None = None, *names: str):
        self.report, self.values, self.names = report, values, names

    def __enter__(self) -> guard:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, SurgeryError):
            self.report.add(*error.diagnostics)
        if self.values is not None and error is not None:
            self.values.update(dict.fromkeys(self.names, POISON))
        return isinstance(error, (SurgeryError, Poisoned))


def bind_call(call: Call, definition: Definition, scope: Mapping[str, Any], report: Collector) -> dict[str, Any]:
    """The values that a step's call gives to a definition's parameters."""
    parameters = {p.name: p for p in definition.params}
    span = definition.name_span
    defined = signature(definition) + (f" is defined at {span.source.name}:{span.line}" if span else "")
    given: dict[str, Any] = {}
    for position, argument in enumerate(call.arguments):
        place = argument.name_span or argument.value.span
        with guard(report):
            if argument.name in parameters:
                parameter = parameters[argument.name]
            elif argument.name is None and position < len(parameters):
                parameter = definition.params[position]
            else:
                count = len(parameters)
                most = f"at most {count} argument{'s' * (count > 1)}" if parameters else "no arguments"
                what = f"has no argument `{argument.name}`" if argument.name else f"takes {most}"
                label, helps = instead_of_argument(argument.name or "", parameters)
                raise fail("unknown-argument", f"{definition.name} {what}", place, label=label, notes=(defined,),
                           helps=helps)
            if parameter.name in given:
                raise fail("unknown-argument", f"`{parameter.name}` is given twice", place)
            # a value that is wrong counts as given: that it has none would be a second report of one mistake
            with guard(report, given, parameter.name):
                given[parameter.name] = typed(evaluate(argument.value, scope), parameter, argument.value.span)
    return defaults(definition.params, given, report, lambda p: fail(
        "missing-argument", f"{definition.name} needs an argument `{p.name}: {p.type}`", call.span, notes=(defined,)))


def example_step(definition: Definition) -> Step:
    """A step that places a definition with its defaults; what has none gets some value of its type."""
    arguments = [Argument(p.name, as_expression(_EXAMPLES[p.type])) for p in definition.params if p.default is None]
    return Step(placement="pre" if definition.kind == "transform" else "add",
                call=Call(definition.name, tuple(arguments)))


def signature(definition: Definition | Spec) -> str:
    """`low_rank(rank: int = 8, alpha: float = 16)`."""
    parts = [f"{p.name}: {p.type}" + (f" = {expression_text(p.default)}" if p.default else "")
             for p in definition.params]
    return f"{definition.name}({', '.join(parts)})"


def assert_checks(checks: Iterable[Check], values: Mapping[str, Any], report: Collector) -> bool:
    """Whether the values meet every `check`; one that they do not is reported (one that rests on an unknown size is
    left for later)."""
    before = len(report.errors)
    for check in checks:
        with guard(report):
            value = evaluate(check.condition, values)
            if isinstance(value, Expr):
                raise fail("wrong-type", f"a check is of compile-time values, not of {describe(value)}", check.span)
            if value is not UNDECIDED and not truth(value, check.condition):
                raise fail("check-failed", f"`check {expression_text(check.condition)}` is not met", check.span,
                           notes=here(check.condition, values))
    return len(report.errors) == before


def says_square(checks: Iterable[Check]) -> bool:
    """Whether `check out == in` stands among them: then what is square alone makes sense for any sizes."""
    # By its form, and not by trying sizes: what follows from other checks in a roundabout way is not looked for.
    stack = [check.condition for check in checks]
    while stack:
        condition = stack.pop()
        if isinstance(condition, Binary) and condition.op == "and":
            stack += (condition.left, condition.right)
        elif isinstance(condition, Binary) and condition.op == "==":
            sides = (condition.left, condition.right)
            if {side.id for side in sides if isinstance(side, Name)} == {"out", "in"}:
                return True
    return False


def unknowns(symbolic: Iterable[Parameter]) -> dict[str, Any]:
    """Each parameter as an unknown of its type, for checking a definition on its own."""
    return {p.name: UNDECIDED if p.type in ("bool", "str") else sizes.symbol(p.name, p.type == "float")
            for p in symbolic}
