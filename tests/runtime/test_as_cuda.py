"""What a GPU would refuse or do otherwise, seen on a CPU: a mode that refuses what CUDA refuses, and the paths that
only other devices take."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from as_cuda import AsCuda, Refused
from dropout import METHODS
from each import in_turns, of_some
from layers import LAYOUTS, Tower, assert_close, operated
from packed import Int8Linear
from torch import Tensor, nn
from zoo import CASES

import surgery
from surgery.codegen import kernels, kernels_row_sums, masks
from surgery.ir.operations import PRIMITIVES
from surgery.language.library import load
from surgery.runtime.apply import apply

WIDE = LAYOUTS["linear 12x18"]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
in_every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def norm_with(statistics: torch.dtype, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Σ a b over rows as an earlier `column_dot` had it: the gradient of a norm's gain."""
    a, b, gain = draw(9, 4, dtype=dtype), draw(9, 4, dtype=dtype), torch.ones(4, dtype=dtype)
    zero, one = torch.zeros(9, 1, dtype=statistics), torch.ones(9, 1, dtype=statistics)
    return torch.ops.aten.native_layer_norm_backward(a, b, [4], zero, one, gain, gain, (False, True, False))[1]


def half(*shape: int) -> Tensor:
    return draw(*shape, dtype=torch.bfloat16)


ALLOWED: list[Callable] = [
    lambda: norm_with(torch.float32, torch.float32), lambda: nn.LayerNorm(4, dtype=torch.float32)(draw(3, 4)),
    lambda: half(2, 3) @ half(3, 2), lambda: draw(2, 3) @ draw(3, 2), lambda: half(2, 3) * draw(2, 3),
    lambda: torch.fft.rfft(draw(4, 6)), lambda: torch.linalg.inv(draw(3, 3)), lambda: half(2, 3).norm(dim=-1),
    lambda: draw(4)[torch.tensor([1, 2])], lambda: draw(4).add_(half(4)), lambda: half(4).mul_(torch.tensor(2.0)),
    lambda: draw(4).take(torch.tensor([1])), lambda: nn.functional.embedding(torch.tensor([1]), half(3, 2)),
    lambda: draw(2, 3).to("meta") + torch.ones(3, device="meta"), lambda: nn.Conv2d(2, 3, 2)(draw(1, 2, 4, 4)),
]
REFUSED: list[Callable] = [
    lambda: norm_with(torch.bfloat16), lambda: norm_with(torch.float16, torch.float16),
    lambda: torch.ops.aten._fft_r2c(half(4, 8), [1], 0, True), lambda: torch.linalg.qr(half(3, 3)),
    lambda: torch.linalg.solve_triangular(half(3, 3), half(3, 3), upper=True), lambda: torch.linalg.svd(half(3, 3)),
    lambda: torch.linalg.inv_ex(half(3, 3)), lambda: torch.linalg.matrix_exp(half(3, 3)),
    lambda: half(2, 3) @ draw(3, 2), lambda: torch.addmm(draw(2), half(2, 3), half(3, 2)),
    lambda: torch.baddbmm(draw(1, 2, 2), half(1, 2, 3), half(1, 3, 2)), lambda: half(2, 3).mv(draw(3)),
    lambda: half(4).add_(draw(4)), lambda: half(4).addcmul_(half(4), draw(4)),
    lambda: draw(4)[torch.tensor([1, 2], dtype=torch.int32)],
    lambda: draw(4).take(torch.tensor([1], dtype=torch.int32)),
    lambda: draw(4).index_put_((torch.tensor([1], dtype=torch.int32),), torch.tensor(1.0)),
    lambda: draw(2, 3) + torch.ones(3, device="meta"), lambda: draw(4)[torch.ones(2, dtype=torch.int64, device="meta")],
    lambda: torch.ops.aten.convolution(half(1, 2, 4, 4), half(3, 2, 2, 2), draw(3), [1, 1], [0, 0], [1, 1], False,
                                       [0, 0], 1),
]


@pytest.mark.parametrize("call", ALLOWED)
def test_what_cuda_computes_runs(call):
    with AsCuda():
        call()


@pytest.mark.parametrize("call", REFUSED)
def test_what_cuda_refuses_is_refused(call):
    with pytest.raises(Refused), AsCuda():
        call()


# ------------------------------------------------------------------------------------------------------- the zoo


