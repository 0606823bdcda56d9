"""Find the number of heads, and their size, of the attention that a module is a part of.

Takes modules; gives numbers, or None where nothing says them. Promises: nothing is guessed from the shape of a weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from surgery.layers.opaque_linear import said

_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")
_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim", "d_kv")  # a size that is said outweighs a quotient
_WIDTHS = ("hidden_size", "d_model", "embed_dim")


def attention_sizes(above: Iterable[nn.Module]) -> tuple[int | None, int | None]:
    """(heads, size of a head) as the nearest of the modules that hold a module says them, itself or by its `config`:
    the heads are those of the queries."""
    heads = size = None
    for module in above:
        for owner in (module, getattr(module, "config", None)):
            heads = heads or _number(owner, _HEADS)
            size = size or _number(owner, _SIZES)
            width = _number(owner, _WIDTHS)
            if heads and size is None and width and width % heads == 0:
                size = width // heads
        if heads and size:
            break
    return heads, size


def kernel(module: nn.Module) -> int:
    """How many positions a kernel has: 9 of 3 x 3, and 1 of what is no convolution."""
    positions = 1
    for side in getattr(module, "kernel_size", ()) if isinstance(getattr(module, "kernel_size", ()), tuple) else ():
        positions *= side
    return positions


def _number(owner: Any, names: Iterable[str]) -> int | None:
    found = (said(owner, name) if isinstance(owner, nn.Module) else getattr(owner, name, None) for name in names)
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)
