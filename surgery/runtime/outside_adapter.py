"""Detect changes of the tensors that a saved adapter does not hold, since the model was operated on.

Takes an operated model; gives a fingerprint of each parameter and buffer outside of the adapters, and later says which
of them changed. Promises: what changed there (running statistics, which batch norms update in every forward pass in
training mode; parameters that somebody unfroze or edited) is never left out of a saved adapter without a warning.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from surgery.diagnostics import Diagnostic
from surgery.layers.wrappers import named_modules
from surgery.matching.name_ranges import alike, ranged
from surgery.runtime.adapter import Adapter
from surgery.runtime.fingerprint import differing, fingerprint_of
from surgery.runtime.sharding import is_part
from surgery.runtime.step_tensors import SharedTensors
from surgery.text import listed


def fingerprints_outside(model: nn.Module, operated: Iterable[nn.Module] = (),
                         held: Collection[str] = ()) -> dict[str, str]:
    """The fingerprint of each tensor that is saved with the model, by name, except for those of adapters and of
    `operated` modules, and those whose names are in `held`. A tensor without plain numbers in this process has none."""
    aside = [*operated, *(m for m in model.modules() if isinstance(m, (Adapter, SharedTensors)))]
    passed = {id(inner) for module in aside for inner in module.modules()}
    there: list[tuple[str, Tensor]] = []
    for path, module in named_modules(model):
        saved = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        there += ((f"{path}.{own}".lstrip("."), tensor) for own, tensor in {**module._parameters, **saved}.items()
                  if id(module) not in passed and tensor is not None)
    # A tensor is known by all its names: one that is trained may be tied to another module's.
    known = {id(parameter) for module in aside for parameter in module._parameters.values()}
    known |= {id(tensor) for name, tensor in there if name in held}
    return {name: fingerprint_of(tensor) for name, tensor in there if id(tensor) not in known and _is_here(tensor)}


def _is_here(tensor: Tensor) -> bool:
    """Whether it is plain real numbers, and all of them here: not one without a shape yet, nor a sparse or nested one,
    whose numbers no index finds."""
    is_dense = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_nested
    is_plain = is_dense and tensor.is_floating_point() and tensor.dtype.itemsize > 1
    return is_plain and tensor.numel() > 0 and not tensor.is_meta and not is_part(tensor)


def changes_outside(model: nn.Module, before: Mapping[str, str], elsewhere: Collection[str] = ()) -> list[Diagnostic]:
    """A warning that names the tensors whose fingerprints differ from `before`; `elsewhere`: names that another adapter
    holds."""
    names = differing(before, fingerprints_outside(model, held=elsewhere)) if before else []
    if not names:
        return []
    what = listed([ranged(group) for group in alike(names)])
    return [Diagnostic("changed-tensor", f"since the model was operated on, {what} changed, which the adapter does not "
                       "hold: put on its base model, it gives other outputs than here", severity="warning",
                       helps=("while you train, put batch norms in evaluation mode; name in `train` what else is to be "
                              "trained", "surgery.save_merged(surgeon, \"out\") saves the model as it is now"))]
