"""Reading the weight of an operated module gives W', in models that read it in the place of a call; and the module
stays one for all that other code does with modules: hooks, replicas, offloading, pruning, threads."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from types import MethodType

import pytest
import torch
import transformers as tf
from layers import LAYOUTS, Tower, assert_close, operated, perturb
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from zoo import CASES

from surgery.diagnostics import SurgeryError
from surgery.language.library import load, parse
from surgery.models.demo import demo_inputs, load_demo
from surgery.runtime.apply import apply
from surgery.runtime.effective_weight import EffectiveWeight
from surgery.runtime.surgeon import Surgeon

EXACT = 1e-10


def both(kind: str = "linear", names: str = "**"):
    return parse(f'target {kind} "{names}" {{ add low_rank(2)  post magnitude() }}')


class ReadsWeight(nn.Linear):
    """A layer of a class that is known, inside of a model that reads its weight."""


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 12), ReadsWeight(12, 12)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = nn.functional.linear(x.to(layer.weight.dtype), layer.weight, layer.bias)
        return x


def read(kind: str = "linear", dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Surgeon, Tensor]:
    torch.manual_seed(0)
    model = Reading().to(dtype)
    surgeon = apply(model, both(kind), dtype=dtype)
    perturb(model)
    return model, surgeon, torch.randn(5, 16, dtype=dtype)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=str)
@pytest.mark.parametrize("name", ["dora", "oft", "everything", "blocks on out with bias"])
def test_the_weight_that_is_read_is_the_merged_one_with_its_gradient(name, layout):
    case = next(c for c in CASES if c.name == name)
    op = operated(case, layout)
    names = [n for n in ("weight", "bias") if getattr(op.base, n, None) is not None]
    read = {n: getattr(op.layer, n).clone() for n in names}
    sum(t.square().sum() for t in read.values()).backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in op.surgeon.parameters() if p.requires_grad)
    op.surgeon.merge()
    for n in names:
        assert_close(read[n], getattr(op.layer, n), EXACT, n)


def test_a_model_that_reads_weights_trains_merges_and_is_switched_off():
    model, surgeon, x = read()
    y = model(x)
    y.square().sum().backward()
    assert all(p.grad.norm() > 0 for p in surgeon.parameters())
    model.eval()
    with torch.no_grad(), surgeon.serving():
        assert_close(model(x), y, EXACT)
    with surgeon.disabled():
        assert type(model.layers[0].weight) is nn.Parameter
        base = model(x)
    surgeon.merge()
    assert_close(model(x), y, EXACT)
    surgeon.remove()
    assert torch.equal(model(x), base) and not torch.equal(base, y)


@pytest.mark.parametrize("name", ["layers.0.weight", "layers.1.bias", "an adapter's"])
def test_a_change_of_what_a_weight_that_is_read_is_made_of_is_told_while_serving(name):
    model, surgeon, x = read()
    model.eval()
    tensor = next(iter(surgeon.parameters())) if name == "an adapter's" else model.get_parameter(name)
    with torch.no_grad(), pytest.raises(SurgeryError, match="changed inside serving"), surgeon.serving():
        model(x)
        tensor.data.mul_(1.01)


def test_what_is_asked_of_a_weight_makes_none(monkeypatch):
    model, surgeon, _ = read()
    monkeypatch.setattr(type(surgeon.adapters["layers.0"]), "weights", lambda *given: pytest.fail("W' was made"))
    weight, stored = model.layers[0].weight, model.get_parameter("layers.0.weight")
    for of in (lambda t: t.shape, lambda t: t.dtype, lambda t: t.device, lambda t: t.size(0), lambda t: t.numel(),
               lambda t: len(t), lambda t: t.ndim, lambda t: t.T.shape, lambda t: t.stride(), lambda t: t.data.dtype,
               lambda t: t.is_contiguous(), lambda t: torch.is_floating_point(t), lambda t: isinstance(t, Tensor)):
        assert of(weight) == of(stored)
    assert weight.requires_grad and not weight.data.requires_grad and not weight.detach().requires_grad


def test_what_is_written_through_a_weight_that_is_read_is_written_to_the_frozen_one():
    model, _, x = read()
    stored, layer, other = model.get_parameter("layers.0.weight"), model.layers[0], torch.randn(12, 16).double()
    writes = {
        "copy_": lambda: layer.weight.copy_(other), "data": lambda: layer.weight.data.copy_(3 * other),
        "rows": lambda: layer.weight[1].copy_(other[1]), "an entry": lambda: layer.weight.__setitem__((0, 0), 3.0),
        "turned": lambda: layer.weight.T.copy_(other.T), "flat": lambda: layer.weight.detach().view(-1)[3:9].zero_(),
        "parts": lambda: layer.weight.chunk(3)[1].zero_(), "init": lambda: nn.init.normal_(layer.weight),
        "sum": lambda: exec("layer.weight += 1", {"layer": layer}),
        "of itself": lambda: layer.weight.mul_(layer.weight),
        "new data": lambda: setattr(layer.weight, "data", other * 2)}
    with torch.no_grad():
        for name, write in writes.items():
            before = stored.clone()
            write()
            assert not torch.equal(stored, before), name
            assert model.get_parameter("layers.0.weight") is stored
            assert torch.equal(model(x), deepcopy(model)(x)), name
        with pytest.raises(SurgeryError, match="has no memory"):
            torch.mul(other, 2, out=layer.weight)
        with pytest.raises(SurgeryError, match="has no memory"):
            layer.weight.data_ptr()


@pytest.mark.parametrize("change", [
    lambda layer, norm: nn.utils.fuse_conv_bn_eval(layer, norm),
    lambda layer, norm: setattr(layer, "weight", nn.Parameter(layer.weight.detach().half().float())),  # a quantiser's
    lambda layer, norm: setattr(layer, "bias", nn.Parameter(layer.bias + 1)),
    lambda layer, norm: layer.register_parameter("weight", nn.Parameter(2 * layer.weight))])
def test_what_is_made_of_the_weight_that_is_read_does_not_take_its_place(change):
    """The adapter would act on it once more. Merged and given back, a layer is fused and quantised as any other."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.randn(2, 3, 6, 6)
    model(x)
    spec = parse("""update moved() on bias { param beta[out] = 0 return beta }
        target conv { add low_rank(rank = 2) add moved() }""")
    surgeon = apply(model.eval(), spec, example=x)
    perturb(model, 0.3)
    y, held = model(x), dict(model.named_parameters())
    with pytest.raises(SurgeryError, match="changed-model.*act once more"):
        change(*model)
    assert torch.equal(model(x), y) and all(held[name] is p for name, p in model.named_parameters())
    surgeon.merge_and_remove()
    torch.testing.assert_close(nn.utils.fuse_conv_bn_eval(*model)(x), y, rtol=1e-4, atol=1e-5)


