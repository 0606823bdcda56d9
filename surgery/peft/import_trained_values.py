"""The values that a PEFT adapter gives to the model's own parameters: `modules_to_save`, biases, saved embeddings.

Takes the tensors that belong to no module's adapter, by the parameter's name; gives those that `train` must hold.
Promises: a value that the model has already is left out only where the adapter did not ask to train it; one for which
the model has no place, or that parts what the model ties, is said.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.diagnostics import Collector, Diagnostic
from surgery.layers.survey import Survey
from surgery.layers.wrappers import named_buffers, named_parameters
from surgery.matching.conflicts import tied
from surgery.peft.table.method import Config
from surgery.peft.target_modules import saved_whole, ties
from surgery.runtime.saved_format import compare, shapes


@dataclass(frozen=True)
class Values:
    """The parameters that the adapter trains, with their values, and what is wrong with them."""

    trained: Mapping[str, Tensor]
    faults: tuple[Diagnostic, ...]


def values(given: Mapping[str, Tensor], config: Config, survey: Survey, taken_weights: Collection[str],
           whole: tuple[str, ...], file: str) -> Values:
    """What the adapter says of the model's own parameters. `taken_weights`: the names of the weights that it operates
    on; `whole`: the beginnings of the names of what it trains as a whole; `file`: what holds the tensors."""
    report, model = Collector(), survey.model
    parameters, buffers = [*named_parameters(model)], dict(named_buffers(model))
    stored = dict(parameters) | buffers
    wanted = {n: list(stored[n].shape) for n in given if n in stored}
    compare(shapes(given), wanted, f"this {type(model).__name__}", report, file)
    if report.errors:
        return Values({}, tuple(report.found))
    # PEFT saves more than it trains (embeddings, buffers of modules that it saves whole): what the model has already is
    # left out, unless the configuration says that it is trained; then it is, from that value on.
    whole = (*whole, *(f"{name}." for name in saved_whole(config.get("modules_to_save"), model)))
    biases = config.get("bias") not in (None, "none")
    asked = {n for n in given if n.startswith(whole) or (biases and n.rpartition(".")[2] == "bias")} - buffers.keys()
    changed = {n: t for n, t in given.items()
               if n in asked or not torch.equal(t.to(stored[n].device, stored[n].dtype), stored[n])}
    for name in (n for n in changed if n in buffers):
        report.error("bad-adapter", f"the adapter holds another `{name}` than the model, and a surgery keeps "
                     "parameters alone")
    for name in (n for n in changed if n in taken_weights):
        report.error("bad-adapter", f"the adapter was trained on another `{name}` than the model's",
                     helps=("name the model that it was trained on",))
    if not ties(config, "modules_to_save"):
        report.add(*_parted(changed, given, survey))
    first = {id(p): n for n, p in reversed(parameters)}
    return Values({first[id(stored[n])]: t for n, t in changed.items()
                   if id(stored[n]) in first and n not in taken_weights}, tuple(report.found))


def _parted(changed: Mapping[str, Tensor], given: Mapping[str, Tensor], survey: Survey) -> Iterator[Diagnostic]:
    """PEFT trains a copy of a tied weight, and leaves what it is tied to; `train` trains the one that there is."""
    shared = tied(survey) if changed else {}
    for name in (n for n in changed if n in shared):
        others = [o for o in shared[name] if o not in given or not torch.equal(given[o], given[name])]
        if others:
            yield Diagnostic("tied-weight",
                             f"the adapter has a `{name}` of its own, and the model ties it to `{others[0]}`",
                             helps=("save the model with untied weights, and name that one",))
