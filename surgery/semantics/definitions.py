"""A definition being given its meaning: from its body to the expression that it returns and the leaves that it needs.

Takes a definition with the values of its parameters, the sizes around it and its operand; gives an `Expr`. Promises:
every shape is checked; the mistakes of all its statements are reported at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, TypeVar

from surgery.diagnostics import Collector, Span, SurgeryError, did_you_mean, fail
from surgery.ir.expression import DEEPEST_FORMULA, OF_DATA, Claim, Draw, Expr, Leaf, NoiseLaw, in_evaluation
from surgery.ir.operations import is_undecided, is_whole, shape_text, undecided
from surgery.ir.sizes import Dim, Size, is_real, symbol
from surgery.language.formatter import expression_text, for_text
from surgery.language.parser import parse_expression
from surgery.language.tree import (
    Argument,
    Call,
    Definition,
    Expression,
    Let,
    Name,
    Noise,
    Param,
    Rounds,
    Statement,
    every_statement,
)
from surgery.language.well_formed import expressions_of, height, nodes_of
from surgery.semantics import index_bounds
from surgery.semantics.arguments import assert_checks, bind_call, guard
from surgery.semantics.distributions import DISTRIBUTIONS, choices
from surgery.semantics.evaluate import assert_can_exist, definition_calls, evaluate, here, size, tensor
from surgery.semantics.repetition import assert_is_new, bounds
from surgery.semantics.scope import NUMBERS, POISON, UNDECIDED, Body, Poisoned, assert_is_free, describe, unknown

Tensor = TypeVar("Tensor", Param, Noise)
CALLED = "called here"
MOST_CALLS = 100  # of definitions in one another, in a step
MOST_ROUNDS = 1000  # of every `for` in a step
MOST_NESTED = 200  # expressions in one another, over all definitions that stand around a call

@dataclass
class Instance:
    """A definition being given its meaning: the sizes around it, its operand, and what it adds to the formula. `known`
    are the definitions that it can call; of one that is called, `around` are those in which it stands, outermost
    first."""

    definition: Definition
    prefix: str
    values: dict[str, Any]
    report: Collector
    known: Mapping[str, Definition]
    group: str = ""
    leaves: list[Leaf] = field(default_factory=list)
    common: list[Leaf] = field(default_factory=list)  # what steps share, whichever of them says it first
    before: Sequence[Leaf] = ()  # of all that is there already: W of a later step and `common` read those too
    claims: list[Claim] = field(default_factory=list)
    around: tuple[Definition, ...] = ()
    made: list[str] = field(default_factory=list)  # a name for each call in the outermost definition
    rounds: list[int] = field(default_factory=list)  # a number for each, in the outermost definition
    tensors: dict[str, int] = field(default_factory=dict)  # how many there are so far by a name
    nested: int = 0  # expressions in one another, in all that is around it

    def __post_init__(self) -> None:
        self.values = Body(self.values, self.known, self._called)

    def run(self) -> Expr | None:
        """The expression that the definition returns (None when a mistake was reported)."""
        # A name that means something in the body already could be read as either: an error, before anything is read.
        before, definition = len(self.report.errors), self.definition
        for node in (*definition.params, *every_statement(definition.body)):
            assert_is_free(node.name, self._given, node.name_span, self.report)
        if definition.dim:
            assert_is_free(definition.dim, ("out", "in", "W"), definition.name_span, self.report)
        if len(self.report.errors) > before:
            return None
        # Its checks say which sizes it is for: at others its body would fail at a place that explains nothing.
        if not assert_checks(self.definition.checks, self.values, self.report):
            return None
        self._read(definition.body)
        with guard(self.report):
            result = self._result()
            starts = [leaf.init for leaf in self.leaves if leaf.init is not None]
            index_bounds.assert_exist([*starts, result], [*self.before, *self.leaves], self.definition.result.span)
            spans = self.definition.claims_spans or (self.definition.name_span,) * len(self.definition.claims)
            self.claims += [Claim(c, result, self.definition.name, s) for c, s in zip(self.definition.claims, spans)]
            return result
        return None

    def _read(self, statements: Iterable[Statement | Rounds]) -> None:
        for statement in statements:
            if isinstance(statement, Rounds):
                self._repeat(statement)
                continue
            with guard(self.report, self.values, statement.name):
                value = self._meaning(statement)
                self.values[statement.name] = not_too_deep(value, statement.span)

    def _repeat(self, rounds: Rounds) -> None:
        """The statements of a `for`, once for each number. A name from above has the value that the last round gave it;
        what else a round names is known in it alone."""
        known, names = set(self.values), [each.name for each in every_statement(rounds.body)]
        handed_on = [name for name in names if name in known]
        assert isinstance(self.values, Body)
        self.values.inside |= {name: for_text(rounds) for name in names if name not in known}
        with guard(self.report, self.values, *handed_on):
            assert_is_new(rounds, self._given)
            first, end = bounds(rounds, self.values)
            if isinstance(first, Dim) or isinstance(end, Dim):
                self._repeat_unknown(rounds, handed_on)
            else:
                self._repeat_known(rounds, range(first, end))
        for name in set(self.values) - known:
            if self.values[name] is not POISON:  # which was told, and is not told again where it is read
                del self.values[name]

    def _repeat_known(self, rounds: Rounds, numbers: range) -> None:
        before = len(self.report.errors)
        for number in numbers:
            self.rounds.append(number)
            if len(self.rounds) > MOST_ROUNDS:
                raise fail("too-large", f"this makes more than {MOST_ROUNDS:,} rounds", rounds.span,
                           helps=("what is alike can be one parameter with an axis more",))
            self.values[rounds.name] = number
            self._read(rounds.body)
            if len(self.report.errors) > before:
                return  # which the next round would tell again

    def _repeat_unknown(self, rounds: Rounds, handed_on: list[str]) -> None:
        """How many rounds there are is not known: once, and what comes out is not guessed."""
        before = {name: self.values[name] for name in handed_on}
        numbers = {name: symbol(name, is_real(v)) for name, v in before.items() if isinstance(v, NUMBERS)}
        self.values.update({**numbers, rounds.name: symbol(rounds.name)})
        self._read(rounds.body)
        for name, value in before.items():
            after = self.values[name]
            if isinstance(value, Expr) and isinstance(after, Expr):
                self.values[name] = value if after is value else undecided((value, after), for_text(rounds))
            elif name in numbers and after is not POISON:
                self.values[name] = symbol(f"({name} after {for_text(rounds)})", is_real(value) or is_real(after))

    @property
    def _given(self) -> tuple[str, ...]:
        """What means something in the body that nothing declares."""
        return "out", "in", "W", *["b"] * self.definition.bias

    @cached_property
    def _nested(self) -> int:
        return self.nested + 3 + max(height(e) for node in nodes_of(self.definition) for e in expressions_of(node))

    def _called(self, call: Call, name: str) -> Expr:
        """What another definition returns where this one calls it: its parameters are this one's too."""
        definition, faults = self.known[call.function], Collector()
        self._assert_callable(definition, call)
        self.made.append(name)
        values = {**self._arguments_of(call, definition), **{n: self.values[n] for n in ("out", "in", "W")},
                  **({"b": self.values["b"]} if definition.bias else {})}
        inner = Instance(definition, f"{self.prefix}-{name}", values, faults, self.known, self.group,
                         common=self.common, before=[*self.before, *self.leaves],
                         around=(*self.around, self.definition), made=self.made, rounds=self.rounds,
                         nested=self._nested)
        result = inner.run()
        place = ((call.span, CALLED),) if call.span else ()
        self.report.add(*(replace(d, related=(*d.related, *place)) for d in faults.found))
        if result is None:
            raise Poisoned
        self.leaves += inner.leaves
        self.claims += inner.claims
        return result

    def _assert_callable(self, definition: Definition, call: Call) -> None:
        """Raises: SurgeryError, for a circle of calls, more of them than there can be, and a bias where none is."""
        place, around = call.name_span or call.span, (*self.around, self.definition)
        names = [each.name for each in around]
        if call.function in names:
            circle = (*names[names.index(call.function):], call.function)
            raise fail("definition-cycle", f"`{call.function}` comes to call itself", place,
                       notes=(" calls ".join(f"`{name}`" for name in circle),),
                       helps=("what is repeated stands in a `for i in 0..count { ... }`, here or in a target",))
        # Each of the expressions around a call is being read when it is made, by recursion.
        is_deep = self._nested > MOST_NESTED
        if is_deep or len(self.made) >= MOST_CALLS:
            what = "definitions stand too deep in one another here" if is_deep else (
                f"`{names[0]}` comes to more than {MOST_CALLS} calls of definitions")
            raise fail("too-large", what, place, helps=("what is alike can be one parameter with an axis more",))
        if definition.bias and not self.definition.bias:
            raise fail("wrong-kind", f"{call.function} is added to a bias, and `{self.definition.name}` is not", place,
                       helps=("call it in an update `on bias`",))

    def _arguments_of(self, call: Call, definition: Definition) -> dict[str, Any]:
        """The values of a call's parameters, and of the side of a transform: that of this one, or as the call says."""
        side = [a for a in call.arguments if definition.dim and a.name == definition.dim]
        before = len(self.report.errors)
        values = bind_call(replace(call, arguments=tuple(a for a in call.arguments if a not in side)), definition,
                           self.values, self.report)
        if definition.dim:
            with guard(self.report):
                if not side and not self.definition.dim:
                    raise fail("missing-argument", f"here {call.function} needs its side: `{definition.dim} = out`, "
                               "`in`, or another size", call.span)
                said = side[0].value if side else Name(self.definition.dim or "")
                values[definition.dim] = size(evaluate(said, self.values), said, self.values)
        if len(self.report.errors) > before:
            raise Poisoned
        return values

    def _meaning(self, statement: Param | Noise | Let) -> Any:
        if isinstance(statement, Let):
            return evaluate(statement.value, self.values)
        if isinstance(statement, Param):
            return self._param(self._numbered(statement), statement.name)
        return self._noise(self._numbered(statement))

    def _numbered(self, statement: Tensor) -> Tensor:
        """A tensor of a `for` by the name that it would have by hand: Q in the first round, Q_2 in the second."""
        self.tensors[statement.name] = count = self.tensors.get(statement.name, 0) + 1
        if count == 1:
            return statement
        name = f"{statement.name}_{count}"
        if name in {each.name for each in every_statement(self.definition.body)}:
            raise fail("duplicate-name", f"`{statement.name}` is called `{name}` in round {count} of its `for`, which "
                       "stands here already", statement.name_span or statement.span, helps=("rename one of the two",))
        return statement.model_copy(update={"name": name})

    def _result(self) -> Expr:
        definition, values = self.definition, self.values
        span = definition.result.span or definition.span
        result = not_too_deep(evaluate(definition.result, values), span)
        if not isinstance(result, Expr):
            raise fail("wrong-type", f"{definition.name} must return a tensor, not {describe(result)}", span)
        # a transform is square, of the side that it acts on; an update is like what it is added to
        if definition.kind == "transform":
            wanted = (values[definition.dim or ""],) * 2
        else:
            wanted = (values["out"],) if definition.bias else (values["out"], values["in"])
        if result.has(*OF_DATA):
            raise fail("wrong-kind", "`G` and `C` are known when a spec is put on a model, and not afterwards: a start "
                       "is made of them, and what a definition returns is not", span,
                       helps=("start a parameter there: `frozen param g[out, in] = G`",))
        if result.has("numbers"):
            raise fail("wrong-kind", "`numbers` is for what a parameter starts at, which is computed once: what a "
                       "definition returns is computed in the dtype of the moment, and bfloat16 knows no 257", span,
                       helps=("keep them in a parameter: `frozen param n[in] = numbers(indices(in))`",))
        if is_undecided(result):
            return undecided(result.args, result.data, wanted)
        if result.shape != wanted:
            raise fail("shape-mismatch", f"{definition.name} returns {shape_text(result.shape)}, and "
                       f"{with_article(definition.kind)} must return {shape_text(wanted)}", span, notes=self._sizes(),
                       helps=_instead_of_result(definition, result, wanted))
        return result

    def _sizes(self) -> tuple[str, ...]:
        names = ["out", "in", *([self.definition.dim] if self.definition.dim else [])]
        known = [f"{n} = {self.values[n]}" for n in names if str(self.values[n]) != n]
        return (f"here {', '.join(known)}",) if known else ()

    def _param(self, param: Param, said: str) -> Expr:
        shape, known = self._shape(param), len(self.leaves)
        init = self._init(param, param.init, shape) if param.init is not None else None
        law = self._draw(param, param.draw, shape) if param.draw is not None else None
        if param.init is not None and self.leaves[known:]:
            raise fail("wrong-kind", "a start is made once, and what is called here has parameters of its own",
                       param.init.span, helps=("call it in a `let`, and start at that",))
        key = f"{self.prefix}.{param.name}"
        scope = param.shared if isinstance(param.shared, str) else "target"
        group = None if not param.shared else f"{self.group}.{key}" if scope == "target" else f"{scope}.{param.name}"
        whole = DISTRIBUTIONS[law.distribution].whole if law else init is not None and is_whole(init)
        if whole and not param.frozen:
            raise fail("wrong-type", f"`{param.name}` holds whole numbers, which cannot be trained",
                       param.name_span or param.span, helps=(f"say `frozen param {param.name}`",))
        if param.manifold and len(shape) < 2:
            raise fail("shape-mismatch", f"`on {param.manifold}` is for matrices, and `{param.name}` is "
                       f"{shape_text(shape)}", param.name_span or param.span)
        rate = self._rate(param, param.rate) if param.rate is not None else 1.0
        leaf = Leaf(key, shape, init, law, param.frozen, group, param.name_span or param.span, whole, rate, param.decay,
                    param.manifold, scope, said)
        if scope != "target":
            return self._common(leaf).expr
        self.leaves.append(leaf)
        return leaf.expr

    def _common(self, leaf: Leaf) -> Leaf:
        """A leaf that steps have in common, by its name: the one that stands there already, or a new one. One tensor
        that steps need in several sizes is a leaf for each, with a number of its own behind its name."""
        if leaf.scope != "module" and leaf.is_of_module:
            raise fail("wrong-kind", f"`shared({leaf.scope})` is one tensor of several modules, and this start is made "
                       "of what each has by itself", leaf.span, helps=("start it at a number or a draw",))
        alike = [other for other in self.common if other.group == leaf.group]
        for other in alike:
            if what := leaf.unlike(other):
                raise unlike_shared(leaf, other, what)
            if other.shape == leaf.shape:
                return other
        number = f"#{len(alike) + 1}" if alike else ""
        leaf = replace(leaf, key=f"shared.{leaf.key.rpartition('.')[2]}{number}")
        self.common.append(leaf)
        self.leaves.append(leaf)
        return leaf

    def _noise(self, noise: Noise) -> Expr:
        shape = self._shape(noise)
        law = self._draw(noise, noise.draw, shape)
        row = DISTRIBUTIONS[law.distribution]
        if row.mean is None:
            raise fail("wrong-kind", f"{law.distribution} has no mean that could stand for it, and `noise` has one "
                       "outside of training", noise.draw.name_span or noise.span,
                       helps=(f"noise is drawn from {', '.join(n for n, r in DISTRIBUTIONS.items() if r.mean)}",))
        given = {**row.arguments, **dict(law.arguments)}
        # Whoever runs it has sizes that are numbers; a formula of any size is shown and proven, whatever the mean.
        mean = math.nan if any(isinstance(v, Dim) for v in given.values()) else float(row.mean(given))
        return Expr("noise", (), NoiseLaw(f"{self.prefix}.{noise.name}", law, mean), shape)

    def _shape(self, statement: Param | Noise) -> tuple[Size, ...]:
        shape = tuple(size(evaluate(d, self.values), d, self.values) for d in statement.dims)
        assert_can_exist(shape, statement.name_span or statement.span)
        return shape

    def _rate(self, param: Param, rate: Expression) -> Dim | float:
        value = evaluate(rate, self.values)
        if isinstance(value, bool) or not isinstance(value, NUMBERS):
            raise fail("wrong-type", f"the rate of `{param.name}` must be a number known at compile time, not "
                       f"{describe(value)}", rate.span)
        if not isinstance(value, Dim) and not value > 0:
            raise fail("bad-value", f"the rate of `{param.name}` must be more than 0, not {float(value):g}", rate.span,
                       helps=(f"say `frozen param {param.name}` for what does not train",))
        return value if isinstance(value, Dim) else float(value)

    def _init(self, param: Param, init: Expression, shape: tuple[Size, ...]) -> Expr:
        value = evaluate(init, self.values)
        if isinstance(value, bool) or not isinstance(value, (*NUMBERS, Expr)):
            raise fail("wrong-type", f"`{param.name}` must start at a number or a tensor, not {describe(value)}",
                       init.span)
        try:
            start = in_evaluation(tensor(value))  # it is evaluated once, so noise is its mean
        except OverflowError:
            raise fail("bad-value", f"`{param.name}` starts at {describe(value)}, which float32 cannot hold",
                       init.span) from None
        if start.shape not in ((), shape):  # a number is the value of every entry
            raise fail("shape-mismatch",
                       f"`{param.name}` is {shape_text(shape)} but starts at {shape_text(start.shape)}",
                       init.span or param.span, notes=self._sizes(),
                       helps=_in_shape(init, start.shape, shape, param))
        return start

    def _draw(self, param: Param | Noise, call: Call, shape: tuple[Size, ...]) -> Draw:
        place = call.name_span or call.span
        if call.function not in DISTRIBUTIONS:
            raise unknown("unknown-distribution", "distribution", call.function, DISTRIBUTIONS, place)
        law = DISTRIBUTIONS[call.function]
        if len(shape) < law.least_dims:
            raise fail("shape-mismatch", f"{call.function} needs at least {law.least_dims} dimensions; "
                       f"`{param.name}` is {shape_text(shape)}", place, helps=("use normal() or uniform()",))
        if len(call.arguments) == 1 < len(law.arguments) and call.arguments[0].name is None:
            first, second = list(law.arguments)[:2]
            self.report.warn("unnamed-argument", f"this sets `{first}` of {call.function}, the first of its arguments",
                             call.arguments[0].value.span,
                             helps=(f"name it: {call.function}({first} = ...), or {call.function}({second} = ...)",))
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


