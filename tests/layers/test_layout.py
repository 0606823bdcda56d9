"""Layouts and sites: how weights are seen as matrices, what a model's sites are, and what is refused and why."""

import ast
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, GptOssConfig, GptOssForCausalLM
from transformers.pytorch_utils import Conv1D

import surgery
from surgery.language.tree import Target
from surgery.layers import kinds
from surgery.layers.kinds import KINDS, supposed
from surgery.layers.layouts import CONV, CONV1D, EMBEDDING, EXPERTS, GROUPED, LINEAR, TRANSPOSED_EXPERTS, weights
from surgery.layers.survey import sites, unsupported
from surgery.models.demo import load_demo


class OwnLinear(nn.Linear):
    pass


class Experts(nn.Module):
    """The interface of transformers' fused experts."""

    def __init__(self, is_transposed: bool):
        super().__init__()
        self.num_experts, self.is_transposed, self.has_bias = 3, is_transposed, True
        self.up_proj = nn.Parameter(torch.randn(3, 5, 7))
        self.up_proj_bias = nn.Parameter(torch.randn(3, 5))


LAYOUTS = [
    (lambda: nn.Linear(7, 5), LINEAR, (5, 7), None),
    (lambda: OwnLinear(7, 5), LINEAR, (5, 7), None),
    (lambda: Conv1D(5, 7), CONV1D, (5, 7), None),
    (lambda: nn.Conv1d(7, 5, 3), CONV, (5, 21), None),
    (lambda: nn.Conv2d(7, 5, (3, 2)), CONV, (5, 42), None),
    (lambda: nn.Conv3d(2, 5, 3), CONV, (5, 54), None),
    (lambda: nn.Conv2d(6, 4, 3, groups=2), replace(GROUPED, kind=kinds.GROUPED), (4, 27), None),
    (lambda: nn.Conv1d(6, 12, 5, groups=6), replace(GROUPED, kind=replace(kinds.GROUPED, groups=6)), (12, 5), None),
    (lambda: nn.Embedding(11, 4), EMBEDDING, (11, 4), None),
    (lambda: Experts(False), EXPERTS, (5, 7), 3),
    (lambda: Experts(True), TRANSPOSED_EXPERTS, (7, 5), 3),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("build", "layout", "shape", "stack"), LAYOUTS)
def test_a_layout_sees_the_weight_as_out_by_in(build, layout, shape, stack, device):
    with torch.device(device):
        module = build()
    (found,) = weights(module)
    weight = getattr(module, found.parameter).detach()
    assert (found.layout, found.stack) == (layout, stack)
    assert layout.shape(module, found.parameter) == shape
    matrix = layout.matrix(weight)
    assert matrix.shape == (shape if stack is None else (stack, *shape))
    back = layout.unmatrix(matrix, weight.shape)
    assert back.shape == weight.shape and (device == "meta" or torch.equal(back, weight))


@pytest.mark.parametrize(("build", "x"), [
    (lambda: Conv1D(5, 7), torch.randn(2, 7)),
    (lambda: nn.Linear(7, 5), torch.randn(2, 7)),
    (lambda: nn.Conv2d(7, 5, (3, 2)), torch.randn(2, 7, 3, 2)),
])
def test_the_matrix_is_what_the_module_multiplies_by(build, x):
    module = build()
    matrix = weights(module)[0].layout.matrix(module.weight)
    assert torch.allclose(module(x).flatten(1), x.flatten(1) @ matrix.T + module.bias, atol=1e-5)


def test_a_convolution_in_channels_last_has_the_same_matrix():
    module = nn.Conv2d(4, 5, 3)
    plain = CONV.matrix(module.weight).clone()
    assert torch.equal(CONV.matrix(module.to(memory_format=torch.channels_last).weight), plain)


REFUSED = [
    (lambda: nn.Embedding(4, 4, max_norm=1.0), "m", "max_norm"),
    (lambda: nn.Embedding(4, 4, sparse=True), "m", "sparse"),
    (lambda: nn.Embedding(4, 4, scale_grad_by_freq=True), "m", "frequency"),
    (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), "m", "computed from other parameters"),
    (lambda: nn.LazyLinear(3), "m", "no shape yet"),
    (lambda: nn.MultiheadAttention(4, 2), "m.out_proj", "reads its weight directly"),
    (lambda: nn.MultiheadAttention(4, 2), "m", "in_proj_weight"),
    (lambda: nn.TransformerEncoderLayer(4, 2, 8), "m.linear1", "fast path"),
    (lambda: nn.LSTM(4, 4), "m", "LSTM is not a linear layer"),
    (lambda: nn.LayerNorm(4), "m", "no weight matrix"),
    (lambda: nn.ConvTranspose2d(4, 4, 1), "m", "ConvTranspose2d is not"),
]


@pytest.mark.parametrize(("build", "name", "reason"), REFUSED)
def test_what_cannot_be_operated_on_is_refused_with_the_reason(build, name, reason):
    model = nn.ModuleDict({"m": build(), "good": nn.Linear(2, 2)})
    assert [s.name for s in sites(model)] == ["good"]
    assert reason in unsupported(model)[name]


