"""The rows of PEFT's methods that turn the weight's inputs or outputs, or the inside of its largest part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgery.peft.table.method import NO_BIAS, OFF, Config, Family, Method, Renamed
from surgery.peft.tensor_mapping import (
    COLUMN,
    FLAT,
    SAME,
    SKEW,
    SKEW_OF_ONE,
    SKEW_SHARED,
    SKEW_TURNED,
    Pairs,
    Place,
    Tensors,
    View,
    pairs,
)

# ------------------------------------------------------------------------------------------------------ OFT and BOFT


@dataclass(frozen=True)
class _Block:
    """PEFT is told the size of a block or how many there are; `fit` is the size or number that it then takes."""

    size: str
    count: str
    names: Mapping[str, str]
    fit: Callable[[int, int], int] = lambda whole, wanted: wanted

    @property
    def fields(self) -> tuple[str, ...]:
        return self.size, self.count, *self.names.values()

    def to_ours(self, config: Config, place: Place) -> dict[str, Any]:
        size, count = config[self.size], config[self.count]
        block = self.fit(place.in_, size) if size else place.in_ // self.fit(place.in_, count)
        return {"block": block, **{ours: config[theirs] for ours, theirs in self.names.items()}}

    def to_peft(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        more = {theirs: parameters[ours] for ours, theirs in self.names.items() if ours in parameters}
        return {self.size: parameters.get("block"), self.count: 0, **more}


def _divisor(whole: int, wanted: int) -> int:
    """The divisor of `whole` that is nearest to `wanted`, the smaller of two."""
    return min((d for d in range(1, whole + 1) if whole % d == 0), key=lambda d: (abs(d - wanted), d))


def _overlapping(config: Config, place: Place) -> str:
    """PEFT turns the patches of the input and adds them up again where they overlap, which counts a pixel several
    times.
    """
    return "PEFT's is no map of the weight where the kernel is larger than 1" if max((1, *place.kernel)) > 1 else ""


def _not_square(config: Config, place: Place) -> str:
    """Of a convolution PEFT reads the first side of the kernel, of the stride and of the padding alone, and no
    dilation.
    """
    plain = not place.kernel or len(place.kernel) == 2 and not place.uneven
    return "" if plain else "PEFT's is for square kernels without gaps"


_OFT = Family("OFT", "OFTConfig", {"bias": NO_BIAS, "use_cayley_neumann": OFF, "coft": OFF, "block_share": OFF},
              biases="oft_only")
_BOFT = Family("BOFT", "BOFTConfig", {"bias": NO_BIAS, "boft_dropout": OFF}, biases="boft_only")
_OFT_BLOCK = _Block("oft_block_size", "r", {}, _divisor)
_BOFT_BLOCK = _Block("boft_block_size", "boft_block_num", {})

# PEFT's default: four powers of the series of the rotation, which is that of the other branch transposed.
_NEUMANN = """
transform near_orthogonal(block: int) on n {
  param Q[n / block, block, block] = 0
  let S = skew(Q) / 2
  return I(n) + block_diag(2 * S + 2 * (S @ S) + 2 * (S @ S @ S) + S @ S @ S @ S).T
}
spec oft_neumann(block: int = 32)
target any "**" {
  pre near_orthogonal(block) on in
}
"""
_SHARED_BLOCK = """
transform same_block(block: int) on n : orthogonal {
  param Q[block, block] = 0
  return kron(I(n / block), cayley(skew(Q)))
}
spec oft_shared(block: int = 32)
target any "**" {
  pre same_block(block) on in
}
"""
# PEFT without its CUDA extension has one factor, which is a rotation of neighbours.
_ONE_FACTOR = """
spec boft_one_factor(block: int = 8)
target any "**" {
  pre block_orthogonal(block) on in
  pre diagonal()
}
"""


def _turning(key: str, view: View = SKEW, turned: View = SKEW_TURNED) -> dict[str, Any]:
    """PEFT turns the input, x R with R = (I - S)(I + S)⁻¹, which is W Rᵀ, and Rᵀ = cayley(2 S): our rotation with
    Q - Qᵀ = 2 S. An embedding's output it turns by the same R, which is W R."""
    inputs = pairs(("oft_R.weight", key, view))
    return {"linear": inputs, "convolution": inputs, "embedding": pairs(("oft_embedding_R.weight", key, turned))}


