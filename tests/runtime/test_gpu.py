"""The zoo on a GPU against the CPU. Everything here is marked `gpu`; `python3 dev.py gpu` runs it, and it is skipped
where there is no CUDA. SURGERY_GPU_DEVICE=cpu runs the same lines on a CPU, to try the tests themselves.

What is compared with is our own model on the CPU in float64, from the same rounded weights, inputs and parameters: that
it is right is for the other tests to say.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from copy import deepcopy
from itertools import product

import pytest
import torch
from dropout import METHODS, P, by_hand, shipped
from layers import LAYOUTS, Layout, Operated, assert_close, gradients, operated
from models import perturbed
from packed import Int8Linear
from torch import Tensor, nn
from zoo import CASES

import surgery
from surgery.codegen import kernels_one_pass, masks
from surgery.codegen.cost_model import one_pass
from surgery.layers.opaque_linear import is_plain
from surgery.models.demo import demo_inputs, load_demo

pytestmark = pytest.mark.gpu

MANY = Layout("linear 96x144, 2,500 tokens", lambda: nn.Linear(144, 96), lambda: torch.randn(5, 500, 144) / 8)
WIDE = LAYOUTS["linear 12x18"]
LAYERS = [*(LAYOUTS[name] for name in ("linear 12x18", "Conv1D 18x12", "Conv2d 12x18", "Embedding 18x12")), MANY]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Relative errors of outputs and of gradients, a few roundings of each dtype.
TOLERANCES = {torch.float32: (1e-5, 2e-4), torch.bfloat16: (2e-2, 6e-2), torch.float16: (3e-3, 1e-2)}
on_every_case = pytest.mark.parametrize("case", CASES, ids=str)
in_every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(scope="module")
def device() -> Iterator[torch.device]:
    name = os.environ.get("SURGERY_GPU_DEVICE", "cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    with (torch.backends.cudnn.flags(enabled=True, allow_tf32=False),  # convolutions in float32 proper
          pytest.MonkeyPatch.context() as patch):
        patch.setattr(kernels_one_pass, "SMALL", 0)  # kernels of Triton's for small layers too
        yield torch.device(name)


class Pair:
    """An operated model on the device, and what it is compared with: the same on the CPU in float64."""

    def __init__(self, op: Operated, device: torch.device):
        self.wide = deepcopy(op.model).double()
        self.op, self.device, self.model = op, device, op.model.to(device)

    def input(self) -> tuple[Tensor, Tensor]:
        """The same input twice: on the device, and in float64 on the CPU."""
        x = self.op.x
        found = x.to(self.device), x.double() if x.is_floating_point() else x
        return tuple(t.clone().requires_grad_(t.is_floating_point()) for t in found)

    def compare(self, y: Tensor, x: Tensor, wide_x: Tensor, tolerances: tuple[float, float]) -> None:
        """An output, and the gradients of the input and of every parameter."""
        expected = self.wide(wide_x)
        assert y.device.type == self.device.type
        assert_close(y.cpu(), expected, tolerances[0], "the output")
        direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
        actual = gradients(y, direction.to(self.device), {"x": x, **dict(self.model.named_parameters())})
        wanted = gradients(expected, direction.double(), {"x": wide_x, **dict(self.wide.named_parameters())})
        assert actual.keys() == wanted.keys()
        # In half types a parameter whose gradient is what is left of larger ones is as far off as those were rounded:
        # Q of R(Q) diag(d) R(Q)ᵀ with d near 1 by 13 %, and by as much in torch's own operations.
        whole = sum(g.double().square().sum() for key, g in wanted.items() if key != "x").sqrt().item()
        for key, gradient in wanted.items():
            least = whole if key != "x" and y.dtype != torch.float32 else 0.0
            error = (actual[key].cpu().double() - gradient).norm().item()
            size = max(gradient.norm().item(), least) or 1.0
            assert error <= tolerances[1] * size, f"the gradient of {key} is off by {error / size:.1e}, relative"


@on_every_case
@pytest.mark.parametrize("layout", LAYERS, ids=str)
@in_every_dtype
def test_values_and_gradients(case, layout, dtype, device):
    pair = Pair(operated(case, layout, dtype, adapter=torch.float32, noise=0.3 if layout is not MANY else 0.03), device)
    x, wide_x = pair.input()
    y = pair.model(x)
    assert y.dtype == dtype
    pair.compare(y, x, wide_x, TOLERANCES[dtype])
    with torch.no_grad():
        assert_close(pair.model.eval()(x), y, TOLERANCES[dtype][0], "evaluation")


@on_every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("layout", [WIDE, LAYOUTS["Conv2d 12x18"]], ids=str)
def test_autocast(case, layout, dtype, device):
    pair = Pair(operated(case, layout, torch.float32), device)
    x, wide_x = pair.input()
    with torch.autocast(device.type, dtype):
        y = pair.model(x)
    assert y.dtype == dtype
    pair.compare(y, x, wide_x, TOLERANCES[dtype])


@on_every_case
@in_every_dtype
def test_merge_unmerge_remove(case, dtype, device):
    """W' is what the CPU merges, rounded once; unmerging and removing give every bit back."""
    op = operated(case, WIDE, dtype, adapter=torch.float32)
    op.model.to(device), op.base.to(device)
    x = op.x.to(device)
    before, y = op.layer.get_parameter("weight").clone(), op.model(x)
    op.surgeon.merge()
    exact = case.formula(op.weight.cpu(), type(op.p)({key: value.cpu() for key, value in op.p.items()}))
    half = torch.finfo(dtype).eps / 2
    error = (op.layer.get_parameter("weight").cpu().double() - exact).abs()
    # singular vectors are as far off as their singular values are near each other
    more = (error - half * exact.abs() * 1.01).max() / exact.abs().max()
    assert more <= (1e-4 if case.name == "the singular values of a product" else 1e-5), f"{more:.1e}"
    assert_close(op.model(x), y, TOLERANCES[dtype][0], "the merged output")
    op.surgeon.unmerge()
    assert torch.equal(op.layer.get_parameter("weight"), before) and torch.equal(op.model(x), y)
    op.surgeon.remove()
    assert torch.equal(op.model(x), op.base(x)) and op.layer.get_parameter("weight").device.type == device.type


