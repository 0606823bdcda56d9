"""Several named surgeries of one model: switched, one after the other, or mixed.

Takes a model and, by name, specs or saved adapters; gives one operated model at a time. Promises: a surgery's tensors
are the same objects in whatever company they run; what is stacked is merged in the order in which it runs; the model is
the base model, bit for bit, when none is in use; a verb happens as a whole or not at all, whatever interrupts it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from math import isfinite
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.diagnostics import did_you_mean, fail, tell
from surgery.given import takes
from surgery.ir.compose import mixed, named, stacked
from surgery.ir.expression import Formula
from surgery.language.grammar import is_name
from surgery.language.tree import Spec, Target, every_step
from surgery.layers.wrappers import bare
from surgery.planning.compile import Placed, Plan
from surgery.runtime.apply import adapter_of, prepare
from surgery.runtime.attach import attach
from surgery.runtime.calibration import Loss
from surgery.runtime.checkpoint_marks import mark_of
from surgery.runtime.save import save
from surgery.runtime.step_tensors import SharedTensors
from surgery.runtime.surgeon import Surgeon
from surgery.runtime.transaction import Scope, all_or_nothing


@dataclass
class Known:
    """A named surgery that can be used: its surgeon, which has left the model, and its values of the model's own
    parameters."""

    surgeon: Surgeon
    trained: dict[str, torch.Tensor]

    def placed(self, site: str) -> Placed | None:
        return next((p for p in self.surgeon.plan.placed if p.site.name == site), None)


class Surgeries:
    """The named surgeries of a model. `active` are the names in use, in order; `surgeon` operates them,
    None for the base model."""

    @takes(model="model")
    def __init__(self, model: nn.Module):
        self.model, self._given = bare(model), model
        self.active: tuple[str, ...] = ()
        self.surgeon: Surgeon | None = None
        self._known: dict[str, Known] = {}
        self._again: Callable[[], object] = lambda: None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all added surgeries, in use or not."""
        return tuple(self._known)

    @all_or_nothing
    def add(self, name: str, what: Spec | str | PathLike, *, seed: int = 0, dtype: torch.dtype = torch.float32,
            data: Iterable[Any] | None = None, loss: Loss | None = None) -> None:
        """Add a surgery under a name: a saved adapter's folder, or a fresh one of a spec (a `Spec`, a file's path or a
        shipped name). `use` or `mix` then operates with it.

        `data`, `loss`: as in `apply`, on the base model. Raises: SurgeryError, and then nothing is added.
        """
        if not is_name(name) or name in self._known:
            raise fail("bad-value", f"`{name}` is taken" if name in self._known else f"`{name}` is not a name",
                       helps=("a surgery's name is made of letters, digits and `_`, and is its own",))
        again = self._again
        self._leave()  # it is fitted to the base model, and what was in use is then put in again
        if isinstance(what, PathLike) or (isinstance(what, str) and Path(what).is_dir()):
            surgeon = attach(self._given, what)
        else:
            surgeon = prepare(self._given, what, seed=seed, dtype=dtype, data=data, loss=loss)
            surgeon.check_start()
            surgeon.operate()
            tell(surgeon.plan.warnings)
        state = surgeon.state()
        trained = {key: state[key].clone() for key in surgeon.plan.train}  # removing gives the model's own back
        self._known = {**self._known, name: Known(surgeon, trained)}
        surgeon.remove()
        again()

    def use(self, *names: str) -> Surgeon | None:
        """Operate with these: the first acts on the frozen weights, each further one on what the ones before made of
        them.

        With no name, the model is the base model. Of a model that checkpoints gradients, first take the backward passes
        of what ran with others: it runs layers again in them, with what is in use then, which torch refuses with its
        CheckpointError, and by reentrant checkpoints does not see. Raises: SurgeryError (bad-value).
        """
        return self._operate(names, lambda formulas: reduce(stacked, formulas.values()))

    def mix(self, shares: Mapping[str, float]) -> Surgeon | None:
        """Operate with a weighted sum, W' = W + Σ share · (W'ₙ - W), of surgeries that only add.

        Raises: SurgeryError (bad-value) for one that says `pre` or `post`, or trains parameters of the model, and for a
        share that is no number.
        """
        for name, share in shares.items():
            if not isinstance(share, Real) or not isfinite(share):
                raise fail("bad-value", f"the share of `{name}` must be a finite number, not {share!r}")
            steps = [step for placed in self._of(name).surgeon.plan.placed for step in every_step(placed.target.steps)]
            if self._of(name).trained or any(step.placement != "add" for step in steps):
                raise fail("bad-value", f"`{name}` does more than add to weights, so there is no share of it to take",
                           helps=("use() runs surgeries of any kind one after the other",))
        return self._operate(tuple(shares), lambda formulas: mixed({f: shares[name] for name, f in formulas.items()}),
                             tuple(map(float, shares.values())))

    def save(self, name: str, folder: str | PathLike, base_model: str | None = None, revision: str | None = None,
             force: bool = True, **about: Any) -> None:
        """Write one surgery's adapter with its current values, for `attach`. Raises: SurgeryError."""
        known = self._of(name)
        self._keep_trained()
        surgeon = known.surgeon
        elsewhere = {parameter for each in self._known.values() for parameter in each.trained}
        save(surgeon, folder, base_model, revision, {**surgeon.state(), **known.trained}, force, elsewhere=elsewhere,
             **about)

    @all_or_nothing
    def remove(self, partly: bool = False) -> nn.Module:
        """Take everything out: the model is as before. `partly`: as far as it still stands, as a surgeon's does."""
        self._leave(partly)
        self._known, self._again = {}, lambda: None
        return self._given

    def scope(self) -> Scope:
        """What verbs may change."""
        known = list(self._known.values())
        scopes = [each.scope() for each in (self.surgeon, *(k.surgeon for k in known)) if each is not None]
        return Scope([self, *known, *(o for s in scopes for o in s.objects)],
                     [self.model, *(m for s in scopes for m in s.roots)], [p for s in scopes for p in s.parameters])

    # ------------------------------------------------------------------------------------------------ in and out

    def _of(self, name: str) -> Known:
        if name not in self._known:
            near = did_you_mean(name, self._known)
            raise fail("bad-value", f"no surgery is called `{name}`",
                       notes=(f"there are: {', '.join(self._known) or 'none'}",),
                       helps=(near,) if near else ())
        return self._known[name]

    @all_or_nothing
    def _operate(self, names: tuple[str, ...], compose: Callable[[dict[str, Formula]], Formula],
                 shares: tuple[float, ...] = ()) -> Surgeon | None:
        known = {name: self._of(name) for name in names}
        if len(known) < len(names):
            raise fail("bad-value", "a surgery runs once, and one is named twice")
        self._leave()
        if known:
            trained = {key: value for each in known.values() for key, value in each.trained.items()}
            surgeon = together(self._given, known, compose)
            for adapter in surgeon.adapters.values():
                adapter.mark = mark_of(names, shares)
            self.surgeon = surgeon.operate(trained)
        self.active, self._again = names, lambda: self._operate(names, compose, shares)
        return self.surgeon

    def _leave(self, partly: bool = False) -> None:
        """Give the base model back; what was trained is kept."""
        if self.surgeon is not None:
            if not partly:
                self._keep_trained()
            self.surgeon.remove(partly)
        self.surgeon, self.active = None, ()

    def _keep_trained(self) -> None:
        values = self.surgeon.state() if self.surgeon is not None else {}
        for known in (self._known[name] for name in self.active):
            known.trained = {key: values[key].clone() for key in known.trained}


