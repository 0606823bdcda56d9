"""A quantised model with its adapters merged, as a plain model: W' of the dequantised W, which is what was trained.

Takes an operated model; makes it, in place and for good, one of plain layers. Promises: every layer whose weight is
packed becomes an `nn.Linear` of what its calls say, operated on or not; what cannot be made plain is refused before
anything is changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.diagnostics import fail
from surgery.layers.opaque_linear import is_packed_again, is_plain
from surgery.layers.survey import Site, Survey
from surgery.layers.wrappers import own_parameter, submodule
from surgery.runtime.atomic_folders import replacing
from surgery.runtime.merge import merged, rounded
from surgery.runtime.save import MODEL
from surgery.runtime.surgeon import Surgeon
from surgery.text import listed


@torch.no_grad()
def merge_plainly(surgeon: Surgeon) -> dict[str, float]:
    """Take the adapters out and leave a plain model with each W'; gives the relative rounding error of each operated
    module. Memory: the plain model beside the packed one. Raises: SurgeryError (merge-error)."""
    model = surgeon.model
    dtype = getattr(model, "dtype", torch.float32)
    operated = {p.site.name: p.site for p in surgeon.plan.placed if _is_packed(p.site)}
    packed = [*operated.values(), *(site for site in Survey(model).sites
                                    if _is_packed(site) and site.name not in operated)]
    _assert_can_be_plain(model, packed)
    trained = {name: value for name, value in surgeon.state().items() if name in surgeon.plan.train}
    dense: dict[str, nn.Linear] = {}
    written: list[tuple[nn.Module, str, Tensor]] = []
    errors: dict[str, float] = {}
    for placed in surgeon.plan.placed:
        site, adapter = placed.site, surgeon.adapters[placed.site.name]
        if site.name in operated:
            exact = adapter.weights(site.module)
            made = rounded(placed, [(slice(None), exact)], {
                name: torch.empty_like(value, dtype=dtype) for name, value in zip(("weight", "bias"), exact)})
            dense[site.name] = _linear(site, *made.tensors.values(), dtype=dtype)
            errors[site.name] = made.error
        else:
            made = merged(placed, adapter)
            written += [(site.module, name, tensor) for name, tensor in made.tensors.items()]
            errors[site.name] = made.error
    for site in packed:  # those that nothing operates on, too: the model is to be plain
        if site.name not in dense:
            own = () if site.bias is None else (site.bias,)
            dense[site.name] = _linear(site, site.read(), *own, dtype=dtype)
    surgeon.remove()
    _place(model, trained, written, {name: dense[site.name] for site in packed for name in (site.name, *site.aliases)})
    _forget_quantisation(model)
    return errors


def _is_packed(site: Site) -> bool:
    return site.layout.is_called or is_packed_again(site.module)


def _place(model: nn.Module, trained: Mapping[str, Tensor], written: Iterable[tuple[nn.Module, str, Tensor]],
           layers: Mapping[str, nn.Linear]) -> None:
    """Put what was trained, each W' and the plain layers (by name) in the places of what stands in the model."""
    for name, value in trained.items():
        path, _, own = name.rpartition(".")
        owner = submodule(model, path)
        assert owner is not None  # it was there when the adapter was attached
        own_parameter(owner, own).data = value.to(own_parameter(owner, own).dtype)
    for module, name, tensor in written:  # over what was trained there: W' is made of that
        own_parameter(module, name).data = tensor
    for name, layer in layers.items():
        above, _, own = name.rpartition(".")
        parent = submodule(model, above)
        assert parent is not None
        parent._modules[own] = layer


def _linear(site: Site, weight: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype) -> nn.Linear:
    made = nn.Linear(site.in_, site.out, bias is not None, device="meta", dtype=dtype)
    made.weight = nn.Parameter(weight.to(dtype).contiguous(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().to(dtype).contiguous(), requires_grad=False)
    return made.train(site.module.training)


def _assert_can_be_plain(model: nn.Module, packed: Iterable[Site]) -> None:
    """Raises: SurgeryError (merge-error), where nothing is packed, or something that no call tells the weight of."""
    inside = {id(inner) for site in packed for inner in site.module.modules()}
    if not inside:
        raise fail("merge-error", f"no layer of this {type(model).__name__} is quantised, so there is nothing to "
                   "dequantise", helps=("merge without --dequantise",))
    # Places of an adapter of ours are whole numbers too, and no packed weight.
    left = [f"{path}.{name}" for path, module in model.named_modules() if id(module) not in inside
            for name, tensor in module._parameters.items() if tensor is not None and not is_plain(tensor)
            and not type(module).__module__.startswith("surgery.")]
    if left:
        raise fail("merge-error", f"{listed(left)} cannot be dequantised: only linear layers can be called for their "
                   "weight")


def _forget_quantisation(model: nn.Module) -> None:
    """Have transformers save it as the plain model that it now is."""
    config = getattr(model, "config", None)
    if config is not None and getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    for name in ("hf_quantizer", "quantization_method", "_weight_conversions", "is_loaded_in_4bit",
                 "is_loaded_in_8bit"):
        vars(model).pop(name, None)
    if hasattr(model, "is_quantized"):
        vars(model)["is_quantized"] = False


def save_plain(model: Any, folder: Path, extras: Iterable[Any], force: bool) -> None:
    """Save a plain model of transformers, and `extras` beside it. Raises: SurgeryError (bad-output)."""
    with replacing(folder, MODEL, force) as new:
        model.save_pretrained(new)
        for extra in extras:
            extra.save_pretrained(new)
