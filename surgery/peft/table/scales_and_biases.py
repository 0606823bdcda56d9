"""The rows of PEFT's methods of gains, projections and biases, and of whole modules that are trained."""

from __future__ import annotations

from typing import Any

from surgery.peft.table.additive import NOTHING, kernel, linears
from surgery.peft.table.method import NO_BIAS, OFF, Config, Family, Method, Renamed, without_bias
from surgery.peft.tensor_mapping import CHANNELS, COLUMN, FLAT, SAME, SCALAR, Place, pairs

# --------------------------------------------------------------------------------------------------------------- IA3

_IA3 = Family("IA3", "IA3Config", {"feedforward_modules": OFF}, lists=("feedforward_modules",))
_D = "ia3_l", "pre_diagonal.d"
# On a convolution's inputs PEFT has one gain for a channel, whatever its kernel.
_CHANNEL_GAINS = """
transform channel_gains(kernel: int) on n : diagonal {
  param d[n / kernel] = 1
  return diag(kron(d, ones(kernel)))
}
spec ia3_channels(kernel: int = 1)
target conv "**" {
  pre channel_gains(kernel) on in
}
"""


def _flat(config: Config, place: Place) -> str:
    return "PEFT has no one-dimensional convolution" if len(place.kernel) == 1 else ""


IA3_ROWS = (
    Method("ia3", _IA3, "ia3", NOTHING, {
        **linears(pairs((*_D, COLUMN))), "convolution": pairs((*_D, CHANNELS))}, refuses=_flat, pads_as_layer=True),
    Method("ia3 on inputs", _IA3, "ia3", NOTHING, linears(pairs((*_D, FLAT))), {"feedforward_modules": True}, target=1),
    Method("ia3 on channels", _IA3, _CHANNEL_GAINS, Renamed({}, kernel), {
        "convolution": pairs((_D[0], "pre_channel_gains.d", CHANNELS))}, {"feedforward_modules": True}, _flat,
           pads_as_layer=True),
)

# ------------------------------------------------------------------------------------------------------ GLoRA and DEFT

_GLORA = Family("GLORA", "GloraConfig", {"bias": NO_BIAS}, biases="glora_only")
_DEFT = Family("DEFT", "DeftConfig", {"bias": NO_BIAS, "alpha": OFF, "para": OFF, "deft_dropout": OFF},
               biases="deft_only")
_RANK = Renamed({"rank": "r"})
# PEFT's defaults: the support of the bias is of low rank, its gain and its shift are one number each.
_GLORA_DEFAULT = """
update scale_and_shift(rank: int) {
  param Ad[out, rank] = 0
  param Au[rank, in] ~ kaiming_uniform(a = sqrt(5))
  param Bd[out, rank] = 0
  param Bu[rank, in] ~ kaiming_uniform(a = sqrt(5))
  return W * (Ad @ Au) + Bd @ Bu
}
update bias_support(rank: int) on bias {
  param Cd[in, rank] = 0
  param Cu[rank, 1] ~ kaiming_uniform(a = sqrt(5))
  param d = 0
  param e = 0
  return d * b + e + reshape(W @ (Cd @ Cu), out)
}
spec glora_default(rank: int = 8)
target linear {
  add scale_and_shift(rank)
  add bias_support(rank)
}
"""
_PATHS = tuple((f"glora_{x}.X{side}", f"add_scale_and_shift.{x}{side}", SAME) for x in "AB" for side in "du")
_BIAS_PATHS = tuple((f"glora_{x}.X", f"add_bias_support.{x.lower()}", SAME) for x in "CDE")
_SMALL_PATHS = (*((f"glora_C.X{side}", f"add_bias_support.C{side}", SAME) for side in "du"),
                *((f"glora_{x}.X", f"add_bias_support.{x.lower()}", SCALAR) for x in "DE"))

_ZEROS = tuple(f"glora_{x}.zeros" for x in "CDE")  # saved for a layer without a bias


def _deft(step: str) -> dict[str, Any]:
    return linears(pairs(("deft_P", f"{step}.P", SAME), ("deft_R", f"{step}.R", SAME)))


PROJECTIONS = (
    Method("glora", _GLORA, "glora", _RANK, {"linear": pairs(*_PATHS, *_BIAS_PATHS)},
           {"config_A_B": "lora", "config_C": "vector", "config_D_E": "vector"}, derived=_ZEROS),
    Method("glora, as PEFT starts it", _GLORA, _GLORA_DEFAULT, _RANK, {"linear": pairs(*_PATHS, *_SMALL_PATHS)},
           {"config_A_B": "lora", "config_C": "lora", "config_D_E": "constant"}, derived=_ZEROS),
    Method("deft", _DEFT, "deft", _RANK, _deft("add_decompose"), {"decomposition_method": "relu"}),
    Method("deft_qr", _DEFT, "deft_qr", _RANK, _deft("add_decompose_orthogonal"), {"decomposition_method": "qr"}),
)

# ----------------------------------------------------------------------------------------------- biases and norms

_BEFT = Family("BEFT", "BeftConfig", {})
_LN = Family("LN_TUNING", "LNTuningConfig", {})

BIASES = (
    Method("beft", _BEFT, "beft", NOTHING, {
        "linear": pairs(("beft_bias", "add_shift.beta", FLAT))}, refuses=without_bias),
    # Of a module that is trained as a whole, our tensors go by the names of its parameters.
    Method("ln_tuning", _LN, "ln_tuning", NOTHING, {"trained": pairs(
        *((f"ln_tuning_layers.{name}", name, SAME) for name in ("weight", "bias")))}),
)

SCALES: tuple[Method, ...] = (*IA3_ROWS, *PROJECTIONS, *BIASES)
