"""W' in runs of its rows: the numbers of all of it at once, and every fault that is seen in those. (The values, of all
cases and in float64: test_zoo.py.)"""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import surgery
from surgery.diagnostics import SurgeryError
from surgery.language.library import parse
from surgery.planning.initial_values import departure
from surgery.runtime import adapter
from surgery.runtime.identity_check import assert_identity, moved_by
from surgery.runtime.merge import merged

OUT, IN = 50, 24
DORA = "target any { add low_rank(rank = 2)  post magnitude() }"
ANY = "update any_change() { param B[out, in] = 0  return B }\ntarget any { add any_change()  add shift() }"
TURNED = "target any { post orthogonal(rank = 2) }"  # each row of W' rests on all rows of W


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows at a time: the last block has a single one."""
    monkeypatch.setattr(adapter, "BLOCK", 7 * IN + 3)
    monkeypatch.setattr(adapter, "TILE", 1)


def operated(layer: nn.Module, spec: str) -> tuple[surgery.Surgeon, object, adapter.Adapter]:
    torch.manual_seed(0)
    surgeon = surgery.apply(nn.Sequential(layer), parse(spec), check=False)
    (placed,) = surgeon.plan.placed
    return surgeon, placed, surgeon.adapters[placed.site.name]


def moved(held: adapter.Adapter) -> None:
    with torch.no_grad():
        for parameter in held.parameters():
            parameter += 0.1 * torch.randn(parameter.shape).to(parameter.dtype)


LAYERS = {
    "linear": lambda: nn.Linear(IN, OUT), "no bias": lambda: nn.Linear(IN, OUT, bias=False),
    "transposed": lambda: Conv1D(OUT, IN), "convolution": lambda: nn.Conv1d(IN // 3, OUT, 3),
    "embedding": lambda: nn.Embedding(OUT, IN),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_merged_by_rows_is_merged_at_once(layer: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = DORA if layer in ("no bias", "embedding") else ANY
    _, placed, held = operated(LAYERS[layer]().to(dtype), spec)
    moved(held)
    with torch.no_grad():
        assert len([*held.weights_by_rows(placed.site.module)]) == 8
    by_rows = merged(placed, held)
    monkeypatch.setattr(adapter, "BLOCK", 10**9)
    at_once = merged(placed, held)
    assert by_rows.error == pytest.approx(at_once.error, rel=1e-5, abs=1e-12)
    assert by_rows.tensors.keys() == at_once.tensors.keys()
    for name, tensor in at_once.tensors.items():
        assert tensor.dtype == by_rows.tensors[name].dtype == dtype
        assert by_rows.tensors[name].is_contiguous()
        # a product of other sizes may add up in another order, which a narrow dtype shows in a number here and there
        assert departure(tensor, by_rows.tensors[name]) <= (1e-6 if dtype is torch.float32 else 1e-3)


def begins_at(tensor: torch.Tensor, byte: int) -> torch.Tensor:
    """A copy that begins so many bytes after a multiple of 64, as a tensor of a file that is mapped may."""
    memory = torch.empty(tensor.nbytes + 128, dtype=torch.uint8)
    first = -memory.data_ptr() % 64 + byte
    return memory[first:first + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("blocks", [1, 8])
def test_a_merge_is_the_same_wherever_its_numbers_begin_in_memory(layer: str, blocks: int,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of few rows add up in another order there: merged in memory a model had other last bits than merged in
    its files."""
    spec = "target any { add low_rank(rank = 4)  post magnitude() }"
    monkeypatch.setattr(adapter, "BLOCK", 10**9 if blocks == 1 else 7 * IN)
    for side in (IN, 96):
        module = LAYERS[layer]() if side == IN else nn.Linear(side, side)
        surgeon, placed, held = operated(module, spec)
        moved(held)
        wanted = merged(placed, held).tensors["weight"]
        for byte in (4, 8, 16, 32):
            for parameter in surgeon.model.parameters():
                parameter.data = begins_at(parameter.detach(), byte)
            assert torch.equal(merged(placed, held).tensors["weight"], wanted)


