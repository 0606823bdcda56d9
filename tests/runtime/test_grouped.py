"""Convolutions in groups, depthwise ones among them: W is the stored weight as [out, in / groups · kernel], and each run
of its rows sees its own channels. Every program gives what torch's own convolution gives with W' in the weight's place.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
from case import Case
from layers import Layout, Operated, Tower, assert_close, gradients, operated, perturb
from peft import LoraConfig
from peft_trips import adapted, saved
from torch import Tensor, nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    MambaConfig,
    MambaForCausalLM,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    RegNetConfig,
    RegNetForImageClassification,
)
from zoo import CASES

import surgery
from surgery.diagnostics import SurgeryError
from surgery.ir.dense import dense
from surgery.language.library import parse
from surgery.layers.survey import sites
from surgery.models.demo import demo_inputs
from surgery.planning.compile import compile
from surgery.planning.figures import Report
from surgery.runtime.apply import apply

EXACT = 1e-10


def _layout(name: str, build: Callable[[], nn.Module], *shape: int) -> Layout:
    """A layout whose map is torch's own convolution of that geometry."""
    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        module = build()
        return module._conv_forward(x, weight.reshape(module.weight.shape), bias)

    return Layout(name, build, lambda: torch.randn(2, *shape), run, lambda w: w.flatten(1))


