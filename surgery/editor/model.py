"""The model that a spec is written for, from its configuration alone.

Takes a model's name; gives a `Model`: the names that patterns can have, and what they match. Promises: no weight is
read, and no Python code of the model's folder runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from surgery.diagnostics import SurgeryError
from surgery.layers.kinds import LINEAR
from surgery.text import counted, some_lines

if TYPE_CHECKING:
    from torch import nn

    from surgery.layers.survey import Site
    from surgery.matching.matches import Catalogue

_MOST_NAMES = 8  # that a hover lists


@dataclass(frozen=True)
class Candidate:
    """A pattern that matches something, and what."""

    pattern: str
    matches: str


class Model:
    """A skeleton with its weights' names. Raises: SurgeryError (unknown-model)."""

    def __init__(self, name: str):
        # Imported here: these need torch, which an editor without a model does without.
        from surgery.models.loading import quiet_libraries, skeleton

        quiet_libraries(bars=False)
        from surgery.matching.matches import Catalogue

        self.name = name
        self.skeleton: nn.Module = skeleton(name)
        self.catalogue: Catalogue = Catalogue(self.skeleton)

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.catalogue.survey.sites

    @cached_property
    def candidates(self) -> tuple[Candidate, ...]:
        """A pattern for each last segment of a weight's name (`**.q_proj`), then every whole name."""
        by_end: dict[str, list[Site]] = {}
        for site in self.sites:
            by_end.setdefault(site.name.rpartition(".")[2], []).append(site)
        # `**.0` of an unnamed list says little, and matches whatever stands first in any of them
        ends = [Candidate(f"**.{end}", _summary(sites)) for end, sites in by_end.items() if not end.isdecimal()]
        return (*ends, *(Candidate(site.name, _summary([site])) for site in self.sites))

    @cached_property
    def parameters(self) -> tuple[Candidate, ...]:
        """The same of the parameters that `train` can name."""
        names = [name for name, _ in self.skeleton.named_parameters()]
        ends: dict[str, int] = {}
        for name in names:
            end = ".".join(name.split(".")[-2:])
            ends[end] = ends.get(end, 0) + 1
        return (*(Candidate(f"**.{end}", counted(count, "parameter")) for end, count in ends.items()
                  if not end[:1].isdecimal()), *(Candidate(name, "a parameter") for name in names))

    @property
    def classes(self) -> tuple[str, ...]:
        return self.catalogue.classes

    @cached_property
    def largest_linear(self) -> tuple[int, int] | None:
        linear = ((s.out, s.in_) for s in self.sites if s.kind == LINEAR.word)
        return max(linear, key=lambda sides: sides[0] * sides[1], default=None)

    def matches(self, pattern: str) -> str:
        """Say which weights a pattern matches, in Markdown; empty for a pattern that is not well formed."""
        from surgery.matching.patterns import compile_pattern

        try:
            glob = compile_pattern(pattern)
        except SurgeryError:
            return ""
        taken = [s for s in self.sites if any(glob.live(name) for name in self.catalogue.marked[s])]
        named = some_lines((f"`{s.name}` ({s.kind}, {s.sides})" for s in taken), _MOST_NAMES)
        return "\n".join([f'`"{pattern}"` matches {counted(len(taken), "weight")} of {self.name}', "",
                          *(f"- {line}" for line in named)])


def _summary(sites: list[Site]) -> str:
    kinds = dict.fromkeys(f"{site.kind} {site.sides}" for site in sites)
    first = next(iter(kinds))
    return f"{counted(len(sites), 'weight')}, {first}{' and others' * (len(kinds) > 1)}"


def names_of_models() -> list[str]:
    """The models that are here already, for the line that chooses one."""
    from surgery.models.demo import DEMOS, LARGER
    from surgery.models.names import DEMO
    from surgery.models.packages import carried

    return [*(DEMO + name for name in (*DEMOS, *LARGER)), *carried()]