def test_a_kernel_that_autograd_does_not_follow_is_refused():
    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x)
            return x @ w.mT

        @staticmethod
        def backward(ctx, g):
            return None, g.mT @ ctx.saved_tensors[0]

    model, _, x = read()
    y = Kernel.apply(x, model.layers[0].weight)
    assert_close(y, x @ model.layers[0].weight.T, EXACT)
    with pytest.raises(RuntimeError, match="invalid gradient"):
        y.sum().backward()
    compiled = torch.compile(lambda h, w: h @ w.T, backend="eager")
    with pytest.raises(Exception, match="has no memory"):  # of a compiler's, around ours
        compiled(x, model.layers[0].weight)
    assert_close(compiled(x, model.layers[0].weight.clone()), y, EXACT)


@pytest.mark.parametrize("way", ["compile", "checkpoint", "deepcopy", "pickle", "vmap", "state", "functional"])
def test_a_weight_is_read_in_every_way_that_a_model_runs(way):
    model, surgeon, x = read()
    wanted = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ways = {
        "compile": lambda: compiled(x), "checkpoint": lambda: checkpoint(model, x, use_reentrant=False),
        "deepcopy": lambda: deepcopy(model)(x), "pickle": lambda: pickle.loads(pickle.dumps(model))(x),
        "vmap": lambda: torch.vmap(model)(x), "functional": lambda: torch.func.functional_call(
            model, {key: t.clone() for key, t in model.state_dict().items()}, (x,)),
        "state": lambda: (model.load_state_dict(deepcopy(model.state_dict())), model(x))[1]}
    y = ways[way]()
    assert_close(y, wanted, EXACT)
    if y.requires_grad:
        y.square().sum().backward()


