"""Adapters that go from PEFT to here and back: how PEFT makes one, and what it gives for an input."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from surgery.models.demo import demo_inputs, load_demo


def adapted(model: nn.Module, config: peft.PeftConfig, size: float = 0.1) -> peft.PeftModel:
    """PEFT's model around `model`, its trained parameters moved at random from where they start. (Which PEFT draws from
    the global generator: a start that hardly shows in what the model says would be a matter of the order of tests.)"""
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        found = peft.get_peft_model(model, config).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=draw)
    return found


def saved(model: peft.PeftModel, folder: Path) -> Path:
    with quiet():
        model.save_pretrained(folder)
    return folder


def opened(model: nn.Module, folder: Path) -> peft.PeftModel:
    """PEFT's model as it loads an adapter."""
    with quiet():
        return peft.PeftModel.from_pretrained(model, folder).eval()


def quiet() -> Any:
    """PEFT warns of storage, of tied weights and of what it cannot look up on a hub."""
    return warnings.catch_warnings(action="ignore")


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


def tensors_of(folder: Path) -> Mapping[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@torch.no_grad()
def logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    return model(**inputs).logits


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@cache
def _demo(name: str) -> tuple[Mapping[str, Tensor], Tensor]:
    model = load_demo(name)
    inputs = demo_inputs(model)
    return inputs, logits(model, inputs)


class Demo:
    """A demo model, made anew on demand, with an input and what the model says of it."""

    def __init__(self, name: str):
        self.name = name
        self.inputs, self.plain = _demo(name)

    def model(self) -> nn.Module:
        return load_demo(self.name)

    def says(self, model: nn.Module) -> Tensor:
        return logits(model, self.inputs)

    def from_peft(self, config: peft.PeftConfig, folder: Path) -> Tensor:
        """Have PEFT make an adapter and save it; what its model then says."""
        model = adapted(self.model(), config)
        saved(model, folder)
        return self.says(model)