def _butterfly(*keys: str) -> dict[str, Any]:
    """PEFT keeps a full matrix of which the skew part counts, as here."""
    view = View(lambda t, place: tuple(t) if len(t) > 1 else t[0], lambda *ts: torch.stack(ts[:-1]))
    return {layout: pairs(("boft_R", keys, view), ("boft_s", "pre_diagonal.d", gains))
            for layout, gains in (("linear", COLUMN), ("convolution", FLAT))}


def _no_second_factor(config: Config, place: Place) -> str:
    block = _BOFT_BLOCK.to_ours(config, place)["block"]
    return _not_square(config, place) or "the blocks do not pair up" * bool(place.in_ % (2 * block) or block % 2)


OFT_ROWS = (
    Method("oft", _OFT, "oft", _OFT_BLOCK, _turning("pre_block_orthogonal.Q"),
           {"use_cayley_neumann": False}, _overlapping),
    Method("oft, Cayley-Neumann", _OFT, _NEUMANN, _OFT_BLOCK, _turning("pre_near_orthogonal.Q"),
           {"use_cayley_neumann": True, "num_cayley_neumann_terms": 5}, _overlapping),
    Method("oft, one block for all", _OFT, _SHARED_BLOCK, _OFT_BLOCK,
           _turning("pre_same_block.Q", SKEW_SHARED, View(lambda t, place: SKEW_SHARED.to_ours(t, place).mT,
                                                          lambda t, place: SKEW_SHARED.to_peft(t.mT, place))),
           {"use_cayley_neumann": False, "block_share": True}, _overlapping),
    # PEFT puts the parameter itself back into the ball before each pass; here the formula does, and the parameter is
    # free.
    Method("coft", _OFT, "coft", _Block("oft_block_size", "r", {"eps": "eps"}, _divisor),
           _turning("pre_near_rotation.Q"), {"use_cayley_neumann": False, "coft": True}, _overlapping),
    Method("boft", _BOFT, "boft", _BOFT_BLOCK, _butterfly("pre_butterfly.Q", "pre_butterfly_2.Q"),
           {"boft_n_butterfly_factor": 2}, _no_second_factor, needs_cuda=True),
    Method("boft, one factor", _BOFT, _ONE_FACTOR, _BOFT_BLOCK, _butterfly("pre_block_orthogonal.Q"),
           {"boft_n_butterfly_factor": 1}, _not_square),
)

# ------------------------------------------------------------------------------------------------------- reflections

