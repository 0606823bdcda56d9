"""The rows of PEFT's methods that add a structured update of their own to the weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, isqrt, prod
from typing import Any

from torch import Tensor

from surgery.peft.table.method import NO_BIAS, OFF, Config, Family, Method, Renamed
from surgery.peft.tensor_mapping import (
    COLUMNS,
    KERNELS,
    POINTS,
    ROWS,
    SAME,
    SCALAR,
    TURNED,
    Correspondence,
    Pairs,
    Place,
    Tensors,
    View,
    pairs,
)

NOTHING = Renamed({})
_RANK = {"rank": "r"}


def linears(rows: Pairs) -> dict[str, Correspondence]:
    """One correspondence for both layouts of a linear layer."""
    return {"linear": rows, "transposed linear": rows}


def solid(config: Config, place: Place) -> str:
    return "PEFT has no three-dimensional convolution" if len(place.kernel) > 2 else ""


# ---------------------------------------------------------------------------------------------- VeRA and its kin

_VERA = Family("VERA", "VeraConfig", {"bias": NO_BIAS}, biases="vera_only")
_RANDLORA = Family("RANDLORA", "RandLoraConfig", {"bias": NO_BIAS}, biases="randlora_only")
_TINYLORA = Family("TINYLORA", "TinyLoraConfig", {"bias": NO_BIAS, "weight_tying": OFF}, biases="tinylora_only")
_UNILORA = Family("UNILORA", "UniLoraConfig", {"bias": NO_BIAS}, biases="unilora_only")
_VBLORA = Family("VBLORA", "VBLoRAConfig", {"bias": NO_BIAS, "save_only_topk_weights": OFF}, biases="vblora_only")


def _own_bases(scale: Tensor, gain: Tensor, a: Tensor, b: Tensor, place: Place) -> tuple[Tensor, ...]:
    """PEFT meets B, flat over (base, rank), with the scaled A, flat over (rank, base): as its B is random, that is the
    paper's sum over the bases with other columns of B.
    """
    count, short = gain.shape
    rank, wide = len(scale), max(place.out, place.in_)
    columns = b[:wide, :count].reshape(wide, rank, count).mT.reshape(wide, short)
    return scale.mT, gain, a[:, 0, :short], columns


def _pefts_bases(scale: Tensor, gain: Tensor, a: Tensor, b: Tensor, place: Place) -> tuple[Tensor, ...]:
    count, rank = scale.shape
    return scale.mT, gain, a[:, None], b.reshape(len(b), count, rank).mT.reshape(len(b), count, rank)


def _shared_bases(config: Config, places: Sequence[Place]) -> dict[str, tuple[int, ...]]:
    """For the longest outputs and the longest inputs, though no module need have both."""
    short, wide = sorted((max(p.in_ for p in places), max(p.out for p in places)))
    rank = config["r"]
    return {"base_model.randlora_A": (rank, 1, short), "base_model.randlora_B": (wide, ceil(short / rank), rank)}


def _too_high(config: Config, place: Place) -> str:
    return "the rank is larger than a side" if config["r"] > min(place.out, place.in_) else ""


def _uneven_bases(config: Config, place: Place) -> str:
    return "the last base is a part of one" if min(place.out, place.in_) % config["r"] else ""


def _unilora_places(config: Config, places: Sequence[Place]) -> list[Tensors]:
    """Every entry of the vector is used as often as any other, up to one; what is scaled by 1 / √(how often)."""
    import numpy as np
    import torch

    rank, length = config["r"], config["theta_d_length"]
    shapes = [shape for p in places for shape in ((rank, p.in_), (p.out, rank))]
    total = sum(m * n for m, n in shapes)
    generator = np.random.default_rng(config["proj_seed"])
    each = np.repeat(np.arange(length), total // length)
    more = [generator.choice(length, size=total % length, replace=False)] if total % length else []
    drawn = np.concatenate([each, *more])
    generator.shuffle(drawn)
    at = [part.reshape(shape) for part, shape in zip(torch.as_tensor(drawn).split([m * n for m, n in shapes]), shapes)]
    size = torch.as_tensor(drawn).bincount(minlength=length).float().rsqrt()
    return [{"unilora_indices_A": a, "unilora_indices_B": b, "unilora_scales_A": size[a], "unilora_scales_B": size[b]}
            for a, b in zip(at[::2], at[1::2])]


def _own_vector(theta: Tensor, at_a: Tensor, at_b: Tensor, scale_a: Tensor, scale_b: Tensor, place: Place) -> tuple:
    """PEFT keeps the scale of each entry of A and B; we that of each entry of the vector."""
    size = scale_a.new_zeros(len(theta))
    for at, scale in ((at_a, scale_a), (at_b, scale_b)):
        size = size.scatter(0, at.flatten(), scale.flatten())
    return theta, at_a, at_b, size


_SHARED_VECTOR = pairs((
    ("base_model.unilora_theta_d", *(f"unilora_{what}_{x}" for what in ("indices", "scales") for x in "AB")),
    tuple(f"add_one_vector.{name}" for name in ("theta", "at_A", "at_B", "size")),
    View(_own_vector, lambda theta, at_a, at_b, size, place: (theta, at_a, at_b, size[at_a], size[at_b]))))
_TINY = (("base_model.tinylora_v.{number}", "add_tiny.v", SAME), ("tinylora_A", "add_tiny.A", SAME),
         ("tinylora_B", "add_tiny.B", SAME), ("tinylora_P", "add_tiny.P", SAME))

BASES = (
    Method("vera", _VERA, "vera", Renamed({**_RANK, "start": "d_initial", "dropout": "vera_dropout"}), linears(pairs(
        ("base_model.vera_A", "add_shared_low_rank.A", COLUMNS), ("base_model.vera_B", "add_shared_low_rank.B", ROWS),
        ("vera_lambda_d", "add_shared_low_rank.d", SAME), ("vera_lambda_b", "add_shared_low_rank.b", SAME)))),
    Method("randlora", _RANDLORA, "randlora",
           Renamed({**_RANK, "alpha": "randlora_alpha", "dropout": "randlora_dropout"}),
           linears(pairs((
               ("randlora_lambda", "randlora_gamma", "base_model.randlora_A", "base_model.randlora_B"),
               tuple(f"add_random_bases.{name}" for name in "lgAB"), View(_own_bases, _pefts_bases)))),
           refuses=_uneven_bases, shared=_shared_bases, derived=("randlora_A", "randlora_B")),
    Method("tinylora", _TINYLORA, "tinylora", Renamed({**_RANK, "count": "u", "dropout": "tinylora_dropout"}),
           {**linears(pairs(*_TINY)), "embedding": pairs(*_TINY)}, refuses=_too_high),
    Method("unilora", _UNILORA, "unilora",
           Renamed({**_RANK, "length": "theta_d_length", "bound": "init_theta_d_bound", "dropout": "unilora_dropout"}),
           linears(_SHARED_VECTOR), again=_unilora_places),
    Method("vblora", _VBLORA, "vblora", Renamed({
        **_RANK, "count": "num_vectors", "length": "vector_length", "best": "topk",
        "bound": "init_vector_bank_bound", "dropout": "vblora_dropout"}), linears(pairs(
        ("base_model.vblora_vector_bank", "add_from_bank.bank", SAME), ("vblora_logits_A", "add_from_bank.L_A", SAME),
        ("vblora_logits_B", "add_from_bank.L_B", SAME)))),
)

# -------------------------------------------------------------------------- products of factors, and grids of them

_BY_MODULE = {"r": "rank_pattern", "alpha": "alpha_pattern"}
_LOHA = Family("LOHA", "LoHaConfig", {"use_effective_conv2d": OFF, "rank_dropout": OFF, "module_dropout": OFF},
               patterns=_BY_MODULE)
_LOKR = Family("LOKR", "LoKrConfig", {"use_effective_conv2d": OFF, "rank_dropout": OFF, "module_dropout": OFF,
                                      "decompose_both": OFF}, patterns=_BY_MODULE)
_HIRA = Family("HIRA", "HiraConfig", {}, patterns={"r": "rank_pattern"})
_DELORA = Family("DELORA", "DeloraConfig", {"bias": NO_BIAS}, biases="delora_only",
                 patterns={"r": "rank_pattern", "delora_lambda": "lambda_pattern"})
_GRALORA = Family("GRALORA", "GraloraConfig", {"bias": NO_BIAS, "hybrid_r": OFF}, biases="gralora_only")
_MISS = Family("MISS", "MissConfig", {"bias": NO_BIAS, "init_weights": (True, False, None)}, biases="miss_only")
_C3A = Family("C3A", "C3AConfig", {"bias": NO_BIAS}, patterns={"block_size": "block_size_pattern"}, biases="c3a_only")

_HADAMARD = pairs(*((f"hada_w{i}_{a}", f"add_hadamard.{b}{i}", SAME) for i in "12" for a, b in ("aB", "bA")))
_HIRA_FACTORS = ("hira_A", "add_weight_times_low_rank.A"), ("hira_B", "add_weight_times_low_rank.B")

# PEFT splits the channels of a convolution rather than the entries of its kernels, and at a factor of the user's if
# given.
_LOKR_SPLIT = """
update kronecker_of(rank: int, alpha: float, factor: int, kernel: int) {
  let rows = if factor > 0 then divisor(out, factor) else divisor(out)
  let columns = if factor > 0 then divisor(in / kernel, factor) else divisor(in / kernel)
  param C[rows, columns] = 0
  param B[out / rows, rank] ~ kaiming_uniform(a = sqrt(5))
  param A[rank, in / columns] ~ kaiming_uniform(a = sqrt(5))
  return (alpha / rank) * kron(C, B @ A)
}
spec lokr_split(rank: int = 8, alpha: float = 8, factor: int = -1, kernel: int = 1)
target any "**" {
  add kronecker_of(rank, alpha, factor, kernel)
}
"""
# The second factor is whole where the rank is at least half of its longer side.
_LOKR_WHOLE = """
update kronecker_whole(rank: int, alpha: float, factor: int, kernel: int) {
  let rows = if factor > 0 then divisor(out, factor) else divisor(out)
  let columns = if factor > 0 then divisor(in / kernel, factor) else divisor(in / kernel)
  param C[rows, columns] = 0
  param D[out / rows, in / columns] ~ kaiming_uniform(a = sqrt(5))
  return (alpha / rank) * kron(C, D)
}
spec lokr_whole(rank: int = 8, alpha: float = 8, factor: int = -1, kernel: int = 1)
target any "**" {
  add kronecker_whole(rank, alpha, factor, kernel)
}
"""


def kernel(config: Config, place: Place) -> dict[str, Any]:
    """The number of entries of a convolution's kernel, as a spec's parameter."""
    return {"kernel": prod(place.kernel)}


def _split(size: int, factor: int) -> int:
    """The first of the two factors into which PEFT splits a size."""
    if factor > 0 and size % factor == 0:
        return factor
    return _divisor(size, min(isqrt(size), factor) if factor > 0 else isqrt(size))


def _divisor(size: int, most: int) -> int:
    return max(d for d in range(1, min(size, most) + 1) if size % d == 0)


def _lokr(whole: bool, split: bool) -> Callable[[Config, Place], str]:
    """Refuses where PEFT's second factor is not whole, or is, and where its sizes are not split in a way of its own, or
    are.
    """

    def refuses(config: Config, place: Place) -> str:
        factor, channels = config.get("decompose_factor", -1), place.in_ // prod(place.kernel)
        longer = max(n // _split(n, factor) for n in (place.out, channels))
        scrambled = whole and len(place.kernel) == 1
        fits = (2 * config["r"] >= longer) == whole and (whole or (factor > 0 or prod(place.kernel) > 1) == split)
        other = factor > 0 and any(_split(n, factor) != _divisor(n, factor) for n in (place.out, channels))
        why = "PEFT splits its sizes otherwise than any spec here"
        return solid(config, place) or why * (not fits or other or scrambled)

    return refuses


def _factors(step: str) -> dict[str, Correspondence]:
    rows = (("lokr_w1", f"{step}.C", SAME), ("lokr_w2_a", f"{step}.B", SAME), ("lokr_w2_b", f"{step}.A", SAME))
    return {"linear": pairs(*rows), "convolution": pairs(*rows)}


_ALPHA = {**_RANK, "alpha": "alpha"}
_SPLIT = Renamed({**_ALPHA, "factor": "decompose_factor"}, kernel)
_KERNEL_OF_D = View(lambda t, place: t.flatten(1), lambda t, place: t.reshape(len(t), -1, *place.kernel))

PRODUCTS = (
    Method("loha", _LOHA, "loha", Renamed(_ALPHA), {"linear": _HADAMARD, "convolution": _HADAMARD}, refuses=solid),
    Method("lokr", _LOKR, "lokr", Renamed(_ALPHA), _factors("add_kronecker"), refuses=_lokr(whole=False, split=False)),
    Method("lokr, other sizes", _LOKR, _LOKR_SPLIT, _SPLIT, _factors("add_kronecker_of"),
           refuses=_lokr(whole=False, split=True)),
    # On a one-dimensional convolution PEFT's product mixes the kernel with the channels: it is not the Kronecker
    # product.
    Method("lokr, whole", _LOKR, _LOKR_WHOLE, _SPLIT, {
        layout: pairs(("lokr_w1", "add_kronecker_whole.C", SAME), ("lokr_w2", "add_kronecker_whole.D", view))
        for layout, view in (("linear", SAME), ("convolution", _KERNEL_OF_D))}, refuses=_lokr(whole=True, split=False)),
    Method("hira", _HIRA, "hira", Renamed({"rank": "r", "dropout": "hira_dropout"}), {
        **linears(pairs(*((*names, SAME) for names in _HIRA_FACTORS))),
        "convolution": pairs((*_HIRA_FACTORS[0], KERNELS), (*_HIRA_FACTORS[1], POINTS)),
        "embedding": pairs(("hira_embedding_A", _HIRA_FACTORS[1][1], TURNED),
                           ("hira_embedding_B", _HIRA_FACTORS[0][1], TURNED))}),
    Method("delora", _DELORA, "delora", Renamed({**_RANK, "lambda": "delora_lambda", "dropout": "module_dropout"}), {
        "linear": pairs(("delora_A", "add_bounded.A", SAME), ("delora_B", "add_bounded.B", SAME),
                        ("delora_lambda", "add_bounded.l", SCALAR))}, derived=("delora_w_norm",)),
    Method("gralora", _GRALORA, "gralora",
           Renamed({"rank": "r", "alpha": "alpha", "grid": "gralora_k", "dropout": "gralora_dropout"}), linears(pairs(
               ("gralora_A", "add_block_grid.A", TURNED), ("gralora_B", "add_block_grid.B", TURNED)))),
)

# ------------------------------------------------------------------------------------ repeated and circulant blocks

# A rank that does not divide the inputs: the last block of columns is cut.
_MISS_CUT = """
update repeated_and_cut(rank: int, count: int) {
  param M[out, rank] = 0
  return columns(M @ kron(ones(1, count), I(rank)), in)
}
spec miss_cut(rank: int = 64, count: int = 1, dropout: float = 0%)
target any "**" {
  add repeated_and_cut(rank, count) dropout(dropout)
}
"""
_MISS_MINI = """
update repeated_both_ways(rank: int, mini: int) {
  param M[mini, rank] = 0
  return kron(ones(out / mini, in / rank), M)
}
spec miss_mini(rank: int = 64, mini: int = 1, dropout: float = 0%)
target any "**" {
  add repeated_both_ways(rank, mini) dropout(dropout)
}
"""
_MISS_NAMES = {**_RANK, "dropout": "miss_dropout"}


def _divides(config: Config, place: Place) -> bool:
    return place.in_ % config["r"] == 0


def _cut(config: Config, place: Place) -> dict[str, Any]:
    return {"count": ceil(place.in_ / config["r"])}


BLOCKS = (
    Method("miss", _MISS, "miss", Renamed(_MISS_NAMES), {"linear": pairs(("miss_block", "add_repeated.M", TURNED))},
           refuses=lambda config, place: "" if _divides(config, place) else "the last block is cut"),
    Method("miss, cut", _MISS, _MISS_CUT, Renamed(_MISS_NAMES, _cut), {
        "linear": pairs(("miss_block", "add_repeated_and_cut.M", TURNED))},
           refuses=lambda config, place: "no block is cut" if _divides(config, place) else ""),
    Method("miss_bat", _MISS, "miss_bat", Renamed(_RANK), {
        "linear": pairs(("miss_block", "add_block_affine.M", SAME))}, {"init_weights": "bat", "miss_dropout": 0.0}),
    Method("miss, mini", _MISS, _MISS_MINI, Renamed({**_MISS_NAMES, "mini": "mini_r"}), {
        "linear": pairs(("miss_block", "add_repeated_both_ways.M", TURNED))}, {"init_weights": "mini"},
           refuses=lambda config, place: "" if _divides(config, place) else "the last block is cut"),
    Method("c3a", _C3A, "c3a", Renamed({"block": "block_size"}), {
        "linear": pairs(("c3a_kernel", "add_convolution.c", SAME))}),
)

ADDITIVE: tuple[Method, ...] = (*BASES, *PRODUCTS, *BLOCKS)