def test_a_quantised_weight_that_is_not_a_linear_layers_is_refused():
    embedding = nn.Embedding(4, 4)
    embedding.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    assert "quantised" in unsupported(nn.ModuleDict({"m": embedding}))["m"]


def test_a_decoder_layer_of_torch_calls_its_linears_and_so_can_be_taken():
    assert [s.name for s in sites(nn.TransformerDecoderLayer(4, 2, 8))] == ["linear1", "linear2"]


# ----------------------------------------------------------------------------------------------------------- sites


def _by_name(model) -> dict:
    return {s.name: s for s in sites(model)}


@pytest.mark.parametrize(("demo", "name", "kind", "shape", "stack", "layer"), [
    ("llama", "model.layers.2.self_attn.k_proj", "linear", (32, 64), None, 2),
    ("llama", "model.embed_tokens", "embedding", (256, 64), None, None),
    ("gpt2", "transformer.h.1.attn.c_attn", "linear", (192, 64), None, 1),
    ("t5", "decoder.block.1.layer.2.DenseReluDense.wo", "linear", (64, 128), None, 1),
    ("mixtral", "model.layers.1.mlp.experts.gate_up_proj", "linear", (256, 64), 4, 1),
    ("vit", "vit.embeddings.patch_embeddings.projection", "conv", (64, 192), None, None),
    ("resnet", "resnet.encoder.stages.1.layers.0.layer.0.convolution", "conv", (64, 288), None, 1),
])
def test_sites_of_the_demos(demo, name, kind, shape, stack, layer):
    site = _by_name(load_demo(demo))[name]
    assert (site.kind, (site.out, site.in_), site.stack, site.layer) == (kind, shape, stack, layer)


def test_transposed_experts_are_sites_too():
    config = GptOssConfig(hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
                          num_key_value_heads=2, num_local_experts=4, vocab_size=96, eos_token_id=1, pad_token_id=0)
    with torch.device("meta"):
        site = _by_name(GptOssForCausalLM(config))["model.layers.0.mlp.experts.gate_up_proj"]
    assert (site.out, site.in_, site.stack, site.weight_name) == (64, 64, 4, site.name)


def test_depth_runs_from_0_to_1_over_the_outermost_list():
    found = _by_name(load_demo("llama"))
    assert [found[f"model.layers.{i}.mlp.up_proj"].depth for i in range(4)] == [0, 1 / 3, 2 / 3, 1]
    assert found["lm_head"].depth is None
    alone = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)])})
    assert [(s.layer, s.depth) for s in sites(alone)] == [(0, 0.0)]
    nested = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2) for _ in range(5)]) for _ in range(2)])
    assert [s.layer for s in sites(nested)] == [0] * 5 + [1] * 5


def test_a_sequential_is_a_list_of_layers_where_there_is_no_module_list():
    assert [(s.name, s.layer) for s in sites(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))] == [("0", 0),
                                                                                                              ("2", 2)]


@pytest.mark.parametrize(("demo", "heads"), [
    ("llama", ["lm_head"]),
    ("bert", ["classifier"]),
    ("gpt2", ["lm_head"]),
    ("t5", ["lm_head"]),
    ("mixtral", ["lm_head"]),
    ("vit", ["classifier"]),
    ("resnet", ["classifier.1"]),
])
def test_heads(demo, heads):
    assert [s.name for s in sites(load_demo(demo)) if s.is_head] == heads


def test_a_model_without_a_task_has_no_head():
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig())
    assert not any(s.is_head for s in sites(model))
    assert not any(s.is_head for s in sites(nn.Sequential(nn.Linear(2, 2))))


def test_a_module_at_two_names_is_one_site():
    shared = nn.Linear(2, 2)
    (site,) = sites(nn.ModuleDict({"a": shared, "b": shared}))
    assert (site.name, site.aliases) == ("a", ("b",))


def test_a_model_that_is_one_layer_is_a_site():
    (site,) = sites(nn.Linear(3, 2))
    assert (site.name, site.weight_name, site.out, site.in_) == ("", "weight", 2, 3)


# ----------------------------------------------------------------------------------------------------------- kinds


def test_no_code_compares_kinds():
    """What a kind decides is a property of its row: a comparison would be one more file that a new kind touches."""
    words = {kind.word for kind in KINDS} | {kind.name for kind in KINDS}
    files = {path: ast.walk(ast.parse(path.read_text(encoding="utf-8")))
             for path in Path(surgery.__file__).parent.rglob("*.py")}
    assert [f"{path.name}:{node.lineno}" for path, nodes in files.items() for node in nodes
            if isinstance(node, ast.Compare) and any(isinstance(part, ast.Constant) and part.value in words
                                                     for part in (node.left, *node.comparators))] == []


def test_the_words_of_kinds_are_those_of_a_target():
    assert {kind.word for kind in KINDS} | {"any"} == set(get_args(Target.model_fields["kind"].annotation))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_target_is_costed_for_the_kind_that_its_word_says(kind):
    assert supposed(kind.word).word == kind.word and not supposed(kind.word).is_called
    assert supposed("any") == kinds.LINEAR