_HRA = Family("HRA", "HRAConfig", {"bias": NO_BIAS, "apply_GS": OFF}, biases="hra_only")
_RANK = Renamed({"rank": "r"})
# An odd number of reflections does not start as I.
_ODD_REFLECTIONS = """
transform reflections(rank: int) on n : orthogonal {
  param U[n, rank] ~ kaiming_uniform(a = sqrt(5))
  return reflect(U)
}
spec hra_odd(rank: int = 7)
target any "**" shifted {
  pre reflections(rank) on in
}
"""
# Mirrors at right angles to each other: all their reflections at once are a flip of one subspace, never I.
_GRAM_SCHMIDT = """
transform subspace_flip(rank: int) on n : orthogonal {
  param U[n, rank] ~ kaiming_uniform(a = sqrt(5))
  let Q = qr(U)
  return I(n) - 2 * (Q @ Q.T)
}
spec hra_gram_schmidt(rank: int = 8)
target any "**" shifted {
  pre subspace_flip(rank) on in
}
"""
# Ours are U's reflections and then V's from the last to the first.
_HALVES = View(lambda t, place: (t[:, :t.shape[1] // 2], t[:, t.shape[1] // 2:].flip(1)),
               lambda u, v, place: torch.cat([u, v.flip(1)], dim=1))


def _mirrors(theirs: str, ours: str | tuple[str, ...], view: View = SAME) -> dict[str, Any]:
    return {layout: pairs((theirs, ours, view)) for layout in ("linear", "convolution")}


HRA_ROWS = (
    Method("hra", _HRA, "hra", _RANK, _mirrors("hra_u", ("pre_householder.U", "pre_householder.V"), _HALVES),
           refuses=lambda config, place: _not_square(config, place) or "an odd number" * (config["r"] % 2)),
    Method("hra of odd rank", _HRA, _ODD_REFLECTIONS, _RANK, _mirrors("hra_u", "pre_reflections.U"),
           refuses=lambda config, place: _not_square(config, place) or "an even number" * (config["r"] % 2 == 0)),
    Method("hra, Gram-Schmidt", _HRA, _GRAM_SCHMIDT, _RANK, _mirrors("hra_u", "pre_subspace_flip.U"),
           {"apply_GS": True}, _not_square),
)

# ------------------------------------------------------------------------------------------------ RoAd, PSOFT

_ROAD = Family("ROAD", "RoadConfig", {})
_GROUP = Renamed({"group": "group_size"})


def _grouped(config: Config) -> Pairs:
    """A row of numbers for each group of outputs."""
    view = View(lambda t, place: t.reshape(place.out // config["group_size"], -1), lambda t, place: t.flatten())
    return pairs(*((f"road_{name}", f"post_pair_turn.{name}", view) for name in ("theta", "alpha")))


def _two_columns(config: Config) -> Pairs:
    """For each group PEFT has the numbers of the first column and then those of the second."""
    size = config["group_size"]
    view = View(lambda t, place: tuple(half.flatten() for half in t.reshape(-1, 2, size).unbind(1)),
                lambda *halves: torch.stack([half.reshape(-1, size) for half in halves[:2]], dim=1).flatten())
    step = "post_pair_map"
    return pairs(*((f"road_{name}", (f"{step}.{name}", f"{step}.{name}_off"), view) for name in ("theta", "alpha")))


ROAD_ROWS = (
    Method("road_1", _ROAD, "road_1", _GROUP, {"linear": _grouped}, {"variant": "road_1"}),
    Method("road_2", _ROAD, "road_2", _GROUP, {"linear": pairs(
        ("road_theta", "post_pair_mix.theta", SAME), ("road_alpha", "post_pair_mix.alpha", SAME))},
           {"variant": "road_2"}),
    Method("road_4", _ROAD, "road_4", _GROUP, {"linear": _two_columns}, {"variant": "road_4"}),
)

# PEFT's alpha scales the inner factors and their product again: it is in no formula.
_PSOFT = Family("PSOFT", "PsoftConfig", {
    "ab_svd_init": ("psoft_init", None), "psoft_svd": ("full", None), "use_cayley_neumann": OFF,
    **{switch: (True,) for switch in ("psoft_orth", "psoft_mag_a", "psoft_mag_b")}})



def _in_pefts_basis(ours: Tensors, theirs: Tensors) -> dict[str, Tensor]:
    """The rotation between singular vectors of other signs: D R D, which K ↦ D K D is of what R is made of."""
    key = "add_subspace_rotation.{}".format
    signs = (ours[key("A")] * theirs[key("A")].to(ours[key("A")])).sum(1).sign()
    return {key("Q"): signs[:, None] * ours[key("Q")] * signs}


PSOFT_ROWS = (
    Method("psoft", _PSOFT, "psoft", Renamed({"rank": "r", "dropout": "psoft_dropout"}), {"linear": pairs(
        ("psoft_R.weight", "add_subspace_rotation.Q", SKEW_OF_ONE),
        ("psoft_R.vector_a", "add_subspace_rotation.a", SAME), ("psoft_R.vector_b", "add_subspace_rotation.b", SAME))},
           rebased=_in_pefts_basis),
)

ROTATIONS: tuple[Method, ...] = (*OFT_ROWS, *HRA_ROWS, *ROAD_ROWS, *PSOFT_ROWS)
