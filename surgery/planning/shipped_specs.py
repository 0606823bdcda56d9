"""The specs that ship, each with its figures for one common layer.

Takes nothing; gives an `Entry` for each. Promises: no torch; counted on a linear layer of the `USUAL` sizes with a
bias, at the cost model's number of tokens, with the spec's own defaults.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import Any

from surgery.codegen.compiled import Compiled
from surgery.ir.sizes import known
from surgery.language.library import read, shipped
from surgery.language.tree import Spec
from surgery.planning.cost_estimates import Estimate
from surgery.planning.families import families
from surgery.planning.trial_sizes import USUAL
from surgery.semantics.evaluate import OF_DATA_NAMES
from surgery.semantics.resolved_spec import resolved

_PAPER = re.compile(r"arXiv \d{4}\.\d{4,5}")


@dataclass(frozen=True)
class Entry:
    """A shipped spec: its first line, its paper's number, its families (`families.FAMILIES`), and of its first target:
    the parameters that train, how the cheapest program runs, and what a step costs as a multiple of the frozen layer's
    (None for a spec that only unfreezes). `data`: what its starts name that data gives, G or C."""

    name: str
    description: str
    paper: str | None
    families: tuple[str, ...]
    parameters: int | None
    program: str
    step_ratio: float | None
    data: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


def catalogue() -> list[Entry]:
    """The shipped specs in the order of their names."""
    return [entry_of(name, read(path)) for name, path in shipped().items()]


def entry_of(name: str, spec: Spec) -> Entry:
    """The figures of a spec for the common layer."""
    paper = _PAPER.search(spec.doc)
    formulas = [formula for _, formula in resolved(spec).formulas(*USUAL)]
    about = (name, spec.doc.partition("\n")[0], paper and paper[0], families(formulas))
    if not formulas:  # it only unfreezes what the model has
        return Entry(*about, None, "the model's own parameters", None)
    formula = formulas[0]
    estimate = Estimate(Compiled.supposed(formula))
    program = "dense" if estimate.built else estimate.candidates[0].strategy
    trained = sum(known(prod(leaf.shape)) for leaf in formula.leaves if not leaf.frozen)
    data = tuple(name for name, (op, _) in OF_DATA_NAMES.items() if any(op in each.of_data for each in formulas))
    return Entry(*about, trained, program, estimate.ratio(), data)
