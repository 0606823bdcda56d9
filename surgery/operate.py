"""Operating on a model: put the adapters in, merge them, switch them off, take them out.

Takes a model and a spec; gives a `Surgeon`. Promises: in place, the model keeps its class and names; an operation that
fails leaves the model exactly as it was; `unmerge`, `disabled` and `remove` give kept bits back, nothing is inverted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from surgery.compile import Placed, Plan, compile
from surgery.diagnostics import Collector, fail
from surgery.initialise import IDENTITY_TOLERANCE, Shared, departure, frozen_leaves, not_identity, tensors
from surgery.layer import SUFFIX, Adapter, install, uninstall
from surgery.merge import merged, refuse_called
from surgery.report import Report, dense_copies, unfit
from surgery.rewrite.identity import starts_as_weight
from surgery.serving import serving
from surgery.syntax.tree import Spec, Target


_SAID = {"operated": "operated on, not merged", "merged": "merged", "base": "switched off", "removed": "given back"}
_WAY_BACK = {"operated": "merge() it first", "merged": "unmerge() it first",
             "base": "leave the block of disabled() first", "removed": "apply the spec again, or attach what was saved"}


def apply(model: nn.Module, spec: Spec | str | Path, *, seed: int = 0, dtype: torch.dtype = torch.float32,
          strict: bool = False) -> Surgeon:
    """Operate on `model` in place as `spec` (a spec, a file's path or a shipped name) says; `dtype` is the adapter's.

    Raises: SurgeryError, and then the model is as it was. A W' that does not start as W is such an error, unless the
    target says `shifted`.
    """
    surgeon = prepare(model, spec, seed=seed, dtype=dtype, strict=strict)
    surgeon.check_identity()
    return surgeon.operate()


def prepare(model: nn.Module, spec: Spec | str | Path, *, seed: int = 0, dtype: torch.dtype = torch.float32,
            strict: bool = False, most: int | None = None) -> Surgeon:
    """A surgeon with everything at hand and the model not yet touched. `most`: how many numbers a saved adapter holds;
    one whose spec asks for more than that and the model together is refused before any is made. Raises: SurgeryError.
    """
    if any(isinstance(m, Adapter) for m in model.modules()):
        raise fail("already-operated", f"this {type(model).__name__} carries a surgery already",
                   helps=("remove() the first one, or put both in one spec",))
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise fail("bad-value", f"an adapter's parameters cannot be {dtype}",
                   helps=("give a floating dtype, such as torch.float32",))
    if not isinstance(seed, int):
        raise fail("bad-value", f"a seed is a whole number, not {seed!r}")
    plan = compile(model, spec, strict)
    report = Collector()
    report.add(*plan.warnings, *unfit(plan), *dense_copies(plan))
    report.raise_errors(strict)
    if most is not None and plan.trainable + plan.frozen > most + plan.total:
        raise fail("bad-adapter", f"the spec asks for {plan.trainable + plan.frozen:,} numbers, and the adapter "
                   f"holds {most:,}")
    plan = replace(plan, warnings=tuple(report.warnings))
    shared: Shared = {}
    return Surgeon(model, plan, {p.site.name: _adapter(p, tensors(p, seed, dtype, shared)) for p in plan.placed}, seed)


def _adapter(placed: Placed, values: dict[str, nn.Parameter]) -> Adapter:
    site = placed.site
    adapter = Adapter(placed.formula, site.layout, site.parameter, site.stack, values, site.answer.gives_gradient)
    return adapter.train(site.module.training)


class Surgeon:
    """The hand on an operated model: report, switch, merge, save, remove. Made by `apply` and `attach`.

    The model is in one of these modes: `operated` (adapters run), `merged` (W' stands in W's place), `base` (as it
    was), `removed` (no more ours).
    """

    def __init__(self, model: nn.Module, plan: Plan, adapters: dict[str, Adapter], seed: int):
        self.model, self.plan, self.adapters, self.seed = model, plan, adapters, seed
        self._mode = "base"
        self._required = {name: p.requires_grad for name, p in model.named_parameters()}
        # What stands in a parameter's place, by mode; one that has nothing for `merged` is then as when `operated`.
        self._kept = {n: {"base": model.get_parameter(n).detach().clone()} for n in plan.train}
        self._tied: dict[str, nn.Parameter] = {}

    @property
    def spec(self) -> Spec:
        """The spec that was applied."""
        return self.plan.spec

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the adapter's parameters (float32 where there is none)."""
        parameters = (p for adapter in self.adapters.values() for p in adapter.parameters())
        return next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)

    @property
    def untied(self) -> tuple[str, ...]:
        """The names of the weights that `untie` gave a tensor of their own."""
        return tuple(self._tied)

    @property
    def merged(self) -> bool:
        return self._mode == "merged"

    def check_identity(self) -> None:
        """Raises: SurgeryError (not-identity) with each target's modules that start elsewhere, and how far off."""
        report = Collector()
        for target in self.spec.targets:
            report.add(*not_identity(target, self._departures(target)))
        report.raise_errors()

    def _departures(self, target: Target) -> dict[str, float]:
        """The modules of a target whose weight does not start as it was, each with the relative change."""
        mine = [p for p in self.plan.placed if p.target is target and not target.shifted and not p.site.is_meta
                and not (p.site.layout.is_called and starts_as_weight(p.formula))]
        found = {p.site.name: _start_error(p, self.adapters[p.site.name]) for p in mine}
        return {name: change for name, change in found.items() if not change <= _tolerance(self.adapters[name])}

    def operate(self) -> Surgeon:
        """Put the adapters in; everything but them and what `train` names is frozen."""
        for placed in self.plan.placed:
            if placed.target.untie and not placed.site.layout.is_called:
                self._untie(placed)
            install(placed.site.module, self.adapters[placed.site.name])
        frozen = {id(adapter.get_parameter(leaf.key)) for adapter in self.adapters.values()
                  for leaf in adapter.formula.leaves if leaf.frozen}
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
        found = {f"{p.site.weight_name}{SUFFIX}.{key}": tensor for p in self.plan.placed
                 for key, tensor in self.adapters[p.site.name].tensors().items()}
        found |= {name: self.model.get_parameter(name) for name in self.plan.train}
        first = {id(tensor): name for name, tensor in reversed(found.items())}
        return {name: tensor for name, tensor in found.items() if first[id(tensor)] == name}

    def state(self) -> dict[str, torch.Tensor]:
        """The values of `named_tensors` as trained, in every mode."""
        tuned = {name: kept["operated"] for name, kept in self._kept.items() if self._mode != "operated"}
        return {name: tuned.get(name, tensor.detach()) for name, tensor in self.named_tensors().items()}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Give the tensors of an operated model copies of other values, of the same shapes: an adapter's keep the dtype
        that they come in, those of `train` the model's."""
        for name, tensor in self.named_tensors().items():
            dtype = tensor.dtype if name in self.plan.train else state[name].dtype
            tensor.data = state[name].detach().to(tensor.device, dtype, copy=True)

    def report(self) -> Report:
        """What was operated on; prints as a table."""
        return Report(self.plan, self.dtype)

    def save(self, folder: str | PathLike, **about: Any) -> None:
        """Write the adapter, whole or not at all: its tensors, its spec, and `about` (base_model, revision, ...).

        Raises: SurgeryError."""
        from surgery import store

        store.save(self, folder, **about)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is the base model, exactly. Nests, and holds when an exception passes."""
        before = self._mode
        self._enter("base")
        try:
            yield
        finally:
            if self._mode != "removed":
                self._enter(before)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Inside, you promise that no tensor of the model changes: what forward passes without a gradient compute from
        the adapter's tensors alone (and W' itself, for fused experts and where a model reads the weight) is kept from
        one to the next, so that a token costs little more than the base model's. For a model in evaluation, merged or
        not; nests, in any number of threads.

        Raises: SurgeryError (wrong-mode), in training mode or at `train()`; (changed-tensor), if a tensor that was
        computed from is another one bit for bit: at the next forward pass where torch tells, and at the end always.
        """
        if any(placed.site.module.training for placed in self.plan.placed):
            raise fail("wrong-mode", "this model is in training mode, and serving() is for one that is evaluated",
                       helps=("call model.eval() first",))
        with serving(self.model, self.adapters):
            yield

    def merge(self) -> dict[str, float]:
        """Put each W' in the place of W, which is kept; gives the relative rounding error of each module.

        Memory: a second copy of the operated weights. Raises: SurgeryError (merge-error); then nothing is merged.
        """
        self._must_be("operated", "merge")
        refuse_called(self.plan.placed)
        made = {p.site.name: merged(p, self.adapters[p.site.name]) for p in self.plan.placed}
        for placed in self.plan.placed:
            for name, tensor in made[placed.site.name].tensors.items():
                full = placed.site.weight_name.removesuffix(placed.site.parameter) + name
                now = self.model.get_parameter(full).data
                self._kept[full] = {"base": now, **self._kept.get(full, {}), "operated": now, "merged": tensor}
        self._enter("merged")
        return {name: each.error for name, each in made.items()}

    def unmerge(self) -> None:
        """Put the kept weights back, bit for bit."""
        self._must_be("merged", "unmerge")
        self._enter("operated")
        self._kept = {name: {"base": self._kept[name]["base"]} for name in self.plan.train}

    def remove(self) -> nn.Module:
        """Take everything out: the model is as before `apply`, bit for bit."""
        if self._mode == "removed":
            return self.model
        self._enter("base")
        for module in {id(p.site.module): p.site.module for p in self.plan.placed}.values():
            uninstall(module)
        for name, tied in self._tied.items():
            owner, _, parameter = name.rpartition(".")
            self.model.get_submodule(owner)._parameters[parameter] = tied
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required[name])
        self._mode = "removed"
        return self.model

    def _must_be(self, mode: str, what: str) -> None:
        if self._mode != mode:
            said, wanted = _SAID[self._mode], _SAID[mode]
            raise fail("wrong-mode", f"this model is {said}, and {what}() is for one that is {wanted}",
                       helps=(_WAY_BACK[self._mode],))

    def _enter(self, mode: str) -> None:
        """Switch the model to a mode: which tensors stand in place, and whether the adapters run."""
        for name, kept in self._kept.items():
            parameter = self.model.get_parameter(name)
            kept[_form(kept, self._mode)] = parameter.data
            parameter.data = kept[_form(kept, mode)].to(parameter.device)
        for adapter in self.adapters.values():
            adapter.active = mode == "operated"
        self._mode = mode


def _form(kept: Mapping[str, torch.Tensor], mode: str) -> str:
    return "operated" if mode == "merged" and mode not in kept else mode


def _tolerance(adapter: Adapter) -> float:
    """1e-5, or the rounding of the adapter's own dtype where that is coarser."""
    return max([IDENTITY_TOLERANCE, *(torch.finfo(p.dtype).eps for p in adapter.parameters() if p.is_floating_point())])


@torch.no_grad()
def _start_error(placed: Placed, adapter: Adapter) -> float:
    before = frozen_leaves(placed)
    after = adapter.weights(placed.site.module)
    return max(departure(old, new) for old, new in zip(before.values(), after))