FAMILIES = {
    "mamba": ("linear", "**.dt_proj", lambda: tf.MambaForCausalLM(tf.MambaConfig(
        vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=4))),
    "falcon_mamba": ("linear", "**.dt_proj", lambda: tf.FalconMambaForCausalLM(tf.FalconMambaConfig(
        vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=4))),
    "jamba": ("linear", "**.dt_proj", lambda: tf.JambaForCausalLM(tf.JambaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=8, num_experts=1,
        mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False, pad_token_id=0))),
    "wavlm": ("linear", "**.attention.{q,k,v,out}_proj", lambda: tf.WavLMModel(tf.WavLMConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, conv_dim=(8, 8),
        conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2))),
    "deberta": ("embedding", "**.rel_embeddings", lambda: tf.DebertaV2Model(tf.DebertaV2Config(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=4, norm_rel_ebd="layer_norm"))),
    "detr": ("embedding", "**.query_position_embeddings", lambda: tf.DetrModel(tf.DetrConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=5, use_timm_backbone=False, use_pretrained_backbone=False,
        backbone=None, backbone_config=tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1],
                                                      layer_type="basic", out_features=["stage2"])))),
    "beit": ("linear", "**.{q,k,v}_proj", lambda: tf.BeitModel(tf.BeitConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16,
        patch_size=8))),
    "swin": ("linear", "**.{q,k,v}_proj", lambda: tf.SwinModel(tf.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2))),
    "t5": ("linear", "**.wo", lambda: load_demo("t5")),
}


def batch(name: str, model: nn.Module) -> dict[str, Tensor]:
    if name == "wavlm":
        return {"input_values": torch.linspace(-1, 1, 400).sin()[None]}
    if name in ("detr", "beit", "swin"):
        return {"pixel_values": torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)}
    ids = torch.arange(12).view(2, 6)
    return {"input_ids": ids, **({"decoder_input_ids": ids} if name == "t5" else {})}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_that_read_weights(name):
    kind, names, build = FAMILIES[name]
    torch.manual_seed(0)
    model = build().eval()
    inputs = batch(name, model)
    base = model(**inputs)[0]
    surgeon = apply(model, both(kind, names))
    perturb(model, 0.5)
    y = model(**inputs)[0]
    assert not torch.equal(y, base), "the adapter is dead"
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in surgeon.parameters())
    surgeon.merge()
    assert_close(model(**inputs)[0], y, 1e-4)


def test_a_loss_that_reads_the_head():
    model = load_demo("llama")
    surgeon = apply(model, parse('target linear "lm_head" { add low_rank(2) }'))
    perturb(model)
    ids = demo_inputs(model)["input_ids"]
    hidden = model.model(ids)[0]
    assert_close(hidden @ model.lm_head.weight.T, model(ids).logits, 1e-5)
    (hidden.detach() @ model.lm_head.weight.T).logsumexp(-1).sum().backward()
    assert all(p.grad.norm() > 0 for p in surgeon.parameters())


# --------------------------------------------------------------------------------------------- what others do to it


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([nn.functional.linear(row, self.weight, self.bias) for row in x])


def test_models_are_compiled_before_any_of_them_has_run():
    """In a thread that has run none: what a compiler finds of it must be there from the first on."""
    def each() -> list[Tensor]:
        models = [Tower(OwnForward(6, width)).double() for width in (4, 5)]
        x, found = torch.randn(3, 6, dtype=torch.float64), []
        for model in models:
            apply(model, both("any"), dtype=torch.float64, check=False)
            perturb(model)
            torch.compiler.reset()
            found.append(torch.compile(model, backend="eager", fullgraph=True)(x))
        return [y - model(x) for y, model in zip(found, models)]

    with ThreadPoolExecutor(1) as thread:
        assert all(y.abs().max() < EXACT for y in thread.submit(each).result())


