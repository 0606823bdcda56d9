"""Models whose weights are read one at a time, and saved adapters on them.

Takes a model's name, or the folder of an adapter; gives what reads each weight. Promises: of a model whose safetensors
files hold every weight under its own name only a skeleton is made; another is loaded whole, and that is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.analysis.spectra.checkpoint import Weights, of_folder
from surgery.analysis.spectra.updates import Pending, of_surgeon
from surgery.diagnostics import fail
from surgery.layers.survey import Site
from surgery.models.loading import folder_of, load, skeleton, with_saved_head
from surgery.models.names import base_name, only_whole
from surgery.runtime.attach import fitted
from surgery.runtime.remade import Remade
from surgery.runtime.saved_format import Saved

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.planning.compile import Placed
    from surgery.runtime.surgeon import Surgeon


@dataclass(frozen=True)
class Asked:
    """How models are opened. `trust`: Python code in a model's folder may run. `step` stands around what takes time and
    `note` is told what a user should know; both get a line of text."""

    trust: bool = False
    step: Callable[[str], AbstractContextManager] = nullcontext
    note: Callable[[str], None] = lambda what: None


def opened_weights(name: str, asked: Asked = Asked(), saved: Saved | None = None) -> Weights:
    """The weights of a model; for a saved adapter, of the model with the head that was trained beside it, if one was.

    Raises: SurgeryError (unknown-model)."""
    # A skeleton first: a checkpoint of many gigabytes is then read one weight at a time.
    with asked.step(f"opening {name}"):
        is_whole = only_whole(name)
        model = load(name) if is_whole else skeleton(name, asked.trust)
        weights = Weights(model, None if is_whole else of_folder(folder_of(name)))
    if not weights.complete:
        asked.note(f"{name} is loaded whole: its files do not hold every weight under the model's own names")
        with asked.step(f"loading {name}"):
            model = load(name, trust=asked.trust)
            weights = Weights(model)
    if saved is None:
        return weights
    return Weights(with_saved_head(name, model, saved, asked.trust), weights.tensors)


@dataclass(frozen=True)
class OpenedAdapter:
    """A saved adapter on a model without weights of its own: `read` gives one, `leaves` the tensors of an adapter."""

    surgeon: Surgeon
    saved: Saved
    base: str
    weights: Weights

    def read(self, site: Site) -> Tensor:
        stored = self.weights.of(site)
        if stored is None:
            shape = list(site.stored_shape)
            raise fail("unknown-model", f"{self.base} has no weight {site.weight_name} of the shape {shape}")
        return stored.read()

    @property
    def leaves(self) -> Callable[[Placed], Mapping[str, Tensor]]:
        # By the names that this surgeon gives them: the adapter was saved by another one.
        saved = self.surgeon.as_named(self.saved.tensors)
        names, adapters, remade = self.surgeon.name_of, self.surgeon.adapters, Remade(self.surgeon, self.saved)

        def of(placed: Placed) -> Mapping[str, Tensor]:
            made = remade.of(placed, lambda: self.read(placed.site))
            held = {leaf.key: saved[names(placed, leaf.key)] for leaf in placed.formula.leaves if leaf.key not in made}
            return adapters[placed.site.name].shaped({**held, **made})

        return of

    def updates(self) -> list[Pending]:
        """What the adapter does to each weight, read when it is measured."""
        return of_surgeon(self.surgeon, self.read, self.leaves)


def opened_adapter(folder: str | PathLike, base: str | None = None, asked: Asked = Asked()) -> OpenedAdapter:
    """A saved adapter on its base model, or on another. Raises: SurgeryError with all that does not fit."""
    saved = Saved(Path(folder))
    name = base_name(folder, base, saved.base, "--base names it")
    weights = opened_weights(name, asked, saved)
    with asked.step(f"attaching {folder}"):
        return OpenedAdapter(fitted(weights.survey.model, saved), saved, name, weights)
