"""The one merge: W' in the place of W, for any formula.

Takes an operated weight; gives the tensors that replace the frozen ones. Promises: computed in float32 or wider and
rounded once; a result that its dtype cannot hold is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from surgery.diagnostics import fail
from surgery.layers.opaque_linear import is_packed_again
from surgery.layers.wrappers import own_parameter
from surgery.planning.compile import Placed
from surgery.planning.initial_values import Departure
from surgery.runtime.adapter import Adapter
from surgery.text import dtype_text, listed

# A value rounded to nearest is off by at most half a unit in the last place, eps / 2 of itself.
ROUNDINGS = 1.0


@dataclass(frozen=True)
class Merged:
    """The stored tensors of one merged module by parameter name, and the relative error of rounding them."""

    tensors: dict[str, torch.Tensor]
    error: float


def refuse_called(placed: Sequence[Placed]) -> None:
    """Raises: SurgeryError (merge-error), if there is a weight that nothing can be written into."""
    called = [p for p in placed if p.site.layout.is_called or is_packed_again(p.site.module)]
    if called:
        names = listed(f"{p.site.name} ({type(p.site.module).__name__})" for p in called)
        raise fail("merge-error", f"W' cannot be written into {names}: no plain weight is kept there",
                   called[0].target.span,
                   helps=("save the adapter, attach it to the model with plain weights (not quantised, no "
                          "parametrisation), and merge that",))


@torch.no_grad()
def merged(placed: Placed, adapter: Adapter) -> Merged:
    """W' and b' of one operated module, in the dtype and layout that it stores. Raises: SurgeryError (merge-error)."""
    site, module = placed.site, placed.site.module
    forms = {site.parameter: site.weight} | ({"bias": site.bias} if adapter.compiled.has_bias else {})
    # a bias may have a dtype of its own
    return rounded(placed, adapter.weights_by_rows(module), {
        name: torch.empty(form.shape, dtype=own_parameter(module, name).dtype, device=form.device)
        for name, form in forms.items() if form is not None})


def rounded(placed: Placed, parts: Iterable[tuple[slice, Sequence[torch.Tensor]]],
            stored: dict[str, torch.Tensor]) -> Merged:
    """W' (and b'), which come as some rows after others in float32 or wider, in what they are `stored` in, by parameter
    name: so W + ΔW is rounded once. Raises: SurgeryError (merge-error)."""
    weight, *bias = stored.values()
    places, off = (placed.site.layout.matrix(weight), *bias), {name: Departure() for name in stored}
    for rows, values in parts:
        for place, value, each in zip(places, values, off.values()):
            each.add(value, place[rows].copy_(value))
    for name, each in off.items():
        error, bound = each.relative, ROUNDINGS * torch.finfo(stored[name].dtype).eps
        if not error <= bound and not each.is_finite:
            raise fail("merge-error", f"W' of {placed.site.name} is not finite", placed.target.span,
                       helps=("the training that made it diverged",))
        if not error <= bound:  # so that a NaN is refused too
            raise fail("merge-error",
                       f"{placed.site.name} does not fit {dtype_text(stored[name].dtype)} after merging: "
                       f"the relative error is {error:.1e}, and rounding allows {bound:.1e}", placed.target.span,
                       helps=("load the model in a wider dtype, then merge",))
    return Merged(stored, max(each.relative for each in off.values()))
