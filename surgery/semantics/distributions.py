"""How parameters are drawn: the table of distributions, and draws that depend on names and a seed alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from surgery.ir.expression import Draw


@dataclass(frozen=True)
class Distribution:
    """Its arguments with their defaults (None for one that must be given), the least number of dimensions it needs,
    torch.nn.init's function, or ours for `whole` numbers and what that lacks, what must hold of the arguments, as a
    spec would say it, and their mean where it can be drawn as noise."""

    arguments: dict[str, float | str | None]
    least_dims: int
    init: str
    whole: bool = False
    check: str = "true"
    mean: Callable[[Mapping[str, Any]], float] | None = None


_FANS = {"a": 0.0, "mode": "fan_in"}
DISTRIBUTIONS: dict[str, Distribution] = {
    "normal": Distribution({"mean": 0.0, "std": 1.0}, 0, "normal_", check="std >= 0",
                           mean=lambda given: given["mean"]),
    "uniform": Distribution({"low": 0.0, "high": 1.0}, 0, "uniform_", check="low <= high",
                            mean=lambda given: (given["low"] + given["high"]) / 2),
    "bernoulli": Distribution({"p": None}, 0, "bernoulli", check="0 <= p and p <= 1", mean=lambda given: given["p"]),
    "kaiming_uniform": Distribution(_FANS, 2, "kaiming_uniform_"),
    "kaiming_normal": Distribution(_FANS, 2, "kaiming_normal_"),
    "xavier_uniform": Distribution({"gain": 1.0}, 2, "xavier_uniform_", check="gain >= 0"),
    "xavier_normal": Distribution({"gain": 1.0}, 2, "xavier_normal_", check="gain >= 0"),
    "orthogonal": Distribution({"gain": 1.0}, 2, "orthogonal_"),
    "sample": Distribution({"of": None}, 1, "sample", whole=True),
    "integers": Distribution({"below": None}, 0, "integers", whole=True, check="below >= 1"),
}
_TORCH_NAMES = {"low": "a", "high": "b"}


def choices(distribution: str, argument: str) -> tuple[str, ...]:
    """The values that a text argument of a distribution may have (empty for a number)."""
    return ("fan_in", "fan_out") if argument == "mode" else ()


def draw(law: Draw, shape: tuple[int, ...], *names: object) -> Any:
    """A float32 tensor (int64 for whole numbers) on the CPU drawn from `law`. `names` (seed, module, parameter) are all
    that the draw depends on."""
    import torch

    # A hash of the names, and no state that runs on: another module in the model, or another order, moves no draw. On
    # the CPU, since the generators of devices give other numbers.
    text = "\0".join(map(str, names))
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(seed)
    row = DISTRIBUTIONS[law.distribution]
    if row.init == "bernoulli":
        (_, p), = law.arguments
        assert isinstance(p, float)  # as for a real module any argument is
        return torch.bernoulli(torch.full(shape, p, dtype=torch.float32, device="cpu"), generator=generator)
    if row.whole:
        most = law.arguments[0][1]
        assert isinstance(most, (int, float))  # a real module's sizes are known, and so is a number made of them
        return _WHOLE[row.init](int(most), shape, generator)
    init: Callable = getattr(torch.nn.init, row.init)
    arguments = {_TORCH_NAMES.get(k, k): v for k, v in law.arguments}
    return init(torch.empty(shape, dtype=torch.float32, device="cpu"), generator=generator, **arguments).detach()


def _sample(of: int, shape: tuple[int, ...], generator: Any) -> Any:
    """Different whole numbers below `of`."""
    import torch

    return torch.randperm(of, generator=generator, device="cpu")[:prod(shape)].reshape(shape).clone()


def _integers(below: int, shape: tuple[int, ...], generator: Any) -> Any:
    import torch

    return torch.randint(below, shape, generator=generator, device="cpu")


_WHOLE = {"sample": _sample, "integers": _integers}