@pytest.fixture(params=["a CPU's paths", "those of other devices"])
def paths(request, monkeypatch) -> str:
    """The second: whole activations in place of parts, dropout's masks as bools."""
    if request.param != "a CPU's paths":
        monkeypatch.setattr(kernels, "on_cpu", lambda a: False)
        monkeypatch.setattr(kernels_row_sums, "ROWS", {})
    return request.param


def step(model: nn.Module, x: Tensor) -> None:
    """A training step, and an evaluation."""
    y = model.train()(x)
    y.backward(torch.ones_like(y))
    with torch.no_grad():
        model.eval()(x)


# What a formula computes is narrow in the first; a weight in float32 also runs under autocast, in float16.
NARROW = [(WIDE, torch.bfloat16)]
OTHERS = [(WIDE, torch.float32), (LAYOUTS["Conv2d 12x18"], torch.bfloat16), (LAYOUTS["Embedding 18x12"], torch.float32)]


@in_turns(3)
@pytest.mark.parametrize("case", CASES, ids=str)
@of_some("layout dtype", NARROW, OTHERS)
def test_the_zoo_asks_for_nothing_that_cuda_refuses(case, layout, dtype):
    """The adapter in float32, dropout, autocast, merging, removing. Where an operation names no device, its tensor is
    made on torch's default one, which is another here."""
    settings = {"dropout": 0.4} if case.name in METHODS else {}
    torch.manual_seed(1)
    model, x = Tower(layout.build().to(dtype)), layout.inputs()
    x = x.to(dtype).requires_grad_() if x.is_floating_point() else x
    with torch.device("meta"), AsCuda() as mode, pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "on_cpu", lambda a: False)
        surgeon = apply(model, case.spec(**settings))
        step(model, x)
        if dtype == torch.float32:
            with torch.autocast("cpu", torch.float16):
                y = model.train()(x)
            y.backward(torch.ones_like(y, device="cpu"))
        surgeon.merge(), surgeon.unmerge(), surgeon.remove()
    assert {"mm", "addmm", "bmm", "convolution", "embedding"} & mode.seen


@in_turns(3)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_embedding_under_autocast_stays_wide(case):
    """As torch's own does. Some of its updates are products, which autocast would narrow before they are added."""
    op = operated(case, LAYOUTS["Embedding 18x12"], torch.float32)
    y = op.model(op.x)
    with torch.autocast("cpu", torch.bfloat16):
        wide = op.model(op.x)
    assert wide.dtype == torch.float32
    assert_close(wide, y, 1e-6)


@pytest.mark.parametrize("name", ["lora", "dora", "sora", "hira", "a projection from W on in"])
@in_every_dtype
def test_a_packed_layer_neither(name, dtype, paths):
    case = next(case for case in CASES if case.name == name)
    model, x = Tower(Int8Linear(18, 12)), draw(40, 18, dtype=dtype).requires_grad_()
    with torch.device("meta"), AsCuda():
        surgery.apply(model, case.spec())
        step(model, x)


def test_the_old_sum_over_rows_would_be_refused(monkeypatch):
    """Found on a GPU: thirteen shipped specs in their first backward pass."""
    def old(a: Tensor, b: Tensor) -> Tensor:
        zero, one = a.new_zeros(len(a), 1), a.new_ones(len(a), 1)
        gain = a.new_ones(a.shape[-1])
        return torch.ops.aten.native_layer_norm_backward(a, b, a.shape[-1:], zero, one, gain, gain,
                                                         (False, True, False))[1]

    with pytest.raises(Refused, match="statistics"), AsCuda():
        old(half(9, 4), half(9, 4))
    with AsCuda():
        kernels.column_dot(half(9, 4), half(9, 4))


# ------------------------------------------------------------------------------------------------------- kernels


def each_kernel(t: int, dtype: torch.dtype) -> Iterator[tuple[str, list[Tensor]]]:
    a, g, s, c = draw(t, 96, dtype=dtype), draw(t, 96, dtype=dtype) + 1, draw(32, 3, 3, dtype=dtype), draw(2, 3, 32)
    wide, c = draw(t, 64, dtype=dtype), c.to(dtype)
    yield from (("column_dot", [a, g]), ("dot", [a, a / 16]), ("column_sum", [g]), ("blocks", [a, s]), ("add_blocks", [g, a, s]),
                ("block_dot", [a, g, s]), ("circulate_back", [wide, c]), ("circulate_dot", [a, wide, c]),
                ("mixed", [draw(2, 5, t, 4, dtype=dtype), draw(2, 5, 4, 6, dtype=dtype)]),
                ("mixed_back", [draw(2, 5, t, 6, dtype=dtype), draw(2, 5, 4, 6, dtype=dtype)]),
                ("mixed_dot", [draw(2, 5, t, 4, dtype=dtype), draw(2, 5, t, 6, dtype=dtype)]))


