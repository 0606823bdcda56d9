"""Estimate how many bytes a quantised model's weights take, from its configuration.

Takes a survey of a skeleton; gives bytes. A skeleton has the plain layers of the configuration's class, and not those
that a quantiser puts in their place. Promises: a quantiser that is not known here gives None, and no guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.layers.survey import Site, Survey

# Under these names quantisers list the modules that they leave as they are.
_KEPT = ("modules_to_not_convert", "llm_int8_skip_modules", "ignore")


def packed_saving(survey: Survey) -> float | None:
    """How many bytes fewer the weights take as they are packed than as the skeleton has them; 0 for plain ones."""
    about = _about(getattr(survey.model, "config", None))
    if about is None:
        return 0
    size = _bytes_of_a_number(about)
    if size is None:
        return None
    kept = [name for key in _KEPT for name in about.get(key) or ()]
    packed = {id(site.weight): site.weight for site in survey.sites if _is_packed(site, about, kept)}
    return sum(weight.numel() * (weight.element_size() - size) for weight in packed.values())


def _is_packed(site: Site, about: Mapping[str, Any], kept: list[str]) -> bool:
    is_taken = bool(site.stack) if about.get("quant_method") == "mxfp4" else site.layout.kind.acts_by_rows and (
        not site.stack or about.get("quant_method") == "fp8")
    is_kept = any(name in site.name.split(".") or site.name.startswith(name) for name in kept)
    return is_taken and not site.layout.is_called and not site.is_head and not is_kept


def _bytes_of_a_number(about: Mapping[str, Any]) -> float | None:
    """Bytes of a number of a packed weight, with its share of the scales."""
    method, bits = about.get("quant_method"), about.get("bits") or 4
    if about.get("load_in_4bit"):  # a float32 for each 64, or 8 bits of it and a float32 for each 256 of those
        return 0.5 + ((1 + 4 / 256) / 64 if about.get("bnb_4bit_use_double_quant") else 4 / 64)
    if about.get("load_in_8bit"):
        return 1
    if method in ("gptq", "awq"):  # float16 scales and packed zeros for each group; -1 is one group for a column
        group = about.get("group_size") or -1
        return bits / 8 + ((2 + bits / 8) / group if group > 0 else 0)
    if method == "fp8":
        rows, columns = about.get("weight_block_size") or (1, 1 << 30)
        return 1 + 4 / (rows * columns)
    return 0.5 + 1 / 32 if method == "mxfp4" else None  # blocks of 32 with 8 bits of scale


def _about(config: Any) -> Mapping[str, Any] | None:
    about = getattr(config, "quantization_config", None)
    return about.to_dict() if about is not None and hasattr(about, "to_dict") else about
