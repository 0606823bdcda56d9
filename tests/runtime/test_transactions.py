"""Verbs happen as a whole or not at all: an interrupt at any line of ours leaves the model as it was before, or as it
is after, and the next verb works."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import ACTING, LORA, OUTSIDE, PACKAGE, interrupted_everywhere, looks
from torch import nn

import surgery
from surgery.diagnostics import SurgeryError

pytestmark = pytest.mark.sweep  # which interrupts at every line

UNTIED = surgery.parse('spec untied()\ntarget linear "2" untie { add low_rank(rank = 1) }')
ADDS = surgery.parse('spec adds()\ntarget linear "0" { add low_rank(rank = 1) }')


def tied() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    model[1].weight.requires_grad_(False)
    return model.eval()


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).eval()


def moved(surgeon: surgery.Surgeon) -> surgery.Surgeon:
    with torch.no_grad():
        for parameter in surgeon.parameters():
            parameter += 0.5
    return surgeon


def test_the_files_that_are_named_exist():
    names = {path.name for path in Path(PACKAGE).rglob("*.py")}
    assert names >= ACTING and all(Path(name).exists() for name in OUTSIDE)


# ------------------------------------------------------------------------------------------------------- one surgeon


@pytest.mark.parametrize("make, spec", [(small, LORA), (tied, UNTIED)], ids=["trained", "untied"])
def test_apply(make, spec):
    """The surgeon is lost with the call, so the model must be as before."""
    taken: list[surgery.Surgeon] = []
    model = interrupted_everywhere(make, lambda model: taken.append(surgery.apply(model, spec)), lambda model: model,
                                   stride=29)
    assert taken[-1].remove() is model and looks(model) == looks(make())


def operated(spec: surgery.Spec, make: Callable[[], nn.Module] = small) -> surgery.Surgeon:
    return moved(surgery.apply(make(), spec))


def merged(spec: surgery.Spec, make: Callable[[], nn.Module] = small) -> surgery.Surgeon:
    surgeon = operated(spec, make)
    surgeon.merge()
    return surgeon


def to_base_and_back(surgeon: surgery.Surgeon) -> None:
    with surgeon.disabled():
        pass


STATE = {name: tensor + 1 for name, tensor in operated(LORA).state().items()}
VERBS = {
    "merge": (lambda: operated(LORA), lambda s: s.merge()),
    "unmerge": (lambda: merged(LORA), lambda s: s.unmerge()),
    "disabled": (lambda: operated(LORA), to_base_and_back),
    "disabled, merged": (lambda: merged(LORA), to_base_and_back),
    "remove": (lambda: operated(LORA), lambda s: s.remove()),
    "remove, merged": (lambda: merged(LORA), lambda s: s.remove()),
    "remove, untied": (lambda: merged(UNTIED, tied), lambda s: s.remove()),
    "load": (lambda: operated(LORA), lambda s: s.load(STATE)),
}


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_of_a_surgeon(name):
    surgeon = interrupted_everywhere(*VERBS[name])
    with surgeon.disabled():
        surgeon.state()
    if name == "merge":
        surgeon.unmerge()
    surgeon.remove()
    assert looks(surgeon.model) == looks(tied() if "untied" in name else small())


def test_attach(tmp_path):
    operated(LORA).save(tmp_path / "saved")
    taken: list[surgery.Surgeon] = []
    model = interrupted_everywhere(small, lambda model: taken.append(surgery.attach(model, tmp_path / "saved")),
                                   lambda model: model, stride=29)
    assert looks(taken[-1].remove()) == looks(small()) == looks(model)


# --------------------------------------------------------------------------------------------------------- surgeries


def several(*used: str) -> surgery.Surgeries:
    surgeries = surgery.Surgeries(small())
    for name, spec in (("a", LORA), ("b", ADDS), ("c", ADDS)):
        surgeries.add(name, spec)
        moved(surgeries.use(name))
    surgeries.use(*used)
    return surgeries


@pytest.mark.parametrize("verb, stride", [
    (lambda s: s.use("b", "a"), 19), (lambda s: s.use(), 5), (lambda s: s.remove(), 5),
    (lambda s: s.add("d", ADDS), 61), (lambda s: s.mix({"b": 0.5, "c": 0.25}), 19)],
    ids=["use", "use none", "remove", "add", "mix"])
def test_a_verb_of_surgeries(verb, stride):
    surgeries = interrupted_everywhere(lambda: several("a"), verb, stride=stride)
    assert (surgeries.surgeon is None) == (not surgeries.active)
    for name in surgeries.names:
        surgeries.use(name)
    surgeries.remove()
    assert looks(surgeries.model) == looks(small())


# -------------------------------------------------------------------------------------------------- errors on the way


def test_an_error_on_the_way_takes_everything_back(monkeypatch):
    """Whatever fails in the middle: the third adapter that is put in, or taken out."""
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    start = looks(model)
    from surgery.runtime import operated
    from surgery.runtime import surgeon as module

    def failing(what: Callable) -> Callable:
        calls = []

        def fails(*arguments: Any) -> Any:
            calls.append(arguments)
            if len(calls) == 3:
                raise RuntimeError("the third one")
            return what(*arguments)
        return fails

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(module, "install", failing(module.install))
        surgery.apply(model, "lora")
    assert looks(model) == start
    surgeon = moved(surgery.apply(model, "lora"))
    surgeon.merge()
    merged = looks(model)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(operated, "uninstall", failing(operated.uninstall))
        surgeon.remove()
    assert looks(model) == merged and surgeon.merged
    surgeon.remove()
    assert looks(model) == start


def test_a_use_that_fails_leaves_what_was_in_use(monkeypatch):
    surgeries = several("a")
    before, surgeon = looks(surgeries.model), surgeries.surgeon
    from surgery.runtime import surgeon as module

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(module, "install", lambda *_: (_ for _ in ()).throw(RuntimeError))
        surgeries.use("b")
    assert looks(surgeries.model) == before and surgeries.active == ("a",) and surgeries.surgeon is surgeon
    surgeries.use("b", "a")
    surgeries.remove()
    assert looks(surgeries.model) == looks(small())


def test_load_that_does_not_fit_changes_nothing():
    surgeon = operated(LORA)
    before, state = looks(surgeon.model), surgeon.state()
    last = [*state][-1]
    for wrong in ({**state, last: state[last][:-1]}, {**state, "another": state[last]},
                  {name: tensor + 1 for name, tensor in state.items() if name != last}):
        with pytest.raises(SurgeryError) as error:
            surgeon.load(wrong)
        assert error.value.diagnostics[0].code == "bad-value" and looks(surgeon.model) == before
    surgeon.merge()
    with pytest.raises(SurgeryError, match="unmerge"):
        surgeon.load(state)
