"""Concrete sizes to try a target at, where no model says them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import lcm, prod
from typing import Any

from surgery.diagnostics import Collector
from surgery.ir.expression import Formula
from surgery.ir.sizes import known
from surgery.language.expressions import Number
from surgery.language.tree import Target, every_step
from surgery.layers.kinds import supposed
from surgery.semantics.definitions import with_called
from surgery.semantics.evaluate import names_in, nodes
from surgery.semantics.resolved_spec import PLACES, ResolvedSpec

# Wide, tall and square weights to try a target on, the small ones first: block sizes must divide them.
_SIDES = ((96, 64), (192, 128), (128, 64), (120, 80), (768, 512), (840, 420), (1536, 1024), (2520, 1260), (4096, 1024))
_LONGEST = 4096
USUAL = (1024, 4096)  # what costs and programs are shown for where nothing says another
_MOST_NUMBERS = 2**26
# Where a module can stand: in the first layer and in the last one.
_MODEL = {"layers": 12, "heads": 6, "head_size": 16, "kernel": 4}
PLACES_TRIED = ({"layer": 0, "depth": 0.0, **_MODEL}, {"layer": 11, "depth": 1.0, **_MODEL})


def place_of(out: int) -> Mapping[str, Any]:
    """Where a weight of so many rows is supposed to stand, if no model says it: in the first layer, its rows in heads
    of 64, or else in as many heads as divide them, those of `PLACES_TRIED` at most."""
    heads = out // 64 if out % 64 == 0 else next(n for n in range(_MODEL["heads"], 0, -1) if out % n == 0)
    return {**PLACES_TRIED[0], "heads": heads, "head_size": out // heads}


@dataclass(frozen=True)
class Trial:
    """A target at concrete sizes."""

    target: Target
    out: int
    in_: int
    formula: Formula


def trials_of(target: Target, resolved: ResolvedSpec, report: Collector) -> Iterator[Trial]:
    """The target at the first wide, tall and square sizes that fit, at each end of the model if it asks where it
    stands."""
    sizes = sizes_to_try(target, resolved)
    for place in places_of(target):
        faults = Collector()
        trials = [first_that_fits(target, resolved, place, sides, faults) for sides in sizes]
        yield from filter(None, trials)
        if not any(trials):
            # No error: a spec may well be for sizes that nobody would guess. But it must not pass for tested.
            where = ", ".join(f"{name} = {place[name]:g}" for name in names_in(target) if name in place)
            of_place = Collector()
            if where and resolved.formula(target, of_place, place=place) is None:  # what is wrong is no matter of sizes
                faults = of_place
                what = f"with {where} this target fits no weight, whatever its size, so it is not tested"
                helps = (f"say what is meant there, `if {where.split(' ')[0]} ...`, or leave such modules out",)
            else:
                what = (f"no size of weight that `check` tries fits this target{f', {where}' if where else ''}, so its "
                        "start and its claims are not tested")
                helps = ("`surgery apply` tests the start on a model",)
            report.warn("untested", what, target.span, notes=tuple(f.message for f in faults.found[:1]), helps=helps)


def shown_at(resolved: ResolvedSpec, shape: tuple[int, int] | None) -> list[Trial]:
    """Each target at one shape, where no model says one: at that given, or else at the usual one, or the largest of
    those to try that fits. Raises: SurgeryError, for a target that does not fit."""
    report, found = Collector(), []
    for target in resolved.spec.targets:
        usual = (USUAL[0], 1) if supposed(target.kind).is_gain else USUAL
        others = sorted({side for sizes in sizes_to_try(target, resolved) for side in sizes}, key=prod, reverse=True)
        shapes = [shape] if shape else [usual, *others]
        for out, in_ in shapes:
            formula = resolved.formula(target, Collector(), out, in_, place_of(out))
            if formula is not None:
                found.append(Trial(target, out, in_, formula))
                break
        else:
            out, in_ = shapes[0]
            resolved.formula(target, report, out, in_, place_of(out))  # for what it says
    report.raise_errors()
    return found


def places_of(target: Target) -> Iterable[Mapping[str, Any]]:
    """The places to try a target at: one, where it asks for nothing that differs between layers."""
    asked = names_in(target).keys() & PLACES.keys()
    return PLACES_TRIED if asked & {"layer", "depth"} else PLACES_TRIED[:1] if asked else ({},)


def first_that_fits(target: Target, resolved: ResolvedSpec, place: Mapping[str, Any],
                    sides: Iterable[tuple[int, int]], faults: Collector) -> Trial | None:
    """The target at the first of the sizes that its checks and shapes allow; `faults` get what the others met."""
    for out, in_ in sides:
        local = Collector()
        formula = resolved.formula(target, local, out, in_, place)
        numbers = sum(known(prod(leaf.shape)) for leaf in formula.leaves) if formula is not None else 0
        if formula is not None and numbers <= _MOST_NUMBERS:
            return Trial(target, out, in_, formula)
        if formula is not None:  # a spec of a line can ask for more memory than there is
            local.warn("untested",
                       f"its parameters hold {numbers:,} numbers at [{out}, {in_}], which are too many to try")
        faults.add(*local.found)
    return None


def sizes_to_try(target: Target, resolved: ResolvedSpec) -> list[list[tuple[int, int]]]:
    """Wide, tall and square sizes, or columns where weights are vectors. Multiples of the spec's own numbers come after
    the usual ones."""
    numbers = numbers_named(target, resolved)
    units = sorted({*numbers, lcm(*numbers)})
    sides = [*_SIDES, *((3 * n, 2 * n) for n in units if 3 * n <= _LONGEST)]
    if supposed(target.kind).is_gain:
        return [[(long, 1) for long, _ in sides]]
    squares = [*(long for long, _ in sides), *(n for n in units if n <= _LONGEST)]
    return [[(short, long) for long, short in sides], sides, [(n, n) for n in squares]]


def numbers_named(target: Target, resolved: ResolvedSpec) -> set[int]:
    """The whole numbers that can be a block's size: those of the spec's parameters, the target and its definitions."""
    known = resolved.library.definitions
    placed = (known[step.call.function] for step in every_step(target.steps))
    named = [each for definition in placed for each in with_called(definition, known)]
    literals = [n.value for part in (target, *named) for n in nodes(part) if isinstance(n, Number)]
    return {n for n in (*resolved.values.values(), *literals) if type(n) is int and n > 1}