def together(model: nn.Module, known: Mapping[str, Known],
             compose: Callable[[dict[str, Formula]], Formula]) -> Surgeon:
    """The surgeon of several surgeries at once, on the very tensors of each.

    Raises: SurgeryError (bad-value), where two train the same parameter of the model."""
    owner: dict[str, str] = {}
    for name, each in known.items():
        for parameter in each.trained:
            if owner.setdefault(parameter, name) != name:
                raise fail("bad-value",
                           f"`{owner[parameter]}` and `{name}` both train {parameter}, which has one value",
                           helps=("use one of them at a time",))
    plans = [each.surgeon.plan for each in known.values()]
    targets: dict[tuple[int, ...], Target] = {}
    placed = [_placed(site, known, compose, targets)
              for site in dict.fromkeys(p.site.name for plan in plans for p in plan.placed)]
    train = tuple(dict.fromkeys(name for plan in plans for name in plan.train))
    spec = Spec("_then_".join(known), targets=tuple(targets.values()))
    plan = Plan(spec, tuple(placed), replace(plans[0].selection, train=train), (), plans[0].total)
    common, adapters = SharedTensors(), {}
    for each in placed:  # the very tensors that each surgery has, by keys that `named` gave its leaves
        site = each.site.name
        values = {f"{name}:{key}": tensor for name, of in known.items() if site in of.surgeon.adapters
                  for key, tensor in of.surgeon.adapters[site].tensors().items()}
        adapters[site] = adapter_of(each, values, common)
    surgeon = Surgeon(model, plan, adapters, seed=0)
    surgeon.saves_as = "surgeries.save(name, folder) writes each of the surgeries in use"
    return surgeon


def _placed(site: str, known: Mapping[str, Known], compose: Callable[[dict[str, Formula]], Formula],
            targets: dict[tuple[int, ...], Target]) -> Placed:
    """The composition of the surgeries that operate on one site."""
    mine = {name: placed for name, each in known.items() if (placed := each.placed(site)) is not None}
    key = tuple(id(p.target) for p in mine.values())
    if key not in targets:
        steps = tuple(part.step for p in mine.values() for part in p.formula.parts)
        targets[key] = Target(*steps, untie=any(p.target.untie for p in mine.values()), shifted=True)
    formula = compose({name: named(p.formula, name) for name, p in mine.items()})
    shared = {f"{name}:{key}": replace(tensor, name=f"{name}:{tensor.name}")
              for name, p in mine.items() for key, tensor in p.shared.items()}
    return Placed(next(iter(mine.values())).site, targets[key], formula, shared)
