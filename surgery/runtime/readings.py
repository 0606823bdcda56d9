"""Find code outside a quantised layer that computes with the layer's tensors, and so passes its adapter by.

A quantised layer's tensors are not W, and no W' can stand in their place: where a model computes with them beside the
layer's own forward, an adapter is not seen. Takes the operated weights and a forward pass; gives the names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from surgery.diagnostics import fail
from surgery.layers.opaque_linear import pieces
from surgery.planning.compile import Placed
from surgery.text import listed


class Readings(TorchFunctionMode):
    """Inside, notes the layers without a plain weight whose tensors are computed with by others than themselves: what
    stands there is not W, and no W' can stand in its place, so that their adapters are not seen."""

    def __init__(self, placed: Sequence[Placed]):
        super().__init__()
        self.read: dict[str, None] = {}
        self.owners = {id(t): p.site for p in placed if p.site.layout.is_called for t in pieces(p.site.module)}

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        # whose dtype, device or shape is asked for is not computed with
        if self.owners and name != "__get__" and not name.endswith("_like"):
            asked = args[:1] if name in ("to", "type_as") else (*args, *kwargs.values())
            for each in (t for a in asked for t in (a if isinstance(a, (tuple, list)) else (a,))):
                site = self.owners.get(id(each)) if isinstance(each, Tensor) else None
                if site is not None and not _runs(site.module):
                    self.read[site.weight_name] = None
        return func(*args, **kwargs)

    def refuse(self) -> None:
        """Raises: SurgeryError (dead-adapter), naming the weights."""
        if self.read:
            raise fail("dead-adapter", f"the model computes with what stands at {listed(self.read)} itself, beside the "
                       "layer's own forward: it is no plain weight, and the adapter is not seen there",
                       helps=("`except` leaves it out; `check=False` operates all the same",
                              "a model with plain weights (not quantised) gives W' there"))


def _runs(module: nn.Module) -> bool:
    """Whether a method of the module is running, in whatever is called from there."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False
