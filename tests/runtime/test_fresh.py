"""Nothing stale: a forward pass computes from the tensors as they are then, however they came to be so; what is kept is
kept inside of `serving()`, and a change there is told."""

from __future__ import annotations

from copy import deepcopy
from threading import Barrier, Thread

import pytest
import torch
from layers import LAYOUTS, Tower, assert_close, perturb
from layers import operated as with_layer
from packed import Int8Linear
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D
from zoo import CASES

from surgery.codegen.candidates import Candidate
from surgery.codegen.cost_model import Cost
from surgery.diagnostics import SurgeryError
from surgery.language.library import load, parse
from surgery.models.demo import load_demo
from surgery.runtime.apply import apply
from surgery.runtime.serving import checksums
from surgery.runtime.surgeon import Surgeon

SPECS = ["lora", "dora", "sora", "oft", "hra", "hira"]
EXACT = 1e-10
on_each = pytest.mark.parametrize("name", SPECS)


def spec(name: str):
    sizes = {"oft": {"block": 4}, "dora": {"rank": 2, "dropout": 0.0}, "lora": {"rank": 2, "dropout": 0.0},
             "sora": {"rank": 2, "dropout": 0.0}, "hra": {"rank": 2}, "hira": {"rank": 2}}
    return load(name, **sizes[name]).retarget("layers.0")


def operated(name: str, dtype: torch.dtype = torch.float64,
             layer: nn.Module | None = None) -> tuple[nn.Module, Surgeon]:
    torch.manual_seed(0)
    model = Tower(layer or nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 12)).to(dtype)
    surgeon = apply(model, spec(name), dtype=dtype)
    perturb(model)
    return model.eval(), surgeon


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(5, 16, dtype=dtype, generator=torch.Generator().manual_seed(1))


def merged_output(model: nn.Module, x: Tensor) -> Tensor:
    """What a copy of the model that is operated anew from its tensors gives: no forward pass has run in it."""
    return deepcopy(model)(x)


OPTIMISERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True)}


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@on_each
def test_a_step_of_an_optimiser_is_seen_by_the_next_evaluation(name, optimiser):
    model, surgeon = operated(name, torch.float32)
    x, optimizer = inputs(torch.float32), OPTIMISERS[optimiser](list(surgeon.parameters()))
    for _ in range(2):
        with torch.no_grad():
            before = model(x)
        model(x).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            assert torch.equal(model(x), merged_output(model, x)) and not torch.equal(model(x), before)


@on_each
@pytest.mark.parametrize("grad", [False, True])
def test_a_write_through_data_is_seen(name, grad):
    model, surgeon = operated(name)
    x = inputs()
    with torch.set_grad_enabled(grad):
        for tensor in (*surgeon.parameters(), *(model.get_parameter(f"layers.0.{n}") for n in ("weight", "bias"))):
            before = model(x)
            tensor.data.mul_(1.5)
            assert torch.equal(model(x), merged_output(model, x)) and not torch.equal(model(x), before)
            tensor.data = tensor.data * 0.5
            assert torch.equal(model(x), merged_output(model, x))


@on_each
def test_a_merge_is_of_the_weight_as_it_is(name):
    model, surgeon = operated(name)
    model.train()(inputs()).sum().backward()
    with torch.no_grad():
        model.eval()(inputs())
    model.get_parameter("layers.0.weight").data.normal_()
    other = deepcopy(model)
    y = other(inputs())
    with torch.no_grad():
        model(inputs())
    surgeon.merge()
    assert_close(model(inputs()), y, EXACT)


@on_each
def test_other_values_loaded_twice_and_other_tensors_of_a_call(name):
    model, surgeon = operated(name)
    x, states = inputs(), []
    with torch.no_grad():
        for seed in range(6):
            draw = torch.Generator().manual_seed(seed)
            states.append({key: t + 0.3 * torch.randn(t.shape, generator=draw, dtype=t.dtype)
                           for key, t in surgeon.state().items()})
        wanted = []
        for state in states:
            surgeon.load(state)
            wanted.append(merged_output(model, x))
            assert torch.equal(model(x), wanted[-1])
        for state, y in zip(states * 5, wanted * 5):  # temporaries, at addresses that are free again
            assert torch.equal(functional_call(model, {key: t.clone() for key, t in state.items()}, (x,)), y)
    for (key, tensor), new in zip(list(model.named_parameters()), states[0].values()):
        if "_surgery" in key:
            owner, _, leaf = key.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor.detach() * 1.1))
    with torch.no_grad():
        assert torch.equal(model(x), merged_output(model, x))


@on_each
def test_in_inference_mode_and_under_vmap(name):
    model, surgeon = operated(name)
    x, state = inputs(), {key: 1.1 * t for key, t in surgeon.state().items()}
    y = model(x).detach()
    with torch.inference_mode():
        assert_close(model(x), y, EXACT)
        surgeon.load(state)
        loaded = model(x)
        assert not torch.equal(loaded, y)
    with torch.no_grad():
        assert_close(model(x), loaded, EXACT)
        assert_close(torch.vmap(model)(x), loaded, EXACT)


