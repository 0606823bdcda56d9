"""Whether a model's own layers can do what a plan asks of them, and what is copied where they cannot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from surgery.diagnostics import Diagnostic
from surgery.layers import opaque_linear
from surgery.layers.layouts import is_direct, runs_by_torch
from surgery.planning.cost_estimates import Estimate
from surgery.planning.machines import machine
from surgery.text import dtype_text, listed, size_text

if TYPE_CHECKING:
    from surgery.planning.compile import Placed, Plan


def estimated(placed: Placed) -> Estimate:
    """What an operated weight costs on the device where it lies."""
    site = placed.site
    runs_programs = runs_by_torch(site.module) if site.stack else is_direct(site.module, site.layout)
    device, dtype = opaque_linear.device(site.module).type, opaque_linear.dtype(site.module)
    return Estimate(placed.compiled, stack=site.stack or 1, builds=not runs_programs,
                    machine=machine(device, dtype_text(dtype)))


def unfit(plan: Plan) -> Iterator[Diagnostic]:
    """The called layers that are not what they must be, those of a target with the same fault together."""
    faulty: dict[tuple[int, str], list[Placed]] = {}
    for placed in plan.placed:
        fault, answer = placed.site.answer.fault, placed.site.answer
        # Wᵀ M is the gradient of the layer's input: a layer that gives none can still be asked for W M.
        if not fault and not answer.gives_gradient and estimated(placed).candidates[0].calls_back:
            fault = (f"the formula multiplies W from the left, and {type(placed.site.module).__name__} gives no "
                     "gradient to its input")
        if placed.site.layout.kind.is_gain and placed.formula.weight.has("drop"):
            fault = "dropout drops entries of an update's input, and a gain has none"
        if fault:
            faulty.setdefault((id(placed.target), fault), []).append(placed)
    for (_, fault), same in faulty.items():
        yield Diagnostic("unsupported-module", f"{listed(p.site.name for p in same)} cannot be operated on: {fault}",
                         same[0].target.span, helps=("`except` leaves such a layer out",))


def dense_copies(plan: Plan) -> Iterator[Diagnostic]:
    """A warning for each target that copies weights at every step: what the copies take, and why."""
    for target in plan.spec.targets:
        copied = [(p, size) for p in plan.placed if p.target is target and (size := copy_size(p))]
        called = {p.site.name: size for p, size in copied if not p.site.stack}
        built = {p.site.name: size for p, size in copied if p.site.stack}
        is_told = any(hasattr(getattr(p.site.module, "config", None), "_experts_implementation") for p, _ in copied)
        if called:
            yield Diagnostic(
                "dense-copy",
                f"this target reads every number of {listed(called)}, where no plain weight is stored: dense "
                f"copies take {size_text(sum(called.values()))} in training", target.span, severity="warning",
                helps=("a formula of products with W (low_rank, diagonal, orthogonal, magnitude) needs no copy",))
        if built:
            yield Diagnostic(
                "dense-copy", f"W' of all experts of {listed(built)} is built in every forward pass, which takes "
                f"{size_text(sum(built.values()))}: their forward is not known to multiply by torch's operations alone",
                target.span, severity="warning",
                helps=("`model.set_experts_implementation(\"grouped_mm\")` of transformers runs the tokens of each "
                       "expert alone",) * is_told)


def copy_size(placed: Placed) -> int:
    """The bytes of the dense copy that is made of an operated weight; 0 for none."""
    site, estimate = placed.site, estimated(placed)
    if site.stack:
        return site.weight.numel() * site.weight.element_size() if estimate.builds else 0
    reads = site.layout.is_called and estimate.candidates[0].reads_weight
    return site.out * site.in_ * opaque_linear.dtype(site.module).itemsize if reads else 0