@on_every_case
def test_operated_on_the_device_itself(case, device):
    """With the model there already, and with the device as torch's default, the same adapters as on the CPU."""
    here = operated(case, WIDE, torch.float32, noise=0.0)
    for default in ("cpu", device):
        model = deepcopy(here.base)
        with torch.device(default):
            surgeon = surgery.apply(nn.ModuleDict({"layers": nn.ModuleList([model])}).to(device), case.spec(), seed=3)
        for key, tensor in surgeon.adapters["layers.0"].tensors().items():
            assert tensor.device.type == device.type
            if case.name not in SVD:  # unique but for signs
                assert_close(tensor.cpu(), here.parameters[key], 1e-4, key)


SVD = ("pissa", "tinylora", "psoft", "olora", "deft_qr")


# --------------------------------------------------------------------------------------------------------- dropout


def mask_of_a_step(a: Tensor, p: float) -> Tensor:
    """As a step draws it on the device of a."""
    is_number = one_pass(a.device.type) and kernels_one_pass.has_triton()
    return (masks.number if is_number else masks.mask)(a, p)


@pytest.mark.parametrize("p", [0.05, 0.4, 0.9])
@pytest.mark.parametrize("drawn", [masks.mask, masks.number])
@in_every_dtype
def test_the_chance_of_dropout(p, drawn, dtype, device):
    a = torch.ones(500, 400, dtype=dtype, device=device)
    dropped = masks.masked(a, drawn(a, p))
    assert set(dropped.float().unique().tolist()) == {0.0, 1.0}
    share = (dropped == 0).double().mean().item()
    assert abs(share - p) < 5 * (p * (1 - p) / a.numel()) ** 0.5
    along = (dropped == 0).double().mean(0)  # no column is favoured
    assert (along - p).abs().max() < 6 * (p * (1 - p) / len(a)) ** 0.5


@pytest.mark.parametrize("name", METHODS)
def test_training_with_a_known_mask(name, device):
    pair = Pair(operated(shipped(name), WIDE, torch.float32, dropout=P), device)
    x, wide_x = pair.input()
    torch.manual_seed(11)
    y = pair.model(x)
    torch.manual_seed(11)
    rows = x.detach().flatten(0, -2)  # as the step sees them
    mask = masks.masked(torch.ones_like(rows), mask_of_a_step(rows, P)).view(x.shape).cpu().double()
    leaves = {key: value.detach().cpu().double().requires_grad_() for key, value in pair.op.parameters.items()}
    on_cpu = Operated(pair.op.case, WIDE, pair.wide, pair.op.surgeon, pair.op.base.cpu(), pair.op.x)
    expected = by_hand(on_cpu, wide_x, wide_x * mask / (1 - P), leaves)
    assert_close(y.cpu(), expected, 1e-5, "the output")
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    actual = gradients(y, direction.to(device), {"x": x, **pair.op.parameters})
    for key, gradient in gradients(expected, direction.double(), {"x": wide_x, **leaves}).items():
        assert_close(actual[key].cpu(), gradient, 1e-4, key)


