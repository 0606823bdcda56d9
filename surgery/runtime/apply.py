"""Apply a spec to a model.

Takes a model and a spec; gives a `Surgeon`, of a model that is operated on (`apply`) or not yet touched (`prepare`).
Promises: what is wrong with the spec or does not fit the model is said before the model is touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import nn

from surgery.diagnostics import Collector, fail
from surgery.given import takes
from surgery.language.tree import Spec
from surgery.layers.wrappers import bare
from surgery.planning.compile import Placed, compile
from surgery.planning.fitness import dense_copies, unfit
from surgery.planning.initial_values import Shared, tensors
from surgery.runtime.adapter import Adapter
from surgery.runtime.calibration import Loss, of_data
from surgery.runtime.remade import ROOM, made_by_rule
from surgery.runtime.saved_format import SEEDS
from surgery.runtime.sharding import refuse_sharded
from surgery.runtime.step_tensors import SharedTensors
from surgery.runtime.surgeon import Surgeon


@takes(model="model", spec="spec")
def apply(model: nn.Module, spec: Spec | str | PathLike, *, seed: int = 0, dtype: torch.dtype = torch.float32,
          strict: bool = False, check: bool = True, example: Any = None, data: Iterable[Any] | None = None,
          loss: Loss | None = None) -> Surgeon:
    """Operate on `model` in place as `spec` (a spec, a file's path or a shipped name) says; `dtype` is the adapter's.

    `check`: prove on a forward pass that the model starts unchanged, that every adapter acts and that merged it gives
    the same (`Surgeon.prove`); what cannot be proven is said in `surgeon.proof`. `example`: a batch for that: keyword
    arguments, a tuple of arguments or a tensor; without one it is made up where the model's configuration allows.

    `data`: batches (of those kinds, with labels) for starts that name `G`, the mean over them of the gradient of the
    loss in W [out, in], or `C`, Σ x xᵀ [in, in] over the inputs of the layer; `loss(model, batch)` where the model's
    output has none.

    What is probably not meant is a warning (SurgeryWarning, and in `surgeon.plan.warnings`); `strict`: an error.

    Raises: SurgeryError, and then the model is as it was. A W' that does not start as W is such an error, unless the
    target says `shifted`.

    >>> import surgery
    >>> model = surgery.load_model("demo:llama")
    >>> surgeon = surgery.apply(model, surgery.load("lora", rank=4).retarget("**.q_proj"))
    >>> sum(parameter.numel() for parameter in surgeon.parameters())
    2048
    >>> surgeon.save("out")  # the adapter alone
    """
    surgeon = prepare(model, spec, seed=seed, dtype=dtype, strict=strict, data=data, loss=loss)
    surgeon.check_start(strict)
    return surgeon.begin(example, check, strict, tells=True)


def prepare(model: nn.Module, spec: Spec | str | PathLike, *, seed: int = 0, dtype: torch.dtype = torch.float32,
            strict: bool = False, most: int | None = None, starts: bool = True, wide: bool = True,
            data: Iterable[Any] | None = None, loss: Loss | None = None) -> Surgeon:
    """A surgeon whose model is not yet touched. `most`: how many numbers a saved adapter holds; a spec that asks for
    more than that and the model together is refused before any is made. Without `starts` the adapters hold NaNs, for
    whoever puts values into all of their tensors. `wide`: as in `tensors`; without it nothing of the starts is made
    again at attach, but saved. Raises: SurgeryError."""
    refuse_sharded(model)
    if any(isinstance(m, Adapter) for m in model.modules()):
        raise fail("already-operated", f"this {type(bare(model)).__name__} carries a surgery already",
                   helps=("remove() the first one, or put both in one spec",))
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise fail("bad-value", f"an adapter's parameters cannot be {dtype}",
                   helps=("give a floating dtype, such as torch.float32",))
    if not isinstance(seed, int) or isinstance(seed, bool) or not SEEDS[0] <= seed <= SEEDS[1]:
        raise fail("bad-value", f"a seed is a whole number from -2^63 to 2^64 - 1, not {seed!r}")
    plan = compile(model, spec, strict)
    report = Collector()
    report.add(*plan.warnings, *unfit(plan), *dense_copies(plan))
    report.raise_errors(strict)
    if most is not None and plan.trainable + plan.frozen > most + ROOM * plan.total:
        raise fail("bad-adapter", f"the spec asks for {plan.trainable + plan.frozen:,} numbers, and the adapter "
                   f"holds {most:,}")
    plan = replace(plan, warnings=tuple(report.warnings))
    shared: Shared = {}
    common = SharedTensors()
    measured = of_data(bare(model), plan.placed, data, loss) if starts else ((p, {}) for p in plan.placed)
    adapters = {p.site.name: adapter_of(p, tensors(p, seed, dtype, shared, starts, found, wide), common)
                for p, found in measured}
    surgeon = Surgeon(model, plan, adapters, seed)
    surgeon.made = made_by_rule(surgeon) if starts and wide else {}
    return surgeon


def adapter_of(placed: Placed, values: Mapping[str, torch.Tensor], common: SharedTensors) -> Adapter:
    """The adapter of one operated weight, with those tensors by key; `common` grows by what adapters share."""
    site = placed.site
    shared = {leaf.key: placed.held(leaf).name for leaf in placed.formula.leaves if leaf.group}
    adapter = Adapter(placed.compiled, site.layout, site.parameter, site.stack, values, common, shared,
                      site.answer.gives_gradient, site.weight_name.rpartition(".")[0])
    return adapter.train(site.module.training)
