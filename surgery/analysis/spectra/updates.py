"""Updates: every ΔW = W' - W of an operated model, or between two models, one matrix at a time.

Takes a surgeon or the sites of two models, and where their tensors are read; gives `Pending` weights that load
themselves when they are asked. Promises: one weight is held at a time; ΔW of a formula is computed in float64 from the
formula, never as the difference of two rounded weights; where the formula makes ΔW a product of thin factors,
it stays one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from surgery.analysis.spectra.orthogonality import Defect, defects
from surgery.codegen.compiled import Compiled
from surgery.ir.builders import scaled, summands, times, total
from surgery.ir.dense import dense, in_dtype
from surgery.ir.expression import Expr
from surgery.layers.survey import Site
from surgery.matching.name_ranges import module_type
from surgery.planning.compile import Placed
from surgery.rewrite.low_rank import Factors, factors
from surgery.rewrite.normal_form import simplify
from surgery.rewrite.norms import spread
from surgery.runtime.frozen_opaque import frozen
from surgery.runtime.surgeon import Surgeon

WIDE = torch.float64
_ROWS = 4096  # of a large matrix, so many at a time
Read = Callable[[Site], Tensor]
Leaves = Mapping[str, Tensor]


@dataclass(frozen=True)
class Update:
    """One ΔW [out, in]: a matrix, or factors U [out, r] and V [r, in]. `weight` is W in float64.

    `rounding` bounds the singular values that rounding alone makes: of W' as it is stored, or of float64.
    """

    name: str
    layer: int | None
    weight: Tensor
    delta: Tensor | tuple[Tensor, Tensor]
    rounding: float
    defects: tuple[Defect, ...] = ()

    @property
    def type(self) -> str:
        """The module's name without its layer: `self_attn.q_proj`, `mlp.experts.gate_up_proj`."""
        return module_type(self.name)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The matrices whose product ΔW is: itself, or its factors."""
        return self.delta if isinstance(self.delta, tuple) else (self.delta,)


@dataclass(frozen=True)
class Pending:
    """A weight not yet read. `load()` gives its updates: one, or one for each matrix of a stack."""

    name: str
    load: Callable[[], Iterator[Update]]


def _each(site: Site, *tensors: Tensor) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """Stored tensors of a site as pairs of a name and matrices: those of a stack by their number."""
    matrices = [site.layout.matrix(t.detach()) for t in tensors]
    if site.stack is None:
        yield site.name, tuple(matrices)
    else:
        yield from ((f"{site.name}.{i}", tuple(m[i] for m in matrices)) for i in range(site.stack))


# ------------------------------------------------------------------------------------------------------ two models


def of_models(pairs: Mapping[Site, tuple[Read, Read]]) -> list[Pending]:
    """The updates between two models: for each site, how W and W' are read."""
    def between(site: Site, base: Read, tuned: Read) -> Iterator[Update]:
        for name, (w, changed) in _each(site, base(site), tuned(site)):
            wide = w.to(WIDE)
            delta = changed.to(wide.device, WIDE) - wide
            # Only W' brings a rounding in: W counts as exact, and two equal weights differ by exactly nothing.
            yield Update(name, site.layer, wide, delta, rounding(changed) if delta.any() else 0.0)

    return [Pending(site.name, partial(between, site, *read)) for site, read in pairs.items()]


def rounding(stored: Tensor) -> float:
    """A bound on the singular values that rounding alone makes of a matrix [m, n] in its dtype.

    An error that is even within half a unit in the last place has the variance ulp² / 12, and a random matrix with
    independent entries of variances b² has the norm max over rows ‖b_i‖ + max over columns ‖b_j‖, to a few per cent.
    What is stored in float32 or wider was mostly computed in that dtype too, which is one more rounding.
    Source: Bandeira & van Handel, Annals of Probability 2016, theorem 1.1.
    """
    roundings = 1.1 if stored.dtype.itemsize < 4 else 2.2
    rows, columns = [], torch.zeros((), dtype=WIDE, device=stored.device)
    for part in stored.split(_ROWS):
        _, exponent = torch.frexp(part if part.dtype == WIDE else part.float())
        squares = torch.exp2((exponent - 1).to(WIDE)).mul_(torch.finfo(stored.dtype).eps).square_()
        squares *= part != 0  # a zero is not rounded
        rows.append(float(squares.sum(dim=1).max()))
        columns = columns + squares.sum(dim=0)
    return roundings / 12**0.5 * (max(rows) ** 0.5 + float(columns.max()) ** 0.5)


