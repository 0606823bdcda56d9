"""How the tensors of one module go from PEFT's side to ours and back.

Takes tensors by the name that PEFT saves them under, below the module's own; one that belongs to the whole model has
its full name, which begins with `base_model.`, and `{number}` in it stands for the number of the module among the
adapted ones. Gives ours by leaf key (`add_low_rank.A`), and back. Promises: a tensor that goes to the other side and
back has the same bits; all views are differentiable, so that gradients go through them too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from surgery.layers.layouts import TRANSPOSED_EXPERTS
from surgery.layers.survey import Site

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Place:
    """One module: its layout's name, its weight's sides as a matrix [out, in], its weight's shape as it is stored,
    whether it has a bias, its number among the modules that PEFT adapts (in the model's order), whether it is a
    convolution that is not the same in all directions or that leaves gaps, and whether it is one that pads with
    something else than zeros. A stack is `experts`, or `turned experts`
    where PEFT takes for the outputs what are the inputs.
    """

    layout: str
    out: int
    in_: int
    shape: tuple[int, ...]
    has_bias: bool = True
    number: int = 0
    uneven: bool = False
    pads_otherwise: bool = False

    @classmethod
    def of(cls, site: Site, number: int = 0) -> Place:
        shape, module, uneven, otherwise = site.stored_shape, site.module, False, False
        if site.stack is not None:
            return cls(_stack(site), site.out, site.in_, shape, False, number)
        if kernel := shape[2:]:
            assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))  # no other layout has a kernel
            gaps = set(module.dilation) != {1}
            pads = module.padding == "same" if isinstance(module.padding, str) else any(module.padding)
            otherwise = pads and module.padding_mode != "zeros"
            plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)
            uneven = gaps or not plain or any(
                len(set(sides)) > 1 for sides in (kernel, module.stride, module.padding))
        return cls(site.layout.name, site.out, site.in_, shape, site.has_bias, number, uneven, otherwise)

    @property
    def kernel(self) -> tuple[int, ...]:
        """The sides of a convolution's kernel; none for other layouts."""
        return self.shape[2:]


def _stack(site: Site) -> str:
    """How PEFT sees a stack: by an attribute that Llama-4's experts, stored [in, out], do not have."""
    is_turned = site.layout is TRANSPOSED_EXPERTS
    if is_turned is not bool(getattr(site.module, "is_transposed", False)):
        return "turned experts"
    return "experts" if site.stack != 1 or not is_turned else "single transposed expert"  # which PEFT adds [out, in] to


class Correspondence(Protocol):
    """How PEFT's tensors of one module map onto ours."""

    def to_ours(self, theirs: Tensors, place: Place) -> dict[str, Tensor]: ...

    def to_peft(self, ours: Tensors, place: Place) -> dict[str, Tensor]: ...


_Seen = TypeVar("_Seen", bound=Tensor | tuple[Tensor, ...])
_Kept = TypeVar("_Kept", bound=Tensor | tuple[Tensor, ...])


@dataclass(frozen=True)
class View(Generic[_Seen, _Kept]):
    """Tensors of PEFT's as ours, and back: each takes the tensors and the place, and gives one tensor or several."""

    to_ours: Callable[..., _Seen]
    to_peft: Callable[..., _Kept]


@dataclass(frozen=True)
class Pair:
    """The tensors that PEFT calls `theirs` are our leaves `ours`, seen through a view."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    view: View


@dataclass(frozen=True)
class Pairs:
    """A correspondence pair by pair. A pair of which a tensor is not there is passed over, as where a layer has no
    bias.
    """

    pairs: tuple[Pair, ...]

    def to_ours(self, theirs: Tensors, place: Place) -> dict[str, Tensor]:
        return _through(theirs, place, ((_named(p.theirs, place), p.ours, p.view.to_ours) for p in self.pairs))

    def to_peft(self, ours: Tensors, place: Place) -> dict[str, Tensor]:
        return _through(ours, place, ((p.ours, _named(p.theirs, place), p.view.to_peft) for p in self.pairs))


def _through(tensors: Tensors, place: Place, rows) -> dict[str, Tensor]:
    mapped: dict[str, Tensor] = {}
    for given, wanted, see in rows:
        if all(name in tensors for name in given):
            seen = see(*(tensors[name] for name in given), place)
            mapped.update(zip(wanted, seen if isinstance(seen, tuple) else (seen,), strict=True))
    return mapped


def _named(names: tuple[str, ...], place: Place) -> tuple[str, ...]:
    return tuple(name.format(number=place.number) for name in names)


def pairs(*rows: tuple[str | tuple[str, ...], str | tuple[str, ...], View]) -> Pairs:
    return Pairs(tuple(Pair(_tuple(theirs), _tuple(ours), view) for theirs, ours, view in rows))


def _tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


# ---------------------------------------------------------------------------------------------------------- views

SAME = View(lambda t, place: t, lambda t, place: t)
TURNED = View(lambda t, place: t.mT, lambda t, place: t.mT)
# PEFT keeps a row, a column or a single number for what is a vector or a scalar here, or the other way round.
FLAT = View(lambda t, place: t.flatten(), lambda t, place: t[None])
COLUMN = View(lambda t, place: t.flatten(), lambda t, place: t[:, None])
SCALAR = View(lambda t, place: t.squeeze(0), lambda t, place: t[None])
# Of a tensor that all modules share, a module takes the leading columns or rows.
COLUMNS = View(lambda t, place: t[:, :place.in_], lambda t, place: t)
ROWS = View(lambda t, place: t[:place.out], lambda t, place: t)
# A convolution's kernels [m, channels, ...] as rows [m, channels · ...], and one number for each output as a kernel of
# size 1.
KERNELS = View(lambda t, place: t.flatten(1), lambda t, place: t.reshape(-1, *place.shape[1:]))
POINTS = View(lambda t, place: t.flatten(1), lambda t, place: t.reshape(*t.shape, *(1 for _ in place.kernel)))
# Of a stack, PEFT has the rows of all A below each other, expert by expert, and the columns of all B side by side, by
# rank and then by expert.
EACH_A = View(lambda t, place: t.unflatten(0, (place.shape[0], -1)), lambda t, place: t.flatten(0, 1))
EACH_B = View(lambda t, place: t.unflatten(1, (-1, place.shape[0])).permute(2, 0, 1),
              lambda t, place: t.permute(1, 2, 0).flatten(1))
EACH_A_TURNED = View(lambda t, place: EACH_A.to_ours(t, place).mT, lambda t, place: EACH_A.to_peft(t.mT, place))
EACH_B_TURNED = View(lambda t, place: EACH_B.to_ours(t, place).mT, lambda t, place: EACH_B.to_peft(t.mT, place))
CHANNELS = View(lambda t, place: t.flatten(), lambda t, place: t.reshape(1, -1, *(1 for _ in place.kernel)))
# Places of entries: whole numbers row by row here, 32 bits or pairs of row and column there.
PLACES = View(lambda t, place: t.long(), lambda t, place: t.int())
ROW_AND_COLUMN = View(lambda t, place: t[0].long() * place.in_ + t[1].long(),
                      lambda t, place: torch.stack([t // place.in_, t % place.in_]))
ROW_AND_COLUMN_32 = View(ROW_AND_COLUMN.to_ours, lambda t, place: ROW_AND_COLUMN.to_peft(t, place).int())


def _upper(stack: Tensor) -> Tensor:
    """What stands above the diagonals of matrices [b, k, k], row by row: [b, k (k - 1) / 2]."""
    rows, columns = torch.triu_indices(stack.shape[-1], stack.shape[-1], 1, device=stack.device)
    return stack[:, rows, columns]


def _skew(upper: Tensor) -> Tensor:
    """The skew matrices [b, k, k] with the numbers [b, k (k - 1) / 2] above their diagonals."""
    size = round((1 + (1 + 8 * upper.shape[1]) ** 0.5) / 2)
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    each = torch.arange(len(upper), device=upper.device)[:, None]
    filled = upper.new_zeros(len(upper), size, size).index_put((each, rows, columns), upper)
    return filled - filled.mT


# Only Q - Qᵀ counts of our Q, a matrix or a stack, and PEFT keeps half of that: the numbers above the diagonal.
SKEW = View(lambda t, place: _skew(t), lambda t, place: _upper(t - t.mT) / 2)
SKEW_TURNED = View(lambda t, place: _skew(t).mT, lambda t, place: _upper(t.mT - t) / 2)
SKEW_OF_ONE = View(lambda t, place: _skew(t[None])[0], lambda t, place: _upper((t - t.mT)[None])[0] / 2)
SKEW_SHARED = View(lambda t, place: _skew(t)[0], lambda t, place: _upper((t - t.mT)[None]) / 2)
