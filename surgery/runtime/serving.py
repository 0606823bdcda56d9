"""Keep the values of set-ups while a user promises that no tensor changes, and check that none did.

Takes the adapters of a model; keeps what they compute from their tensors alone. Promises: nothing is kept outside of
`serving`; what is kept is of the very tensors that it was made of, and that their bits are the same at the end is
looked at, not believed. (Torch's version counters miss writes of fused optimisers and through `.data`: here they only
say early what the bits then prove.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from threading import RLock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from surgery.diagnostics import SurgeryError, fail
from surgery.ir.orthogonal_maps import is_traced
from surgery.text import listed

if TYPE_CHECKING:
    from surgery.runtime.ready_calls import ReadyCall

_ROW = 2**16  # numbers that are hashed as one
_BLOCK = 64  # such rows at a time: 32 MiB of integers
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_LOCK = RLock()


@dataclass
class Kept:
    """A kept value: what it was computed from, the checksums of that, and torch's hints about it (see `hints`);
    `values` is what was computed."""

    on: tuple[Tensor, ...]
    bits: list[tuple]
    hints: tuple
    values: Any


class Serving:
    """The set-ups of a model's adapters while nothing changes. `names` are those of the adapters in the model."""

    def __init__(self, model: nn.Module, names: Mapping[nn.Module, str]):
        self.names, self.depth = names, 0
        self._kept: dict[tuple, Kept] = {}
        self.ready: dict[nn.Module, ReadyCall | None] = {}  # of adapters that have run here
        self._training = [(module, module.training) for module in model.modules()]

    def get(self, adapter: nn.Module, key: tuple, on: Sequence[Tensor], compute: Callable[[], tuple]) -> tuple:
        """The value of `compute()`, which depends on the tensors `on` alone; computed once for the same tensors.

        Raises: SurgeryError (changed-tensor).
        """
        if is_traced():  # the tensors are a transform's or a compiler's, and gone after the call
            return compute()
        kept = self._kept.get((adapter, *key))
        if kept is None:
            bits, signs = checksums(on), hints(on)  # before it is computed: a write in between is then found
            with torch.no_grad():
                kept = self._kept[adapter, *key] = Kept(tuple(on), bits, signs, compute())
        elif not are_same(on, kept.on):
            return compute()  # of other tensors for this call, as under functional_call: no promise was made of those
        elif (now := hints(on)) != kept.hints:
            if checksums(kept.on) != kept.bits:
                raise _changed([self.names[adapter]])
            kept.hints = now  # it was written over with what it was
        return kept.values

    def kept(self, adapter: nn.Module, key: tuple, on: Sequence[Tensor]) -> Kept | None:
        """What is kept under a key, if it is of these tensors."""
        kept = self._kept.get((adapter, *key))
        return kept if kept and are_same(on, kept.on) else None

    def verify(self) -> None:
        """Raises: SurgeryError (changed-tensor), if a tensor that a kept value depends on has other bits than when it
        was computed."""
        changed = {self.names[adapter]: None for (adapter, *_), kept in self._kept.items()
                   if checksums(kept.on) != kept.bits}
        if changed:
            raise _changed(changed)

    def refuse_training(self) -> None:
        """Raises: SurgeryError (wrong-mode); what `model.train()` has switched by then is switched back."""
        for module, mode in self._training:
            module.training = mode
        raise fail("wrong-mode", "this model is serving, and train() is for one whose tensors may change",
                   helps=("leave the block of serving() first",))


def _changed(names: Mapping[str, None] | list[str]) -> SurgeryError:
    return fail("changed-tensor", f"a tensor of {listed(names)} changed inside serving(): outputs may be of the old "
                "values", helps=("leave the block before training, loading or editing, and enter it again afterwards",))


@contextmanager
def serving(model: nn.Module, adapters: Mapping[str, Any]) -> Iterator[None]:
    """Inside, each adapter keeps its set-ups. Nests, in any number of threads: the last to leave ends it.

    Raises: SurgeryError (changed-tensor) at the end of each block, unless an exception passes.
    """
    with _LOCK:
        shared = next((a.serving for a in adapters.values() if a.serving is not None), None)
        shared = shared or Serving(model, {adapter: name for name, adapter in adapters.items()})
        shared.depth += 1
        for adapter in adapters.values():
            adapter.serving = shared
    try:
        yield
        shared.verify()
    finally:
        with _LOCK:
            shared.depth -= 1
            for adapter in adapters.values() if not shared.depth else ():
                adapter.serving = None


# ---------------------------------------------------------------------------------------------------- what changed


def are_same(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether they are the same objects in the same order, whatever numbers stand in them."""
    return len(tensors) == len(others) and all(a is b for a, b in zip(tensors, others))


def hints(tensors: Sequence[Tensor]) -> tuple:
    """Cheap signs of a change, which most writes change and nothing else does. A tensor of inference mode has no
    counter; one of a class of its own may have no address."""
    return tuple((t.device, t.dtype, t.data_ptr(), 0 if t.is_inference() else t._version)
                 for t in tensors if type(t) in (Tensor, nn.Parameter))


@torch.no_grad()
def checksums(tensors: Sequence[Tensor]) -> list[tuple]:
    """The kind of each tensor and 64 bits that another content has with a chance of 2⁻⁶³: a multilinear hash, one pass
    over it. A change of a single number is always seen. Any device, any dtype, a tensor that is made of others too."""
    parts = [part for tensor in tensors for part in _plain(tensor)]
    hashes = [_hash(part) for part in parts]  # all queued before the first is waited for
    return [(part.shape, part.dtype, part.device, int(number)) for part, number in zip(parts, hashes)]


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors of torch's own class that hold a tensor's numbers."""
    if tensor.is_meta:
        return
    if (flatten := getattr(tensor, "__tensor_flatten__", None)) is not None:
        for name in flatten()[0]:
            yield from _plain(getattr(tensor, name))
    elif (to_local := getattr(tensor, "to_local", None)) is not None:
        yield from _plain(to_local())
    else:
        plain = tensor.detach().as_subclass(Tensor)
        yield plain.int_repr() if plain.is_quantized else plain


def _hash(tensor: Tensor) -> Tensor:
    """Σ cᵢ bᵢ modulo 2⁶⁴ over rows of the numbers' bits as integers b, for random odd c; then the same over what the
    rows gave, until one number is left."""
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).contiguous().reshape(-1)
    if flat.nbytes % 8 == flat.storage_offset() * flat.element_size() % 8 == 0:
        flat = flat.view(torch.int64)  # several numbers at once
    flat, level = flat.view(_INTEGERS[flat.element_size()]), 0
    while flat.numel() > 1 or not level:
        sums = []
        for block in flat.split(_BLOCK * _ROW):
            whole = block.numel() // _ROW * _ROW
            rows = [block[:whole].view(-1, _ROW)] if whole else []
            rows += [block[None, whole:]] if whole < block.numel() or not block.numel() else []
            sums += [(_factors(level, str(flat.device))[:part.shape[1]] * part).sum(1) for part in rows]
        flat, level = torch.cat(sums), level + 1
    return flat.sum()


@cache
def _factors(level: int, device: str) -> Tensor:
    """Random odd numbers of 64 bits: an odd factor gives different numbers for different ones."""
    draw = torch.Generator().manual_seed(level)
    with torch.inference_mode(False):
        return (torch.randint(-2**62, 2**62, (_ROW,), generator=draw, device="cpu") * 2 + 1).to(device)