@pytest.mark.parametrize("place", [(-1, slice(None)), (slice(None), -1), (-1, -1), (0, 0), (20, 3)], ids=str)
def test_a_start_that_is_off_in_one_place_is_seen(place: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    _, placed, held = operated(nn.Linear(IN, OUT), ANY)
    assert moved_by(placed, held) == 0
    with torch.no_grad():
        next(t for t in held.tensors().values() if t.ndim == 2)[place] = 0.01
    found = moved_by(placed, held)
    monkeypatch.setattr(adapter, "BLOCK", 10**9)
    assert found > 1e-4 and found == pytest.approx(moved_by(placed, held), rel=1e-5)


@pytest.mark.parametrize("value", [torch.nan, 1e-3], ids=str)
def test_a_bias_and_a_magnitude_that_are_off_in_their_last_number_are_seen(value: float) -> None:
    for spec in (ANY, DORA):
        surgeon, placed, held = operated(nn.Linear(IN, OUT), spec)
        with torch.no_grad():
            next(t for t in held.tensors().values() if t.ndim == 1)[-1] += value
        assert moved_by(placed, held) > 1e-5
    with pytest.raises(SurgeryError, match="not-identity"):  # of which no formula says that it starts as W
        assert_identity(surgeon.plan.spec.targets, [placed], {placed.site.name: held})


@pytest.mark.parametrize("value, words", [(torch.nan, "is not finite"), (torch.inf, "is not finite"),
                                          (1e5, "does not fit float16")], ids=str)
def test_what_is_refused_of_the_last_row(value: float, words: str) -> None:
    _, placed, held = operated(nn.Linear(IN, OUT).to(torch.float16), ANY)
    with torch.no_grad():
        next(t for t in held.tensors().values() if t.ndim == 2).data = torch.zeros(OUT, IN)
        next(t for t in held.tensors().values() if t.ndim == 2)[-1, -1] = value
    with pytest.raises(SurgeryError, match=words):
        merged(placed, held)


class _Largest(TorchDispatchMode):
    """The most bytes that a result has."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.bytes = max(self.bytes, made.numel() * made.element_size())
        return made


def test_no_second_weight_is_made_for_the_check_of_the_start() -> None:
    surgeon, placed, held = operated(nn.Linear(IN, OUT).to(torch.bfloat16), DORA)
    with _Largest() as largest:
        assert_identity(surgeon.plan.spec.targets, [placed], {placed.site.name: held})
    assert largest.bytes == 2 * OUT * IN  # the stored one itself
    surgeon, placed, held = operated(nn.Linear(IN, OUT).to(torch.bfloat16), TURNED)
    with torch.no_grad():
        ((rows, _),) = held.weights_by_rows(placed.site.module)
    assert rows == slice(None)


def assert_made_at_once(spec: str) -> None:
    _, placed, held = operated(nn.Linear(IN, OUT), spec)
    assert moved_by(placed, held) == 0
    moved(held)
    with torch.no_grad():
        ((rows, values),) = held.weights_by_rows(placed.site.module)
        wanted = held.weights(placed.site.module)
    assert rows == slice(None)
    assert all(map(torch.equal, values, wanted))


@pytest.mark.parametrize("given", ["post mixed() with bias", "post mixed()", "add of_bias()"])
def test_what_rests_on_all_of_w_or_b_is_made_at_once(given: str) -> None:
    """Rows of A W are those of A times all of W, which no part of the layer has."""
    spec = """transform mixed() on n { param A[n, n] = 0  return I(n) + A }
        update of_bias() on bias { param A[out, out] = 0  return A @ b }
        target any { %s }""".replace("%s", given)
    assert_made_at_once(spec)


@pytest.mark.parametrize("turned", ["C + C.T", "C * C.T"])
def test_what_is_read_by_rows_and_by_columns_is_made_at_once(turned: str) -> None:
    spec = f"""update own() {{ param C[out, out] = 0  param B[out, in] ~ normal()  return ({turned}) @ B }}
        target any {{ add own() }}"""
    assert_made_at_once(spec)


def test_no_part_is_so_small_that_its_products_are_made_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A last row alone differed in its last bits with two threads from the same row of all of W'."""
    monkeypatch.setattr(adapter, "TILE", 64)
    for out in (577, 576, 703, 640):
        _, placed, held = operated(nn.Linear(IN, out), ANY)
        with torch.no_grad():
            parts = [*held.weights_by_rows(placed.site.module)]
        rows = [len(weight) for _, (weight, _) in parts]
        assert min(rows) >= 64 and max(rows) < 128 and len(rows) == out // 64
        assert [i for part, _ in parts for i in range(part.start, part.stop)] == [*range(out)]
