"""An operated model whose tensors accelerate keeps elsewhere: it runs, and a verb that needs their numbers says so. A
layer of a class that Python does not let be changed is refused."""

from __future__ import annotations

from abc import ABC
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from layers import Tower, assert_close, perturb
from torch import nn

from surgery.diagnostics import SurgeryError
from surgery.language.library import parse
from surgery.runtime.apply import apply

OFFLOADED = """spec offloaded
target linear "layers.0" { add low_rank(2) }
train "layers.2.*" """


@pytest.mark.parametrize("trains", [True, False])
def test_what_is_offloaded_is_not_read_or_written(trains: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tower(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    base, x = deepcopy(model), torch.randn(5, 16)
    spec = parse(OFFLOADED if trains else OFFLOADED.partition("train")[0])
    surgeon = apply(model, spec)
    perturb(model)
    state = {n: t.clone() for n, t in surgeon.state().items()}
    with torch.no_grad():  # as below: a pass of which gradients are taken may sum in another order
        y = model(x)
    cpu_offload(model)
    verbs = (surgeon.state, surgeon.merge, surgeon.retract, surgeon.prove, lambda: surgeon.load(state),
             lambda: surgeon.parameter_groups(1e-3), lambda: surgeon.serving().__enter__(),
             lambda: surgeon.save(tmp_path / "a"), *((surgeon.remove, surgeon.disabled().__enter__) if trains else ()))
    for verb in verbs:
        with pytest.raises(SurgeryError, match="remove_hook_from_submodules"):
            verb()
    with torch.no_grad():
        if not trains:
            with surgeon.disabled():
                assert_close(model(x), base(x), 0)
        assert_close(model(x), y, 0)
    remove_hook_from_submodules(model)
    assert all(torch.equal(t, state[n]) for n, t in surgeon.state().items()) and not (tmp_path / "a").exists()
    assert torch.equal(surgeon.remove()(x), base(x))
    cpu_offload(model)
    before = [*model.state_dict(), *map(type, model.modules())]
    with pytest.raises(SurgeryError, match="without offloading"):
        apply(model, spec)
    assert before == [*model.state_dict(), *map(type, model.modules())]


class Mixed(ABC):  # noqa: B024
    """What optimum-quanto's layers have before nn.Linear."""


class QLinear(Mixed, nn.Linear):
    pass


def test_a_class_that_cannot_be_changed_is_refused_and_the_model_untouched() -> None:
    model = Tower(nn.Linear(16, 16), QLinear(16, 16))
    before = [*model.state_dict(), *map(type, model.modules()), *(p.requires_grad for p in model.parameters())]
    with pytest.raises(SurgeryError, match=r"unsupported-module.*QLinear"):
        apply(model, parse('spec s\ntarget linear "**" { add low_rank(2) }'))
    assert before == [*model.state_dict(), *map(type, model.modules()), *(p.requires_grad for p in model.parameters())]