@pytest.mark.parametrize("build", [lambda: OwnForward(16, 16), lambda: nn.Linear(16, 16), lambda: nn.Conv1d(4, 16, 4)])
def test_four_threads_at_once(build):
    torch.manual_seed(0)
    model = Tower(build())
    apply(model, parse(f'target {"conv" if isinstance(model.layers[0], nn.Conv1d) else "linear"} "**" '
                       "{ add low_rank(2)  post magnitude() }"))
    perturb(model)
    xs = [torch.randn(n + 2, *((4, 6) if isinstance(model.layers[0], nn.Conv1d) else (16,))) for n in range(40)]
    with torch.no_grad():
        wanted = [model(x) for x in xs]

    def run(i: int) -> bool:
        with torch.no_grad():
            return torch.equal(model(xs[i]), wanted[i])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(40)))


def test_four_threads_through_fused_experts():
    model = load_demo("mixtral")
    apply(model, parse('target linear "**.experts.*" { add low_rank(2) }'))
    perturb(model, 0.05)
    batches = [demo_inputs(model, seed, 1, 3 + seed) for seed in range(8)]
    with torch.no_grad():
        wanted = [model(**each).logits for each in batches]

    def run(i: int) -> bool:
        with torch.no_grad():
            return torch.equal(model(**batches[i % 8]).logits, wanted[i % 8])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(24)))
    assert not any("_substitutes" in vars(m) for m in model.modules())


def replica(module: nn.Module) -> nn.Module:
    """What nn.DataParallel makes of a module for another device."""
    copy = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        copy._modules[name] = replica(child)
        setattr(copy, name, copy._modules[name])
    for name, tensor in module._parameters.items():
        if tensor is None:
            copy._parameters[name] = None
        else:
            setattr(copy, name, tensor.clone())
    return copy


@pytest.mark.parametrize("build", [lambda: nn.Linear(16, 16), lambda: OwnForward(16, 16)])
def test_a_replica_runs_and_its_gradients_reach_the_original(build):
    model = Tower(build())
    surgeon = apply(model, both())
    perturb(model)
    x, copy = torch.randn(3, 16), replica(model)
    y = copy(x)
    assert_close(y, model(x), 1e-6)
    y.sum().backward()
    assert all(p.grad is not None for p in surgeon.parameters())
    assert_close(copy.layers[0].weight.clone(), model.layers[0].weight.clone(), 1e-6)


@pytest.mark.parametrize("first", ["dispatch", "apply"])
@pytest.mark.parametrize("name", ["dora", "oft"])
def test_offloading_by_accelerate(first, name):
    from accelerate import cpu_offload
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules

    torch.manual_seed(0)
    model = Tower(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    plain, base, x = deepcopy(model), deepcopy(model), torch.randn(5, 16)
    spec = load(name, **({"block": 4} if name == "oft" else {"rank": 2, "dropout": 0.0})).retarget("**")
    apply(plain, spec, seed=1)
    if first == "dispatch":
        for layer in model.layers:
            add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    surgeon = apply(model, spec, seed=1)
    perturb(model)
    perturb(plain)
    if first == "apply":
        cpu_offload(model)
        assert all(p.is_meta for p in model.parameters())
    with torch.no_grad():
        for _ in range(2):
            assert_close(model(x), plain(x), 1e-6)
        remove_hook_from_submodules(model)
        assert_close(model(x), plain(x), 1e-6)
        surgeon.remove()
        assert torch.equal(model(x), base(x))


def test_hooks_before_and_after():
    seen, model = [], Tower(nn.Linear(16, 16))
    model.layers[0].register_forward_hook(lambda module, x, y: seen.append("before"))
    apply(model, both())
    model.layers[0].register_forward_hook(lambda module, x, y: y + 1)
    adapter = model.layers[0].weight_surgery
    adapter.add_low_rank.register_forward_hook(lambda *given: seen.append("tensors"))
    adapter.register_forward_hook(lambda module, x, y: seen.append("adapter"))
    x = torch.randn(3, 16)
    y = model(x)
    assert seen == ["tensors", "adapter", "before"]
    model.layers[0]._forward_hooks.clear()
    assert_close(y, model(x) + 1, 1e-6)


def test_a_forward_on_the_instance_is_run_and_not_passed_by():
    layer = nn.Linear(16, 16)
    layer.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias) * 2
    model, plain = Tower(layer), Tower(deepcopy(layer))
    plain.layers[0].__dict__.pop("forward")
    for each in (model, plain):
        apply(each, both(), seed=1)
        perturb(each)
    x = torch.randn(3, 16)
    assert_close(model(x), 2 * plain(x), 1e-6)


