"""Checks that need a spec's text alone: every definition and target with symbolic sizes, and names that are never used.

Takes a spec and its library; gives diagnostics. Promises: no model and no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from surgery.diagnostics import Collector, Diagnostic, fail
from surgery.expr import dims
from surgery.expr.elaborate import CLAIMS, Context, Instance, assert_checks, defaults, elaborate, leaf_values
from surgery.expr.ir import Expr
from surgery.expr.values import unknown
from surgery.spec import Library
from surgery.syntax.tree import Argument, Call, Definition, Expression, Name, Node, Param, Parameter, Spec, Target

OUT, IN = dims.symbol("out"), dims.symbol("in")
PLACES = {"layer": dims.symbol("layer"), "depth": dims.symbol("depth")}


def names_in(node: Any) -> set[str]:
    """Every name that the expressions of a node read."""
    return {n.id for n in nodes(node) if isinstance(n, Name)}


def nodes(node: Any) -> Iterator[Any]:
    """A tree node and everything below it."""
    yield node
    if isinstance(node, Node):
        children = [getattr(node, f) for f, info in type(node).model_fields.items() if not info.exclude]
    else:
        children = [getattr(node, f) for f, info in getattr(node, "__dataclass_fields__", {}).items() if info.compare]
    for child in children:
        for c in child if isinstance(child, tuple) else (child,):
            if isinstance(c, (Node, Expression, Argument)):
                yield from nodes(c)


def spec_values(spec: Spec, report: Collector) -> dict[str, Any]:
    """The values of a spec's parameters. Reports a missing value, a wrong type, a `check` that is not met."""
    values = defaults(spec.params, {}, {}, report, _no_value)
    assert_checks(spec.checks, values, report)
    return values


def _no_value(parameter: Parameter) -> Any:
    raise fail("missing-argument", f"the spec's parameter `{parameter.name}` has no value", parameter.name_span,
               helps=(f"give it a default, or --set {parameter.name}=...",))


def lint(spec: Spec, scope: Library) -> list[Diagnostic]:
    """What is wrong with a spec whatever the model: definitions, targets, claims, unused names."""
    report = Collector()
    for definition in spec.definitions:
        report.add(*_definition(definition))
    values = spec_values(spec, Collector())
    for target in spec.targets:
        elaborate(target, Context(scope, {**values, **PLACES}), OUT, IN, report)
    report.add(*_unused(spec))
    return report.found


def _definition(definition: Definition) -> list[Diagnostic]:
    """Mistakes of a definition on its own. A transform need only make sense on one side."""
    report = Collector()
    for claim, span in zip(definition.claims, definition.claims_spans or (None,) * len(definition.claims)):
        if claim not in CLAIMS:
            report.add(*unknown("unknown-claim", "claim", claim, CLAIMS, span).diagnostics)
    sides = [_abstract(definition, n) for n in ((OUT, IN) if definition.dim else (OUT,))]
    report.add(*([] if not all(sides) else sides[0]))
    return report.found


def _abstract(definition: Definition, n: Any) -> list[Diagnostic]:
    report = Collector()
    side = {definition.dim: n} if definition.dim else {}
    values = {**leaf_values(definition.params), "out": OUT, "in": IN, **side, "W": Expr("weight", (), None, (OUT, IN))}
    Instance(definition, definition.name, values, report).run()
    return report.found


# --------------------------------------------------------------------------------------------------- unused


def _unused(spec: Spec) -> Iterator[Diagnostic]:
    steps = set().union(*(names_in(n) for n in (*spec.targets, *spec.checks, *spec.params)), set())
    yield from (_never("parameter", p) for p in spec.params if p.name not in steps)
    for definition in spec.definitions:
        read = names_in(definition)
        yield from (_never("parameter", p) for p in definition.params if p.name not in read)
        yield from (_never("param" if isinstance(s, Param) else "let", s) for s in definition.body if s.name not in read)


def _never(what: str, node: Any) -> Diagnostic:
    return Diagnostic("unused", f"{what} `{node.name}` is never used", node.name_span or node.span, severity="warning",
                      helps=("remove it, or use it",))
