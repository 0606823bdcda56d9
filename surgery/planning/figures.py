"""What a plan does to a model, in figures: the same for `plan`, `apply` and `Surgeon.report()`.

Takes a `Plan` and the dtype of the adapter's parameters; gives rows and totals, as text and as JSON. Promises: no
weight is read, so it works on the meta device; every figure has its unit; a tensor that modules share counts once in a
total.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from surgery.diagnostics import Diagnostic
from surgery.html import table, tag
from surgery.language.tree import Target
from surgery.layers import opaque_linear
from surgery.layers.opaque_linear import SUFFIX
from surgery.layers.wrappers import parameter
from surgery.matching.name_ranges import alike, ranged, starred
from surgery.planning.cost_estimates import Estimate, fallback
from surgery.planning.fitness import copy_size, dense_copies, estimated
from surgery.planning.formulas import formula_lines
from surgery.planning.quantised_sizes import packed_saving
from surgery.text import counted, dtype_text, sides_text, size_text

if TYPE_CHECKING:  # `compile` imports this module, so that a plan shows its own figures in a notebook
    from surgery.planning.compile import Plan


class Row(NamedTuple):
    """One operated weight: `shape` is [out, in] (one matrix of a stack), `parameters` what its adapter trains,
    `step_ratio` an estimate of what a step costs, as a multiple of the frozen layer's."""

    name: str
    target: int
    kind: str
    shape: tuple[int, int]
    stack: int | None
    formula: str
    parameters: int
    step_ratio: float

    @property
    def sides(self) -> str:
        return sides_text(*self.shape, self.stack)


