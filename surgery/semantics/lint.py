"""Checks that need a spec's text alone: every definition and target with symbolic sizes, and names that are never used.

Takes a spec and its library; gives diagnostics. Promises: no model and no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from surgery.diagnostics import Collector, Diagnostic, fail
from surgery.ir import sizes
from surgery.ir.expression import Expr
from surgery.language.library import Library
from surgery.language.tree import Definition, Param, Parameter, Spec
from surgery.semantics.arguments import assert_checks, defaults, unknowns
from surgery.semantics.definitions import Instance
from surgery.semantics.elaborate import Context, elaborate
from surgery.semantics.evaluate import names_in
from surgery.semantics.scope import unknown

CLAIMS = ("orthogonal", "diagonal", "symmetric")
OUT, IN = sizes.symbol("out"), sizes.symbol("in")
PLACES = {"layer": sizes.symbol("layer"), "depth": sizes.symbol("depth")}


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
    report.add(*_of_targets(spec, Context(scope, {**values, **PLACES}), {(d.code, d.span) for d in report.found}))
    report.add(*([] if report.errors else _unused(spec)))  # a misspelt name would make the one that was meant unused
    return report.found


def _of_targets(spec: Spec, context: Context, told: set) -> list[Diagnostic]:
    """Mistakes of the steps, less those of definitions at places already told."""
    report = Collector()
    for target in spec.targets:
        elaborate(target, context, OUT, IN, report)
    return [d for d in report.found if d.span is None or (d.code, d.span) not in told]


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
    side = {definition.dim: n} if definition.dim else {"b": Expr("bias", (), None, (OUT,))} if definition.bias else {}
    values = {**unknowns(definition.params), "out": OUT, "in": IN, **side, "W": Expr("weight", (), None, (OUT, IN))}
    Instance(definition, definition.name, values, report).run()
    return report.found


# --------------------------------------------------------------------------------------------------- unused


def _unused(spec: Spec) -> Iterator[Diagnostic]:
    read = {name for part in (*spec.targets, *spec.checks, *spec.params) for name in names_in(part)}
    yield from (_never("parameter", p) for p in spec.params if p.name not in read)
    for definition in spec.definitions:
        read = names_in(definition)
        yield from (_never("parameter", p) for p in definition.params if p.name not in read)
        yield from (_never("param" if isinstance(s, Param) else "let", s) for s in definition.body
                    if s.name not in read)


def _never(what: str, node: Any) -> Diagnostic:
    return Diagnostic("unused", f"{what} `{node.name}` is never used", node.name_span or node.span, severity="warning",
                      helps=("remove it, or use it",))
