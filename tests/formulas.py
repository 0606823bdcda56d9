"""Formulas of specs, for layers of a size."""

from surgery.diagnostics import Collector
from surgery.ir.expression import Formula
from surgery.language.library import library
from surgery.semantics.elaborate import Context, elaborate
from surgery.semantics.resolved_spec import spec_values

OUT, IN = 512, 1024


def formula(spec, out: int = OUT, in_: int = IN) -> Formula:
    """The formula of a spec's first target."""
    report = Collector()
    found = elaborate(spec.targets[0], Context(library(spec), spec_values(spec, report)), out, in_, report)
    report.raise_errors()
    return found
