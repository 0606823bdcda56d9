"""The rows of LoRA's configuration class: one family, of which switches choose the member."""

from __future__ import annotations

from typing import Any

from surgery.peft.table.method import NO_BIAS, OFF, Config, Family, Method, Renamed, without_bias
from surgery.peft.tensor_mapping import (
    CHANNELS,
    EACH_A,
    EACH_A_TURNED,
    EACH_B,
    EACH_B_TURNED,
    KERNELS,
    POINTS,
    SAME,
    TURNED,
    Place,
    pairs,
)

_LORA = Family("LORA", "LoraConfig", {
    **{switch: OFF for switch in (
        "use_dora", "use_rslora", "lora_bias", "use_qalora", "use_bdlora", "arrow_config", "alora_invocation_tokens",
        "velora_config", "monteclora_config", "kasa_config", "layer_replication", "trainable_token_indices")},
    "bias": NO_BIAS,
    # The other starts rewrite the frozen weight.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}, patterns={"r": "rank_pattern", "lora_alpha": "alpha_pattern"}, biases="lora_only")
_NAMES = Renamed({"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"})
_A, _B = ("lora_A.weight", "add_low_rank.A"), ("lora_B.weight", "add_low_rank.B")
_FACTORS = ((*_A, SAME), (*_B, SAME))
_CONV_FACTORS = ((*_A, KERNELS), (*_B, POINTS))
# A token's row is what PEFT adds to, so that its A and B stand on the other side: W + s (B A)ᵀ.
_ROW_FACTORS = (("lora_embedding_A", "add_low_rank.B", TURNED), ("lora_embedding_B", "add_low_rank.A", TURNED))
_M = "lora_magnitude_vector", "post_magnitude.m"
_BETA = ("lora_B.bias", "add_shift.beta", SAME)
_ON_ALL = {"linear": pairs(*_FACTORS), "transposed linear": pairs(*_FACTORS), "convolution": pairs(*_CONV_FACTORS),
           "embedding": pairs(*_ROW_FACTORS),
           "experts": pairs((*_A, EACH_A), (*_B, EACH_B)),
           "turned experts": pairs((_A[0], _B[1], EACH_A_TURNED), (_B[0], _A[1], EACH_B_TURNED))}
_DORA = {"linear": pairs(*_FACTORS, (*_M, SAME)), "transposed linear": pairs(*_FACTORS, (*_M, SAME)),
         "convolution": pairs(*_CONV_FACTORS, (*_M, CHANNELS))}

_DORA_BY_ROOT = """
spec dora_by_root(rank: int = 16, alpha: float = 32, dropout: float = 5%)
target linear {
  add  low_rank(rank, alpha * sqrt(rank)) dropout(dropout)
  post magnitude()
}
"""
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


def _drops(config: Config, place: Place) -> str:
    return "it takes no dropout there" if "experts" in place.layout and config.get("lora_dropout") else ""


def _started(update: str, *layouts: str) -> dict[str, Any]:
    factors = pairs(("lora_A.weight", f"{update}.A", SAME), ("lora_B.weight", f"{update}.B", SAME))
    return {layout: factors for layout in layouts}


LORA: tuple[Method, ...] = (
    Method("lora", _LORA, "lora", _NAMES, _ON_ALL, refuses=_drops),
    Method("rslora", _LORA, "rslora", _NAMES, _ON_ALL, {"use_rslora": True}, _drops),
    Method("lora_bias", _LORA, "lora_bias", _NAMES, {
        "linear": pairs(*_FACTORS, _BETA), "transposed linear": pairs(*_FACTORS, _BETA),
        "convolution": pairs(*_CONV_FACTORS, _BETA)}, {"lora_bias": True}, without_bias),
    # In training PEFT's dropout also reaches the frozen layer's part of DoRA, (m / ‖·‖ - 1) x Wᵀ; ours the update's
    # alone.
    Method("dora", _LORA, "dora", _NAMES, _DORA, {"use_dora": True}),
    Method("dora, rank-stabilised", _LORA, _DORA_BY_ROOT, _NAMES, _DORA, {"use_dora": True, "use_rslora": True}),
    Method("dora on embeddings", _LORA, _DORA_BY_COLUMN, _NAMES, {
        "embedding": pairs(*_ROW_FACTORS, (_M[0], "post_column_magnitude.m", SAME))}, {"use_dora": True}),
    # PEFT takes B₀ A₀ off the frozen weight; its A and B are ours.
    Method("pissa", _LORA, "pissa", _NAMES, _started("add_principal", "linear", "transposed linear"),
           {"init_lora_weights": "pissa"}, rewrites=True),
    Method("olora", _LORA, "olora", _NAMES, _started("add_orthonormal", "linear"), {"init_lora_weights": "olora"},
           rewrites=True),
)
