"""What a module says of where it stands: how many layers, heads and positions of a kernel there are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from layers import Tower
from torch import nn

import surgery
from surgery.diagnostics import SurgeryError
from surgery.language.library import parse
from surgery.layers.survey import sites
from surgery.models.loading import load as load_model
from surgery.planning.check import check
from surgery.planning.compile import compile

GAINS = "update gains(size: int) { param g[out / size] = 0 return kron(diag(g), I(size)) @ W }"


def said(model: nn.Module, end: str) -> tuple:
    site = next(site for site in sites(model) if site.name.endswith(end))
    return site.layers, site.heads, site.head_size, site.kernel


@pytest.mark.parametrize(("demo", "end"), [("llama", "k_proj"), ("llama", "down_proj"), ("bert", "query")])
def test_a_model_says_its_sizes(demo, end):
    model = load_model(f"demo:{demo}")
    config = model.config
    heads = config.num_attention_heads
    sizes = (config.num_hidden_layers, heads, getattr(config, "head_dim", None) or config.hidden_size // heads, 1)
    assert said(model, end) == sizes


class Attention(nn.Module):
    def __init__(self, **said):
        super().__init__()
        self.q = nn.Linear(32, 32)
        self.conv = nn.Conv2d(4, 8, (3, 5))
        vars(self).update(said)


@pytest.mark.parametrize(("module", "wanted"), [
    (Attention(), (None, None)), (Attention(num_heads=4, head_dim=8), (4, 8)),
    (Attention(num_heads=4, embed_dim=32), (4, 8)),
    (Attention(config=SimpleNamespace(num_attention_heads=8, hidden_size=32)), (8, 4)),
    (Attention(config=SimpleNamespace(num_attention_heads=8, hidden_size=33)), (8, None)),  # nothing is rounded
    (Attention(config=SimpleNamespace(num_attention_heads=8, hidden_size=32, head_dim=16)), (8, 16)),
    (Attention(num_heads=True, head_dim="8"), (None, None)),
])
def test_the_nearest_that_says_it_is_asked(module, wanted):
    tower = Tower(module)
    assert said(tower, "q") == (1, *wanted, 1) and said(tower, "conv") == (1, *wanted, 15)
    tower.config = SimpleNamespace(num_attention_heads=2, head_dim=2)
    assert said(tower, "q")[1:3] == tuple(own or 2 for own in wanted)


def test_a_spec_reads_them():
    spec = parse(GAINS + ' target linear "**.{q,k}_proj" { add gains(head_size) }')
    assert check(spec) == []
    plan = compile(load_model("demo:llama"), spec)
    assert {p.parameters for p in plan.placed} == {4, 2}  # a gain for each head, of the keys too


def test_a_convolution_is_seen_by_its_kernel():
    spec = parse("update own(kernel: int) { param A[in / kernel, 2] ~ normal() param B[out, 2 * kernel] = 0"
                 " return B @ kron(A.T, I(kernel)) } target conv { add own(kernel) }")
    assert check(spec) == []
    (placed,) = compile(Tower(nn.Conv2d(4, 8, 3)), spec).placed
    assert placed.formula.leaves[0].shape == (4, 2)


def test_a_parameter_of_the_name_is_what_it_means():
    """Specs of before these names had a meaning keep theirs."""
    text = GAINS + " spec own(heads: int = 8, kernel: int = 2) target linear { add gains(heads * kernel) }"
    (placed,) = compile(Tower(nn.Linear(32, 32)), parse(text)).placed
    assert placed.parameters == 2 and check(parse(text)) == []


@pytest.mark.parametrize(("text", "said"), [
    (GAINS + " target linear { add gains(heads) }", "an attention around the module, or its configuration, says it"),
    ("update own { param A[heads, in] = 0 return ones(out, heads) @ A } target linear { add own() }",
     "a definition gets it as an argument: `definition(heads = heads)`"),
    ("update own { param A[layer, in] = 0 return ones(out, layer) @ A } target linear { add own() }",
     "a definition gets it as an argument: `definition(layer = layer)`"),
])
def test_what_nothing_says_is_unknown_by_name(text, said):
    with pytest.raises(SurgeryError, match="unknown name `(heads|layer)`") as error:
        surgery.plan(Tower(nn.Linear(32, 32)), parse(text))
    assert said in error.value.diagnostics[0].helps[0]


def test_what_fits_at_no_size_is_told_with_its_place():
    """A rank of 0 in the first layer: nobody was told that it was the layer."""
    (told, *_) = check(parse("target linear { add low_rank(rank = layer) }"))
    assert told.code == "untested" and told.message.startswith("with layer = 0 this target fits")
