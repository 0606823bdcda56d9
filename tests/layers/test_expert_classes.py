"""Fused experts that do not say by transformers' interface how they lie."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layers import perturb
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DbrxConfig, JetMoeConfig, Llama4TextConfig, PreTrainedConfig
from transformers.integrations.finegrained_fp8 import (
    ALL_FP8_EXPERTS_FUNCTIONS,
    FP8Experts,
    use_experts_implementation,
)
from transformers.models.csm.modeling_csm import CsmCodebooksHead
from transformers.models.dbrx.modeling_dbrx import DbrxExperts
from transformers.models.inkling.modeling_inkling import InklingSharedExperts
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts
from transformers.models.moshi.modeling_moshi import MoshiFlexibleLinear

import surgery
from surgery import plan
from surgery.language.library import load
from surgery.layers.layouts import EXPERTS, TRANSPOSED_EXPERTS
from surgery.planning.compile import compile
from surgery.runtime.apply import apply

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 50, "num_key_value_heads": 2}
CONFIGS = {
    "llama4": (Llama4TextConfig(**SIZES, num_attention_heads=4, head_dim=4, num_local_experts=3, num_experts_per_tok=1,
                                intermediate_size_mlp=24, interleave_moe_layer_step=1, pad_token_id=0),
               {"experts.gate_up_proj": (48, 16), "experts.down_proj": (16, 24)}, TRANSPOSED_EXPERTS),
    "jetmoe": (JetMoeConfig(**SIZES, kv_channels=4, num_local_experts=3, num_experts_per_tok=2),
               {"mlp.input_linear.weight": (48, 16), "mlp.output_linear.weight": (16, 24)}, EXPERTS),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_experts_of_an_own_class_are_stacks(name: str) -> None:
    config, shapes, layout = CONFIGS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # which the class leaves empty
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    spec = load("lora", rank=2).retarget(*(f"**.{ending}" for ending in shapes))
    planned = compile(model, spec)
    assert {(p.site.out, p.site.in_) for p in planned.placed} == {*shapes.values()} and len(planned.placed) == 4
    assert all((p.site.stack, p.site.layout) == (3, layout) for p in planned.placed)
    x = torch.arange(3, 23)[None]
    base = model(x).logits
    surgeon = apply(model, spec)
    torch.testing.assert_close(model(x).logits, base)
    with torch.no_grad():
        for parameter in surgeon.parameters():
            parameter.normal_(std=0.1)
    operated = model(x).logits
    assert (operated - base).abs().max() > 1e-3
    operated.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in surgeon.parameters())
    surgeon.merge()
    torch.testing.assert_close(model(x).logits, operated, rtol=1e-4, atol=1e-5)


class Own(nn.Module):
    """Experts of a user's class, used as `use` says."""

    def __init__(self, use: Callable[..., Tensor], *shape: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.up, self.use = nn.Parameter(torch.empty(shape, dtype=dtype), dtype.is_floating_point), use

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        return self.use(x, self.up, *more)


def routed(x: Tensor, w: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
    y = x.new_zeros(len(x), w.shape[2])
    for e in range(len(w)):
        token, place = torch.where(experts == e)
        y = y.index_add(0, token, (x[token] @ w[e].to(x.dtype)) * shares[token, place, None])
    return y


def packed(how: str) -> nn.Module:
    """Experts of transformers in 8 or 4 bits, their scales beside them."""
    config = PreTrainedConfig(hidden_size=64, num_experts=4, moe_intermediate_size=32, hidden_act="silu")
    kind = use_experts_implementation(experts_class=FP8Experts, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS,
                                      has_bias=False, has_gate=True)
    return kind(config=config, block_size=(16, 16), expert_dtype=how)


ROWS, CHOSEN, SHARES = torch.randn(6, 8), torch.tensor([[0, 1], [2, 1], [1, 0], [2, 0], [0, 2], [1, 2]]), torch.rand(6, 2)
LONGCAT = SimpleNamespace(expert_ffn_hidden_size=6, hidden_size=8, n_routed_experts=3, zero_expert_num=1, hidden_act="silu")
INKLING = SimpleNamespace(moe_intermediate_size=6, hidden_size=8, n_shared_experts=2, hidden_act="silu")
# What is called with what, and of each parameter how many matrices, out, in, and whether it is stored [E, in, out].
NAMED: dict[str, tuple[Callable[[], nn.Module], tuple, dict[str, tuple[int, int, int, bool]]]] = {
    "longcat": (lambda: LongcatFlashExperts(LONGCAT), (ROWS, CHOSEN, SHARES),
                {"gate_up_proj": (4, 12, 8, False), "down_proj": (3, 8, 6, False)}),
    "inkling": (lambda: InklingSharedExperts(INKLING), (ROWS[None], torch.rand(6, 2)),
                {"gate_proj": (2, 6, 8, False), "up_proj": (2, 6, 8, False), "down_proj": (2, 8, 6, False)}),
    "moshi": (lambda: MoshiFlexibleLinear(8, 5, 3), (ROWS[None], torch.arange(6) % 3), {"weight": (3, 5, 8, False)}),
    "csm": (lambda: CsmCodebooksHead(8, 4, 5), (ROWS[None, :3], torch.arange(1, 4)), {"weight": (3, 5, 8, True)}),
    "in x out": (lambda: Own(routed, 3, 8, 5), (ROWS, CHOSEN, SHARES), {"up": (3, 5, 8, True)}),
    "square, in x out": (lambda: Own(routed, 3, 8, 8), (ROWS, CHOSEN, SHARES), {"up": (3, 8, 8, True)}),
    "square, out x in": (lambda: Own(lambda x, w, *r: routed(x, w.mT, *r), 3, 8, 8), (ROWS, CHOSEN, SHARES),
                         {"up": (3, 8, 8, False)}),
    "matrix first": (lambda: Own(lambda x, w: (w @ x.reshape(3, -1, 8).mT).mT.flatten(0, 1), 3, 5, 8), (ROWS,),
                     {"up": (3, 5, 8, False)}),
    "einsum": (lambda: Own(lambda x, w: torch.einsum("td,efd->tef", x, w), 3, 5, 8), (ROWS,), {"up": (3, 5, 8, False)}),
    "einsum, square, turned": (lambda: Own(lambda x, w: torch.einsum("td, efd -> etf", x, w.mT), 3, 8, 8), (ROWS,),
                               {"up": (3, 8, 8, True)}),
    "einsum, in x out, all added": (lambda: Own(lambda x, w: torch.einsum("edf,etd->tf", w, x.expand(3, -1, -1)), 3, 8, 5),
                                    (ROWS,), {"up": (3, 5, 8, True)}),
    "einsum, one by one": (lambda: Own(lambda x, w: sum(torch.einsum("td,fd->tf", x, each) for each in w.unbind()), 3, 5, 8),
                           (ROWS,), {"up": (3, 5, 8, False)}),
}


@pytest.mark.parametrize("name", NAMED)
def test_stacks_of_any_class_are_operated_on_where_a_pattern_names_them(name: str) -> None:
    build, arguments, wanted = NAMED[name]
    torch.manual_seed(0)
    model = nn.ModuleDict({"experts": build(), "other": nn.Linear(8, 8)})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    before = {n: p.clone() for n, p in model.named_parameters()}
    patterns = ", ".join(f'"experts.{own}"' for own in wanted)
    spec = surgery.parse(f"target linear {patterns} {{ add low_rank(2) pre diagonal() post diagonal() }}")
    for one in (model, nn.ModuleDict({"experts": build(), "other": nn.Linear(8, 8)}).to("meta")):
        placed = surgery.plan(one, spec).placed
        assert {p.site.parameter: (p.site.stack, p.site.out, p.site.in_, p.site.layout is TRANSPOSED_EXPERTS)
                for p in placed} == wanted
    assert [p.site.name for p in surgery.plan(model, surgery.parse('target linear "**" { add low_rank(2) }')).placed] == ["other"]
    base = model["experts"](*arguments)
    surgeon = apply(model, spec, check=False)
    torch.testing.assert_close(model["experts"](*arguments), base)
    perturb(model, 0.3)
    operated = model["experts"](*arguments)
    operated.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in surgeon.parameters())
    assert (operated - base).abs().max() > 1e-2
    surgeon.merge()
    torch.testing.assert_close(model["experts"](*arguments), operated)
    surgeon.unmerge()
    assert all(torch.equal(p, before[n]) for n, p in surgeon.remove().named_parameters())


@pytest.mark.parametrize(("module", "name", "words"), [
    (lambda: Own(lambda x, w, e, s: routed(x, w, e, s) + w.sum(), 3, 8, 8), "up", "no call of a Own was found"),
    (lambda: Own(lambda x, w, e, s: routed(x, w, e, s) + routed(x, w.mT, e, s), 3, 8, 8), "up", "one way round"),
    (lambda: Own(lambda x, w, e, s: routed(x, torch.tanh(w), e, s), 3, 8, 8), "up", "nowhere else"),
    (lambda: Own(lambda x, w, e, s: routed(x[:, :3], w[:, :3], e, s), 3, 8, 8), "up", "no call"),
    (lambda: Own(lambda x, w, *, table: x @ w[table], 3, 8, 8), "up", "no call"),
    *((lambda how=how: Own(lambda x, w: torch.einsum(how, x, w), 3, 8, 8), "up", "no call")
      for how in ("td,edd->te", "tf,efd->tef", "td,efd->tefd", "t...,e...d->ted")),
    (lambda: DbrxExperts(DbrxConfig(d_model=8, ffn_config={"ffn_hidden_size": 6, "moe_num_experts": 3}).ffn_config),
     "mlp.w1", "matches no linear layer"),
    (lambda: packed("fp8"), "gate_up_proj", "its weight is quantised"),
    (lambda: packed("fp8"), "gate_up_proj_scale_inv", "its weight is quantised"),
    (lambda: packed("fp4"), "down_proj", "its weight is quantised"),
    (lambda: Own(routed, 3, 8, 8, dtype=torch.int8), "up", "its weight is quantised")])
def test_what_is_no_stack_that_is_known_is_refused_in_words(module: Callable[[], nn.Module], name: str, words: str) -> None:
    for build in (plan, apply):
        model = nn.ModuleDict({"experts": module(), "other": nn.Linear(8, 8)})
        with pytest.raises(surgery.SurgeryError, match=words):
            build(model, surgery.parse(f'target linear "experts.{name}" {{ add low_rank(2) }}'))


def test_a_stack_larger_than_the_memory_which_is_all_there_is_is_asked_without_any() -> None:
    def use(x: Tensor, w: Tensor, experts: Tensor) -> Tensor:
        return torch.matmul(x[:, :, None], w.contiguous()[experts].clone().transpose(1, 2)[None]).squeeze(2)

    with torch.device("meta"):
        model = nn.ModuleDict({"experts": Own(use, 1 << 6, 1 << 14, 1 << 15)})
    (placed,) = plan(model, surgery.parse('target linear "experts.up" { add low_rank(2) }')).placed
    assert (placed.site.stack, placed.site.out, placed.site.in_) == (1 << 6, 1 << 14, 1 << 15)
