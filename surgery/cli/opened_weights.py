"""Models whose weights are read one at a time, and saved adapters on them.

Takes MODEL, or the folder of an adapter; gives what reads each weight. Promises: of a model whose safetensors files
hold every weight under its own name only a skeleton is made; another is loaded whole, and that is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.analysis.spectra.checkpoint import Weights, of_folder
from surgery.cli.model_options import base_name
from surgery.cli.output import Output
from surgery.diagnostics import fail
from surgery.layers.survey import Site
from surgery.models.loading import DEMO, folder_of, load, quiet_libraries, skeleton, with_saved_head
from surgery.runtime.attach import fitted
from surgery.runtime.saved_format import Saved

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.planning.compile import Placed
    from surgery.runtime.surgeon import Surgeon


def opened_weights(output: Output, name: str, saved: Saved | None = None) -> Weights:
    """The weights of MODEL; for a saved adapter, of MODEL with the head that was trained beside it, if one was.

    Raises: SurgeryError (unknown-model)."""
    quiet_libraries(output.animated)
    with output.busy(f"opening {name}"):
        found = (Weights(load(name)) if name.startswith(DEMO)
                 else Weights(skeleton(name, output.trust), of_folder(folder_of(name))))
    if not found.complete:
        output.note(f"{name} is loaded whole: its files do not hold every weight under the model's own names")
        with output.busy(f"loading {name}"):
            found = Weights(load(name, trust=output.trust))
    return found if saved is None else Weights(
        with_saved_head(name, found.survey.model, saved, output.trust), found.tensors)


@dataclass(frozen=True)
class OpenedAdapter:
    """A saved adapter on a model without weights of its own: `read` gives one, `leaves` the tensors of an adapter."""

    surgeon: Surgeon
    saved: Saved
    base: str
    weights: Weights

    def read(self, site: Site) -> Tensor:
        found = self.weights.of(site)
        if found is None:
            shape = list(site.stored_shape)
            raise fail("unknown-model", f"{self.base} has no weight {site.weight_name} of the shape {shape}")
        return found.read()

    @property
    def leaves(self) -> Callable[[Placed], Mapping[str, Tensor]]:
        names = {id(tensor): name for name, tensor in self.surgeon.named_tensors().items()}
        return lambda placed: {key: self.saved.tensors[names[id(tensor)]]
                               for key, tensor in self.surgeon.adapters[placed.site.name].tensors().items()}


def opened_adapter(output: Output, folder: str, base: str | None) -> OpenedAdapter:
    """A saved adapter on its base model, or on another. Raises: SurgeryError with all that does not fit."""
    saved = Saved(Path(folder))
    name = base_name(folder, base, saved.meta.get("base_model"), "--base names it")
    weights = opened_weights(output, name, saved)
    with output.busy(f"attaching {folder}"):
        return OpenedAdapter(fitted(weights.survey.model, saved), saved, name, weights)
