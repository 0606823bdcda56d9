"""A verb interrupted at each line of ours that it runs."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from each import SWEEP
from torch import nn

import surgery
from surgery.runtime.adapter import Adapter

PACKAGE = str(Path(surgery.__file__).parent)
# Where the model is changed, every line counts each time that it runs; elsewhere, the first and the last time.
ACTING = {"surgeon.py", "stack.py", "merge.py", "adapter.py", "operated.py"}
PURE = ("ir", "language", "rewrite", "codegen", "diagnostics.py", "text.py")  # which know no model
OUTSIDE = tuple(f"{PACKAGE}/{name}" for name in PURE)
Line = tuple[str, int, int]  # the file, the line, and how many times it ran before
LORA = surgery.parse('spec lora()\ntarget linear "0" { add low_rank(rank = 1) post magnitude() }\ntrain "1.bias"')


def looks(model: nn.Module) -> list[tuple]:
    """Everything that can be told of a model without looking into a surgeon: classes, names, numbers, flags."""
    modules = [(name, type(m).__name__, hasattr(type(m), "base"), m.training, getattr(m, "active", None))
               for name, m in model.named_modules()]
    return modules + [(name, p.requires_grad, p.dtype, tuple(p.flatten().tolist()))
                      for name, p in model.named_parameters(remove_duplicate=False)]


class Interrupt:
    """Counts the lines of ours that run inside, and interrupts at one of them."""

    def __init__(self, at: Line | None = None):
        self.at, self.lines, self._counts = at, [], Counter()
        self._left = at[2] if at else 0  # how many times that line runs before

    def __enter__(self) -> Interrupt:
        sys.settrace(self._called)
        return self

    def __exit__(self, *error: Any) -> None:
        sys.settrace(None)

    def _called(self, frame: FrameType, event: str, argument: object) -> Callable | None:
        file = frame.f_code.co_filename
        if self.at:  # which is one line: the others need not be counted
            return self._until if file == self.at[0] else None
        return self._line if file.startswith(PACKAGE) and not file.startswith(OUTSIDE) else None

    def _line(self, frame: FrameType, event: str, argument: object) -> Callable:
        if event == "line":
            place = (frame.f_code.co_filename, frame.f_lineno)
            self.lines.append((*place, self._counts[place]))
            self._counts[place] += 1
        return self._line

    def _until(self, frame: FrameType, event: str, argument: object) -> Callable:
        assert self.at
        if event == "line" and frame.f_lineno == self.at[1]:
            self._left -= 1
            if self._left < 0:
                raise KeyboardInterrupt
        return self._until

    @property
    def chosen(self) -> list[Line]:
        """The lines to interrupt at."""
        return [(file, line, before) for file, line, before in self.lines
                if before in (0, self._counts[file, line] - 1) or Path(file).name in ACTING]


def interrupted_everywhere(make: Callable[[], Any], verb: Callable[[Any], Any],
                           model: Callable[[Any], nn.Module] = lambda subject: subject.model, stride: int = 5) -> Any:
    """Interrupt a verb at one of so many of its lines (a sweep: at each), one after the other on the same subject; then
    let it happen."""
    for _ in range(2):  # the first run fills caches
        subject = make()
        with Interrupt() as told:
            verb(subject)
    after = looks(model(subject))
    subject = make()
    before, identities = looks(model(subject)), [id(p) for p in model(subject).parameters()]
    assert len(told.chosen) > 20
    for at in told.chosen[::1 if SWEEP in os.environ else stride]:
        for each in model(subject).modules():  # else calls would be ready that were not when the lines were told
            if isinstance(each, Adapter):
                each.ready.clear()
        with pytest.raises(KeyboardInterrupt), Interrupt(at):
            verb(subject)
        assert torch.is_grad_enabled(), at
        assert looks(model(subject)) == before and [id(p) for p in model(subject).parameters()] == identities, at
    verb(subject)
    assert looks(model(subject)) == after
    return subject
