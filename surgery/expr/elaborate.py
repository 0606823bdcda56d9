"""From a target's steps to the formula of one module: W' and b' as expressions over the adapter's leaves.

Takes a target, the library in scope, the compile-time values and the module's sizes (symbolic or known); gives a `Formula`.
Promises: shapes are checked here and nowhere later; all the mistakes of the steps are reported at once, each at its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import prod
from typing import Any

from surgery.diagnostics import Collector, Diagnostic, Span, SurgeryError, did_you_mean, fail
from surgery.expr import dims, places
from surgery.expr.dims import Dim, Size
from surgery.expr.draws import DISTRIBUTIONS, choices
from surgery.expr.ir import Claim, Draw, Expr, Formula, Leaf, Part
from surgery.expr.primitives import is_whole, make, shape_text, undecided
from surgery.expr.values import NUMBERS, POISON, UNDECIDED, Poisoned, describe, evaluate, here, size, tensor, unknown
from surgery.spec import Library
from surgery.syntax.parser import parse_expression
from surgery.syntax.printer import expression_text
from surgery.syntax.tree import Argument, Call, Check, Definition, Let, Param, Parameter, Step, Target

CLAIMS = ("orthogonal", "diagonal", "symmetric")
_TYPES = {"int": (int, Dim), "float": NUMBERS, "bool": (bool,), "str": (str,)}
_KINDS = {"pre": "transform", "post": "transform", "add": "update"}


# -------------------------------------------------------------------------------------------------- arguments


def typed(value: Any, parameter: Parameter, span: Span | None) -> Any:
    """The value, if it is of the parameter's type; a whole number is one of a float too. Raises: SurgeryError (wrong-type)."""
    is_other = (isinstance(value, bool) and parameter.type != "bool") or (parameter.type == "int" and dims.is_real(value))
    if value is UNDECIDED or (isinstance(value, _TYPES[parameter.type]) and not is_other):
        return dims.real(value) if parameter.type == "float" and value is not UNDECIDED else value
    raise fail("wrong-type", f"`{parameter.name}` is of type {parameter.type}, not {describe(value)}", span)


def defaults(params: Iterable[Parameter], given: dict[str, Any], scope: Mapping[str, Any], report: Collector,
             missing: Any) -> dict[str, Any]:
    """The values of formal parameters: those given, else their defaults, else `missing(parameter)`."""
    values: dict[str, Any] = {}
    for p in params:
        with guard(report, values, p.name):
            if p.name in given:
                values[p.name] = given[p.name]
            elif p.default is not None:
                values[p.name] = typed(evaluate(p.default, {**scope, **values}), p, p.default.span or p.span)
            else:
                values[p.name] = missing(p)
    return values


class guard:
    """Reports the diagnostics of its block, and poisons `name` in `values` when the block failed."""

    def __init__(self, report: Collector, values: dict[str, Any] | None = None, name: str = ""):
        self.report, self.values, self.name = report, values, name

    def __enter__(self) -> guard:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, SurgeryError):
            self.report.add(*error.diagnostics)
        if self.values is not None and error is not None:
            self.values[self.name] = POISON
        return isinstance(error, (SurgeryError, Poisoned))


def bind_call(call: Call, definition: Definition, scope: Mapping[str, Any], report: Collector) -> dict[str, Any]:
    """The values that a step's call gives to a definition's parameters."""
    given: dict[str, Any] = {}
    for position, argument in enumerate(call.arguments):
        with guard(report):
            parameter = _formal(argument, position, definition, call)
            if parameter.name in given:
                raise fail("unknown-argument", f"`{parameter.name}` is given twice", argument.name_span or argument.value.span)
            with guard(report, given, parameter.name):
                given[parameter.name] = typed(evaluate(argument.value, scope), parameter, argument.value.span)
    return defaults(definition.params, given, {}, report, lambda p: _missing(p, call, definition))


def _formal(argument: Argument, position: int, definition: Definition, call: Call) -> Parameter:
    names = [p.name for p in definition.params]
    if argument.name in names:
        return definition.params[names.index(argument.name)]
    if argument.name is None and position < len(names):
        return definition.params[position]
    most = f"takes at most {len(names)} argument{'s' * (len(names) > 1)}" if names else "takes no arguments"
    what = f"has no argument `{argument.name}`" if argument.name else most
    raise fail("unknown-argument", f"{definition.name} {what}", argument.name_span or argument.value.span,
               label=did_you_mean(argument.name or "", names), notes=_defined(definition))


def signature(definition: Definition) -> str:
    """`low_rank(rank: int = 8, alpha: float = 16)`."""
    parts = [f"{p.name}: {p.type}" + (f" = {expression_text(p.default)}" if p.default else "") for p in definition.params]
    return f"{definition.name}({', '.join(parts)})"