def _in_shape(init: Expression, start: tuple[Size, ...], shape: tuple[Size, ...], param: Param) -> tuple[str, ...]:
    """What is meant by as many entries in another shape, and by one matrix as the start of a stack."""
    is_turned = sorted(map(str, start)) == sorted(map(str, shape))
    if math.prod(start) == math.prod(shape) and not is_turned:
        return (f"its entries in that shape are `reshape({expression_text(init)}, "
                f"{', '.join(map(expression_text, param.dims))})`",)
    if len(start) != 2 or len(param.dims) != 3:
        return ()
    count, *sides = map(expression_text, param.dims)
    stack = f"kron(ones({count}, 1), {expression_text(init)})"
    return (f"so many of it are `reshape({stack}, {count}, {', '.join(sides)})`",)


def _assert_fits(call: Call, shape: tuple[Size, ...], given: Mapping[str, Any]) -> None:
    """Raises: SurgeryError, if the distribution's check is not met, or more different places are asked for than there
    are."""
    law = DISTRIBUTIONS[call.function]
    check, values = _parsed(law.check), {**law.arguments, **given}
    if evaluate(check, values) is False:
        raise fail("bad-value", f"{call.function} needs {law.check}", call.span, notes=here(check, values))
    of, count = given.get("of"), math.prod(shape)
    if of is not None and not isinstance(of, Dim) and not isinstance(count, Dim) and count > of:
        raise fail("bad-value", f"{count} different places are asked for, and there are {of:g}", call.span)


