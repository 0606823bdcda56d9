"""Operating on a model: put the adapters in, merge them, switch them off, take them out.

Takes a model and a spec; gives a `Surgeon`. Promises: in place, the model keeps its class and names; an operation that
fails leaves the model exactly as it was; `unmerge`, `disabled` and `remove` give kept bits back, nothing is inverted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike

import torch
import torch.nn as nn

from surgery.compile import Placed, Plan, compile
from surgery.diagnostics import Collector, fail
from surgery.initialise import IDENTITY_TOLERANCE, Shared, departure, frozen_leaves, not_identity, tensors
from surgery.layer import Adapter, install, uninstall
from surgery.merge import merged
from surgery.report import Report
from surgery.syntax.tree import Spec


def apply(model: nn.Module, spec: Spec, *, seed: int = 0, dtype: torch.dtype = torch.float32, strict: bool = False) -> Surgeon:
    """Operate on `model` in place as `spec` says; `dtype` is the adapter parameters'. Raises: SurgeryError, and then the
    model is as it was (a W' that does not start as W is such an error, unless the target says `shifted`)."""
    surgeon = prepare(model, spec, seed=seed, dtype=dtype, strict=strict)
    surgeon.check_identity()
    return surgeon.operate()


def prepare(model: nn.Module, spec: Spec, *, seed: int = 0, dtype: torch.dtype = torch.float32, strict: bool = False) -> Surgeon:
    """A surgeon with everything at hand and the model not yet touched. Raises: SurgeryError."""
    if any(isinstance(m, Adapter) for m in model.modules()):
        raise fail("already-operated", f"this {type(model).__name__} carries a surgery already",
                   helps=("remove() the first one, or put both in one spec",))
    plan = compile(model, spec, strict)
    shared: Shared = {}
    return Surgeon(model, plan, {p.site.name: _adapter(p, tensors(p, seed, dtype, shared)) for p in plan.placed}, seed)


def _adapter(placed: Placed, values: dict[str, nn.Parameter]) -> Adapter:
    return Adapter(placed.formula, placed.site.layout, placed.site.parameter, placed.site.stack, values).train(placed.site.module.training)


class Surgeon:
    """The hand on an operated model: report, switch, merge, save, remove. Made by `apply` and `attach`.

    The model is in one of three modes: `operated` (adapters run), `merged` (W' stands in W's place), `base` (as it was).
    """

    def __init__(self, model: nn.Module, plan: Plan, adapters: dict[str, Adapter], seed: int):
        self.model, self.plan, self.adapters, self.seed = model, plan, adapters, seed
        self._mode = "base"
        self._required = {name: p.requires_grad for name, p in model.named_parameters()}
        self._weights: dict[str, dict[str, torch.Tensor]] = {}  # by parameter name: its tensor in the modes base and merged
        self._trained = {n: {"base": model.get_parameter(n).detach().clone()} for n in plan.train}
        self._tied: dict[str, nn.Parameter] = {}

    @property
    def spec(self) -> Spec:
        """The spec that was applied."""
        return self.plan.spec

    @property
    def merged(self) -> bool:
        return self._mode == "merged"

    def check_identity(self) -> None:
        """Raises: SurgeryError (not-identity) naming each module whose weight starts elsewhere, and by how much."""
        report = Collector()
        for placed in self.plan.placed:
            if not placed.target.shifted and not placed.site.weight.is_meta:
                relative = _start_error(placed, self.adapters[placed.site.name])
                if not relative <= IDENTITY_TOLERANCE:
                    report.add(not_identity(placed, relative))
        report.raise_errors()

    def operate(self) -> Surgeon:
        """Put the adapters in; everything but them and what `train` names is frozen."""
        for placed in self.plan.placed:
            if placed.target.untie:
                self._untie(placed)
            install(placed.site.module, self.adapters[placed.site.name])
        frozen = {id(a.get_parameter(leaf.key)) for a in self.adapters.values() for leaf in a.formula.leaves if leaf.frozen}
        trained = {id(p) for p in self.named_tensors().values()} - frozen
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        self._mode = "operated"
        return self

    def _untie(self, placed: Placed) -> None:
        module, name = placed.site.module, placed.site.parameter
        self._tied[placed.site.weight_name] = module._parameters[name]
        module._parameters[name] = nn.Parameter(module._parameters[name].detach().clone())

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that train: the adapters' and those of `train`."""
        return (p for p in self.model.parameters() if p.requires_grad)

    def named_tensors(self) -> dict[str, nn.Parameter]:
        """Every adapter tensor and every `train` tensor by its name in the model, shared ones once."""
        own = {id(p) for a in self.adapters.values() for p in a.parameters()}
        own |= {id(self.model.get_parameter(name)) for name in self.plan.train}
        return {name: p for name, p in self.model.named_parameters() if id(p) in own}

    def report(self) -> Report:
        """What was operated on; prints as a table."""
        return Report(self.plan)

    def save(self, folder: str | PathLike, **about: str | None) -> None:
        """Write the adapter: its tensors, its spec, and `about` (base_model, revision). Atomic. Raises: SurgeryError."""
        from surgery.store import save

        save(self, folder, **about)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is the base model, exactly. Nests, and holds when an exception passes."""
        before = self._mode
        self._enter("base")
        try:
            yield
        finally:
            self._enter(before)

    def merge(self) -> dict[str, float]:
        """Put each W' in the place of W, which is kept; gives the relative rounding error of each module.

        Memory: a second copy of the operated weights. Raises: SurgeryError (merge-error); then nothing is merged.
        """
        if self.merged:
            raise fail("already-operated", "this model is merged already", helps=("unmerge() first",))
        made = {p.site.name: merged(p, self.adapters[p.site.name]) for p in self.plan.placed}
        for placed in self.plan.placed:
            for name, tensor in made[placed.site.name].tensors.items():
                full = placed.site.weight_name.removesuffix(placed.site.parameter) + name
                self._weights[full] = {"base": self.model.get_parameter(full).data, "merged": tensor}
        self._enter("merged")
        return {name: each.error for name, each in made.items()}

    def unmerge(self) -> None:
        """Put the kept weights back, bit for bit."""
        if not self.merged:
            raise fail("already-operated", "this model is not merged", helps=("merge() comes first",))
        self._enter("operated")
        self._weights.clear()

    def remove(self) -> nn.Module:
        """Take everything out: the model is as before `apply`, bit for bit."""
        self._enter("base")
        for module in {id(p.site.module): p.site.module for p in self.plan.placed}.values():
            uninstall(module)
        for name, tied in self._tied.items():
            owner, _, parameter = name.rpartition(".")
            self.model.get_submodule(owner)._parameters[parameter] = tied
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required[name])
        return self.model

    def _enter(self, mode: str) -> None:
        """Switch the model to a mode: which tensors stand in place, and whether the adapters run."""
        for name, kept in self._trained.items():
            parameter = self.model.get_parameter(name)
            kept["base" if self._mode == "base" else "tuned"] = parameter.data
            parameter.data = kept["base" if mode == "base" else "tuned"].to(parameter.device)
        for name, kept in self._weights.items():
            parameter = self.model.get_parameter(name)
            parameter.data = kept["merged" if mode == "merged" else "base"].to(parameter.device)
        for adapter in self.adapters.values():
            adapter.active = mode == "operated"
        self._mode = mode


@torch.no_grad()
def _start_error(placed: Placed, adapter: Adapter) -> float:
    before = frozen_leaves(placed)
    after = adapter.weights(placed.site.module)
    return max(departure(old, new) for old, new in zip(before.values(), after))
