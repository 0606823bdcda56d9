"""Kernels of one pass on a GPU against their plain forms in float64. `python3 dev.py gpu` runs it, and it is skipped where
there is no CUDA. SURGERY_GPU_DEVICE=cpu holds the plain forms to themselves, to try the tests; with TRITON_INTERPRET=1 too
the kernels run on a CPU, in Triton's interpreter (test_triton_interpreted.py does so)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from layers import assert_close
from torch import Tensor

import surgery
from surgery.codegen import kernels_one_pass as one_pass
from surgery.codegen.dropout_number import drawn_number
from surgery.codegen.supposed_device import steps_of

pytestmark = pytest.mark.gpu

DEVICE = torch.device(os.environ.get("SURGERY_GPU_DEVICE", "cuda"))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROUNDINGS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# Tokens, features, rank, and whether all lie by columns: none, one, not a power of 2, as in a model. (Each kind of
# sizes is a kernel to compile.)
SHAPES = [(0, 48, 4, False), (1, 11008, 16, True), (65, 130, 1, False), (300, 96, 64, True), (1030, 333, 17, False),
          (129, 257, 128, True), (2500, 11008, 16, False)]
CASES = [(torch.float32, shape) for shape in SHAPES] + [
    (dtype, shape) for dtype in (torch.bfloat16, torch.float16) for shape in SHAPES[3:]]
GIVEN = [("gained", True), ("gained", False), ("gained_back", None), ("gained_back", True), ("gained_back", False),
         ("masked", None), ("masked_", None), ("times_masked", None), ("masked_times", None), ("masked_outer", True),
         ("masked_outer", False)]
if INTERPRETED:  # it runs one tile after another in NumPy: few of them; and its products of bfloat16 are garbage
    CASES = [(torch.float32, (1, 700, 16, True)), (torch.float32, (65, 130, 1, False)),
             (torch.float16, (129, 257, 128, True))]


@pytest.fixture(autouse=True)
def _small_too(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    monkeypatch.setattr(one_pass, "SMALL", 0)
    if INTERPRETED:
        monkeypatch.setattr(one_pass, "_fits", lambda numbers, tensors: numbers > 0 and tensors[0].dtype in ROUNDINGS)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())


def draw(*shape: int, dtype: torch.dtype, turned: bool = False) -> Tensor:
    """Random numbers; turned: by columns in memory, and beside others."""
    generator = torch.Generator().manual_seed(sum(shape))
    if turned:
        return torch.randn(shape[1] + 3, shape[0], generator=generator).to(DEVICE, dtype)[:shape[1]].mT
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def operands(name: str, way: bool | None, shape: Sequence[int], dtype: torch.dtype, turned: bool) -> list[Any]:
    t, n, r = shape
    y, g, h = (draw(t, size, dtype=dtype, turned=turned) for size in (n, n, r))
    m, d, number = draw(r, n, dtype=dtype, turned=turned), draw(n, dtype=dtype), drawn_number(y, 0.3)
    low = [None, None] if way is None else [h, m]
    return {"gained": [y, d, h, m, 0.5, way], "gained_back": [g, d, y, *low, 0.5, bool(way)], "masked": [y, number],
            "masked_": [y, number], "times_masked": [h, m, number], "masked_times": [y, number, m.mT],
            "masked_outer": [y, number, h, way]}[name]


def values(name: str, form: Any, args: list[Any]) -> list[Tensor]:
    """What a form gives, sums over chunks of rows added up."""
    results = form(*args)
    results = args[:1] if name == "masked_" else list(results) if isinstance(results, tuple) else [results]
    if name in ("gained_back", "masked_outer"):
        results[-1] = results[-1].sum(0)
    return results


@pytest.mark.parametrize("name, way", GIVEN)
@pytest.mark.parametrize("dtype, shape", CASES, ids=str)
def test_a_kernel_is_its_plain_form(name, way, dtype, shape):
    *shape, turned = shape
    args = operands(name, way, shape, dtype, turned)
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    found = values(name, getattr(torch.ops.surgery, name), args)
    wanted = values(name, getattr(one_pass, f"plain_{name}"), wide)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype in (dtype, torch.float32)
        assert_close(one, other, ROUNDINGS[dtype], f"{name} of {shape}")
        if "masked" in name and one.shape == tuple(shape[:2]):
            assert torch.equal(one[other == 0], torch.zeros_like(one[other == 0])), "what is dropped is 0"


def stepped(dtype: torch.dtype, spec: surgery.Spec) -> list[Tensor]:
    """The output of a layer as its step runs on a GPU, and the gradients, in this dtype. The same draws in each."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(70, 90))
    surgeon = surgery.apply(model, spec)
    for p in surgeon.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x = draw(3, 41, 70, dtype=torch.float32).to(dtype).requires_grad_()
    model.to(DEVICE, dtype)
    with steps_of("cuda"):
        torch.manual_seed(1)
        y = model(x)
    (y * torch.linspace(-1, 1, y.numel(), device=DEVICE, dtype=dtype).view_as(y)).sum().backward()
    return [y, *(p.grad for p in (x, *surgeon.parameters()) if p.grad is not None)]


@pytest.mark.parametrize("dropout", [0, 0.3])
@pytest.mark.parametrize("name", ["lora", "dora", "sora", "pre_diag", "hra"])
def test_a_step_by_kernels_is_that_of_plain_forms(name, dropout):
    spec = surgery.load(name)
    spec = spec if "dropout" not in {p.name for p in spec.params} else surgery.load(name, dropout=dropout)
    for found, wanted in zip(stepped(torch.float32, spec), stepped(torch.float64, spec), strict=True):
        assert_close(found, wanted, 3e-6, name)


def test_triton_works_where_there_is_a_gpu():
    """Else the tests above would hold plain forms to themselves."""
    assert one_pass._works(torch.device("cuda", 0)) or DEVICE.type != "cuda"


@pytest.mark.parametrize("dtype", ROUNDINGS, ids=str)
def test_a_sum_over_tokens_is_the_same_each_time(dtype):
    args = operands("gained_back", True, [5000, 300, 16], dtype, False)
    first, second = (one_pass.gained_back((0.5, True), *args[:3], *args[3:5]) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_many_tokens_lose_nothing_of_a_sum():
    """Some thousands of numbers in bfloat16 would stop at 256."""
    ones = torch.ones(40_000, 32, dtype=torch.bfloat16, device=DEVICE)
    _, sums = torch.ops.surgery.gained_back(ones, ones[0], ones, None, None, 1.0, False)
    assert (sums.sum(0) == 40_000).all()


def test_seeds_follow_torchs_generator():
    a = torch.empty(8, 8, device=DEVICE)
    torch.manual_seed(3)
    first, other = drawn_number(a, 0.1), drawn_number(a, 0.1)
    torch.manual_seed(3)
    assert first.device.type == DEVICE.type and first == drawn_number(a, 0.1) and first != other


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_gpu_computes_on_itself():
    y, d, h, m = (torch.randn(*shape, device="cuda:1") for shape in ((40, 24), (24,), (40, 4), (4, 24)))
    with torch.cuda.device(0):
        found = torch.ops.surgery.gained(y, d, h, m, 2.0, True)
    assert_close(found.cpu(), one_pass.plain_gained(*(t.cpu().double() for t in (y, d, h, m)), 2.0, True), 1e-5)