GEOMETRIES = (
    _layout("in 2 groups, stride and padding", lambda: nn.Conv2d(4, 12, 3, stride=2, padding=1, groups=2), 4, 5, 6),
    _layout("in 4 groups, dilated and circular", lambda: nn.Conv2d(
        8, 12, (3, 2), dilation=(2, 1), padding=(2, 1), padding_mode="circular", groups=4), 8, 6, 5),
    _layout("depthwise, reflecting", lambda: nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect", groups=6), 6, 5, 4),
    _layout("depthwise in time", lambda: nn.Conv1d(12, 12, 4, padding=3, groups=12), 12, 5),
    _layout("two filters a channel", lambda: nn.Conv1d(6, 12, 3, padding="same", bias=False, groups=6), 6, 7),
    _layout("in space, in 3 groups", lambda: nn.Conv3d(
        6, 12, 2, padding=1, padding_mode="replicate", groups=3), 6, 2, 3, 3),
    _layout("as wide as high", lambda: nn.Conv1d(8, 12, 3, groups=2), 8, 5),
)
_NAMES = ("lora", "dora", "post_diag", "sora", "hira", "ia3", "mirrors on out", "mirrors on in", "gains on both sides",
          "two updates", "order of steps", "glora", "a full update", "a projection that depends on W",
          "W among the factors", "a norm with its gradient", "a magnitude per column with its gradient")
FORMULAS = [case for case in CASES if case.name in _NAMES]
BLOCKS = [case for case in CASES if case.name in ("block_diag of expm", "one block for all", "blocks on out with bias",
                                                  "kron of two rotations", "kron of a gain and I", "everything")]
# What a formula can meet: wide groups and narrow ones, one channel each, a square W. How a kernel moves is another matter.
WIDE, NARROW, DEPTHWISE, SQUARE = (GEOMETRIES[i] for i in (0, 1, 3, 6))
PAIRS = [*((case, layout) for case in FORMULAS for layout in (WIDE, NARROW, DEPTHWISE, SQUARE)),
         *((case, layout) for case in BLOCKS for layout in (WIDE, NARROW, SQUARE)),
         *((case, layout) for case in FORMULAS for layout in GEOMETRIES if case.name == "order of steps"
           and layout not in (WIDE, NARROW, DEPTHWISE, SQUARE))]


def test_the_formulas_are_all_there():
    assert {case.name for case in FORMULAS} == set(_NAMES) and len(BLOCKS) == 6


def programs(op: Operated, training: bool):
    """The layer with each of its programs in turn."""
    best = op.adapter.programs()[training]
    for program in dict.fromkeys((best, *best.over)):
        op.adapter.programs()[training] = program
        yield program.strategy
    op.adapter.programs()[training] = best


@pytest.mark.parametrize(("case", "layout"), PAIRS, ids=str)
def test_every_program_is_torchs_convolution_with_the_new_weight(case, layout):
    op = operated(case, layout)
    x, leaves = op.input(), op.leaves()
    expected = op.oracle(x["x"], leaves)
    direction = torch.randn_like(expected)
    wanted = gradients(expected, direction, {**x, **leaves})
    for training in (True, False):
        op.model.train(training)
        for strategy in programs(op, training):
            mine = op.input()
            y = op.model(mine["x"])
            assert_close(y, expected, EXACT, strategy)
            for key, gradient in gradients(y, direction, {**mine, **op.parameters}).items():
                assert_close(gradient, wanted[key], EXACT, f"{strategy}: the gradient of {key}")


# Maps that keep to the rows of a group, and those that look as if they did.
MAPS = ("diag(d) + 0.1", "(0.5 * diag(d)) @ block_diag(S)", "block_diag(S) @ diag(d) @ block_diag(S).T",
        "kron(I(n / 3), K)", "kron(K, I(n / 3))", "shuffle(n / 3, 3) @ diag(d) @ shuffle(3, n / 3)",
        "diag(d) + shuffle(2, n / 2)", "I(n) + 0.3 * (d2 @ d2.T)", "diag(d) * block_diag(S)", "diag(d) @ X", "diag(d) - X",
        "(I(n) + d2 @ d2.T) @ diag(d)", "kron(I(2), block_diag(Z)) @ diag(d)", "circulant(C)", "block_diag(H) @ G")


@pytest.mark.parametrize("layout", [WIDE, NARROW, DEPTHWISE], ids=str)
@pytest.mark.parametrize("text", MAPS)
def test_a_map_of_the_rows_is_taken_for_what_it_is(text, layout):
    sizes = {"d": "[n]", "S": "[n / 3, 3, 3]", "K": "[3, 3]", "d2": "[n, 1]", "X": "[n, n]", "Z": "[n / 6, 3, 3]",
             "C": "[n / 4, n / 4, 4]", "H": "[n / 3, 3, 2]", "G": "[2 * n / 3, n]"}
    params = "\n".join(f"param {name}{size} ~ normal(std = 0.5)" for name, size in sizes.items()
                       if name in re.findall(r"[a-zA-Z]\w*", text))
    case = Case("map", "add low_rank(1, 2)\npost own()", lambda w, p: w, lambda m, n: 0, shifted=True,
                definitions=f"transform own() on n {{\n{params}\nreturn {text}\n}}")
    op = operated(case, layout)
    x, leaves = op.input(), op.leaves()
    made = dense(op.adapter.formula.weight, {"weight": op.weight, **leaves})
    expected = layout.run(x["x"], made, op.bias)
    direction = torch.randn_like(expected)
    wanted = gradients(expected, direction, {**x, **leaves})
    for strategy in programs(op, True):
        mine = op.input()
        y = op.model(mine["x"])
        assert_close(y, expected, EXACT, strategy)
        for key, gradient in gradients(y, direction, {**mine, **op.parameters}).items():
            assert_close(gradient, wanted[key], EXACT, f"{strategy}: the gradient of {key}")


@pytest.mark.parametrize("layout", GEOMETRIES, ids=str)
@pytest.mark.parametrize("name", ["lora", "order of steps"])
def test_merged_it_is_the_same_and_removed_it_is_the_base(name, layout):
    op = operated(next(case for case in CASES if case.name == name), layout)
    y = op.model(op.x)
    assert_close(op.layer.weight.clone(), op.case.formula(op.weight, op.p).reshape(op.base.weight.shape), EXACT)
    op.surgeon.merge()
    assert_close(op.model(op.x), y, EXACT)
    op.surgeon.unmerge()
    op.surgeon.remove()
    assert type(op.layer) is type(op.base) and torch.equal(op.layer.weight, op.base.weight)


@pytest.mark.parametrize("layout", GEOMETRIES, ids=str)
@pytest.mark.parametrize("name", ["lora", "sora"])
def test_a_narrow_weight(name, layout):
    op = operated(next(case for case in CASES if case.name == name), layout, torch.bfloat16, adapter=torch.float32)
    mine, leaves = op.input(), op.leaves()
    x = {"x": op.x.double().requires_grad_()}
    y, expected = op.model(mine["x"]), op.oracle(x["x"], leaves)
    assert y.dtype == torch.bfloat16
    assert_close(y, expected, 2e-2)
    direction = torch.randn(y.shape)
    wanted = gradients(expected, direction.double(), {**x, **leaves})
    for key, gradient in gradients(y, direction.to(y.dtype), {**mine, **op.parameters}).items():
        assert_close(gradient, wanted[key], 6e-2, key)


def test_one_image_without_a_batch_and_channels_last():
    op = operated(FORMULAS[0], WIDE)
    assert_close(op.model(op.x[0]), op.model(op.x)[0], EXACT)
    turned = op.x.to(memory_format=torch.channels_last)
    assert_close(op.model(turned), op.model(op.x), EXACT)


def test_dropout_drops_entries_of_the_input_for_every_program():
    op = operated(next(case for case in CASES if case.name == "sora"), WIDE, dropout=0.4)
    for _ in programs(op, True):
        torch.manual_seed(11)
        y = op.model(op.x)
        torch.manual_seed(11)
        dropped = op.adapter.frozen(op.layer).dropout(op.x, 0.4)
        assert not torch.equal(dropped, op.x)
        frozen = {"weight": op.weight, "bias": op.bias, **op.leaves()}
        whole = dense(op.adapter.formula.weight, frozen)
        start = {key: torch.zeros_like(t) if key == "add_low_rank.B" else t for key, t in frozen.items()}
        without = dense(op.adapter.formula.weight, start)
        expected = op.layout.run(op.x, without, op.bias) + op.layout.run(dropped, whole - without, None)
        assert_close(y, expected, EXACT)


# ------------------------------------------------------------------------------------------------ what it costs


def test_a_thin_update_runs_by_its_factors_where_groups_are_wide_and_is_built_where_they_are_narrow():
    def strategy(module: nn.Module) -> str:
        (placed,) = compile(Tower(module), parse('target conv "layers.0" { add low_rank(4) }')).placed
        return placed.compiled.candidates()[0].strategy

    assert strategy(nn.Conv2d(256, 256, 3, groups=2)) != "built weight"
    assert strategy(nn.Conv2d(256, 256, 3, groups=256)) == "built weight"


def test_only_what_is_large_beside_the_whole_map_is_a_fallback():
    def warned(steps: str, module: nn.Module) -> bool:
        return bool(Report(compile(Tower(module), parse(f'target conv "layers.0" {{ {steps} }}'))).fallbacks)

    full = "transform full() on n { param X[n, n] = 0 return expm(X - X.T) }"
    depthwise = nn.Conv2d(64, 64, 7, groups=64)
    assert not warned("add low_rank(16)", depthwise) and not warned("add low_rank(2) post orthogonal(2)", depthwise)
    spec = parse(f'{full}\ntarget conv "layers.0" {{ post full() }}')
    assert Report(compile(Tower(depthwise), spec)).fallbacks


# --------------------------------------------------------------------------------------------- models that have them


def _mamba() -> nn.Module:
    return MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, vocab_size=64,
                                        time_step_rank=2, pad_token_id=0, bos_token_id=0, eos_token_id=0))


