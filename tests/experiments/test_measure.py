"""The memory of a step: known by hand, and as torch's allocator tells its profiler."""

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from surgery.experiments.timing import Allocations, peak_bytes, seconds
from surgery.models.demo import demo_inputs, load_demo
from surgery.runtime.apply import apply

CPU = torch.device("cpu")
MEGABYTE = 4 * 2**18  # of a float32 tensor of 512 x 512


def megabytes(call) -> float:
    return peak_bytes(call, CPU) / MEGABYTE


def test_what_is_alive_counts_and_what_is_dropped_does_not():
    x = torch.ones(512, 512)
    assert megabytes(lambda: (x + 1) + 1) == 2
    assert megabytes(lambda: ((x + 1) + 1) + 1) == 2
    assert megabytes(lambda: [x + 1, x + 2, x + 3]) == 3


def test_views_and_tensors_from_before_do_not_count():
    x = torch.ones(512, 512)
    assert megabytes(lambda: (x.T, x[:3], x.view(-1), x.add_(1))) == 0
    assert megabytes(lambda: (x + 1).T[3:].unsqueeze(0)) == 1


def test_a_sparse_tensor_counts_with_its_indices_and_values():
    with Allocations() as counted:
        values, places = torch.ones(10), torch.arange(20).reshape(2, 10)
        found = torch.sparse_coo_tensor(places, values, (20, 20), check_invariants=True) * 2
        assert counted.live == 2 * (10 * 4 + 20 * 8)
    assert found._nnz() == 10


def test_what_autograd_saves_counts_until_the_backward_pass():
    x = torch.ones(512, 512, requires_grad=True)
    saved = 2  # exp and tanh keep their results
    with Allocations() as counted:
        y = x.exp().tanh().sum()
        assert counted.live == saved * MEGABYTE + 4
        y.backward()
        del y
        assert counted.live == MEGABYTE  # the gradient of x
    assert counted.peak > saved * MEGABYTE


def test_it_is_what_the_allocator_says(capfd):
    model = load_demo("llama:hidden_size=128,intermediate_size=256").train()
    apply(model, "sora")
    batch = demo_inputs(model, batch=2, length=64)

    def step() -> None:
        model.zero_grad()
        model(**batch, use_cache=False).logits.sum().backward()

    step()
    counted = peak_bytes(step, CPU)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    assert abs(counted - allocated(profiled)) < 1e-3 * counted
    capfd.readouterr()  # the profiler talks


def allocated(profiled: profile) -> int:
    """The peak of the sums of what was allocated and freed, in order."""
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_a_call_takes_time():
    layer, x = nn.Linear(64, 64), torch.ones(8, 64)
    assert seconds(lambda: layer(x), CPU) > 0
