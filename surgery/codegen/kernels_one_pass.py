"""Kernels that read and write each activation once: gains beside low-rank terms, and dropout drawn again from a number.

Each is an operation of torch's (`torch.ops.surgery`), so that whoever counts or traces sees one operation: on CUDA a
Triton kernel, where torch has Triton and it works; elsewhere the plain form, which is also what a kernel is held to.
Promises: sums over tokens are in float32 at least, in an order that shapes alone decide. No gradient is taken through
them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from surgery.codegen.dropout_number import dropped
from surgery.codegen.kernels import column_dot, wide

SMALL = 2**16  # numbers of an activation below which to start a kernel of Triton's takes longer than the passes
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


# ------------------------------------------------------------------------------------------ what a text calls


def gained(data: tuple[float, bool], y: Tensor, d: Tensor, h: Tensor, m: Tensor) -> Tensor:
    """d (y + c h m) if inside, else d y + c h m: [t, n], [n], [t, r], [r, n]. `data`: c, and whether inside."""
    return _alone(torch.ops.surgery.gained, y, d, h, m, *data)


def gained_dot(data: tuple[float], g: Tensor, y: Tensor, h: Tensor, m: Tensor) -> Tensor:
    """Σ g (y + c h m) over the rows: [n]."""
    return column_dot(g, torch.addmm(y, h, m, alpha=data[0]))


def gained_back(data: tuple[float, bool], g: Tensor, d: Tensor, y: Tensor,
                *low: Tensor) -> tuple[Tensor, Tensor]:
    """d g and Σ g y over the rows: [t, n] and [n]. With `low`, h and m: if inside, c h m is added to y, else to
    d g."""
    h, m = low or (None, None)
    out, sums = _alone(torch.ops.surgery.gained_back, g, d, y, h, m, *data)
    return out, sums.sum(0).to(g.dtype)


def masked_times(a: Tensor, number: Tensor, m: Tensor) -> Tensor:
    """a m without the entries of a that are dropped: [t, n], [n, r] -> [t, r]."""
    return _alone(torch.ops.surgery.masked_times, a, number, m)


def times_masked(h: Tensor, m: Tensor, number: Tensor) -> Tensor:
    """h m without the entries of it that are dropped: [t, r], [r, n] -> [t, n]."""
    return _alone(torch.ops.surgery.times_masked, h, m, number)


def masked_outer(data: tuple[bool], a: Tensor, number: Tensor, g: Tensor) -> Tensor:
    """aᵀ g without the entries of a that are dropped, [n, r], or its transpose: [t, n], [t, r]."""
    return _alone(torch.ops.surgery.masked_outer, a, number, g, *data).sum(0).to(a.dtype)


def masked(a: Tensor, number: Tensor) -> Tensor:
    """a without the entries that are dropped."""
    return _alone(torch.ops.surgery.masked, a, number)


def masked_(a: Tensor, number: Tensor) -> None:
    """The same, written into a."""
    _alone(torch.ops.surgery.masked_, a, number)


def _alone(operation: Any, *args: Any) -> Any:
    """What an operation gives where no gradient is taken through it. Raises: RuntimeError."""
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
        raise RuntimeError(f"no gradient is taken through {operation}, which is for steps whose gradients are written "
                           "out")
    return operation(*args)


# ------------------------------------------------------------------------------------------------- plain forms


def plain_gained(y: Tensor, d: Tensor, h: Tensor, m: Tensor, factor: float, inside: bool) -> Tensor:
    return torch.addmm(y, h, m, alpha=factor).mul_(d) if inside else torch.addmm(y * d, h, m, alpha=factor)


def plain_gained_back(g: Tensor, d: Tensor, y: Tensor, h: Tensor | None, m: Tensor | None, factor: float,
                      inside: bool) -> tuple[Tensor, Tensor]:
    out = g * d
    if h is not None and m is not None:
        if inside:
            y = torch.addmm(y, h, m, alpha=factor)
        else:
            out = torch.addmm(out, h, m, alpha=factor)
    return out, (g.to(wide(g)) * y).sum(0, keepdim=True)


def plain_masked(a: Tensor, number: Tensor) -> Tensor:
    return a.masked_fill(dropped(number, tuple(a.shape)), 0.0)


def plain_masked_(a: Tensor, number: Tensor) -> None:
    a.masked_fill_(dropped(number, tuple(a.shape)), 0.0)


def plain_times_masked(h: Tensor, m: Tensor, number: Tensor) -> Tensor:
    return plain_masked(h @ m, number)


def plain_masked_times(a: Tensor, number: Tensor, m: Tensor) -> Tensor:
    return plain_masked(a, number) @ m


def plain_masked_outer(a: Tensor, number: Tensor, g: Tensor, turned: bool) -> Tensor:
    kept = plain_masked(a, number)
    return (g.mT @ kept if turned else kept.mT @ g).to(wide(a))[None]


# ------------------------------------------------------------------------------------------------- operations


def _fits(numbers: int, tensors: Sequence[Tensor]) -> bool:
    """Whether a kernel of Triton's runs on these for an activation of so many numbers, which are not few: plain
    matrices of one device and dtype, on which Triton works."""
    first = tensors[0]
    if not numbers or numbers < SMALL or not first.is_cuda or first.dtype not in _DTYPES:
        return False
    is_plain = first.ndim == 2 and all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
    is_one = all(t.device == first.device and t.dtype in (first.dtype, torch.int64) for t in tensors)
    return is_plain and is_one and _works(first.device)


@cache
def _works(device: torch.device) -> bool:
    """Whether Triton compiles for a device and its kernel computes. (It needs a C compiler, and a GPU that has products
    of tiles.) What it does not is told once."""
    if not has_triton():
        return False
    try:
        from surgery.codegen import kernels_triton

        y, d = torch.ones(16, 16, device=device), torch.full((16,), 2.0, device=device)
        with torch.cuda.device(device):
            works = bool((kernels_triton.gained(y, d, y, y, 1.0, False) == 18).all())
        reason = "it computes wrong numbers"
    except Exception as error:  # of a driver, a compiler of C, or Triton's own: they have no common class
        works, reason = False, str(error).partition("\n")[0]
    if not works:
        warnings.warn(f"Triton does not work on {device} ({reason}): plain operations run there, which are slower",
                      stacklevel=2)
    return works


def _kernel_or_plain(name: str, plain: Callable[..., Any], size: Callable[..., int]) -> Callable[..., Any]:
    """What an operation runs: Triton's kernel of its name, where one runs on what it is given, else the plain form.
    `size` says how many numbers the activation has that is read or made."""
    def run(*args: Any) -> Any:
        if not _fits(size(*args), [a for a in args if isinstance(a, Tensor)]):
            return plain(*args)
        from surgery.codegen import kernels_triton

        with torch.cuda.device(args[0].device):  # a kernel is started on the device that is current
            return getattr(kernels_triton, name)(*args)

    return run


def _first(a: Tensor, *others: Any) -> int:
    return a.numel()


def _product(h: Tensor, m: Tensor, *others: Any) -> int:
    return h.shape[0] * m.shape[1]


_LIBRARY = torch.library.Library("surgery", "FRAGMENT")
for _schema, _plain, _size in (
        ("gained(Tensor y, Tensor d, Tensor h, Tensor m, float factor, bool inside) -> Tensor", plain_gained, _first),
        ("gained_back(Tensor g, Tensor d, Tensor y, Tensor? h, Tensor? m, float factor, bool inside) "
         "-> (Tensor, Tensor)", plain_gained_back, _first),
        ("masked(Tensor a, Tensor number) -> Tensor", plain_masked, _first),
        ("masked_(Tensor(a!) a, Tensor number) -> ()", plain_masked_, _first),
        ("times_masked(Tensor h, Tensor m, Tensor number) -> Tensor", plain_times_masked, _product),
        ("masked_times(Tensor a, Tensor number, Tensor m) -> Tensor", plain_masked_times, _first),
        ("masked_outer(Tensor a, Tensor number, Tensor g, bool turned) -> Tensor", plain_masked_outer, _first)):
    _name = _schema.partition("(")[0]
    _LIBRARY.define(_schema)
    _LIBRARY.impl(_name, _kernel_or_plain(_name, _plain, _size), "CompositeExplicitAutograd")
