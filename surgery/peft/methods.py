"""The table of PEFT's methods: a row each, the one place that import, export, `bench` and the parity test read.

A new row needs a spec, the names of its parameters in PEFT's configuration, and where each of PEFT's tensors goes. The
names of layouts are those of `surgery.layout`. Checked against PEFT 0.21.2 by tests/test_peft_parity.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.peft.method import (
    CHANNELS, KERNELS, OFF, POINTS, SAME, SKEW, SKEW_TURNED, TURNED, Config, Family, Method, Place, Renamed, pairs)

# ------------------------------------------------------------------------------------------------------------ LoRA

_LORA = Family("LORA", "LoraConfig", {
    **{switch: OFF for switch in (
        "use_dora", "use_rslora", "lora_bias", "use_qalora", "use_bdlora", "arrow_config", "alora_invocation_tokens",
        "velora_config", "monteclora_config", "kasa_config", "layer_replication", "target_parameters",
        "trainable_token_indices")},
    "init_lora_weights": (True, False, None, "gaussian", "eva"),  # the other starts rewrite the frozen weight
}, patterns={"r": "rank_pattern", "lora_alpha": "alpha_pattern"}, biases="lora_only")
_LORA_NAMES = Renamed({"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"})
_A, _B = ("lora_A.weight", "add_low_rank.A"), ("lora_B.weight", "add_low_rank.B")
_FACTORS = ((*_A, SAME), (*_B, SAME))
_CONV_FACTORS = ((*_A, KERNELS), (*_B, POINTS))
# A token's row is what PEFT adds to, so that its A and B stand on the other side: W + s (B A)ᵀ.
_ROW_FACTORS = (("lora_embedding_A", "add_low_rank.B", TURNED), ("lora_embedding_B", "add_low_rank.A", TURNED))
_M = "lora_magnitude_vector", "post_magnitude.m"

# PEFT's DoRA on an embedding has a norm for each feature, not for each token.
_DORA_BY_COLUMN = """
transform column_magnitude() on n : diagonal {
  param m[n] = col_norm(W)
  return diag(m / detach(col_norm(W)))
}
spec dora_embedding(rank: int = 16, alpha: float = 32, dropout: float = 5%)
target embedding {
  add  low_rank(rank, alpha) dropout(dropout)
  post column_magnitude() on in
}
"""

# ------------------------------------------------------------------------------------------------------------- OFT


class _Block:
    """PEFT is told the size of a block or how many there are, and takes the nearest that divides."""

    def to_ours(self, config: Config, place: Place) -> dict[str, Any]:
        size, count = config["oft_block_size"], config["r"]
        return {"block": _divisor(place.in_, size) if size else place.in_ // _divisor(place.in_, count)}

    def to_peft(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        return {"oft_block_size": parameters["block"], "r": 0}


def _divisor(whole: int, wanted: int) -> int:
    """The divisor of `whole` that is nearest to `wanted`, the smaller of two."""
    return min((d for d in range(1, whole + 1) if whole % d == 0), key=lambda d: (abs(d - wanted), d))


_Q = "pre_block_orthogonal.Q"
_OFT = Family("OFT", "OFTConfig", {"use_cayley_neumann": OFF, "coft": OFF, "block_share": OFF}, biases="oft_only")


def _overlapping(place: Place) -> str:
    """PEFT turns the patches of the input and adds them up again where they overlap, which counts a pixel several times."""
    return "PEFT's is no map of the weight where the kernel is larger than 1" if max((1, *place.shape[2:])) > 1 else ""


# ------------------------------------------------------------------------------------------------------- the table

METHODS: tuple[Method, ...] = (
    Method("lora", _LORA, "lora", _LORA_NAMES, {
        "linear": pairs(*_FACTORS), "transposed linear": pairs(*_FACTORS), "convolution": pairs(*_CONV_FACTORS),
        "embedding": pairs(*_ROW_FACTORS)}),
    # In training PEFT's dropout also reaches the frozen layer's part of DoRA, (m / ‖·‖ - 1) x Wᵀ; ours the update's alone.
    Method("dora", _LORA, "dora", _LORA_NAMES, {
        "linear": pairs(*_FACTORS, (*_M, SAME)), "transposed linear": pairs(*_FACTORS, (*_M, SAME)),
        "convolution": pairs(*_CONV_FACTORS, (*_M, CHANNELS))}, {"use_dora": True}),
    Method("dora on embeddings", _LORA, _DORA_BY_COLUMN, _LORA_NAMES, {
        "embedding": pairs(*_ROW_FACTORS, (_M[0], "post_column_magnitude.m", SAME))}, {"use_dora": True}),
    # PEFT turns the input, x R with R = (I - S)(I + S)⁻¹, which is W Rᵀ, and Rᵀ = cayley(2 S): our rotation with
    # Q - Qᵀ = 2 S. An embedding's output it turns by the same R, which is W R.
    Method("oft", _OFT, "oft", _Block(), {
        "linear": pairs(("oft_R.weight", _Q, SKEW)), "convolution": pairs(("oft_R.weight", _Q, SKEW)),
        "embedding": pairs(("oft_embedding_R.weight", _Q, SKEW_TURNED))}, {"use_cayley_neumann": False}, _overlapping),
)