def _defined(definition: Definition) -> tuple[str, ...]:
    place = f" is defined at {definition.name_span.source.name}:{definition.name_span.line}" if definition.name_span else ""
    return (f"{signature(definition)}{place}",)


def _missing(parameter: Parameter, call: Call, definition: Definition) -> Any:
    raise fail("missing-argument", f"{definition.name} needs an argument `{parameter.name}: {parameter.type}`", call.span,
               notes=_defined(definition))


def assert_checks(checks: Iterable[Check], values: Mapping[str, Any], report: Collector) -> bool:
    """Whether the values meet every `check`; one that they do not is reported (one that rests on an unknown size is left
    for later)."""
    before = len(report.errors)
    for check in checks:
        with guard(report):
            if evaluate(check.condition, values) is False:
                raise fail("check-failed", f"`check {expression_text(check.condition)}` is not met", check.span,
                           notes=here(check.condition, values))
    return len(report.errors) == before


# ------------------------------------------------------------------------------------------------ definitions


@dataclass
class Instance:
    """A definition being given its meaning: the sizes around it, its operand, and what it adds to the formula."""

    definition: Definition
    prefix: str
    values: dict[str, Any]
    report: Collector
    group: str = ""
    leaves: list[Leaf] = field(default_factory=list)

    def run(self) -> Expr | None:
        """The expression that the definition returns (None when a mistake was reported)."""
        if not assert_checks(self.definition.checks, self.values, self.report):
            return None
        for statement in self.definition.body:
            with guard(self.report, self.values, statement.name):
                is_let = isinstance(statement, Let)
                self.values[statement.name] = evaluate(statement.value, self.values) if is_let else self._param(statement)
        with guard(self.report):
            result = self._result()
            places.assert_exist([*(leaf.init for leaf in self.leaves if leaf.init is not None), result], self.leaves)
            return result
        return None

    def _result(self) -> Expr:
        result = evaluate(self.definition.result, self.values)
        span = self.definition.result.span or self.definition.span
        if not isinstance(result, Expr):
            raise fail("wrong-type", f"{self.definition.name} must return a tensor, not {describe(result)}", span)
        wanted = self._wanted()
        if result.op == "undecided":
            return undecided(result.args, result.data, wanted)
        if result.shape != wanted:
            raise fail("shape-mismatch", f"{self.definition.name} returns {shape_text(result.shape)}, and "
                       f"{_a(self.definition.kind)} must return {shape_text(wanted)}", span, notes=self._sizes())
        return result

    def _wanted(self) -> tuple[Size, ...]:
        n = self.values.get(self.definition.dim or "")
        if self.definition.kind == "transform":
            return (n, n)
        return (self.values["out"],) if self.definition.bias else (self.values["out"], self.values["in"])

    def _sizes(self) -> tuple[str, ...]:
        names = ["out", "in", *([self.definition.dim] if self.definition.dim else [])]
        known = [f"{n} = {self.values[n]}" for n in names if str(self.values[n]) != n]
        return (f"here {', '.join(known)}",) if known else ()

    def _param(self, param: Param) -> Expr:
        shape = tuple(size(evaluate(d, self.values), d, self.values) for d in param.dims)
        init = self._init(param, shape) if param.init is not None else None
        law = self._draw(param, shape) if param.draw is not None else None
        key = f"{self.prefix}.{param.name}"
        group = f"{self.group}.{key}" if param.shared else None
        whole = DISTRIBUTIONS[law.distribution].whole if law else is_whole(init)
        if whole and not param.frozen:
            raise fail("wrong-type", f"`{param.name}` holds whole numbers, which cannot be trained",
                       param.name_span or param.span, helps=(f"say `frozen param {param.name}`",))
        self.leaves.append(Leaf(key, shape, init, law, param.frozen, group, param.name_span or param.span, whole))
        return self.leaves[-1].expr

    def _init(self, param: Param, shape: tuple[Size, ...]) -> Expr:
        value = evaluate(param.init, self.values)
        if isinstance(value, bool) or not isinstance(value, (*NUMBERS, Expr)):
            raise fail("wrong-type", f"`{param.name}` must start at a number or a tensor, not {describe(value)}", param.init.span)
        start = self._start(value, param)
        if start.shape not in ((), shape):
            raise fail("shape-mismatch", f"`{param.name}` is {shape_text(shape)} but starts at {shape_text(start.shape)}",
                       param.init.span or param.span, notes=self._sizes())
        return start

    def _start(self, value: Any, param: Param) -> Expr:
        try:
            return tensor(value)
        except OverflowError:
            raise fail("bad-value", f"`{param.name}` starts at {describe(value)}, which float32 cannot hold",
                       param.init.span) from None

    def _draw(self, param: Param, shape: tuple[Size, ...]) -> Draw:
        call, place = param.draw, param.draw.name_span or param.draw.span
        if call.function not in DISTRIBUTIONS:
            raise unknown("unknown-distribution", "distribution", call.function, DISTRIBUTIONS, place)
        law = DISTRIBUTIONS[call.function]
        if len(shape) < law.least_dims:
            raise fail("shape-mismatch", f"{call.function} needs at least {law.least_dims} dimensions; "
                       f"`{param.name}` is {shape_text(shape)}", place, helps=("use normal() or uniform()",))
        given = tuple(self._draw_argument(a, i, call) for i, a in enumerate(call.arguments))
        lacking = [name for name, default in law.arguments.items() if default is None and name not in dict(given)]
        if lacking:
            raise fail("missing-argument", f"{call.function} needs an argument `{lacking[0]}`", place)
        _assert_fits(call, shape, dict(given))
        return Draw(call.function, given)

    def _draw_argument(self, argument: Argument, position: int, call: Call) -> tuple[str, Any]:
        known = DISTRIBUTIONS[call.function].arguments
        name = argument.name or (list(known) + [None] * position)[position]
        if name not in known:
            what = f"argument `{name}`" if name else f"argument number {position + 1}"
            raise fail("unknown-argument", f"{call.function} has no {what}", argument.name_span or argument.value.span,
                       label=did_you_mean(name or "", known), notes=(f"it takes {', '.join(known)}",))
        value, allowed = evaluate(argument.value, self.values), choices(call.function, name)
        if value not in (*allowed, UNDECIDED) if allowed else not isinstance(value, NUMBERS):
            wanted = " or ".join(f'"{a}"' for a in allowed) or "a number"
            raise fail("wrong-type", f"`{name}` must be {wanted}, not {describe(value)}", argument.value.span)
        return name, value if allowed or isinstance(value, Dim) else float(value)