def test_a_forward_on_the_instance_may_ask_for_its_class_s():
    """As compressed-tensors puts one on each layer: it rounds the input, and has the class do the rest."""
    layer = nn.Linear(16, 16)
    layer.forward = MethodType(lambda self, x: self.__class__.forward(self, x.round(decimals=1)), layer)
    model, plain = Tower(layer), Tower(deepcopy(layer))
    plain.layers[0].__dict__.pop("forward")
    surgeons = [apply(each, both(), seed=1) for each in (model, plain)]
    for each in (model, plain):
        perturb(each)
    x = torch.randn(3, 16)
    assert_close(model(x), plain(x.round(decimals=1)), 1e-6)
    with surgeons[0].disabled(), surgeons[1].disabled():
        assert_close(model(x), plain(x.round(decimals=1)), 1e-6)
    surgeons[0].merge()
    assert_close(model(x), plain(x.round(decimals=1)), 1e-5)


def _pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)


def _normed(layer: nn.Module) -> None:
    nn.utils.weight_norm(layer)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("change", [_pruned, _normed])
def test_pruning_and_weight_norm_of_an_operated_layer_act_on_the_frozen_weight(change):
    torch.manual_seed(0)
    model = Tower(nn.Linear(16, 12))
    base = deepcopy(model)
    apply(model, both(), seed=1)
    perturb(model)
    change(model.layers[0])
    change(base.layers[0])
    p, x = model.layers[0].weight_surgery.tensors(), torch.randn(3, 16)
    y = model(x)
    base(x)
    weight = base.layers[0].weight + 8 * p["add_low_rank.B"] @ p["add_low_rank.A"]
    weight = weight * (p["post_magnitude.m"] / weight.norm(dim=1))[:, None]
    assert_close(y, x @ weight.T + base.layers[0].bias, 1e-5)
    assert_close(model.layers[0].weight.clone(), weight, 1e-5)


def test_pruned_tensors_of_an_adapter():
    model = Tower(nn.Linear(16, 12))
    apply(model, both())
    perturb(model)
    x, copy = torch.randn(3, 16), deepcopy(model)
    prune.l1_unstructured(model.layers[0].weight_surgery.add_low_rank, "A", 0.5)
    a = copy.layers[0].weight_surgery.add_low_rank.A
    with torch.no_grad():
        a.mul_(model.layers[0].weight_surgery.add_low_rank.A_mask)
    assert_close(model(x), copy(x), 1e-6)
    with torch.no_grad():
        model.layers[0].weight_surgery.add_low_rank.A_orig.mul_(2)
        a.mul_(2)
    assert_close(model(x), copy(x), 1e-6)


def test_a_parametrisation_of_an_operated_weight_is_refused():
    model = Tower(nn.Linear(16, 12))
    apply(model, both())
    parametrizations.weight_norm(model.layers[0])
    with pytest.raises(SurgeryError, match="a parametrisation took its place after the surgery"):
        model(torch.randn(3, 16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["lora", "dora", "sora", "oft"])
def test_another_dtype_after_the_surgery(name, dtype):
    case = next(c for c in CASES if c.name == name)
    op = operated(case, LAYOUTS["linear 12x12"], torch.float32)
    wanted = op.model(op.x)
    op.model.to(dtype)
    y = op.model(op.x.to(dtype))
    assert y.dtype == dtype and all(p.dtype == dtype for p in op.adapter.parameters())
    assert_close(y.float(), wanted, {torch.float64: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype])


def test_base_and_operated_checkpoints_load_strictly():
    base = load_demo("llama").state_dict()
    model, other = load_demo("llama"), load_demo("llama")
    for each in (model, other):
        apply(each, load("dora", rank=2))
    perturb(model)
    ids = demo_inputs(model)
    y = model(**ids).logits
    for assign in (False, True):
        before = dict(model.named_parameters())
        model.load_state_dict(base, strict=True, assign=assign)
        assert torch.equal(model(**ids).logits, y)
        assert all(before[n] is p for n, p in model.named_parameters() if "_surgery" in n)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(**ids).logits, y)
    partly = {key: t for key, t in model.state_dict().items() if not key.endswith("add_low_rank.A")}
    with pytest.raises(RuntimeError, match="Missing key.*add_low_rank.A"):
        other.load_state_dict(partly)


