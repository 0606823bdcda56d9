"""What a step of training costs: its time, and the most memory that is held during it.

Takes models that are trained; gives seconds and bytes. Promises: the parameters keep their values; bytes are those of
all tensors (weights, gradients, the optimizer's, activations) at their most; models whose times are to be compared take
turns in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from surgery.experiments.timing import peak_bytes, seconds, turned
from surgery.models.modes import in_mode

WARM_UP = 2
ROUNDS = 7


class Clock(TrainerCallback):
    """Takes the time of each step of the Trainer: forward, backward and the optimizer."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *about: Any, **more: Any) -> None:
        self._began = perf_counter()

    def on_step_end(self, *about: Any, **more: Any) -> None:
        self._times.append(perf_counter() - self._began)

    @property
    def seconds(self) -> float:
        """The median step, the first ones left out where there are more."""
        return median(self._times[WARM_UP:] or self._times)


def side_by_side(models: Mapping[str, PreTrainedModel], batch: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """The seconds of a step of AdamW on a batch that has labels, for each model in each of `ROUNDS` rounds. In a round
    all take their turn, so that a machine's moods fall on all of them. The models are left in training mode."""
    steps = [(name, _step(model.train(), batch)[0]) for name, model in models.items()]
    for _, step in WARM_UP * steps:
        step()
    times: dict[str, list[float]] = {name: [] for name in models}
    for number in range(ROUNDS):
        for name, step in turned(steps, number):
            times[name].append(seconds(step, models[name].device))
    return times


def _step(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """A step to be called, which leaves the parameters where they are, and its optimizer."""
    # A rate of 0 does all the work of a step and leaves the parameters, so that every round is of the same model.
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.0, weight_decay=0.0)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, optimizer


def step_bytes(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> int:
    """The most bytes held at once in a step of AdamW on a batch that has labels: weights, gradients, the optimizer's
    state and activations. The model is then as it was."""
    step, optimizer = _step(model, batch)
    with in_mode(model, True):
        step()  # the optimizer's state is made in its first step
        # What stands between two steps, tied tensors once, and on top of it what a step allocates.
        states = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
        held = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers(), *states)}
        return sum(held.values()) + peak_bytes(step, model.device)