ROUNDINGS = {torch.float32: 5e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}


@in_every_dtype
@pytest.mark.parametrize("tokens", [0, 1, 300, 5000])
def test_a_kernel_rounds_once_or_twice_however_many_rows_there_are(tokens, dtype, paths):
    """A sum over 5,000 rows in bfloat16 itself is 8 % off."""
    for name, given in each_kernel(tokens, dtype):
        wanted = getattr(kernels, name)(*(t.double() for t in given))
        with AsCuda():
            found = getattr(kernels, name)(*(t.clone() for t in given))
        assert found.dtype == dtype, name
        assert_close(found, wanted, ROUNDINGS[dtype], name)


def test_the_weighted_sums_of_rows(paths):
    given = [t.requires_grad_() for t in (draw(2100, 12), draw(2100, 12) + 1, draw(12))]
    wide = [t.detach().double().requires_grad_() for t in given]
    found, (a, b, d) = kernels_row_sums.weighted_dot(*given), wide
    wanted = (a * b * d).sum(-1)
    assert_close(found, wanted, 1e-6)
    direction = draw(2100)
    for mine, theirs in zip(torch.autograd.grad(found, given, direction),
                            torch.autograd.grad(wanted, wide, direction.double())):
        assert_close(mine, theirs, 1e-6)


# ------------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("p", [0.05, 0.4, 0.9])
@in_every_dtype
def test_the_chance_of_a_mask(p, dtype, paths):
    torch.manual_seed(0)
    a = torch.ones(300, 400, dtype=dtype)
    mask = masks.mask(a, p)
    assert (mask.dtype == torch.bool) == (paths != "a CPU's paths")
    dropped = masks.masked(a, mask)
    assert set(dropped.unique().tolist()) == {0.0, 1.0} and (a == 1).all()
    share = (dropped == 0).double().mean().item()
    assert abs(share - p) < 5 * (p * (1 - p) / a.numel()) ** 0.5
    along = (dropped == 0).double().mean(0)  # no column is favoured
    assert (along - p).abs().max() < 6 * (p * (1 - p) / len(a)) ** 0.5


@in_every_dtype
@pytest.mark.parametrize("alpha", [1.0, -2.5])
def test_what_is_added_under_a_mask(dtype, alpha, paths):
    torch.manual_seed(0)
    y, a, m = (draw(*shape, dtype=dtype) for shape in ((50, 8), (50, 3), (3, 8)))
    mask = masks.mask(y, 0.4)
    kept = masks.masked(torch.ones(50, 8, dtype=torch.float64), mask)
    expected = y.double() + alpha * kept * (a.double() @ m.double())
    assert_close(masks.add_masked(y, a, m, mask, alpha), expected, 2 * ROUNDINGS[dtype])


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_users_default_dtype_changes_no_chance(default, monkeypatch):
    """Gaps of 256 different numbers are no gaps: with bfloat16 as torch's default, far more is dropped or far less."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    a = torch.ones(1000, 1000)
    try:
        torch.set_default_dtype(default)
        dropped = (masks.masked(a, masks.mask(a, 0.01)) == 0).double().mean().item()
    finally:
        torch.set_default_dtype(before)
    assert abs(dropped - 0.01) < 5 * (0.01 * 0.99 / a.numel()) ** 0.5


def test_a_chance_that_never_comes_drops_nothing():
    """Its gaps are longer than any integer."""
    for p in (1e-15, 1e-19, 1e-300):
        assert torch.equal(masks.masked(torch.ones(50, 8), masks.mask(torch.ones(50, 8), p)), torch.ones(50, 8))


@pytest.mark.parametrize("block", [64, 256])
def test_a_step_of_no_tokens_through_fourier_transforms(block):
    model = nn.Sequential(nn.Linear(512, 512))
    apply(model, load("c3a", block=block))
    x = torch.ones(2, 0, 512, requires_grad=True)
    model.train()(x).sum().backward()
    assert x.grad.shape == x.shape and not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    assert PRIMITIVES["circulate"]
