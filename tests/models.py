"""Whole models that are operated on, as the tests of what is saved, measured and shown need them."""

import torch
from torch import nn

import surgery

# Demos with two layers, or with one, where more would say no more.
SMALLER = {"llama": "llama:num_hidden_layers=2", "bert": "bert:num_hidden_layers=2", "gpt2": "gpt2:n_layer=2",
           "vit": "vit:num_hidden_layers=2", "t5": "t5", "mixtral": "mixtral", "resnet": "resnet"}
LLAMA = "llama:num_hidden_layers=1"


def perturbed(model: nn.Module, spec: object, scale: float = 0.05, **options) -> surgery.Surgeon:
    """The model operated on, with every trained parameter moved. (The proof on a forward pass is the business of
    test_proof.py.)"""
    surgeon = surgery.apply(model, spec, **{"check": False, **options})
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in surgeon.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=draw).to(parameter.device, parameter.dtype)
    return surgeon


def spec_for(name: str, spec: str) -> surgery.Spec:
    """A shipped spec; for a ResNet on its convolutions."""
    found = surgery.load(spec)
    kind = "conv" if name == "resnet" else "linear"
    return found.model_copy(update={"targets": tuple(t.model_copy(update={"kind": kind}) for t in found.targets)})