def unlike_shared(leaf: Leaf, other: Leaf, what: str) -> SurgeryError:
    """The error for two leaves that are said to be one tensor, and cannot be."""
    return fail("unlike-shared", f"`{leaf.group.rpartition('.')[2] if leaf.group else ''}` is one tensor wherever "
                f"`shared({leaf.scope})` says it, and {what} is said in two ways", leaf.span,
                related=((other.span, "the first is here"),) if other.span else (),
                helps=("say it alike, or give one of the two another name",))


def with_called(definition: Definition, known: Mapping[str, Definition]) -> list[Definition]:
    """A definition, those that its body calls, and those that they call, each once; no more than can be called."""
    found: dict[str, Definition] = {}
    stack = [definition]
    while stack and len(found) < MOST_CALLS:
        for call in definition_calls(stack.pop(), known):
            if call.function not in found:
                found[call.function] = known[call.function]
                stack.append(found[call.function])
    return [definition, *found.values()]


@cache
def _parsed(check: str) -> Expression:
    """A distribution's own check, parsed once."""
    return parse_expression(check)


def not_too_deep(value: Any, span: Span | None) -> Any:
    """The value. Raises: SurgeryError (too-large), if it is a tensor that takes too many operations on one another."""
    if isinstance(value, Expr) and value.depth > DEEPEST_FORMULA:
        raise fail("too-large", f"this takes more than {DEEPEST_FORMULA} operations one after the other", span,
                   helps=("a sum or a product of many parts of one form is a product with one stacked parameter",))
    return value


