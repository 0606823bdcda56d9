"""Whole models that are operated on, as the tests of what is saved, measured and shown need them."""

import torch
from torch import nn

import surgery
from surgery.models.demo import demo_inputs

# Demos with two layers, or with one, where more would say no more.
SMALLER = {"llama": "llama:num_hidden_layers=2", "bert": "bert:num_hidden_layers=2", "gpt2": "gpt2:n_layer=2",
           "vit": "vit:num_hidden_layers=2", "t5": "t5", "mixtral": "mixtral", "resnet": "resnet"}
LLAMA = "llama:num_hidden_layers=1"


def logits(model: nn.Module) -> torch.Tensor:
    """What a demo gives for its batch."""
    with torch.no_grad():
        return model(**demo_inputs(model)).logits


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


def assert_held_once(surgeon: surgery.Surgeon, before: list[nn.Parameter]) -> None:
    """What the model holds beside the parameters from before: real numbers as parameters with an axis, each once, and
    whole ones as buffers, so that what copies, shards or saves a model takes them as its own."""
    model, own = surgeon.model, set(map(id, before))
    found = [p for _, p in model.named_parameters(remove_duplicate=False) if id(p) not in own]
    assert len(set(map(id, found))) == len(found)
    assert all(p.is_floating_point() and p.ndim for p in found)
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(held[n] is tensor for n, tensor in surgeon.named_tensors().items())
    whole = [n for n, b in model.named_buffers() if n in surgeon.named_tensors()]
    assert all(not held[n].is_floating_point() for n in whole) and set(whole) <= set(model.state_dict())
    assert all("." not in own for m in model.modules() for own in (*m._parameters, *m._buffers))
