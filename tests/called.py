"""Layers that are called and not read, operated on with a case of the zoo."""

from __future__ import annotations

import torch
from case import Case
from layers import Tower, perturb
from torch import nn
from zoo import CASES

from surgery.runtime.apply import apply
from surgery.runtime.surgeon import Surgeon

OUT, IN = 12, 18


def operated(case: Case, layer: nn.Module, **settings: torch.dtype) -> tuple[Tower, Surgeon]:
    model = Tower(layer)
    surgeon = apply(model, case.spec(), seed=3, **{"dtype": torch.float64, **settings})
    perturb(model)
    return model, surgeon


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)