# -------------------------------------------------------------------------------------------------- operated models


def of_surgeon(surgeon: Surgeon, read: Read, leaves: Callable[[Placed], Leaves]) -> list[Pending]:
    """The updates of an operated model: how each frozen weight is read, and the tensors of each adapter by key."""
    return [Pending(p.site.name, lambda p=p: _operated(surgeon, p, read(p.site), leaves(p)))
            for p in surgeon.plan.placed]


def _operated(surgeon: Surgeon, placed: Placed, stored: Tensor, leaves: Leaves) -> Iterator[Update]:
    adapter, site = surgeon.adapters[placed.site.name], placed.site
    narrow = torch.promote_types(stored.dtype, torch.float32)  # in which the transforms run
    for i, (name, (w,)) in enumerate(_each(site, stored)):
        # a parameter that all matrices of a stack share has no axis for them
        own = {key: t if key in adapter.shared or site.stack is None else t[i] for key, t in leaves.items()}
        values = {"weight": w.to(WIDE), **{key: in_dtype(t.detach().to(w.device), WIDE) for key, t in own.items()}}
        delta, noise = _delta(placed, values)
        coarsest = max((torch.finfo(t.dtype).eps for t in own.values() if t.is_floating_point()), default=0.0)
        if isinstance(delta, Tensor) and delta.norm() <= coarsest * values["weight"].norm() and \
                delta.norm() <= _moved(placed, values, own):
            noise = float("inf")  # no larger than the rounding of the parameters themselves
        yield Update(name, site.layer, values["weight"], delta, noise,
                     defects(placed.formula, {key: in_dtype(t, narrow) for key, t in values.items()}))


def _moved(placed: Placed, values: Leaves, own: Leaves) -> Tensor:
    """How far ΔW is from itself with each parameter a unit in its last place larger or smaller, at random: a rotation
    by small angles, that are as exact as large ones, by little; one whose parameters are near 1 by their rounding."""
    draw, moved = torch.Generator().manual_seed(0), dict(values)
    for key, stored in own.items():
        if stored.is_floating_point():
            signs = torch.randint(0, 2, stored.shape, generator=draw, device="cpu").to(values[key]) * 2 - 1
            moved[key] = values[key] * (1 + torch.finfo(stored.dtype).eps * signs)
    one, other = (_delta(placed, each)[0] for each in (values, moved))
    assert isinstance(one, Tensor) and isinstance(other, Tensor)
    return (one - other).norm()


def _delta(placed: Placed, values: Leaves) -> tuple[Tensor | tuple[Tensor, Tensor], float]:
    """ΔW and the rounding of float64 in it."""
    expr, thin = change(placed.compiled)
    if thin is not None:
        return (dense(thin[0], values), dense(thin[1], values)), 0.0
    # By the program that merging would run: what is measured is what a merged model would hold, in float64.
    program = placed.compiled.of_weight(expr).weights
    layer = frozen(placed.site.module, placed.site.layout, placed.site.parameter)
    layer.weight = values["weight"]
    layer.device = layer.weight.device  # of a model of which one weight is in memory at a time: the rest has no numbers
    leaves = {key: t for key, t in values.items() if key != "weight"}
    delta = program.setup(layer, leaves, program.once(layer, WIDE), WIDE, WIDE)[0]
    return delta, max(delta.shape) * torch.finfo(WIDE).eps * float(values["weight"].norm() + delta.norm())


@lru_cache(maxsize=1024)
def change(compiled: Compiled) -> tuple[Expr, Factors | None]:
    """W' - W in normal form, and its thin factors where it has some."""
    weight = compiled.merged_form.weight
    # W is taken away as one more term, so that the normal form cancels it: a difference of numbers would round.
    frozen = Expr("weight", (), None, weight.shape)
    delta = simplify(total([*_terms(weight), times(-1, frozen)], weight.shape))
    return delta, factors(delta)


def _terms(expr: Expr) -> Iterator[Expr]:
    """The summands of an expression, those of (I + L) x = x + L x too: then W cancels, and what is left may be thin."""
    scalar, rest = scaled(expr)
    apart = spread(rest)
    if rest.op == "add" or apart is not None:
        parts = summands(rest if apart is None else apart)
        yield from (t if scalar is None else times(scalar, t) for part in parts for t in _terms(part))
    else:
        yield expr
