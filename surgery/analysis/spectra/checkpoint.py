"""The tensors of a model by name, each read when it is asked for: from a folder's safetensors files, or from a model.

Takes a folder or a model; gives `Tensors`. Promises: opening reads names and shapes alone; a tensor that is read is
held by the reader only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from surgery.analysis.spectra.updates import Read
from surgery.diagnostics import fail
from surgery.layers.survey import Site, Survey
from surgery.matching.conflicts import tied
from surgery.models.checkpoint_files import weight_files


@dataclass(frozen=True)
class Stored:
    """A tensor where it lies: its shape, and how it is read."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


Tensors = Mapping[str, Stored]


def of_model(model: nn.Module) -> Tensors:
    """The parameters of a model; a tied one is the same `Stored` under each of its names."""
    known = {id(p): Stored(tuple(p.shape), partial(getattr, p, "data")) for p in model.parameters()}
    return {name: known[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}


def of_folder(folder: Path) -> Tensors:
    """The tensors in a model's safetensors files; none without such files. Raises: SurgeryError (unknown-model)."""
    def read(file: Path, name: str) -> Tensor:
        # Opened anew for each tensor, so that no file stays open while the weights are measured.
        with safe_open(file, "pt") as opened:
            return opened.get_tensor(name)

    stored: dict[str, Stored] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, "pt") as opened:
                stored |= {name: Stored(tuple(opened.get_slice(name).get_shape()), partial(read, file, name))
                           for name in opened.keys()}
        except (OSError, SafetensorError) as error:
            raise fail("unknown-model", f"cannot read {file}: {error}") from None
    return stored


# --------------------------------------------------------------------------------------------- the weights of sites


class Weights:
    """The weights of a model by site: `model` (a skeleton will do) says which there are, `tensors` hold them."""

    def __init__(self, model: nn.Module, tensors: Tensors | None = None):
        self.survey, self.tensors = Survey(model), of_model(model) if tensors is None else tensors
        self._prefix = getattr(model, "base_model_prefix", "")
        self._tied = tied(self.survey)
        self._called = {s.name: None if s.is_meta else Stored((s.out, s.in_), s.read)
                        for s in self.survey.sites if s.layout.is_called}

    def of(self, site: Site) -> Stored | None:
        """The tensor of a site of this model, or of one that has its modules; None for one of another shape. Of a
        called layer it is what the calls of the loaded model say, whatever lies in files under its name."""
        # What is tied is stored once, under any of its names; and a base model's own checkpoint leaves out the prefix
        # that its tensors have in a task model.
        spelt = (spelling for known in (site.weight_name, *self._tied.get(site.weight_name, ()))
                 for spelling in (known, f"{self._prefix}.{known}", known.removeprefix(f"{self._prefix}.")))
        stored = next((self.tensors[name] for name in spelt if name in self.tensors), None)
        stored = self._called.get(site.name, stored)
        return stored if stored is not None and stored.shape == site.stored_shape else None

    @property
    def complete(self) -> bool:
        """Whether the tensors of all its sites are there under names known to us."""
        return all(map(self.of, self.survey.sites))


def pairs(base: Weights, tuned: Weights) -> dict[Site, tuple[Read, Read]]:
    """The sites of the tuned model that both have a tensor for, each with how the two are read; tied ones once."""
    first: dict[tuple[int, int], tuple[Site, Stored, Stored]] = {}
    for site in tuned.survey.sites:
        one, other = base.of(site), tuned.of(site)
        if one and other:
            # A tied weight is the same `Stored` at each of its sites: it changed once, and is measured once.
            first.setdefault((id(one), id(other)), (site, one, other))
    return {site: (_reader(one), _reader(other)) for site, one, other in first.values()}


def _reader(stored: Stored) -> Read:
    return lambda site: stored.read()
