"""Attach a saved adapter to a model.

Takes a model and the folder that `save` wrote; gives a surgeon. Promises: everything that does not fit is said at once,
and then the model is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from os import PathLike

import torch
from torch import nn

from surgery.diagnostics import Collector, Diagnostic, SurgeryError, tell
from surgery.given import takes
from surgery.models.loading import load_with_saved_head
from surgery.models.names import base_name
from surgery.planning.initial_values import follows
from surgery.runtime.apply import prepare
from surgery.runtime.fingerprint import fingerprints
from surgery.runtime.hub import adapter_folder
from surgery.runtime.remade import Remade, digest_of
from surgery.runtime.saved_format import TENSORS, Saved, compare, shapes
from surgery.runtime.surgeon import Surgeon
from surgery.semantics.index_bounds import bounds
from surgery.text import listed


@takes(model="model", folder="folder")
def attach(model: nn.Module, folder: str | PathLike, *, revision: str | None = None, strict: bool = False) -> Surgeon:
    """Put a saved adapter on a model, in place: a folder, or `OWNER/NAME` of the hub, there at a `revision`.
    Raises: SurgeryError with all that does not fit; the model is then as it was.

    A base model with other weights than those that the adapter was trained on is a warning (SurgeryWarning, and in
    `surgeon.plan.warnings`); `strict`: an error.

    The adapter's tensors keep the dtype that they were saved in; a `train` tensor takes that of the model's.

    >>> import surgery
    >>> surgery.apply(surgery.load_model("demo:llama"), "lora").save("trained")
    >>> surgeon = surgery.attach(surgery.load_model("demo:llama"), "trained")
    >>> surgeon.spec.name
    'lora'
    """
    return attached(model, Saved(adapter_folder(folder, revision)), strict)


@takes(adapter="folder")
def from_pretrained(adapter: str | PathLike, *, revision: str | None = None, base: str | None = None,
                    dtype: str | None = None, trust: bool = False, strict: bool = False) -> Surgeon:
    """Load the base model that a saved adapter names (or another, `base`), at the commit that it was trained on, and
    attach the adapter: a folder, or `OWNER/NAME` of the hub, there at a `revision`. The model is `surgeon.model`.

    `dtype`: load it in this one; `trust`: Python code in its folder may run; `strict`: as in `attach`.

    Raises: SurgeryError (missing-file, unknown-model, bad-adapter).

    >>> import surgery
    >>> surgery.apply(surgery.load_model("demo:llama"), "lora").save("trained")
    >>> surgery.from_pretrained("trained").model.config.model_type
    'llama'
    """
    saved = Saved(adapter_folder(adapter, revision))
    name = base_name(adapter, base, saved.base, "name it: from_pretrained(adapter, base=\"OWNER/NAME\")")
    return attached(load_with_saved_head(name, saved, dtype, trust), saved, strict)


def attached(model: nn.Module, saved: Saved, strict: bool) -> Surgeon:
    """A saved adapter on a model. Raises: SurgeryError, and then the model is as it was."""
    surgeon = fitted(model, saved)
    report, remade = Collector(), Remade(surgeon, saved)
    report.add(*saved.differing(fingerprints(surgeon.plan.placed)))
    values = surgeon.as_named(saved.tensors)
    surgeon.assert_operable()  # before W is read
    for placed in surgeon.plan.placed:
        names = remade.names(placed)
        values |= {names[key]: tensor for key, tensor in remade.of(placed, placed.site.read).items()}
    report.add(*remade.warnings())
    report.raise_errors(strict)
    surgeon.plan = replace(surgeon.plan, warnings=(*surgeon.plan.warnings, *report.warnings))
    tell(report.warnings)
    surgeon.made = {name: digest_of(values[name]) for name in saved.remade if name not in remade.of_rounded}
    return surgeon.operate(values)


def fitted(model: nn.Module, saved: Saved) -> Surgeon:
    """A surgeon for a saved adapter, whose tensors fit and are to be put in; the model (a skeleton will do) is not
    touched.

    Raises: SurgeryError with all that does not fit."""
    # a spec that asks for more numbers than the adapter holds is refused before any is made
    report, held = Collector(), sum(tensor.numel() for tensor in saved.tensors.values())
    try:
        surgeon = prepare(model, saved.spec, seed=saved.meta["seed"], dtype=getattr(torch, saved.meta["dtype"]),
                          most=held, starts=False)
    except SurgeryError as error:
        raise _does_not_fit(model, saved, error.diagnostics) from None
    tensors = surgeon.as_named(saved.tensors)
    said = {name: form["shape"] for name, form in saved.remade.items()}
    compare({**said, **shapes(tensors)}, shapes(surgeon.named_tensors()), f"this {type(model).__name__}", report)
    if report.errors:
        raise _does_not_fit(model, saved, report.found)
    # names and shapes fit: now the numbers, since whole ones would be read as real ones, and a place that does not
    # exist is met by the device, later and without a word of what is wrong
    whole = [name for name, own in surgeon.named_tensors().items() if name in tensors and own.is_floating_point()
             and not tensors[name].is_floating_point()]
    if whole:
        report.error("bad-adapter", f"{TENSORS} holds whole numbers where real ones are: {listed(whole)}")
    can = {surgeon.name_of(p, key) for p in surgeon.plan.placed for key in follows(p)}
    if lost := [name for name in saved.remade if name not in can]:
        report.error("not-remade", f"the adapter does not hold what cannot be made again here: {listed(lost)}",
                     notes=("W is known by calls alone there (a quantised layer)",) if any(
                         p.site.layout.is_called for p in surgeon.plan.placed) else (),
                     helps=("attach it to the model as it was trained, and save it with self_contained=True",))
    for placed in surgeon.plan.placed:
        for key, count in bounds(placed.formula.leaves).items():
            if (name := surgeon.name_of(placed, key)) not in tensors:
                continue
            places = tensors[name]
            if places.is_floating_point() or not ((0 <= places) & (places < count)).all():
                report.error("bad-adapter", f"{TENSORS}: {name} must hold whole numbers from 0 to {count - 1:g}")
    if report.errors:
        raise _does_not_fit(model, saved, report.found)
    return surgeon


def _does_not_fit(model: nn.Module, saved: Saved, why: Iterable[Diagnostic]) -> SurgeryError:
    base = saved.base
    first = Diagnostic("bad-adapter", f"the adapter in {saved.folder} does not fit this {type(model).__name__}",
                       notes=(f"it was saved for {base}",) if base else ())
    return SurgeryError((first, *why))
