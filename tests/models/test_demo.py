"""Demo models: small, random, the same under a seed, and harmless to the caller's random state."""


import pytest
import torch

from surgery.diagnostics import SurgeryError
from surgery.layers.survey import sites
from surgery.models.demo import DEMOS, demo_config, demo_inputs, load_demo
from surgery.models.loading import skeleton

TIED = {"gpt2", "t5"}
CLASSES = {
    "llama": "LlamaForCausalLM", "bert": "BertForSequenceClassification", "gpt2": "GPT2LMHeadModel",
    "t5": "T5ForConditionalGeneration", "mixtral": "MixtralForCausalLM", "vit": "ViTForImageClassification",
    "resnet": "ResNetForImageClassification",
}


def test_the_names_are_those_of_the_table():
    assert set(DEMOS) == set(CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_a_demo_runs_on_its_inputs(name):
    model = load_demo(name)
    assert type(model).__name__ == CLASSES[name] and not model.training
    assert sum(p.numel() * p.element_size() for p in model.parameters()) < 2 * 2**20
    shapes = {key: value.shape for key, value in skeleton(f"demo:{name}").state_dict().items()}
    assert shapes == {key: value.shape for key, value in model.state_dict().items()}
    with torch.no_grad():
        logits = model(**demo_inputs(model)).logits
    assert logits.shape[0] == 2 and torch.isfinite(logits).all() and logits.std() > 0


@pytest.mark.parametrize("name", CLASSES)
def test_a_seed_fixes_weights_and_inputs(name):
    first, same, other = (load_demo(name, seed=s).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(value, same[key]) for key, value in first.items())
    assert any(not torch.equal(value, other[key]) for key, value in first.items())
    batch, again, different = (demo_inputs(name, seed=s) for s in (3, 3, 4))
    assert all(torch.equal(value, again[key]) and not torch.equal(value, different[key])
               for key, value in batch.items())
    assert demo_inputs(load_demo(name), seed=3).keys() == batch.keys()


@pytest.mark.parametrize("name", CLASSES)
def test_the_random_state_of_the_caller_is_left_alone(name):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load_demo(name)
    demo_inputs(name)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", CLASSES)
def test_ties(name):
    model = load_demo(name)
    tensors, names = dict(model.named_parameters()), dict(model.named_parameters(remove_duplicate=False))
    assert (len(tensors) != len(names)) == (name in TIED)


@pytest.mark.parametrize("name", CLASSES)
def test_inner_linear_layers_take_blocks_of_32(name):
    inner = [s for s in sites(load_demo(name)) if s.kind == "linear" and not s.is_head]
    assert all(s.out % 32 == 0 and s.in_ % 32 == 0 for s in inner)


def test_a_name_that_is_no_demo_is_an_error():
    with pytest.raises(SurgeryError, match="did you mean `demo:llama`") as caught:
        demo_config("lama")
    assert caught.value.diagnostics[0].code == "unknown-model"
