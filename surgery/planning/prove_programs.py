"""Compare the programs of a target with its formula in numbers: values and gradients.

Takes targets at concrete sizes; gives diagnostics. Promises: a program is computed as the expression that its text is
proven to mean, and the formula as it stands in the spec, with nothing rewritten; all in float64.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from surgery.codegen.candidates import Candidate
from surgery.codegen.compiled import Compiled
from surgery.codegen.two_ways import ways
from surgery.diagnostics import Diagnostic, internal
from surgery.ir.dense import dense
from surgery.ir.expression import in_evaluation, in_training
from surgery.ir.sizes import known_shape
from surgery.planning.numeric_check import begins, moved
from surgery.planning.trial_sizes import Trial

TOLERANCE = 1e-6  # relative to the largest number
_TOKENS, _DISTANCE = 3, 0.1  # rows of input, and how far parameters are from their start
_MOST_NUMBERS = 2**18  # of a weight


def try_programs(trials: Iterable[Trial]) -> list[Diagnostic]:
    """One diagnostic for each target with a program that gives other values or gradients than its formula: our
    mistake."""
    wrong: dict[int, Diagnostic] = {}
    for trial in trials:
        is_open = trial.out * trial.in_ <= _MOST_NUMBERS and id(trial.target) not in wrong
        if is_open and (fault := _fault(trial)):
            wrong[id(trial.target)] = internal("a program for this target does not compute its formula",
                                               trial.target.span, fault)
    return [*wrong.values()]


def _fault(trial: Trial) -> str:
    """Which program is off, and how far; empty if none is."""
    compiled = Compiled.supposed(trial.formula, trial.target.kind)
    for training in (True, False):
        leaves = _leaves(trial, compiled, training)
        wanted = _results(_output(compiled, leaves, training), leaves)
        if not all(bool(w.isfinite().all()) for w in wanted):
            continue  # the formula itself has no value there
        for candidate in compiled.candidates(training):
            given = _given(candidate, leaves)
            error = max(float((g - w).abs().max() / w.abs().max().clamp_min(1)) for g, w in zip(given, wanted))
            if not error <= TOLERANCE:  # so written, a NaN is an error too
                return (f"{candidate.strategy} at [{trial.out}, {trial.in_}] is off by {error:.1e}; allowed is "
                        f"{TOLERANCE:.0e}")
    return ""


def _leaves(trial: Trial, compiled: Compiled, training: bool) -> dict[str, Tensor]:
    """An input and the tensors of a target, its parameters away from their start; noise as it might be drawn."""
    generator = torch.Generator().manual_seed(4)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    values = moved(trial, begins(trial), _DISTANCE, seed=3)
    for leaf in (each for each in trial.formula.leaves if not each.frozen):
        values[leaf.key].requires_grad_()
    for drawn in compiled.noises if training else ():
        values[drawn.data.key] = noise(*known_shape(drawn.shape))
    # token ids stand for rows with a single 1, and have no gradient
    x = torch.eye(trial.out, dtype=torch.float64, device="cpu")[-_TOKENS:] if compiled.kind.takes_ids else noise(
        _TOKENS, trial.in_)
    return {**values, "x": x.requires_grad_(not compiled.kind.takes_ids)}


def _output(compiled: Compiled, leaves: dict[str, Tensor], training: bool) -> Tensor:
    """What the formula makes of the input."""
    mode, formula = in_training if training else in_evaluation, compiled.formula
    weight = dense(mode(formula.weight), leaves)
    y = leaves["x"] @ (weight if compiled.kind.takes_ids else weight.mT)
    return y + dense(mode(formula.bias), leaves) if compiled.has_bias else y


def _given(candidate: Candidate, leaves: dict[str, Tensor]) -> list[Tensor]:
    """The same of a program: of two ways the first gives the output and the input's gradient, and the second the rest.
    (A bias that trains stands in both.)"""
    first, second = ways(candidate.whole)
    rest = _results(dense(second, leaves), leaves)
    if first is second:
        return rest
    own = _results(dense(first, leaves), leaves)
    is_input = [False, *(leaf is leaves["x"] for leaf in leaves.values() if leaf.requires_grad)]
    return [own[0], *(a if of_input else b for a, b, of_input in list(zip(own, rest, is_input))[1:])]


def _results(y: Tensor, leaves: dict[str, Tensor]) -> list[Tensor]:
    """The output, and what a random loss of it has for gradients in the input and in all that trains."""
    trained = [leaf for leaf in leaves.values() if leaf.requires_grad]
    draw = torch.Generator().manual_seed(5)
    loss = (torch.randn(y.shape, generator=draw, dtype=torch.float64, device="cpu") * y).sum()
    gradients = torch.autograd.grad(loss, trained, allow_unused=True) if loss.requires_grad else [None] * len(trained)
    return [y.detach(), *(torch.zeros_like(leaf) if g is None else g for leaf, g in zip(trained, gradients))]