def with_article(kind: str) -> str:
    """`an update`, `a transform`."""
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def _instead_of_result(definition: Definition, result: Expr, wanted: tuple[Size, ...]) -> tuple[str, ...]:
    """What is meant by a result of another shape, where that is known."""
    if definition.kind == "transform" and result.has("weight"):
        return ("a transform is the matrix that W is multiplied by: return it without W",)
    if definition.kind == "transform" and result.shape == wanted[:1]:
        return ("the diagonal matrix of a vector is `diag(d)`",)
    if len(wanted) == 2 and result.shape == wanted[::-1]:
        return ("W is [out, in], as torch stores it: return `.T` of this, or give each factor its other shape",)
    if len(wanted) == 2 and result.shape == wanted[:1]:
        return (f"what is added to the bias is `update {definition.name}(...) on bias`",)
    sides = (definition.dim,) * 2 if definition.dim else ("out", "in")
    told = (_as_what_is_left(found, name, side) for found, name, side in zip(result.shape, sides, wanted)
            if len(result.shape) == len(wanted) and found != side)
    return tuple(filter(None, told))[:1]


def _as_what_is_left(found: Size, name: str, side: Size) -> str:
    """That a parameter in a product is to follow from the side that this is to be; empty where that says nothing."""
    own = sorted(found.symbols() - {"out", "in"}) if isinstance(found, Dim) and len(found.terms) == 1 else []
    rest = found / symbol(own[-1]) if own and isinstance(found, Dim) else 1
    if rest == 1 or own[-1] in str(rest):
        return ""
    text = f"({rest})" if " " in str(rest) else f"{rest}"
    return (f"sizes are compared before a model is there, whatever they are: write `{name} / {text}` in the place of "
            f"`{own[-1]}`")
