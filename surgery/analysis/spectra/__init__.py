"""The microscope: what an adapter, or training, did to the weights of a model.

    ΔW = W' - W = Σ σ_i u_i v_iᵀ,   p_i = σ_i / Σ σ  (or σ_i² / Σ σ²)
    entropy H = -Σ p log p          stable rank ‖ΔW‖_F² / ‖ΔW‖₂²         effective rank exp H

Takes an operated model, two models, or a matrix; gives plain dataclasses with `to_json`. Promises: one weight is held
at a time in float64; an update that the formula makes a product of thin factors is never built.

Source: Chang et al., AAAI 2026, arXiv 2511.00051 (figures 1, 2 and 4); Roy & Vetterli, EUSIPCO 2007 (effective rank);
Hu et al., arXiv 2106.09685, equation 4 (overlap of subspaces).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import overload

from torch import Tensor, nn

from surgery.analysis.spectra.checkpoint import Weights, pairs
from surgery.analysis.spectra.spectrum import Spectrum
from surgery.analysis.spectra.summary import TOP, Group, Row, Spectra, row_of
from surgery.analysis.spectra.updates import Pending, of_models, of_surgeon
from surgery.diagnostics import fail
from surgery.layers.survey import Site
from surgery.runtime.adapter import Adapter
from surgery.runtime.surgeon import Surgeon

Track = Callable[[Sequence[Pending]], Iterable[Pending]]


@overload
def spectrum(subject: Tensor, tuned: Tensor | None = None, *, squared: bool = False, top: int = TOP,
             condition: bool = False) -> Spectrum: ...


@overload
def spectrum(subject: Surgeon | nn.Module, tuned: nn.Module | None = None, *, squared: bool = False,
             top: int = TOP, condition: bool = False) -> Spectra: ...


def spectrum(subject: Surgeon | nn.Module | Tensor, tuned: nn.Module | Tensor | None = None, *, squared: bool = False,
             top: int = TOP, condition: bool = False) -> Spectra | Spectrum:
    """The spectra of what a surgeon does to its model, in any mode; of `tuned - subject` for two models; the `Spectrum`
    of a matrix ΔW, or of the difference of two.

    `squared`: the entropies are of p = σ² / Σ σ². `top`: how many directions of W overlaps are with, 0 for none;
    `condition`: the condition numbers of W' too.
    Raises: SurgeryError (bad-value) for models that have no weight in common, or one that is operated on, and for what
    is no matrix of finite numbers.

    >>> import surgery, torch
    >>> surgery.spectrum(torch.eye(4))  # its entropy is log 4
    <Spectrum of a matrix [4, 4]: rank 4, entropy 1.386, stable rank 4, effective rank 4>
    """
    if isinstance(subject, Tensor) and not isinstance(tuned, nn.Module):
        delta = subject if tuned is None else tuned - subject
        if delta.ndim != 2 or not delta.isfinite().all():
            others = " with others in it" if delta.ndim == 2 else ""
            raise fail("bad-value", f"a spectrum is of a matrix of finite numbers, not of {list(delta.shape)}{others}")
        return Spectrum.of(delta, squared=squared)
    if isinstance(subject, Surgeon):
        # A merged model holds W': W must be in its place, and is put there for as long as weights are read.
        with subject.disabled():
            return gathered(pending_of(subject), squared, top, condition=condition)
    # An operated model's weights are still W: measured as a second model it would seem unchanged.
    if not isinstance(subject, nn.Module) or not isinstance(tuned, nn.Module) or any(
            isinstance(m, Adapter) and m.active for m in tuned.modules()):
        raise fail("bad-value", "a model is measured against another one, with its weights changed or merged",
                   helps=("of an operated model, give the surgeon",))
    both = pairs(Weights(subject), Weights(tuned))
    if not both:
        raise fail("bad-value", f"{type(subject).__name__} and {type(tuned).__name__} have no weight in common")
    return gathered(of_models(both), squared, top, condition=condition)


def gathered(pending: Sequence[Pending], squared: bool = False, top: int = TOP, track: Track = iter,
             condition: bool = False) -> Spectra:
    """The rows of pending weights, each loaded when its turn comes; `track` may watch how they go by."""
    rows = (row_of(update, squared, top, condition) for each in track(pending) for update in each.load())
    return Spectra(tuple(rows), squared, top)


def pending_of(surgeon: Surgeon) -> list[Pending]:
    """The updates of an operated model that has its base weights in place (inside `disabled()`)."""
    return of_surgeon(surgeon, Site.read, lambda placed: surgeon.adapters[placed.site.name].values())


__all__ = ["Group", "Pending", "Row", "Spectra", "Spectrum", "gathered", "pending_of", "row_of", "spectrum"]
