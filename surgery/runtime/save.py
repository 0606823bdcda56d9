"""Saving an adapter, and saving a merged model as a plain one.

A saved adapter is a folder of three files: `adapter.safetensors` (the adapter's tensors and those of `train`),
`adapter.surg` (the spec on its own, parameters as they were set), `meta.json`; and a list of them by which a later run
knows what it may replace. Promises: a folder appears whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save as to_bytes
from torch import nn

from surgery import __version__
from surgery.diagnostics import fail
from surgery.language.library import inlined
from surgery.runtime.adapter import Adapter, SharedTensors
from surgery.runtime.atomic_folders import Kind, refuse_taken, replacing
from surgery.runtime.saved_format import ADAPTER, FORMAT, META, SPEC, TENSORS
from surgery.runtime.sharding import is_first, on_first, whole
from surgery.text import dtype_text

if TYPE_CHECKING:
    from surgery.runtime.surgeon import Surgeon

MODEL = Kind("a saved model")


def save(surgeon: Surgeon, folder: str | PathLike, base_model: str | None = None, revision: str | None = None,
         state: Mapping[str, torch.Tensor] | None = None, force: bool = True, **more: Any) -> None:
    """Write the adapter into `folder`, in the place of one that we wrote there unless `force` is off; `state` where its
    tensors' values are not the surgeon's own; what else is said of it goes into `meta.json`. The model may be merged or
    disabled.

    Raises: SurgeryError (bad-output), and then what stood at `folder` still does.
    """
    tensors = {name: _whole(name, tensor) for name, tensor in (state or surgeon.state()).items()}
    about = {"format_version": FORMAT, "surgery_version": __version__, "base_model": base_model, "revision": revision,
             "model_class": type(surgeon.model).__name__, "seed": surgeon.seed, "dtype": dtype_text(surgeon.dtype),
             "tensors": {n: {"shape": list(t.shape), "dtype": dtype_text(t.dtype)} for n, t in tensors.items()}, **more}

    def write() -> None:
        with replacing(Path(folder), ADAPTER, force) as new:
            (new / TENSORS).write_bytes(to_bytes(tensors))
            (new / SPEC).write_text(inlined(surgeon.spec).to_surg(), encoding="utf-8")
            (new / META).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    on_first(surgeon.part, write)


def _whole(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU. A shard, or a tensor without data, would be saved as a part that looks like a whole."""
    if tensor.is_meta or hasattr(tensor, "placements") or not tensor.numel():
        raise fail("bad-output", f"{name} is not here as a whole (it is sharded or on the meta device)",
                   helps=("gather the model's parameters before saving",))
    return tensor.cpu().contiguous()


def save_merged(surgeon: Surgeon, folder: str | PathLike, extras: Iterable[Any] = (), force: bool = False) -> None:
    """Save the merged model as a plain one, which transformers loads without us; `extras` (a tokenizer) are saved
    beside it. `force`: in the place of one that we wrote there and that nobody has changed.

    The model is afterwards as it was before. Raises: SurgeryError (bad-output, merge-error).
    """
    model = surgeon.model
    if not hasattr(model, "save_pretrained"):
        raise fail("bad-output",
                   f"{type(model).__name__} is not a model of transformers, so there is no format to save it in",
                   helps=("merge() and save its state_dict() yourself",))
    on_first(surgeon.part, lambda: refuse_taken(Path(folder), MODEL, force))
    with _merged(surgeon), _untied(surgeon):
        tensors = _gathered(plain(model, model.state_dict()), surgeon.part)

        def write() -> None:
            with replacing(Path(folder), MODEL, force) as new:
                try:
                    model.save_pretrained(new, state_dict=tensors)
                except SafetensorError as error:  # which is what it makes of an error of the system's
                    raise OSError(str(error)) from error
                for extra in extras:
                    extra.save_pretrained(new)

        on_first(surgeon.part, write)


def plain(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's tensors by name without those of adapters."""
    ours = tuple(f"{name}." for name, m in model.named_modules(remove_duplicate=False)
                 if isinstance(m, (Adapter, SharedTensors)))
    return {name: tensor for name, tensor in state.items() if not name.startswith(ours)}


def _gathered(state: Mapping[str, torch.Tensor], like: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The tensors, each whole; of a sharded model, in the memory of the first process alone."""
    if like is None:
        return dict(state)
    found = {}
    for name, tensor in state.items():
        every = whole(tensor)  # which all processes take part in
        if is_first(like):
            found[name] = every.cpu()
    return found


@contextmanager
def _merged(surgeon: Surgeon) -> Iterator[None]:
    if surgeon.merged:
        yield
    else:
        surgeon.merge()
        try:
            yield
        finally:
            surgeon.unmerge()


@contextmanager
def _untied(surgeon: Surgeon) -> Iterator[None]:
    """Inside, the configuration says that what `untie` parted is not tied, so that a reload keeps both weights."""
    config = surgeon.model.config
    before = getattr(config, "tie_word_embeddings", False)
    config.tie_word_embeddings = before and not surgeon.untied
    try:
        yield
    finally:
        config.tie_word_embeddings = before
