"""How parameters are drawn: the table of distributions, and draws that depend on names and a seed alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from surgery.expr.ir import Draw


@dataclass(frozen=True)
class Distribution:
    """Its arguments with their defaults, the least number of dimensions it needs, and torch.nn.init's function."""

    arguments: dict[str, float | str]
    least_dims: int
    init: str


_FANS = {"a": 0.0, "mode": "fan_in"}
DISTRIBUTIONS: dict[str, Distribution] = {
    "normal": Distribution({"mean": 0.0, "std": 1.0}, 0, "normal_"),
    "uniform": Distribution({"low": 0.0, "high": 1.0}, 0, "uniform_"),
    "kaiming_uniform": Distribution(_FANS, 2, "kaiming_uniform_"),
    "kaiming_normal": Distribution(_FANS, 2, "kaiming_normal_"),
    "xavier_uniform": Distribution({"gain": 1.0}, 2, "xavier_uniform_"),
    "xavier_normal": Distribution({"gain": 1.0}, 2, "xavier_normal_"),
}
_TORCH_NAMES = {"low": "a", "high": "b"}


def choices(distribution: str, argument: str) -> tuple[str, ...]:
    """The values that a text argument of a distribution may have (empty for a number)."""
    return ("fan_in", "fan_out") if argument == "mode" else ()


def draw(law: Draw, shape: tuple[int, ...], *names: object) -> Any:
    """A float32 tensor on the CPU drawn from `law`. `names` (seed, module, parameter) are all that the draw depends on."""
    import torch

    row = DISTRIBUTIONS[law.distribution]
    init: Callable = getattr(torch.nn.init, row.init)
    generator = torch.Generator().manual_seed(_seed(names))
    arguments = {_TORCH_NAMES.get(k, k): v for k, v in law.arguments}
    return init(torch.empty(shape, dtype=torch.float32), generator=generator, **arguments).detach()


def _seed(names: tuple[object, ...]) -> int:
    text = "\0".join(map(str, names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
