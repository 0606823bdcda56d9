"""The parameter groups of an optimiser: a learning rate for each parameter of the spec, and decay only where it does no
harm.

Takes an operated model's named tensors and its plan; gives groups for `torch.optim`. Promises: each tensor is in one
group; a rate that names nothing that trains is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import inf
from typing import Any

import torch

from surgery.diagnostics import fail
from surgery.ir.expression import Leaf
from surgery.ir.sizes import Dim
from surgery.planning.compile import Placed, Plan
from surgery.planning.initial_values import starts_around_zero


def parameter_groups(plan: Plan, tensors: Mapping[str, torch.Tensor], name_of: Callable[[Placed, str], str], lr: float,
                     weight_decay: float, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """The groups of one rate and one decay each. `rates`: by `lr_NAME`, the rate of every `param NAME` of the spec,
    whatever its own `rate` says; a parameter without one has `lr` times its `rate`.

    Raises: SurgeryError (bad-value)."""
    # Decay pulls to 0. A gain that starts at 1 it would pull away from W, so it is given to what starts around 0, and
    # to the matrices of `train`, as trainers do (a bias or a norm gets none). On a manifold there is no way to 0.
    decays = {name: tensors[name].ndim > 1 for name in plan.train}
    # of each tensor, its own name, and that of its `param`
    own_names: dict[str, tuple[str, ...]] = dict.fromkeys(plan.train, ("",))
    factors = dict.fromkeys(plan.train, 1.0)  # and what `rate` says
    for placed in plan.placed:
        for leaf in placed.formula.leaves:
            if not leaf.frozen:
                name = name_of(placed, leaf.key)
                assert not isinstance(leaf.rate, Dim)  # a real module's sizes are known
                own_names[name], factors[name] = _names(leaf), leaf.rate
                decays[name] = leaf.decays and not leaf.manifold and starts_around_zero(leaf)
    refuse_unknown(plan, rates)
    given = {name.removeprefix("lr_"): rate for name, rate in rates.items()}
    if not all(0 <= rate < inf for rate in (lr, weight_decay, *rates.values())):  # a NaN is not either
        raise fail("bad-value", "rates and decay are finite numbers from 0 on")
    groups: dict[tuple[float, float], list[torch.Tensor]] = {}
    for name, own in own_names.items():
        rate = next((given[each] for each in own if each in given), lr * factors[name])
        key = rate, weight_decay if decays[name] else 0.0
        groups.setdefault(key, []).append(tensors[name])
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def _names(leaf: Leaf) -> tuple[str, ...]:
    """What a rate can call a tensor: of a round of a `for` the name that it would have by hand, `t_2`, or that of all
    rounds, `t`."""
    return leaf.key.rpartition(".")[2].partition("#")[0], leaf.name


def refuse_unknown(plan: Plan, rates: Iterable[str]) -> None:
    """Raises: SurgeryError (bad-value) for a rate `lr_NAME` of no parameter that trains."""
    trained = (leaf for placed in plan.placed for leaf in placed.formula.leaves if not leaf.frozen)
    known = {name for leaf in trained for name in _names(leaf)}
    unknown = [name for name in rates if not name.startswith("lr_") or name.removeprefix("lr_") not in known]
    if unknown:
        raise fail("bad-value", f"`{unknown[0]}` names no parameter that trains",
                   notes=(f"there are: {', '.join(f'lr_{name}' for name in sorted(known))}",))
