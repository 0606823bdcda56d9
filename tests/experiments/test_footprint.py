"""The time and the memory of a step: turns taken in a fair order, bytes that AdamW adds, a clock that warms up."""

import torch

from surgery.experiments.training_cost import Clock, side_by_side, step_bytes


def test_models_side_by_side_take_turns(monkeypatch) -> None:
    """Each is warmed up, and in each round another begins; their values stay."""
    order: list[str] = []

    class Line(torch.nn.Linear):
        device = torch.device("cpu")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            order.append(self.called)
            return type("Output", (), {"loss": super().forward(x).square().mean()})

    models = {name: Line(2, 2) for name in ("a", "b", "c")}
    for name, model in models.items():
        model.called = name
    before = {name: model.weight.clone() for name, model in models.items()}
    monkeypatch.setattr("surgery.experiments.training_cost.ROUNDS", 4)
    times = side_by_side(models, {"x": torch.ones(1, 2)})
    assert "".join(order) == "abcabc" + "abcbcacababc" and [len(t) for t in times.values()] == [4, 4, 4]
    assert all(torch.equal(model.weight, before[name]) for name, model in models.items())


def test_peak_memory_counts_weights_gradients_the_optimizer_and_activations() -> None:
    class Line(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 64, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return type("Output", (), {"loss": self.second(self.first(x).relu()).square().mean()})

    line, batch, size = Line(), {"x": torch.randn(4096, 64)}, 4 * 64 * 64
    before = {n: p.clone() for n, p in line.named_parameters()}
    whole = step_bytes(line, batch)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in line.named_parameters())
    line.first.requires_grad_(False)
    less = step_bytes(line, batch)
    # All weights and three activations (after relu, of the second layer, squared); the first layer's two moments more.
    assert less > 4 * size + 3 * 4 * 4096 * 64 and whole - less >= 2 * size


def test_the_clock_takes_the_median_step(monkeypatch) -> None:
    times = iter([0, 9, 10, 18, 20, 21, 30, 33, 40, 42])
    monkeypatch.setattr("surgery.experiments.training_cost.perf_counter", lambda: next(times))
    clock = Clock()
    for _ in range(5):
        clock.on_step_begin()
        clock.on_step_end()
    assert clock.seconds == 2  # of 1, 3 and 2: the first two are left out