@pytest.mark.parametrize("key", ["weight_surgery.add_weight_times_low_rank.B", "weight"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_change_of_what_a_second_set_up_reads_is_an_error(monkeypatch, key, autocast):
    """A set-up that is made again in the backward pass reads what the forward pass read, or says so."""
    monkeypatch.setattr(Candidate, "recompute_cost", property(lambda plan: Cost()))
    model, _ = operated("hira", torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model.layers[0](inputs(torch.float32))
    with torch.no_grad():
        model.get_parameter(f"layers.0.{key}").mul_(1.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.float().sum().backward()


def test_a_gradient_reaches_a_weight_that_is_trained_by_hand():
    """What rests on the layer alone is made with a gradient where the user asks for one."""
    torch.manual_seed(0)
    model = Tower(nn.Linear(6, 4, bias=False)).double()
    apply(model, parse("update sized() { param b[out, in] = 0  return b @ diag(col_norm(W)) }\n"
                       "target linear { add sized() }"), dtype=torch.float64)
    perturb(model)
    weight, x = model.get_parameter("layers.0.weight"), torch.randn(3, 6, dtype=torch.float64)
    b, copy = model.layers[0].weight_surgery.add_sized.b.detach(), weight.detach().clone().requires_grad_()
    weight.requires_grad_()
    dense = x @ (copy + b * copy.norm(dim=0)).T
    assert_close(model(x), dense, EXACT)
    for y in (model(x), dense):
        y.square().sum().backward()
    assert_close(weight.grad, copy.grad, EXACT)


# ---------------------------------------------------------------------------------------------------------- serving


@on_each
def test_serving_gives_the_same_and_makes_nothing_twice(name):
    model, surgeon = operated(name)
    x, made = inputs(), []
    with torch.no_grad():
        y = model(x)
    adapter = surgeon.adapters["layers.0"]
    computed = adapter.computed
    adapter.computed = lambda *given: (made.append(1), computed(*given))[1]
    with torch.no_grad(), surgeon.serving():
        assert all(torch.equal(model(x), y) for _ in range(3)) and len(made) == 1
        with surgeon.serving():
            model(x)
        assert len(made) == 1
        assert torch.equal(functional_call(model, {k: t.clone() for k, t in surgeon.state().items()}, (x,)), y)
        doubled = {key: 2 * t for key, t in surgeon.state().items()}
        other = functional_call(model, doubled, (x,))
    with torch.no_grad():
        model(x), model(x)
        assert len(made) == 5
        surgeon.load(doubled)
        assert torch.equal(model(x), other) and adapter.serving is None


WRITES = {
    "in place": lambda t: t.mul_(1.01), "data": lambda t: t.data.mul_(1.01),
    "new data": lambda t: setattr(t, "data", t * 2),
    "fused": lambda t: (setattr(t, "grad", torch.ones_like(t)), torch.optim.AdamW([t], fused=True).step())}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("key", ["layers.0.weight_surgery.add_low_rank.B", "layers.0.weight"])
def test_a_change_while_serving_is_told(write, key):
    model, surgeon = operated("dora", torch.float32)
    x = inputs(torch.float32)
    with torch.no_grad(), pytest.raises(SurgeryError, match=r"a tensor of `layers.0` changed inside serving") as error:
        with surgeon.serving():
            model(x)
            WRITES[write](model.get_parameter(key))
            if write in ("data", "fused"):  # which torch keeps to itself
                model(x)
    assert error.value.diagnostics[0].code == "changed-tensor"
    with torch.no_grad():
        assert torch.equal(model(x), merged_output(model, x))
        with surgeon.serving():  # and it serves again
            assert torch.equal(model(x), merged_output(model, x))


def test_a_change_is_told_at_the_next_forward_pass_where_torch_counts_it():
    model, surgeon = operated("lora")
    with torch.no_grad(), pytest.raises(SurgeryError, match="changed-tensor"), surgeon.serving():
        model(inputs())
        surgeon.load({key: 2 * t for key, t in surgeon.state().items()})
        model(inputs())
        pytest.fail("it went on")


def test_what_is_written_over_with_the_same_is_no_change():
    model, surgeon = operated("dora")
    with torch.no_grad(), surgeon.serving():
        y = model(inputs())
        surgeon.load(surgeon.state())
        for tensor in surgeon.parameters():
            tensor.add_(0)
        assert torch.equal(model(inputs()), y)


def test_training_while_serving_is_refused_and_changes_no_mode():
    model, surgeon = operated("lora")
    with surgeon.serving():
        with pytest.raises(SurgeryError, match="wrong-mode.*serving"):
            model.train()
        assert not any(module.training for module in model.modules())
    model.train()
    with pytest.raises(SurgeryError, match="training mode"), surgeon.serving():
        pass
    model.eval()
    with pytest.raises(ZeroDivisionError), surgeon.serving():
        1 / 0
    assert model.train().training


@on_each
def test_a_call_while_serving_runs_its_program_alone_unless_something_is_different(name, monkeypatch):
    model, surgeon = operated(name, torch.float32)
    x, adapter, long = inputs(torch.float32), surgeon.adapters["layers.0"], []
    forward = type(adapter).forward
    monkeypatch.setattr(type(adapter), "forward", lambda self, *given: (long.append(1), forward(self, *given))[1])
    with torch.no_grad():
        y, turned = model(x), model(x[None, :, None])
        with torch.autocast("cpu", torch.bfloat16):
            narrow = model(x)
    with surgeon.disabled():
        base = model(x)
    with surgeon.serving():
        with torch.no_grad():
            model(x)
            long.clear()
            assert torch.equal(model(x), y) and torch.equal(model(x[None, :, None]), turned)
            assert not long
            long.clear()
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(model(x), narrow) and long
            with surgeon.disabled():
                assert torch.equal(model(x), base)
            assert_close(torch.func.vmap(model)(x), y, 1e-6)
            part, seen = next(adapter.children()), []
            hook = part.register_forward_hook(lambda *given: seen.append(1))
            assert torch.equal(model(x), y) and seen
            hook.remove()
        assert model(x).requires_grad
    assert adapter.serving is None


def test_a_pass_with_a_gradient_is_made_anew_while_serving():
    model, surgeon = operated("sora")
    with surgeon.serving():
        with torch.no_grad():
            y = model(inputs())
        z = model(inputs())
        assert_close(z, y, EXACT)
        z.sum().backward()
    assert all(p.grad is not None for p in surgeon.parameters())


def test_a_copy_makes_no_promise():
    model, surgeon = operated("lora")
    with torch.no_grad(), surgeon.serving():
        model(inputs())
        copy = deepcopy(model).train().eval()
        perturb(copy, seed=3)
        assert not torch.equal(copy(inputs()), model(inputs()))
        assert torch.equal(copy(inputs()), merged_output(copy, inputs()))


def test_generation_of_a_llama_while_serving():
    model = load_demo("llama")
    surgeon = apply(model, load("dora", rank=4))
    perturb(model, 0.05)
    ids = torch.randint(3, 250, (1, 4))
    plain = model.generate(ids, max_new_tokens=4, do_sample=False)
    with surgeon.serving():
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), plain)


def test_a_dense_copy_of_a_packed_layer_is_of_its_bits():
    """W of a layer that is called, for a formula that reads all of it, is made again when a code changes."""
    model, surgeon = operated("hira", torch.float32, Int8Linear(16, 12))
    x = inputs(torch.float32)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            before = model(x)
            code = next(t for t in (*model.layers[0].parameters(), *model.layers[0].buffers()) if t.dtype == torch.int8)
            code.data[0] = -code.data[0]
            assert torch.equal(model(x), merged_output(model, x)) and not torch.equal(model(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool,
                                   torch.complex64])
def test_a_checksum_sees_a_single_number(dtype):
    draw = torch.Generator().manual_seed(0)
    for count in (1, 3, 64, 70_001):
        tensor = (torch.randn(count, generator=draw) * 9).to(dtype)
        before = checksums([tensor])
        assert checksums([tensor.clone()]) == before
        for place in (0, count // 2, count - 1):
            other = tensor.clone()
            other[place] = ~other[place] if dtype == torch.bool else other[place] + 1
            assert checksums([other]) != before
    assert checksums([torch.zeros(2, 3)]) != checksums([torch.zeros(3, 2)])
    assert checksums([torch.arange(6.).view(2, 3).T]) == checksums([torch.arange(6.).view(2, 3).T.contiguous()])


def test_threads_serve_together():
    model, surgeon = operated("sora")
    x, wrong, barrier = inputs(), [], Barrier(4)
    with torch.no_grad():
        y = model(x)

    def run() -> None:
        with torch.no_grad(), surgeon.serving():
            barrier.wait()
            wrong.extend(1 for _ in range(20) if not torch.equal(model(x), y))

    threads = [Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and surgeon.adapters["layers.0"].serving is None


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=str)
def test_every_kind_of_layer_serves(layout):
    """Embeddings too, whose programs have no step that a call could be ready with."""
    op = with_layer(next(case for case in CASES if case.name == "lora"), layout)
    op.model.eval()
    with torch.no_grad():
        wanted = op.model(op.x)
        with op.surgeon.serving():
            for _ in range(3):
                assert_close(op.model(op.x), wanted, 1e-12)


def test_other_numbers_of_a_weight_that_no_set_up_rests_on_are_read_while_serving():
    """A layer that stores its weight turned kept a view of the numbers of before."""
    model, x = nn.Sequential(Conv1D(40, 60)).eval(), torch.randn(3, 60)
    surgeon = apply(model, load("lora", rank=2), check=False)
    with torch.no_grad(), surgeon.serving():
        model(x)
        stored = model[0].get_parameter("weight")
        stored.data = 2 * stored.data  # as torch.nn.utils.vector_to_parameters does it
        served = model(x)
    assert_close(served, model(x), 1e-6)


def test_serving_ends_with_the_outermost_block():
    model, surgeon = operated("lora")
    with surgeon.serving():
        with surgeon.serving():
            pass
        with pytest.raises(SurgeryError, match="is serving"):
            model.train()
    assert model.train().training