@dataclass(frozen=True, repr=False)
class Report:
    """The figures of a plan; `str()` is a table of plain text. `dtype` is that of the adapter's parameters."""

    plan: Plan
    dtype: torch.dtype = torch.float32

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The operated weights in module order."""
        targets = {id(target): i for i, target in enumerate(self.plan.spec.targets)}
        # Layers of one size share their formula, whose text takes long: each is written once.
        first = {id(p.formula): p for p in self.plan.placed}
        formulas = {key: formula_lines(p.target, p.formula)[0] for key, p in first.items()}
        return tuple(Row(p.site.name, targets[id(p.target)], p.site.kind, (p.site.out, p.site.in_), p.site.stack,
                         formulas[id(p.formula)], p.parameters, estimate.ratio())
                     for p, estimate in zip(self.plan.placed, self.estimates))

    @cached_property
    def estimates(self) -> tuple[Estimate, ...]:
        """What each operated weight costs, in module order."""
        return tuple(map(estimated, self.plan.placed))

    @property
    def fallbacks(self) -> list[Diagnostic]:
        """A warning for each target that has no cheap program on one of its weights."""
        pairs = list(zip(self.plan.placed, self.estimates))
        found = (fallback(t, [e for p, e in pairs if p.target is t]) for t in self.plan.spec.targets)
        return [*filter(None, found), *dense_copies(self.plan)]

    @property
    def step_ratio(self) -> float:
        """The estimate for all operated weights together, as a multiple of what they cost frozen (1 where there are
        none)."""
        return _ratio(self.estimates)

    def step_ratio_of(self, target: Target) -> float:
        """The same for the weights of one target of the plan's spec."""
        return _ratio([e for p, e in zip(self.plan.placed, self.estimates) if p.target is target])

    @property
    def total(self) -> int:
        """Parameters of the model itself."""
        return self.plan.total

    @cached_property
    def unfrozen(self) -> dict[str, int]:
        """The parameters that `train` unfreezes, with how many numbers each holds."""
        return {name: p.numel() for name, p in self._unfrozen.items()}

    @cached_property
    def _unfrozen(self) -> dict[str, torch.Tensor]:
        return {name: parameter(self.plan.selection.survey.model, name) for name in self.plan.train}

    @property
    def trainable(self) -> int:
        """Parameters that train: the adapter's and those of `train`."""
        return self.plan.trainable + sum(self.unfrozen.values())

    @property
    def percent(self) -> float:
        """`trainable` as a share of `total`, in per cent."""
        return 100 * self.trainable / max(self.total, 1)

    @property
    def bytes(self) -> int:
        """What the adapter's tensors take, those that are not trained too."""
        numbers = self.plan.trainable + self.plan.frozen - self.plan.whole
        return numbers * self.dtype.itemsize + self.plan.whole * torch.int64.itemsize

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of the base model (as its quantiser packs it, where that is known), of dense copies of its weights, of
        the adapter, and what AdamW adds (a gradient and two moments of each trained number)."""
        survey = self.plan.selection.survey
        # A quantised layer keeps its numbers in buffers, or in tensors that are no parameters of the model: they are
        # asked of the layer, and by identity, since a tied weight stands at several names.
        packed = [t for site in survey.sites if site.layout.is_called for t in site.held]
        plain = (p for name, p in survey.model.named_parameters() if f"{SUFFIX}." not in name)
        base = {id(t): opaque_linear.size(t) for t in (*packed, *plain)}
        copies = sum(map(copy_size, self.plan.placed))
        trained = self.plan.trainable * self.dtype.itemsize + sum(p.nbytes for p in self._unfrozen.values())
        size = sum(base.values()) - math.floor(packed_saving(survey) or 0)
        return {"base": size, **({"dense copies": copies} if copies else {}), "adapter": self.bytes,
                "gradients and AdamW": 3 * trained}

    @cached_property
    def left_out(self) -> dict[str, list[str]]:
        """The modules with a weight that no target takes, by reason."""
        by_reason: dict[str, list[str]] = {}
        for name, reason, _ in self.plan.selection.left_out:
            by_reason.setdefault(reason, []).append(name)
        return by_reason

    def to_json(self) -> dict[str, Any]:
        """All the figures, for `--json`."""
        return {"spec": self.plan.spec.name, "modules": [r._asdict() for r in self.rows], "unfrozen": self.unfrozen,
                "left_out": self.left_out, "trainable": self.trainable, "frozen": self.plan.frozen, "base": self.total,
                "percent": self.percent, "dtype": dtype_text(self.dtype), "bytes": self.bytes,
                "step_ratio": self.step_ratio}

    def __repr__(self) -> str:
        return f"<Report: {self.summary}>"

    def _repr_html_(self) -> str:
        """The operated weights as a table, for notebooks; those that differ in their index alone are one row."""
        rows = [(ranged([row.name for row in same]), len(same), same[0].sides, same[0].formula,
                 f"{sum(row.parameters for row in same):,}", f"{same[0].step_ratio:.2f} x")
                for same in _alike(self.rows)]
        return table(("weights", "", "[out, in]", "formula", "parameters", "step"), rows) + tag("p", self.summary)

    def __str__(self) -> str:
        lines = []
        for index, of_target in groupby(sorted(self.rows, key=lambda r: r.target), lambda r: r.target):
            target = self.plan.spec.targets[index]
            place = f" at {target.span.source.name}:{target.span.line}" if target.span else ""
            # weights that differ only in their index, and in nothing shown, are one line: a model has dozens of layers
            rows = [(f"  {ranged([r.name for r in same])}", f"{len(same)} x", same[0].sides, same[0].formula,
                     counted(sum(r.parameters for r in same), "parameter"), f"step {same[0].step_ratio:.2f} x")
                    for same in _alike(of_target)]
            lines += [f"target {target.kind}{place}", *_table(rows)]
        if self.unfrozen:
            sizes = [(ranged(names), sum(self.unfrozen[name] for name in names)) for names in alike(self.unfrozen)]
            lines += ["train", *_table((f"  {names}", counted(size, "parameter")) for names, size in sizes)]
        if self.left_out:
            rows = []
            for reason, names in self.left_out.items():
                kinds = list(dict.fromkeys(map(starred, names)))  # the first few say what it is about
                some = ", ".join(kinds[:3]) + (", ..." if len(kinds) > 3 else "")
                rows.append((f"  {some}", counted(len(names), "module"), reason))
            lines += ["left out", *_table(rows)]
        lines.append(self.summary)
        if self.estimates:
            lines.append(f"a step of them with {self.estimates[0].tokens:,} tokens costs {self.step_ratio:.2f} x what "
                         "it costs frozen, by estimate")
        return "\n".join(lines)

    @property
    def summary(self) -> str:
        """The totals in one line."""
        extra = f", {counted(self.plan.frozen, 'frozen parameter')} of its own" if self.plan.frozen else ""
        return (f"{counted(len(self.rows), 'weight')} operated on: {counted(self.trainable, 'parameter')} train, "
                f"{self.percent:.3g} % of {self.total:,}{extra}; "
                f"the adapter takes {size_text(self.bytes)} in {dtype_text(self.dtype)}")


def _ratio(estimates: Sequence[Estimate]) -> float:
    return sum(e.seconds() for e in estimates) / sum(e.frozen_seconds for e in estimates) if estimates else 1.0


# ----------------------------------------------------------------------------------------------------------- text


def _alike(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows in groups that differ only in an index of their names, and in nothing shown."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        shown = row.sides, row.formula, row.parameters, f"{row.step_ratio:.2f}"
        groups.setdefault((row.target, starred(row.name), *shown), []).append(row)
    return list(groups.values())


def _table(rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines with their columns aligned; a column of figures to the right."""
    rows = [list(row) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    right = [all(row[i][:1].isdigit() for row in rows) for i in range(len(widths))]
    return ["  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right)).rstrip() for row in rows]
