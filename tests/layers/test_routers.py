"""Routers of experts as linear layers: whatever else their forward does, their weight only stands in x Wᵀ."""

import pytest
import torch
from models import SMALLER, perturbed
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DeepseekV3Config, GptOssConfig, Qwen2MoeConfig

import surgery
from surgery.layers.product_probe import multiplies
from surgery.models.demo import load_demo

SIZES = dict(vocab_size=32, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2,
             num_attention_heads=2, num_key_value_heads=2, num_experts_per_tok=2)
MODELS = {
    "mixtral": lambda: load_demo(SMALLER["mixtral"]),
    "qwen2-moe": lambda: AutoModelForCausalLM.from_config(Qwen2MoeConfig(
        **SIZES, num_experts=4, shared_expert_intermediate_size=8)),
    "deepseek-v3": lambda: AutoModelForCausalLM.from_config(DeepseekV3Config(
        **SIZES, n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=0, q_lora_rank=8, kv_lora_rank=8,
        qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)),
    "gpt-oss": lambda: AutoModelForCausalLM.from_config(GptOssConfig(**SIZES, num_local_experts=4, head_dim=8)),
}
SPEC = 'target linear "**.mlp.{gate,router}" { add low_rank(rank = 2)  post diagonal() }'


@pytest.mark.filterwarnings("ignore")  # of the name of the two that each model has not
@pytest.mark.parametrize("name", MODELS)
def test_a_router_is_operated_on_as_a_linear_layer(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    ids = torch.arange(12).reshape(2, 6)
    base = model(ids).logits
    surgeon = perturbed(model, surgery.parse(SPEC), scale=0.5)
    assert {placed.site.name.rpartition(".")[2] for placed in surgeon.plan.placed} <= {"gate", "router"}
    router, adapter = surgeon.plan.placed[0].site.module, next(iter(surgeon.adapters.values()))
    operated = model(ids).logits
    operated.square().sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in surgeon.parameters())
    # what the class gives with W' in the place of W
    plain, x = MODELS[name]().eval(), torch.randn(3, router.weight.shape[1])
    (twin,) = [m for n, m in plain.named_modules() if n == surgeon.plan.placed[0].site.name]
    twin.load_state_dict({**router.state_dict(), "weight": adapter.weights(router)[0]}, strict=False)
    for ours, theirs in zip(router(x), twin(x)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    with surgeon.disabled():
        assert torch.equal(model(ids).logits, base)
    surgeon.merge()
    torch.testing.assert_close(model(ids).logits, operated, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(operated, base, atol=1e-4)


class Own(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.weight, self.use = nn.Parameter(torch.randn(4, 8)), use

    def forward(self, x):
        return self.use(x, self.weight)


@pytest.mark.parametrize(("use", "is_one"), [
    (lambda x, w: F.linear(x.float(), w.float()).softmax(-1).topk(2), True),
    (lambda x, w: F.linear(x.to(w.dtype), w, None).sigmoid(), True),
    (lambda x, w: F.linear(x, w) / w.norm(), False), (lambda x, w: F.linear(x, w) + w.mean(), False),
    (lambda x, w: F.linear(x, F.normalize(w)), False), (lambda x, w: F.linear(x, w, w[:, 0]), False),
    (lambda x, w: F.linear(w, x[0]), False), (lambda x, w: x.sum(), False), (lambda x, w: w[x.long()], False)])
def test_a_weight_that_is_used_in_another_way_is_no_router_s(use, is_one: bool) -> None:
    module = Own(use)
    before = module.weight.detach().clone()
    assert multiplies(module) is is_one and multiplies(Own(use).to("meta")) is is_one
    assert torch.equal(module.weight, before)
    model = nn.ModuleDict({"gate": module, "other": nn.Linear(8, 8)})
    if is_one:
        assert len(surgery.plan(model, surgery.parse(SPEC.replace("**.mlp.{gate,router}", "gate"))).placed) == 1
    else:
        with pytest.raises(surgery.SurgeryError, match="is not a linear layer"):
            surgery.plan(model, surgery.parse(SPEC.replace("**.mlp.{gate,router}", "gate")))
