"""Dropout masks, each in the form that its device is fastest with; a form is a class.

    Places   int32 or int64 [count]   the indices of what is dropped: few, and their gaps quickly drawn by a CPU
    Bits     bool [t, n]              True for each entry that is dropped
    Number   int64 []                 from which the draws are made again wherever they are needed: no memory, no pass

Takes and gives matrices [tokens, features]. Promises: each entry is dropped with the chance that was drawn for, by
itself; a mask drops the same in both passes of a step.
"""

from __future__ import annotations

from math import log1p

import torch
from torch import Tensor

from surgery.codegen import kernels, kernels_one_pass
from surgery.codegen.dropout_number import drawn_number

_ENDLESS = 2.0**40  # more than a tensor holds; a chance of 1e-19 has gaps that no integer holds


def mask(a: Tensor, p: float) -> Tensor:
    """A dropout mask, each entry dropped with probability p: places on a CPU, elsewhere bits."""
    return Places.drawn(a, p) if kernels.on_cpu(a) else Bits.drawn(a, p)


def number(a: Tensor, p: float) -> Tensor:
    """A dropout mask that is one number, from torch's generator of the device."""
    return Number.drawn(a, p)


def masked(a: Tensor, mask: Tensor) -> Tensor:
    """a with 0 where the mask says so."""
    return _form(mask).masked(a, mask)


def masked_(a: Tensor, mask: Tensor) -> Tensor:
    """a with 0 where the mask says so, written into a."""
    _form(mask).clear(a, mask)
    return a


def add_masked(y: Tensor, a: Tensor, m: Tensor, mask: Tensor, alpha: float = 1.0) -> Tensor:
    """y + alpha masked(a m), into y: [t, n], [t, r], [r, n] -> [t, n]."""
    return _form(mask).add(y, a, m, mask, alpha)


class Bits:
    """True for each entry that is dropped."""

    @staticmethod
    def drawn(a: Tensor, p: float) -> Tensor:
        return torch.empty_like(a, dtype=torch.bool).bernoulli_(p)

    @staticmethod
    def masked(a: Tensor, mask: Tensor) -> Tensor:
        return a.masked_fill(mask, 0.0)

    @staticmethod
    def clear(a: Tensor, mask: Tensor) -> None:
        a.masked_fill_(mask, 0.0)

    @staticmethod
    def add(y: Tensor, a: Tensor, m: Tensor, mask: Tensor, alpha: float) -> Tensor:
        return y.add_(masked(a @ m, mask), alpha=alpha)


class Number:
    """The draws made again."""

    @staticmethod
    def drawn(a: Tensor, p: float) -> Tensor:
        return drawn_number(a, p)

    @staticmethod
    def masked(a: Tensor, mask: Tensor) -> Tensor:
        return kernels_one_pass.masked(a, mask)

    @staticmethod
    def clear(a: Tensor, mask: Tensor) -> None:
        kernels_one_pass.masked_(a, mask)

    @staticmethod
    def add(y: Tensor, a: Tensor, m: Tensor, mask: Tensor, alpha: float) -> Tensor:
        return y.add_(kernels_one_pass.times_masked(a, m, mask), alpha=alpha)


class Places:
    """The indices of what is dropped, along rows that follow each other."""

    @staticmethod
    def drawn(a: Tensor, p: float) -> Tensor:
        count = a.numel()
        # The gaps between entries that chance takes are geometric. More than are drawn would be taken once in 1e15.
        draws = int(count * p + 8 * (count * p) ** 0.5) + 8
        rolled = torch.rand(draws, dtype=torch.float32, device="cpu")  # whatever the user's defaults are
        # 32 bits, which a CPU rounds to four times as fast, where the gaps' sum is far from what they hold
        dtype = torch.int32 if count < 2**28 and p > 1e-3 else torch.int64
        gaps = rolled.neg_().log1p_().mul_(1 / log1p(-p)).clamp_(max=_ENDLESS).to(dtype).add_(1)
        places = gaps.cumsum(0, dtype=dtype).sub_(1)
        places = places[:int(torch.searchsorted(places, count))]
        return places.to(torch.int32) if count < 2**31 else places

    @staticmethod
    def masked(a: Tensor, mask: Tensor) -> Tensor:
        return masked_(a.clone(memory_format=torch.contiguous_format), mask)

    @staticmethod
    def clear(a: Tensor, mask: Tensor) -> None:
        places = mask.long()
        if a.is_contiguous():
            a.view(-1).index_fill_(0, places, 0.0)  # which threads share; `put_` is refused where algorithms are fixed
        else:
            a[places // a.shape[-1], places % a.shape[-1]] = 0.0

    @staticmethod
    def add(y: Tensor, a: Tensor, m: Tensor, mask: Tensor, alpha: float) -> Tensor:
        if not y.is_contiguous():
            return Bits.add(y, a, m, mask, alpha)
        flat, places = y.view(-1), mask.long()
        before = flat.take(places)
        y.addmm_(a, m, alpha=alpha)
        flat.index_copy_(0, places, before)
        return y


def _form(mask: Tensor) -> type[Bits] | type[Number] | type[Places]:
    """The form that a mask has, by what it is made of."""
    return Bits if mask.dtype == torch.bool else Places if mask.ndim else Number