@pytest.mark.parametrize("name", METHODS)
def test_the_mean_over_masks_is_the_evaluated_output(name, device):
    op = operated(shipped(name), WIDE, torch.float32, dropout=P)
    op.model.to(device)
    x = torch.randn(18, device=device).expand(20_000, 18)
    samples = op.model(x).double()
    error = (samples.mean(0) - op.model.eval()(x[0]).double()).abs()
    assert (error < 5 * samples.std(0) / len(x) ** 0.5 + 1e-5).all() and (samples.std(0) > 1e-3).all()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_checkpointing(name, reentrant, device):
    op = operated(shipped(name), WIDE, torch.float32, dropout=0.4)
    op.model.to(device)
    x = op.x.to(device).requires_grad_()
    direction, found = torch.randn(2, 3, 12, device=device), []
    for run in (op.model, lambda x: torch.utils.checkpoint.checkpoint(op.model, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        (run(x) * direction).sum().backward()
        found.append([leaf.grad for leaf in (x, *op.parameters.values())])
        for leaf in (x, *op.parameters.values()):
            leaf.grad = None
    for mine, again in zip(*found):
        assert_close(again, mine, 1e-6)


# --------------------------------------------------------------------------------------------------- whole models


MODELS = ("llama", "mixtral", "gpt2", "bert", "resnet")
SPECS = ("lora", "dora", "sora", "oft")


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch, return_dict=True).logits


@pytest.mark.parametrize("spec, name", [pair for pair in product(SPECS, MODELS) if pair != ("oft", "resnet")])
def test_a_whole_model(name, spec, device):
    """The gradient of every parameter that trains; merged and saved as operated."""
    model = load_demo(name)
    if name == "mixtral":
        model.set_experts_implementation("eager")  # torch's grouped product has no float64
    surgeon = perturbed(model, spec_of(spec, name), scale=0.02)
    wide, batch = deepcopy(model).double(), demo_inputs(model)
    model.to(device)
    mine = {key: value.to(device) for key, value in batch.items()}
    theirs = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    y, expected = logits(model, mine), logits(wide, theirs)
    assert_close(y.cpu(), expected, 1e-4, "the output")
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    actual = gradients(y, direction.to(device), dict(model.named_parameters()))
    for key, gradient in gradients(expected, direction.double(), dict(wide.named_parameters())).items():
        assert_close(actual[key].cpu(), gradient, 2e-3, key)
    surgeon.merge()
    assert_close(logits(model, mine), y, 1e-4, "the merged output")


def spec_of(spec: str, name: str) -> surgery.Spec:
    """A shipped spec on a model's layers of its family."""
    kind = {"resnet": "conv"}.get(name, "linear")
    found = surgery.load(spec, **({"dropout": 0.0} if spec not in ("oft",) else {}))
    return found.model_copy(update={"targets": tuple(t.model_copy(update={"kind": kind}) for t in found.targets)})


@pytest.mark.parametrize("spec", SPECS)
def test_generation(spec, device):
    """Greedy tokens: operated, merged, and on the CPU."""
    model = load_demo("llama")
    surgeon = perturbed(model, spec_of(spec, "llama"))
    batch = demo_inputs(model)
    settings = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(**batch, **settings)
    model.to(device)
    mine = {key: value.to(device) for key, value in batch.items()}
    operated_ = model.generate(**mine, **settings)
    surgeon.merge()
    assert torch.equal(operated_, model.generate(**mine, **settings)) and torch.equal(operated_.cpu(), wanted)


@pytest.mark.parametrize("spec", SPECS)
def test_saved_from_the_device_and_attached_there(spec, device, tmp_path):
    model = load_demo("llama").to(device)
    surgeon = perturbed(model, spec_of(spec, "llama"))
    batch = {key: value.to(device) for key, value in demo_inputs(model).items()}
    y = logits(model, batch)
    surgeon.save(tmp_path / "adapter")
    other = load_demo("llama").to(device)
    surgery.attach(other, tmp_path / "adapter")
    assert_close(logits(other, batch), y, 1e-5)


@pytest.mark.parametrize("name", ["dora", "sora", "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_compiled(name, dtype, device):
    torch.compiler.reset()
    pair = Pair(operated(shipped(name), MANY, dtype, adapter=torch.float32, noise=0.1), device)
    x, wide_x = pair.input()
    pair.compare(torch.compile(pair.model, fullgraph=True)(x), x, wide_x, TOLERANCES[dtype])


@pytest.mark.parametrize("name", ["lora", "dora", "sora", "hira", "a projection from W on in"])
@in_every_dtype
def test_a_packed_layer(name, dtype, device):
    """One that is called, as those of quantisation libraries are."""
    torch.manual_seed(0)
    model = nn.Sequential(Int8Linear(18, 12))
    assert not is_plain(model[0].weight)
    perturbed(model, shipped(name).spec("*"), scale=0.1)
    wide, x = deepcopy(model).double(), torch.randn(40, 18).to(dtype)
    mine, theirs = x.to(device, copy=True).requires_grad_(), x.double().requires_grad_()
    model.to(device)
    y, expected = model(mine), wide(theirs)
    assert_close(y.cpu(), expected, TOLERANCES[dtype][0], "the output")
    y.sum().backward(), expected.sum().backward()
    assert_close(mine.grad.cpu(), theirs.grad, TOLERANCES[dtype][1], "the gradient of the input")
    for (key, parameter), other in zip(model.named_parameters(), wide.parameters()):
        if parameter.requires_grad:
            assert_close(parameter.grad.cpu(), other.grad, TOLERANCES[dtype][1], key)
