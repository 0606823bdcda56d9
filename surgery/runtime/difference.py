"""Compare two specs, or two adapters: their formulas, parameters, modules, costs and tensors.

Takes what `surgery.peft.diff` reads of the two; gives a `Difference`. Promises: of an adapter's tensors no more than
their numbers is looked at.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from surgery.ir.notation_forms import in_full
from surgery.language.expressions import Number
from surgery.language.formatter import expression_text
from surgery.language.tree import Parameter, Spec
from surgery.matching.name_ranges import alike, ranged
from surgery.planning.formulas import formula_lines, formulas
from surgery.text import counted, figure_text, some_lines

if TYPE_CHECKING:
    from surgery.planning.figures import Report

_MOST = 12  # lines of tensors that a text shows


@dataclass(frozen=True)
class Side:
    """One of the two: its name, its spec, the tensors of a saved adapter (of one that is made again at attach, what its
    folder says of it), and its plan on the model."""

    name: str
    spec: Spec
    tensors: Mapping[str, Any] = field(default_factory=dict, repr=False)
    report: Report | None = field(default=None, repr=False)

    @property
    def lines(self) -> list[str]:
        """Its formulas as `surgery show` has them, but with all digits of their numbers, and what it trains besides."""
        with in_full():
            found = [line for target, formula in formulas(self.spec) for line in (
                Spec(targets=(target,)).to_surg().partition(" {\n")[0].strip(), *formula_lines(target, formula))]
        return [*found, *(Spec(train=(each,)).to_surg().strip() for each in self.spec.train)]

    @property
    def parameters(self) -> dict[str, str]:
        return {p.name: f"{p.type} = {_value_text(p)}" if p.default is not None else p.type for p in self.spec.params}

    @property
    def costs(self) -> dict[str, str]:
        if self.report is None:
            return {}
        return {"weights": f"{len(self.report.rows):,}", "trained parameters": f"{self.report.trainable:,}",
                "of its own, frozen": f"{self.report.plan.frozen:,}",
                "a step, as a multiple of the frozen layers'": f"{self.report.step_ratio:.2f}"}


@dataclass(frozen=True)
class Difference:
    """`str()` is a text; nothing in it means that the two say and hold the same."""

    a: Side
    b: Side

    @property
    def formulas(self) -> list[str]:
        """The lines that differ, marked `-` for a and `+` for b."""
        lines = list(difflib.ndiff(self.a.lines, self.b.lines))
        return [line.rstrip() for line in lines if line[0] in "+-"]

    @property
    def parameters(self) -> dict[str, tuple[str | None, str | None]]:
        """Parameters of the specs that are not the same in both, each with its type and default in a and in b."""
        return _unequal(self.a.parameters, self.b.parameters)

    @property
    def costs(self) -> dict[str, tuple[str | None, str | None]]:
        """Figures on the model that differ."""
        return _unequal(self.a.costs, self.b.costs)

    @property
    def modules(self) -> tuple[list[str], list[str]]:
        """The weights that a alone operates on, and those that b alone does."""
        of_a, of_b = ([row.name for row in side.report.rows] if side.report else [] for side in (self.a, self.b))
        return [n for n in of_a if n not in set(of_b)], [n for n in of_b if n not in set(of_a)]

    @property
    def tensors(self) -> dict[str, float | None]:
        """The tensors of saved adapters that are not equal: ‖a - b‖ / ‖a‖, None where one has none of that shape or
        other places. Of what a folder does not hold it is an estimate, by sums of all entries."""
        names = dict.fromkeys((*self.a.tensors, *self.b.tensors))
        distances = {name: _distance(self.a.tensors.get(name), self.b.tensors.get(name)) for name in names}
        return {name: distance for name, distance in distances.items() if distance != 0}

    def to_json(self) -> dict[str, Any]:
        only_a, only_b = self.modules
        return {"a": self.a.name, "b": self.b.name, "formulas": self.formulas, "parameters": self.parameters,
                "modules": {"a": only_a, "b": only_b}, "costs": self.costs, "tensors": self.tensors}

    def __str__(self) -> str:
        return "\n".join(self._lines()) or "no difference"

    def _lines(self) -> Iterator[str]:
        if self.formulas:
            yield from ("formulas", *(f"  {line}" for line in self.formulas))
        for title, rows in (("parameters", self.parameters), ("costs", self.costs)):
            if rows:
                yield from (title, *(f"  {name}: {old or '-'} -> {new or '-'}" for name, (old, new) in rows.items()))
        for side, names in zip((self.a, self.b), self.modules):
            if names:
                yield from (f"{counted(len(names), 'weight')} of {side.name} alone",
                            *(f"  {ranged(same)}" for same in alike(names)))
        if self.tensors:
            far = sorted(self.tensors, key=lambda name: -(self.tensors[name] or float("inf")))
            yield f"{counted(len(far), 'tensor')} of the adapters, by their distance"
            told = some_lines((f"{name}: {figure_text(self.tensors[name])}" for name in far), _MOST)
            yield from (f"  {line}" for line in told)


def _value_text(parameter: Parameter) -> str:
    """Its default, however it is written: 5% is 0.05, and 0 of a `float` 0.0."""
    default = parameter.default
    assert default is not None
    if not isinstance(default, Number):
        return expression_text(default)
    return str(float(default.value) if parameter.type == "float" else default.value)


def _unequal(a: Mapping[str, str], b: Mapping[str, str]) -> dict[str, tuple[str | None, str | None]]:
    names = dict.fromkeys((*a, *b))
    return {name: (a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)}


def _distance(a: Any, b: Any) -> float | None:
    if a is None or b is None:
        return None
    if isinstance(a, Mapping) or isinstance(b, Mapping):
        from surgery.runtime.remade import departure_between, summary_of

        far = departure_between(*(each if isinstance(each, Mapping) else summary_of(each) for each in (a, b)))
        return far if far < float("inf") else None
    if a.shape != b.shape:
        return None
    if not (a.is_floating_point() and b.is_floating_point()):  # between places there is no distance
        return 0.0 if bool((a == b).all()) else None
    a, b = a.double(), b.double()
    return float((a - b).norm() / a.norm()) if a.norm() else float((a - b).norm())