MODELS = {
    "convnext": lambda: ConvNextForImageClassification(ConvNextConfig(
        hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32, layer_scale_init_value=0.5)),
    "mobilenet": lambda: MobileNetV2ForImageClassification(MobileNetV2Config(image_size=32, depth_multiplier=0.1)),
    "efficientnet": lambda: EfficientNetForImageClassification(EfficientNetConfig(
        image_size=32, width_coefficient=0.2, depth_coefficient=0.1, hidden_dim=256)),
    "regnet": lambda: RegNetForImageClassification(RegNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4, layer_type="y")),
    "mamba": _mamba,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_has_them(name):
    """All convolutions are taken; operated it trains, merged it says the same, and removed it is what it was."""
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    inputs = {k: t.double() if t.is_floating_point() else t for k, t in demo_inputs(model).items()}
    before, state = model(**inputs).logits, copy.deepcopy(model.state_dict())
    grouped = [s.name for s in sites(model) if s.layout.kind.groups > 1]
    assert grouped
    spec = parse("target conv { pre diagonal() add low_rank(2) post magnitude() }")
    surgeon = apply(model, spec, dtype=torch.float64, check=name == "convnext")
    assert set(grouped) <= surgeon.adapters.keys()
    assert_close(model(**inputs).logits, before, 1e-9)
    perturb(model, 0.05)
    y = model(**inputs).logits
    (y * torch.randn_like(y)).sum().backward()
    for site in grouped:
        assert all(p.grad is not None and p.grad.any() for p in surgeon.adapters[site].parameters()), site
    surgeon.merge()
    assert_close(model(**inputs).logits, y, 1e-9)
    surgeon.unmerge()
    surgeon.remove()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())


def test_a_cache_that_reads_the_weight_reads_the_new_one():
    """Mamba multiplies by `conv1d.weight` itself where it goes on from a cache."""
    torch.manual_seed(0)
    model, ids = _mamba().double().eval(), torch.randint(1, 64, (1, 5))
    apply(model, parse('target conv "**.conv1d" { add low_rank(2) }'), dtype=torch.float64)
    perturb(model)
    whole = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True), whole)


# ------------------------------------------------------------------------------------------------ what is refused


def test_what_does_not_fit_is_refused_alike_by_plan_and_apply():
    model = Tower(nn.Conv2d(12, 12, 3, groups=12))
    spec = parse('target conv "layers.0" { pre block_orthogonal(4) on in }')
    said = []
    for operation in (compile, apply):
        with pytest.raises(SurgeryError) as failure:
            operation(model, spec)
        said.append(str(failure.value))
    assert said[0] == said[1] and "layers.0 [12, 9] in 12 groups" in said[0]
    assert type(model.layers[0]) is nn.Conv2d


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(4, 8, 3, groups=2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((2, 3)))


def test_lora_as_peft_puts_it_on_groups_is_refused_both_ways(tmp_path):
    """PEFT's A sees all channels there, B the rows of its group: no update of a W [out, in / groups · kernel] does that."""
    torch.manual_seed(0)
    folder = saved(adapted(Net(), LoraConfig(r=4, target_modules=["conv"])), tmp_path / "theirs")
    with pytest.raises(SurgeryError, match="grouped convolution"):
        surgery.import_peft(Net(), folder)
    surgeon = apply(Net(), parse('target conv "conv" { add low_rank(4) }'))
    with pytest.raises(SurgeryError, match="grouped convolution") as failure:
        surgery.export_peft(surgeon, tmp_path / "ours")
    assert failure.value.diagnostics[0].code == "no-peft-form" and not (tmp_path / "ours").exists()
