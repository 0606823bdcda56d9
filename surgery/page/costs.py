"""What the modules of a target cost in a training step, beside the same modules frozen: counted, and not measured.

Takes operated weights; gives a ratio of FLOPs. Promises: the program that is counted is the one that runs.
"""

from __future__ import annotations

from collections.abc import Iterable

from surgery.compile import Placed
from surgery.expr.ir import Expr, Formula
from surgery.layer import is_direct
from surgery.lower.cost import TOKENS
from surgery.lower.program import activations


def step_ratio(placed: Iterable[Placed], tokens: int = TOKENS) -> float | None:
    """FLOPs of a step, forward and backward, over those of the frozen layers; None where a layer only knows itself how it
    runs (fused experts)."""
    found = [(_flops(p, p.formula, tokens), _flops(p, _frozen(p), tokens)) for p in placed if _is_direct(p)]
    return sum(own for own, _ in found) / sum(frozen for _, frozen in found) if found else None


def _is_direct(placed: Placed) -> bool:
    cls = type(placed.site.module)
    return is_direct(getattr(cls, "base", cls))


def _flops(placed: Placed, formula: Formula, tokens: int) -> float:
    has_bias = placed.site.module._parameters.get("bias") is not None
    return activations(formula, placed.site.layout.kind, True, has_bias, tokens).cost(tokens).flops


def _frozen(placed: Placed) -> Formula:
    out, in_ = placed.site.out, placed.site.in_
    return Formula(Expr("weight", (), None, (out, in_)), Expr("bias", (), None, (out,)), ())
