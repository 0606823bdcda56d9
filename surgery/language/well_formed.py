"""What no spec may hold, whether it came from text, Python or JSON.

Takes a tree. Gives diagnostics. Promises: a spec that passes can be printed, and its text parses to an equal spec.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any

from surgery.diagnostics import Collector, Span
from surgery.language import tree
from surgery.language.grammar import KEYWORDS, WORDS, is_name

LANGUAGE = 1  # the version of the language that this is
MAX_DEPTH = 100
MAX_REPEATS = 8  # one inside the other
MAX_INT = 2**63 - 1

#: What may follow the call of a step.
CLAUSES = {"pre": ("on", "with bias"), "add": ("dropout",), "post": ("on", "with bias")}
CLAUSE_TEXTS = {"on": "`on out` or `on in`", "with bias": "`with bias`", "dropout": "`dropout(rate)`"}
#: What the head of a target says besides selectors.
HEAD_WORDS = {word for terminal in ("KIND", "_IN", "SHIFTED", "UNTIE") for word in WORDS[terminal]}


def check_spec(spec: tree.Spec) -> Collector:
    """Everything that is wrong with the form of a spec."""
    report = Collector()
    for node in nodes_of(spec):
        for rule in RULES.get(type(node), ()):
            rule(report, node)
        for expression in expressions_of(node):
            check_expression(report, expression)
    return report


def check_expression(report: Collector, expression: tree.Expression) -> None:
    """Depth, numbers, names, and what each call says twice."""
    # A stack and no recursion: this is what refuses an expression that is too deep for every recursion after it.
    stack = [(expression, 0)]
    while stack:
        node, depth = stack.pop()
        depth += 1 + node.parens
        if depth > MAX_DEPTH:
            report.error("syntax", f"this expression is nested more than {MAX_DEPTH} deep", node.span,
                         helps=("name its parts with `let`",))
            return
        for rule in RULES.get(type(node), ()):
            rule(report, node)
        stack += [(child, depth) for child in reversed(expressions_of(node))]


def height(expression: tree.Expression) -> int:
    """How many expressions stand in one another."""
    deepest, stack = 0, [(expression, 1)]
    while stack:
        node, depth = stack.pop()
        deepest = max(deepest, depth)
        stack += [(child, depth + 1) for child in expressions_of(node)]
    return deepest


def nodes_of(value: Any) -> Iterator[tree.Node]:
    """A node and all the nodes in it."""
    if isinstance(value, tuple):
        for item in value:
            yield from nodes_of(item)
    elif isinstance(value, tree.Node):
        yield value
        for field in type(value).model_fields:
            yield from nodes_of(getattr(value, field))


def expressions_of(node: tree.Node | tree.Expression) -> list[tree.Expression]:
    """The expressions that stand directly in a statement, or the operands of an expression, in order."""
    if isinstance(node, tree.Call):
        return [argument.value for argument in node.arguments]
    names = type(node).model_fields if isinstance(node, tree.Node) else [field.name for field in fields(node)]
    values = [getattr(node, name) for name in names]
    flat = [item for value in values for item in (value if isinstance(value, tuple) else (value,))]
    return [value for value in flat if isinstance(value, tree.Expression)]


# ------------------------------------------------------------------------------------------------------- rules


def check_clause(report: Collector, placement: str, clause: str, span: Span | None, again: bool = False) -> bool:
    """Whether a step of this placement may say this clause (once)."""
    allowed = CLAUSES[placement]
    if again:
        report.error("syntax", f"`{clause}` stands twice", span)
    elif clause not in allowed:
        report.error("syntax", f"`{clause}` cannot follow `{placement}`", span,
                     helps=(f"`{placement}` takes {' and '.join(CLAUSE_TEXTS[c] for c in allowed)}",))
    return not again and clause in allowed


def _step(report: Collector, step: tree.Step) -> None:
    # `on out` is what no clause means, and a tree that was built does not say which of the two it was
    clauses = {"on": step.side != "out", "with bias": step.bias, "dropout": step.dropout is not None}
    for clause in (c for c, stands in clauses.items() if stands):
        check_clause(report, step.placement, clause, step.span)


def _repeat(report: Collector, repeat: tree.Repeat) -> None:
    _has_steps(report, "a `for`", repeat)
    _name(report, repeat.name, repeat.name_span)
    check_repeats(report, repeat)


def _rounds(report: Collector, rounds: tree.Rounds) -> None:
    if not rounds.body:
        report.error("syntax", "a `for` needs at least one statement", rounds.span,
                     helps=("write `param`, `let` or `noise` between the braces",))
    _name(report, rounds.name, rounds.name_span)
    check_repeats(report, rounds)


def check_repeats(report: Collector, loop: tree.For) -> bool:
    """Whether no more `for` stand in one another than may; told of the innermost that holds too many."""
    loops = [loop]
    depth = 0
    while loops := [each for outer in loops for each in tree.inside(outer) if isinstance(each, tree.For)]:
        depth += 1
    if depth == MAX_REPEATS:
        report.error("syntax", f"`for` stands inside `for` more than {MAX_REPEATS} times", loop.span)
    return depth < MAX_REPEATS


def _has_steps(report: Collector, what: str, node: tree.Target | tree.Repeat) -> None:
    if not node.steps:
        report.error("syntax", f"{what} needs at least one step", node.span,
                    helps=("write `pre`, `add` or `post` between the braces",))


def _target(report: Collector, target: tree.Target) -> None:
    _has_steps(report, "a target", target)
    _name(report, target.ancestor, target.span)
    _selectors(report, target.selectors + target.exclude)


def check_language(report: Collector, version: float, span: Span | None = None) -> None:
    """Whether this version of the language is one that is known here."""
    if version > LANGUAGE:
        report.error("newer-language", f"this spec is written in language {version}, and this surgery knows language "
                     f"{LANGUAGE}", span, helps=("install a newer version of surgery",
                                                 f"or say `language {LANGUAGE}`, if it uses nothing newer"))
    elif version < 1:
        report.error("syntax", "versions of the language are counted from 1", span)


def _spec(report: Collector, spec: tree.Spec) -> None:
    if spec.language is not None:
        check_language(report, spec.language)
    _name(report, spec.name, spec.name_span)
    _once(report, "parameter", [(p.name, p.name_span) for p in spec.params])
    if spec.name is None and spec.params:
        report.error("syntax", "a spec with parameters needs a name")


def _definition(report: Collector, definition: tree.Definition) -> None:
    for name in (definition.name, definition.dim, *definition.claims):
        _name(report, name, definition.name_span)
    _once(report, "claim", zip(definition.claims, definition.claims_spans or [None] * len(definition.claims)))
    # the dimension, the parameters and the statements share one scope in the body
    dim = {definition.dim: definition} if definition.dim else {}
    _names_of_body(report, _first_of_each(report, definition.params, dim), definition.body, {})
    if (definition.kind == "transform") is (definition.dim is None):
        report.error("syntax", f"{definition.kind} `{definition.name}`: a transform names its dimension with `on`, "
                               "an update does not", definition.name_span)
    if definition.bias and definition.kind == "transform":
        report.error("syntax", f"transform `{definition.name}`: only an update can be `on bias`", definition.name_span)


def _first_of_each(report: Collector, nodes: Iterable[Any], known: dict[str, Any]) -> dict[str, Any]:
    """`known` with the nodes by their names; a name that has a meaning already is told."""
    for node in nodes:
        if node.name in known:
            _stands_twice(report, "name", node.name, node.name_span, known[node.name].name_span)
        known.setdefault(node.name, node)
    return known


def _names_of_body(report: Collector, around: dict[str, Any], body: Iterable[Any], tensors: dict[str, Any]) -> None:
    """Names that stand twice. In a `for` a `let` may have the name of one above, whose next value it is. What is a
    tensor has its name in the whole definition, and what else a `for` names has it there alone."""
    own: dict[str, Any] = {}
    for node in body:
        is_next = isinstance(node, tree.Let) and isinstance(around.get(node.name), tree.Let)
        is_tensor = isinstance(node, (tree.Param, tree.Noise))
        first = own.get(node.name) or (None if is_next else around.get(node.name)) or (
            tensors.get(node.name) if is_tensor else None)
        if first is not None:
            _stands_twice(report, "name", node.name, node.name_span, first.name_span,
                          helps=("the next value is given to what a `let` above the `for` names",)
                          if isinstance(node, tree.Let) and node.name not in own else ())
        if isinstance(node, tree.Rounds):
            variable = {} if first else {node.name: node}
            _names_of_body(report, {**around, **own, **variable}, node.body, tensors)
            continue
        own.setdefault(node.name, node)
        if is_tensor:
            tensors.setdefault(node.name, node)


def _param(report: Collector, param: tree.Param) -> None:
    _name(report, param.name, param.name_span)
    if (param.init is None) is (param.draw is None):
        report.error("syntax", f"param `{param.name}` starts at a value (`=`) or at a draw (`~`), one of the two",
                     param.span)
    said = [*(["rate"] if param.rate is not None else []), *["no decay"] * (not param.decay),
            *[f"on {param.manifold}"] * bool(param.manifold)]
    if param.frozen and said:
        report.error("syntax", f"`{said[0]}` says how a parameter trains, and `{param.name}` is frozen", param.span,
                     helps=("leave out the one or the other",))


def _named(report: Collector, node: Any) -> None:
    _name(report, node.name, node.name_span)


def _select(report: Collector, select: tree.Select) -> None:
    _selector_name(report, select.name, select.name_span)
    _selectors(report, select.patterns)


def _train(report: Collector, train: tree.Train) -> None:
    _selectors(report, train.patterns)


def _use(report: Collector, use: tree.Use) -> None:
    _text(report, use.path, use.span)


def _selectors(report: Collector, selectors: tuple) -> None:
    for selector in selectors:
        if isinstance(selector, tree.Pattern):
            _text(report, selector.text, selector.span)
        else:
            _selector_name(report, selector.name, selector.span)


def _selector_name(report: Collector, name: str, span: Span | None) -> None:
    _name(report, name, span)
    if name in HEAD_WORDS:
        report.error("reserved-name", f"`{name}` has a meaning of its own in a target and cannot name a selector", span)


def _string(report: Collector, string: tree.String) -> None:
    _text(report, string.value, string.span)


def _id(report: Collector, name: tree.Name) -> None:
    _name(report, name.id, name.span)


def _number(report: Collector, number: tree.Number) -> None:
    # sizes and indices are counted in 63 bits by torch
    limit = MAX_INT if isinstance(number.value, int) else math.inf
    if not math.isfinite(number.value) or number.value > limit:
        report.error("syntax", "this number is out of range", number.span,
                     notes=(f"integers go up to {MAX_INT}, other numbers up to 1.8e308",))
    # text has no negative literal, only a minus before one: printed and parsed again this would be another tree
    elif math.copysign(1, number.value) < 0:
        report.error("syntax",
                     f"`Number({number.value})`: a negative number is `Unary(\"-\", Number({-number.value}))`")


def _matrix(report: Collector, matrix: tree.Matrix) -> None:
    if not matrix.entries or matrix.columns < 1 or len(matrix.entries) % matrix.columns:
        report.error("syntax", "a matrix has rows of equal length, with at least one entry", matrix.span)


def _call(report: Collector, call: tree.Call) -> None:
    _name(report, call.function, call.name_span)
    keywords = [(a.name, a.name_span) for a in call.arguments if a.name is not None]
    for name, span in keywords:
        _name(report, name, span)
    _once(report, "argument", keywords)
    names = [a.name for a in call.arguments]
    for before, argument in zip(names, call.arguments[1:]):
        if before is not None and argument.name is None:
            report.error("syntax", f"a positional argument of `{call.function}` follows the named argument `{before}`",
                         argument.value.span, helps=("put the positional arguments first, or name this one too",))


RULES: dict[type, tuple] = {
    tree.Spec: (_spec,), tree.Parameter: (_named,), tree.Use: (_use,), tree.Select: (_select,), tree.Train: (_train,),
    tree.Definition: (_definition,), tree.Param: (_param,), tree.Noise: (_named,),
    tree.Let: (_named,), tree.Target: (_target,), tree.Step: (_step,), tree.Repeat: (_repeat,),
    tree.Rounds: (_rounds,),
    tree.Call: (_call,), tree.Name: (_id,), tree.Number: (_number,), tree.String: (_string,),
    tree.Matrix: (_matrix,),
}


# ------------------------------------------------------------------------------------------------------- parts


def _once(report: Collector, what: str, names: Iterable[tuple[str, Span | None]]) -> None:
    first: dict[str, Span | None] = {}
    for name, span in names:
        if name in first:
            _stands_twice(report, what, name, span, first[name])
        first.setdefault(name, span)


def _stands_twice(report: Collector, what: str, name: str, span: Span | None, first: Span | None,
                  helps: tuple[str, ...] = ()) -> None:
    report.error("duplicate-name", f"{what} `{name}` stands twice", span, helps=helps,
                 related=((first, "the first is here"),) if first else ())


def _name(report: Collector, name: str | None, span: Span | None) -> None:
    if name is None or is_name(name):
        return
    if name in KEYWORDS:
        report.error("reserved-name", f"`{name}` is a word of the language and cannot be a name", span)
    else:
        report.error("syntax", f"{name!r} is not a name", span, helps=("a name is made of letters, digits and `_`",))


def _text(report: Collector, text: str, span: Span | None) -> None:
    if any(c in text for c in '"\r\n'):
        report.error("syntax", f"the string {text!r} cannot be written in a spec", span,
                     notes=("a string is one line without double quotes",))
