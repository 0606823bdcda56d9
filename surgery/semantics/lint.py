"""Checks that need a spec's text alone: every definition and target with symbolic sizes, and names that are never used.

Takes a resolved spec; gives diagnostics. Promises: no model and no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from surgery.diagnostics import Collector, Diagnostic
from surgery.ir.expression import Expr
from surgery.language.tree import Definition, Spec, every_statement
from surgery.semantics.arguments import assert_defaults, says_square, unknowns
from surgery.semantics.definitions import CALLED, Instance, with_called
from surgery.semantics.evaluate import names_in
from surgery.semantics.resolved_spec import IN, OUT, ResolvedSpec
from surgery.semantics.scope import unknown

CLAIMS = ("orthogonal", "diagonal", "symmetric")


def linted(spec: Spec, report: Collector) -> ResolvedSpec:
    """The spec with its names resolved, and its lint reported; made once for a spec, so that one that is put on many
    models is read once. Raises: SurgeryError, for files that it uses and cannot read."""
    resolved, found = _linted(spec) if spec.uses else _known(_Same(spec))  # a file may have changed since
    report.add(*found)
    return resolved


def _linted(spec: Spec) -> tuple[ResolvedSpec, tuple[Diagnostic, ...]]:
    report = Collector()
    resolved = ResolvedSpec(spec, report)
    return resolved, (*report.found, *lint(resolved))


@dataclass(frozen=True, eq=False)
class _Same:
    """A key for this very spec, which is frozen: one that is equal may stand elsewhere, and be told of there."""

    spec: Spec

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.spec is self.spec

    def __hash__(self) -> int:
        return id(self.spec)


@lru_cache(maxsize=32)
def _known(same: _Same) -> tuple[ResolvedSpec, tuple[Diagnostic, ...]]:
    return _linted(same.spec)


def lint(resolved: ResolvedSpec) -> list[Diagnostic]:
    """What is wrong with a spec whatever the model: definitions, targets, claims, unused names."""
    spec, report = resolved.spec, Collector()
    known = resolved.library.definitions
    found = [diagnostic for definition in spec.definitions for diagnostic in _definition(definition, known)]
    # a mistake of a definition's own is told once, and not again where another one calls it
    own = {(d.code, d.span) for d in found if not _is_of_call(d)}
    report.add(*(d for d in found if not _is_of_call(d) or (d.code, d.span) not in own))
    reported = {(d.code, d.span) for d in report.found}
    of_steps = Collector()
    for target in spec.targets:
        resolved.formula(target, of_steps)
    # nor again for each step that places it
    report.add(*(d for d in of_steps.found if d.span is None or (d.code, d.span) not in reported))
    report.add(*([] if report.errors else _unused(spec)))  # a misspelt name would make the one that was meant unused
    return report.found


def _is_of_call(diagnostic: Diagnostic) -> bool:
    return any(text == CALLED for _, text in diagnostic.related)


def _definition(definition: Definition, known: Mapping[str, Definition]) -> list[Diagnostic]:
    """Mistakes of a definition on its own, at sizes and values that are not known. A transform need only make sense on
    one side."""
    report = Collector()
    for claim, span in zip(definition.claims, definition.claims_spans or (None,) * len(definition.claims)):
        if claim not in CLAIMS:
            report.add(*unknown("unknown-claim", "claim", claim, CLAIMS, span).diagnostics)
    assert_defaults(definition.params, report)
    in_ = OUT if any(says_square(d.checks) for d in with_called(definition, known)) else IN
    of_sides: list[list[Diagnostic]] = []
    for n in (OUT, in_) if definition.dim else (OUT,):
        faults, side = Collector(), {"b": Expr("bias", (), None, (OUT,))} if definition.bias else {}
        values = {**unknowns(definition.params), "out": OUT, "in": in_,
                  **({definition.dim: n} if definition.dim else side), "W": Expr("weight", (), None, (OUT, in_))}
        Instance(definition, definition.name, values, faults, known).run()
        of_sides.append(faults.found)
    report.add(*(of_sides[0] if all(of_sides) else []))
    return report.found


# --------------------------------------------------------------------------------------------------- unused


def _unused(spec: Spec) -> Iterator[Diagnostic]:
    read = {name for part in (*spec.targets, *spec.checks, *spec.params) for name in names_in(part)}
    yield from (_never("parameter", p) for p in spec.params if p.name not in read)
    for definition in spec.definitions:
        read = names_in(definition)
        yield from (_never("parameter", p) for p in definition.params if p.name not in read)
        yield from (_never(s.what, s) for s in every_statement(definition.body)
                    if s.name not in read)


def _never(what: str, node: Any) -> Diagnostic:
    return Diagnostic("unused", f"{what} `{node.name}` is never used", node.name_span or node.span, severity="warning",
                      helps=("remove it, or use it",))
