"""What a case of the zoo is: a spec, the same map written with the oracle, and what else is known of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import oracle as o
from torch import Tensor

from surgery.language.library import load, parse, retarget
from surgery.language.tree import Spec

METHODS = Path(__file__).parent / "methods"


class Parameters(dict):
    """The parameters of one adapter in float64, as `p["add_low_rank", "B"]`."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Parameters:
        return cls({tuple(key.split(".")): value for key, value in tensors.items()})

    def of_step(self, step: str) -> dict[str, Tensor]:
        """One step's parameters by their own names."""
        return {name: value for (owner, name), value in self.items() if owner == step}


@dataclass(frozen=True, eq=False)
class Case:
    """A spec and its oracle. `claims`: how many claims its formula carries; `shifted`:
    it does not start as the base."""

    name: str
    steps: str
    formula: Callable[[Tensor, Any], Tensor]
    count: Callable[[int, int], int]
    definitions: str = ""
    bias: Callable[[Tensor, Any], Tensor] = lambda b, p: b
    claims: int = 0
    shifted: bool = False
    shipped: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def spec(self, pattern: str = "layers.0", **settings: Any) -> Spec:
        """The case's spec, on the modules of `pattern`."""
        if self.steps:
            return _parsed(self.text(pattern))
        return _loaded(self.name, pattern, *{**self.shipped, **settings}.items())

    def text(self, pattern: str = "layers.0") -> str:
        flag = " shifted" if self.shifted else ""
        return f'{self.definitions}\nspec zoo()\ntarget any "{pattern}"{flag} {{\n{self.steps}\n}}\n'


# A spec is frozen, so that all tests can have the same.
_parsed = lru_cache(maxsize=None)(parse)


@lru_cache(maxsize=None, typed=True)
def _loaded(name: str, pattern: str, *settings: tuple[str, Any]) -> Spec:
    """A shipped spec, or one of tests/methods, on modules of any kind."""
    method = METHODS / f"{name}.surg"
    spec = retarget(load(method if method.exists() else name, **dict(settings)), pattern)
    return spec.model_copy(update={"targets": tuple(t.model_copy(update={"kind": "any"}) for t in spec.targets)})


def update(name: str, formula: Callable[..., Tensor], count: Callable[[int, int], int], *lines: str) -> Case:
    """An update of a user's own, its body and its result: `formula(w, **its parameters)` is what it adds to W."""
    text = "update own(r: int = 2) {\n  " + _body(lines)
    return Case(name, "  add own()", lambda w, p: w + formula(w, **p.of_step("add_own")), count, text)


def transform(name: str, formula: Callable[..., Tensor], count: Callable[[int], int], *lines: str, side: str = "out",
              claims: str = "", shifted: bool = False) -> Case:
    """A transform of a user's own, after a low-rank update: `formula(operand, **its parameters)` is its matrix."""
    text = f"transform own(r: int = 2) on n{' : ' + claims if claims else ''} {{\n  " + _body(lines)

    def whole(w: Tensor, p: Parameters) -> Tensor:
        x = w + o.low_rank(p, 2, 4)
        made = formula(x, **p.of_step("post_own"))
        return o.mul(made, x) if side == "out" else o.mul(x, made)

    return Case(name, f"  add low_rank(2, 4)\n  post own() on {side}", whole,
                lambda m, n: 2 * (m + n) + count(m if side == "out" else n), text,
                claims=len(claims.split(", ")) if claims else 0,
                shifted=shifted)


def _body(lines: tuple[str, ...]) -> str:
    return "\n  ".join((*lines[:-1], f"return {lines[-1]}")) + "\n}"
