"""A tiny batch before and after an operation: are the logits unchanged?

Takes a model; gives the relative change of its outputs over a block. Promises: never a silent pass: where it cannot
tell (a `shifted` target, a model that we have no batch for), it says so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from surgery.cli.render import Output
from surgery.demo import demo_inputs
from surgery.diagnostics import fail
from surgery.initialise import IDENTITY_TOLERANCE, departure
from surgery.syntax.tree import Spec

_ROUNDINGS = 4  # a half dtype may be off by so many units in the last place


class Compared:
    """Runs the model when the block begins and when it ends. `change` is relative, None where it was not measured."""

    def __init__(self, output: Output, model: nn.Module, spec: Spec):
        self.output, self.model, self.spec = output, model, spec
        self.change: float | None = None
        self.verdict = ""

    def __enter__(self) -> Compared:
        self.batch = self._batch()
        self.before = self._run() if self.batch else None
        return self

    def __exit__(self, kind: type | None, *rest: Any) -> None:
        if kind is None and self.before is not None:
            self._judge(departure(self.before, self._run()))

    def _batch(self) -> dict[str, torch.Tensor] | None:
        if any(target.shifted for target in self.spec.targets):
            return self._skip("a target says `shifted`, so the model does not start as the base model: not compared")
        try:
            batch = demo_inputs(self.model)
            self.model(**batch)
            return batch
        except Exception as error:  # a model that wants another kind of batch fails in its own way
            return self._skip(f"no batch for a {type(self.model).__name__} ({type(error).__name__}): not compared")

    def _skip(self, why: str) -> None:
        self.verdict = why

    @torch.no_grad()
    def _run(self) -> torch.Tensor:
        """All the numbers that the model gives for the batch."""
        with self.output.busy("running a tiny batch"):
            found = self.model(**self.batch, return_dict=True)
        first = next(v for v in found.values() if isinstance(v, torch.Tensor) and v.is_floating_point())
        return first.flatten()

    def _judge(self, change: float) -> None:
        if not self.before.isfinite().all():
            raise fail("not-identity",
                       "the logits of the base model are not finite, so there is nothing to compare with",
                       helps=("nothing was saved",))
        self.change = change
        eps = max(torch.finfo(p.dtype).eps for p in self.model.parameters() if p.is_floating_point())
        allowed = max(IDENTITY_TOLERANCE, _ROUNDINGS * eps)
        if not change <= allowed:
            raise fail("not-identity", f"the logits change by {change:.1e}, relative; {allowed:.0e} is allowed",
                       helps=("nothing was saved",))
        self.verdict = f"the logits are unchanged (relative change {change:.1e}, allowed {allowed:.0e})"
