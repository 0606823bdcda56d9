"""Random specs whose updates are sums of terms with maps on both sides: `(W + B A) @ (I + C D)`, reflections, Cayley
maps, gains, a `let` that is used twice, factors in front, transforms before and after on both sides.

One text for each seed. What their programs have to get right is what is read twice and what may be written over.
"""

from __future__ import annotations

from random import Random

_MAPS = ("I({n}) + {a} @ {b}.T", "cayley({a} @ {b}.T - {b} @ {a}.T)", "expm({a} @ {b}.T - {b} @ {a}.T)", "reflect({u})",
         "diag({d})", "I({n}) + diag({d})")
_SHAPES = {"a": "[{n}, r] ~ normal(std = 0.1)", "b": "[{n}, r] ~ normal(std = 0.1)", "u": "[{n}, r] ~ normal(std = 1)",
           "d": "[{n}] ~ normal(std = 0.1)"}


class _Definition:
    """A definition in the making."""

    def __init__(self, random: Random):
        self.random = random
        self.lines: list[str] = []

    def param(self, shape: str) -> str:
        name = f"p{len(self.lines)}"
        self.lines.append(f"param {name}{shape}")
        return name

    def map(self, n: str) -> str:
        """A map of a side, near the identity or orthogonal or neither."""
        text = self.random.choice(_MAPS)
        names = {key: self.param(shape.format(n=n)) for key, shape in _SHAPES.items() if f"{{{key}}}" in text}
        return f"({text.format(n=n, **names)})"

    def low_rank(self) -> str:
        return f"{self.param('[out, r] ~ normal(std = 0.1)')} @ {self.param('[r, in] ~ normal(std = 0.1)')}"

    def term(self) -> str:
        """W, a low-rank matrix or both, with maps on its sides or without, or a multiple of that."""
        core = self.random.choice(["W", "({})", "(W + {})"])
        core = core.format(self.low_rank()) if "{}" in core else core
        if self.random.random() < 0.8:
            core = f"({core} @ {self.map('in')})"
        if self.random.random() < 0.3:
            core = f"({self.map('out')} @ {core})"
        return f"({self.random.choice(['0.5', '-2', '3'])} * {core})" if self.random.random() < 0.3 else core

    def total(self) -> str:
        """A sum of terms, the first of them perhaps by a name that is used twice."""
        terms = [self.term() for _ in range(self.random.randint(1, 3))]
        if self.random.random() < 0.4:
            self.lines.append(f"let twice = {terms[0]}")
            is_right = self.random.random() < 0.5
            terms[0] = f"twice + (twice @ {self.map('in')})" if is_right else f"twice + ({self.map('out')} @ twice)"
        return " + ".join(terms)


def text(seed: int) -> str:
    """The spec of a seed."""
    random = Random(seed)
    definitions, steps = [], []
    for i in range(random.randint(1, 2)):
        body = _Definition(random)
        result = body.total()
        definitions.append(_written(f"update sum_{i}(r: int = 4)", body, result))
        steps.append(f"add sum_{i}()")
    for i, place in enumerate(("pre {} on in", "post {} on in", "pre {} on out", "post {} on out")):
        if random.random() < 0.15:
            body = _Definition(random)
            result = " @ ".join(body.map("n") for _ in range(random.randint(1, 2)))
            definitions.append(_written(f"transform map_{i}(r: int = 4) on n", body, result))
            steps.insert(random.randint(0, len(steps)), place.format(f"map_{i}()"))
    return "\n\n".join(["spec sums()", *definitions, "target linear shifted {\n  " + "\n  ".join(steps) + "\n}\n"])


def _written(head: str, body: _Definition, result: str) -> str:
    return "\n  ".join([f"{head} {{", *body.lines, f"return {result}"]) + "\n}"