def _assert_fits(call: Call, shape: tuple[Size, ...], given: Mapping[str, Any]) -> None:
    """Raises: SurgeryError, if the distribution's check is not met, or more different places are asked for than there are."""
    law = DISTRIBUTIONS[call.function]
    check, values = parse_expression(law.check), {**law.arguments, **given}
    if evaluate(check, values) is False:
        raise fail("bad-value", f"{call.function} needs {law.check}", call.span, notes=here(check, values))
    of, count = given.get("of"), prod(shape)
    if of is not None and not isinstance(of, Dim) and not isinstance(count, Dim) and count > of:
        raise fail("bad-value", f"{count} different places are asked for, and there are {of:g}", call.span)


def _a(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


# ---------------------------------------------------------------------------------------------------- targets


@dataclass(frozen=True)
class Context:
    """What the steps of a target see: the library, the compile-time values (the spec's parameters, `layer`, `depth`), and
    the name under which the target's shared parameters are kept."""

    library: Library
    values: Mapping[str, Any]
    group: str = "0"


def elaborate(target: Target, context: Context, out: Size, in_: Size, report: Collector, has_bias: bool = True) -> Formula | None:
    """The formula of a target for a weight [out, in]; None when a mistake was reported. Without a bias, what is added to it
    is left out."""
    before = len(report.errors)
    builder = _Builder(context, out, in_, report, has_bias)
    names = step_names(target.steps)
    for placement in ("pre", "add", "post"):
        for index, (step, name) in enumerate(zip(target.steps, names)):
            if step.placement == placement:
                builder.place(index, step, name)
    return builder.formula() if len(report.errors) == before else None


def step_names(steps: Iterable[Step]) -> list[str]:
    """A name for each step, its adapter's own: `add_low_rank`, and `add_low_rank_2` for a second one."""
    seen: dict[str, int] = {}
    names = []
    for step in steps:
        base = f"{step.placement}_{step.call.function}"
        seen[base] = seen.get(base, 0) + 1
        names.append(base if seen[base] == 1 else f"{base}_{seen[base]}")
    return names


class _Builder:
    """Builds W' step by step. `plain` is the operand that transforms name `W`: the same sum without dropout, which acts
    on an update's input and not on the weight."""

    def __init__(self, context: Context, out: Size, in_: Size, report: Collector, has_bias: bool):
        self.context, self.report, self.has_bias = context, report, has_bias
        self.sizes = {"out": out, "in": in_}
        self.weight = self.x = self.plain = Expr("weight", (), None, (out, in_))
        self.bias = self.frozen_bias = Expr("bias", (), None, (out,))
        self.leaves: list[Leaf] = []
        self.claims: list[Claim] = []
        self.parts: list[Part] = []

    def formula(self) -> Formula:
        return Formula(self.x, self.bias, tuple(self.leaves), tuple(self.claims), tuple(self.parts))

    def place(self, index: int, step: Step, name: str) -> None:
        dropout = 0.0
        with guard(self.report):
            dropout = self._dropout(step)
        with guard(self.report):
            definition = self._definition(step)
            if definition.bias and not self.has_bias:
                return
            operand = self.weight if step.placement == "add" else self.plain
            made = self._instance(step, name, definition, operand)
            if made is not None:
                part = made if step.placement != "add" or definition.bias else self._dropped(made, dropout, name)
                self.parts.append(Part(index, part, operand))
                self._put(step, definition, part, made)

    def _instance(self, step: Step, name: str, definition: Definition, operand: Expr) -> Expr | None:
        before = len(self.report.errors)
        values = bind_call(step.call, definition, {**self.context.values, **self.sizes}, self.report)
        if len(self.report.errors) > before:
            return None
        side = {definition.dim: self.sizes[step.side]} if definition.dim else {"b": self.frozen_bias} if definition.bias else {}
        within = Collector()
        instance = Instance(definition, name, {**values, **self.sizes, **side, "W": operand}, within, self.context.group)
        result = instance.run()
        self.report.add(*(_placed(d, step) for d in within.found))
        self.leaves += instance.leaves
        if result is not None:
            spans = definition.claims_spans or (definition.name_span,) * len(definition.claims)
            self.claims += [Claim(c, result, definition.name, s) for c, s in zip(definition.claims, spans)]
        return result

    def _definition(self, step: Step) -> Definition:
        known, call = self.context.library.definitions, step.call
        kind, place = _KINDS[step.placement], call.name_span or call.span or step.span
        if call.function not in known:
            fitting = [n for n, d in known.items() if d.kind == kind]
            raise unknown("unknown-definition", kind, call.function, fitting, place)
        if known[call.function].kind != kind:
            other = "add" if kind == "transform" else "pre` or `post"
            raise fail("wrong-kind", f"`{step.placement}` needs {_a(kind)}, and {call.function} is "
                       f"{_a(known[call.function].kind)}", place, helps=(f"place it with `{other}`",))
        return known[call.function]

    def _dropped(self, update: Expr, dropout: float, name: str) -> Expr:
        return Expr("drop", (update,), (dropout, name), update.shape) if dropout else update

    def _put(self, step: Step, definition: Definition, part: Expr, plain: Expr) -> None:
        """What a step made, in its place."""
        if step.placement != "add":
            self._transform(step, part)
        elif definition.bias:
            self._shift(step, part)
        else:
            self.x, self.plain = make("add", self.x, part), make("add", self.plain, plain)

    def _shift(self, step: Step, update: Expr) -> None:
        if step.dropout is not None:
            raise fail("wrong-kind", f"dropout acts on an update's input, and {step.call.function} is added to the bias",
                       step.dropout.span)
        self.bias = make("add", self.bias, update)

    def _dropout(self, step: Step) -> float:
        if step.dropout is None:
            return 0.0
        p = evaluate(step.dropout, {**self.context.values, **self.sizes})
        if isinstance(p, bool) or not isinstance(p, (int, float, Fraction)):
            raise fail("wrong-type", f"dropout must be a number, not {describe(p)}", step.dropout.span)
        if not 0 <= p < 1:
            raise fail("bad-value", f"dropout must be at least 0 and less than 1, not {float(p):g}", step.dropout.span,
                       helps=("write 5% or 0.05",))
        return float(p)

    def _transform(self, step: Step, transform: Expr) -> None:
        left = step.side == "out"
        self.x, self.plain = (make("matmul", transform, x) if left else make("matmul", x, transform)
                              for x in (self.x, self.plain))
        if left and step.bias:
            self.bias = make("matmul", transform, self.bias)
        elif step.bias:
            raise fail("wrong-kind", "`with bias` needs a transform `on out`: the bias is a column of the output", step.span)


def _placed(diagnostic: Diagnostic, step: Step) -> Diagnostic:
    """A mistake in a definition, with the step that places it."""
    where = step.call.span
    return replace(diagnostic, related=(*diagnostic.related, (where, "placed here"))) if where else diagnostic


def leaf_values(symbolic: Iterable[Parameter]) -> dict[str, Any]:
    """Each parameter as an unknown of its type, for checking a definition on its own."""
    return {p.name: UNDECIDED if p.type in ("bool", "str") else dims.symbol(p.name, p.type == "float")
            for p in symbolic}
