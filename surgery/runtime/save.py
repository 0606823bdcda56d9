"""Saving an adapter, and saving a merged model as a plain one.

A saved adapter is a folder of three files: `adapter.safetensors` (the adapter's tensors and those of `train`),
`adapter.surg` (the spec on its own, parameters as they were set), `meta.json`; and a list of them by which a later run
knows what it may replace. Promises: a folder appears whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save as to_bytes

from surgery.diagnostics import fail, tell
from surgery.given import takes
from surgery.models.names import parted
from surgery.runtime.atomic_folders import Kind, refuse_taken, replacing
from surgery.runtime.checkpoints import on_cpu
from surgery.runtime.outside_adapter import changes_outside
from surgery.runtime.saved_format import ADAPTER, DIVERGED, META, SPEC, TENSORS, not_finite
from surgery.runtime.sharding import is_first, on_first, whole

if TYPE_CHECKING:
    from surgery.runtime.surgeon import Surgeon

MODEL = Kind("a saved model")


def save(surgeon: Surgeon, folder: str | PathLike, base_model: str | None = None, revision: str | None = None,
         state: Mapping[str, torch.Tensor] | None = None, force: bool = True,
         files: Mapping[str, str] = MappingProxyType({}), self_contained: bool = False,
         elsewhere: Collection[str] = (), **more: Any) -> None:
    """Write the adapter into `folder`, in the place of one that we wrote there unless `force` is off; `state` where its
    tensors' values are not the surgeon's own; `files` beside it, their texts by name; what else is said of it goes into
    `meta.json`. The model may be merged or disabled. `base_model` and `revision` are the model's own, as it was loaded,
    where they are not said. `elsewhere`: parameters of the model that another adapter holds.

    What is frozen, and is still what the spec, the seed and W make, is left out and made again by whoever attaches it;
    `self_contained`: everything is written.

    Raises: SurgeryError (bad-output; bad-adapter, for tensors that `attach` would refuse), and then what stood at
    `folder` still does.
    """
    tensors = {name: on_cpu(name, tensor) for name, tensor in (state or surgeon.state()).items()}
    if broken := not_finite(tensors):
        raise fail("bad-adapter", f"the adapter holds what is not finite, and is not saved: {broken}",
                   helps=(DIVERGED,))
    tell(changes_outside(surgeon.model, surgeon.record.outside, elsewhere))
    remade = surgeon.record.left_out(tensors, self_contained)
    held = {name: tensor for name, tensor in tensors.items() if name not in remade}
    texts = {**texts_of(surgeon, tensors, remade, base_model, revision, **more), **files}

    def write() -> None:
        with replacing(Path(folder), ADAPTER, force) as new:
            (new / TENSORS).write_bytes(to_bytes(held))
            write_texts(new, texts)

    on_first(surgeon.part, write)


def texts_of(surgeon: Surgeon, tensors: Mapping[str, torch.Tensor], remade: Mapping[str, Any],
             base_model: str | None = None, revision: str | None = None, **more: Any) -> dict[str, str]:
    """What a saved adapter says of itself, by file. Of `tensors` the shapes and dtypes count alone; `remade`: what is
    said of those that it does not hold."""
    config = getattr(surgeon.model, "config", None)
    base_model, said = parted(base_model or getattr(config, "_name_or_path", None) or "")
    # The commit that was loaded tells more than the branch that was asked for.
    revision = revision or getattr(config, "_commit_hash", None) or said
    about = surgeon.record.meta(surgeon.model, tensors, remade, base_model=base_model or None, revision=revision,
                                **more)
    return {SPEC: surgeon.record.text(), META: json.dumps(about, indent=2) + "\n"}


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


@takes(surgeon="surgeon", folder="folder")
def save_merged(surgeon: Surgeon, folder: str | PathLike, extras: Iterable[Any] = (), force: bool = False) -> None:
    """Save the merged model as a plain one, which transformers loads without us; `extras` (a tokenizer) are saved
    beside it. `force`: in the place of one that we wrote there and that nobody has changed.

    The model is afterwards as it was before. Raises: SurgeryError (bad-output, merge-error).
    """
    model = surgeon.model
    save_pretrained = getattr(model, "save_pretrained", None)
    if save_pretrained is None:
        raise fail("bad-output",
                   f"{type(model).__name__} is not a model of transformers, so there is no format to save it in",
                   helps=("merge() and save its state_dict() yourself",))
    on_first(surgeon.part, lambda: refuse_taken(Path(folder), MODEL, force))
    with ExitStack() as stack:
        if not surgeon.merged:
            # said before, so that no interrupt between the two leaves it merged; `merge` itself is whole or not at all
            stack.callback(lambda: surgeon.unmerge() if surgeon.merged else None)
            surgeon.merge()
        like, tensors = surgeon.part, {}
        for name, tensor in model.state_dict().items():
            every = tensor if like is None else whole(tensor)  # which all processes take part in
            if like is None or is_first(like):  # of a sharded model, in the memory of the first process alone
                tensors[name] = every if like is None else every.cpu()

        def write() -> None:
            with replacing(Path(folder), MODEL, force) as new:
                try:
                    save_pretrained(new, state_dict=tensors)
                except SafetensorError as error:  # which is what it makes of an error of the system's
                    raise OSError(str(error)) from error
                for extra in extras:
                    extra.save_pretrained(new)

        on_first(surgeon.part, write)