def test_an_effective_weight_is_no_parameter():
    model, _, _ = read()
    assert isinstance(model.layers[0].weight, EffectiveWeight) and type(model.layers[0].bias) is nn.Parameter
    with pytest.raises(TypeError, match="cannot assign"):
        nn.Linear(16, 12).weight = model.layers[0].weight


class OfItsClass(nn.Linear):
    """A layer whose own forward reads what its class says, by names that a class of ours might have too."""

    base, names, kind = 10000, ("a", "b"), "mine"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.base / len(self.names) * len(self.kind)


@pytest.mark.parametrize("layer", [OfItsClass, type("Plain", (nn.Linear,), {n: vars(OfItsClass)[n] for n in ("base", "names", "kind")})])
def test_what_a_class_says_is_what_its_layers_read(layer: type[nn.Linear]) -> None:
    model, x = nn.Sequential(layer(6, 6)), torch.randn(2, 6)
    before, said = model(x), (layer.base, layer.names, layer.kind)
    surgeon = apply(model, both(), check=False)
    torch.testing.assert_close(model(x), before)
    assert (model[0].base, model[0].names, model[0].kind) == said and isinstance(deepcopy(model)[0], layer)
    perturb(model)
    operated = model(x)
    surgeon.merge()
    torch.testing.assert_close(model(x), operated)
    surgeon.remove()
    assert type(model[0]) is layer and torch.equal(model(x), before)


@pytest.mark.parametrize(("layer", "name", "x"), [
    (nn.Linear(6, 6), "input", torch.randn(2, 6)), (tf.pytorch_utils.Conv1D(6, 6), "x", torch.randn(2, 6)),
    (nn.Conv1d(6, 6, 1), "input", torch.randn(2, 6, 3)), (nn.Embedding(6, 6), "input", torch.arange(4))])
def test_an_input_may_be_given_by_its_name(layer: nn.Module, name: str, x: Tensor) -> None:
    surgeon = apply(nn.Sequential(layer), both("any"), check=False)
    perturb(layer)
    assert torch.equal(layer(**{name: x}), layer(x))
    with surgeon.disabled():
        assert torch.equal(layer(**{name: x}), layer(x))
    for given in ((), (x, x)):
        with pytest.raises(TypeError, match=f"takes one input, and is given {len(given)}"):
            layer(*given)


@pytest.mark.parametrize("layer, x", [
    (nn.Embedding(12, 12), torch.arange(12).reshape(2, 6)), (nn.Conv2d(3, 12, 2), torch.ones(2, 3, 5, 5)),
    (nn.Linear(12, 12), torch.ones(2, 12))])
def test_a_square_layer_is_run_with_its_weight_and_not_with_that_turned(layer, x) -> None:
    """A layer that looks rows up has Wᵀ for its map, any other W: of a square one both are matrices of one shape."""
    model = nn.Sequential(layer)
    apply(model, parse("""
        update turned() { param g = 0.5  return g * reshape(W.T, out, in) }
        target any shifted { add turned() }"""), check=False)
    found = model(x)
    weight = layer.weight.detach()
    frozen = model.get_parameter("0.weight")
    with torch.no_grad():
        assert torch.allclose(weight.reshape(12, 12), frozen.reshape(12, 12) + 0.5 * frozen.reshape(12, 12).T)
        plain = {nn.Embedding: lambda: weight[x], nn.Linear: lambda: x @ weight.T + layer.bias,
                 nn.Conv2d: lambda: nn.functional.conv2d(x, weight, layer.bias)}
        wanted = next(make for kind, make in plain.items() if isinstance(layer, kind))()
        assert torch.allclose(found, wanted, atol=1e-5)
