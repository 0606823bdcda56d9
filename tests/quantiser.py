"""A quantiser as packages register theirs with transformers: every linear layer but the head, in bytes with a scale for
each row."""

from __future__ import annotations

from typing import Any

from packed import Int8Linear
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin


@register_quantization_config("rows8")
class Rows8Config(QuantizationConfigMixin):
    def __init__(self, **more: Any):
        self.quant_method = "rows8"


@register_quantizer("rows8")
class Rows8Quantizer(HfQuantizer):
    requires_calibration = False

    def _process_model_after_weight_loading(self, model: nn.Module, **more: Any) -> nn.Module:
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name != "lm_head":
                above, _, own = name.rpartition(".")
                setattr(model.get_submodule(above), own, Int8Linear.of(module).train(module.training))
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True
