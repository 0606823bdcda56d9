"""A model's weights in its safetensors files, read one at a time by the names that they have in the model.

Takes a skeleton and the folder of its files; gives each parameter as transformers would load it, and the stored tensors
that it is made of. Promises: nothing but headers is read before a weight is asked for; where the files do not say for
certain what a parameter is, `Unsure` says why.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from surgery.layers.survey import Survey
from surgery.layers.wrappers import named_parameters, own_parameter
from surgery.matching.conflicts import tied
from surgery.models.checkpoint_files import StoredTensor, TensorFile, opened_file, read_into, weight_files
from surgery.models.loading import skeleton
from surgery.models.names import DEMO, only_whole
from surgery.models.stored_names import Piece, Unsure, pieces
from surgery.planning.compile import Placed
from surgery.text import some

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# Floating types that a weight is stored in; what is stored in another is packed, and no plain weight.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in DTYPES.items()}


def skeleton_of_files(name: str, trust: bool = False) -> PreTrainedModel:
    """The skeleton of a model whose files may hold its weights one by one. Raises: Unsure; SurgeryError
    (unknown-model)."""
    if only_whole(name):
        raise Unsure("a demo has no files" if name.startswith(DEMO) else "a GGUF file holds no plain weights")
    model = skeleton(name, trust)
    if getattr(model.config, "quantization_config", None) is not None:
        raise Unsure("the base model is quantised, and its files hold no plain weights")
    if getattr(model.config, "transformers_weights", None):
        raise Unsure("the base model's folder has transformers load something else than its usual files")
    return model


class StoredWeights:
    """The weights of a model in the files of a folder. `dtype`: in which they are loaded, the model's own if None.

    Raises: Unsure, where the model has a parameter that the files hold nothing for, or none of its shape."""

    def __init__(self, model: PreTrainedModel, root: Path, dtype: str | None = None):
        self.model = model
        self.files: tuple[TensorFile, ...] = tuple(map(opened_file, weight_files(root)))
        if not self.files:
            raise Unsure("the base model has no safetensors files")
        if (root / "adapter_config.json").exists():
            raise Unsure("the base model's folder has transformers load something else than its usual files")
        self.where = {t.name: (file, t) for file in self.files for t in file.tensors}
        if len(self.where) < sum(len(file.tensors) for file in self.files):
            raise Unsure("two of its files hold a tensor of the same name")
        self.stored: dict[str, StoredTensor] = {name: tensor for name, (_, tensor) in self.where.items()}
        empty = {name: torch.empty(t.shape, dtype=DTYPES.get(t.dtype, torch.uint8), device="meta")
                 for name, t in self.stored.items()}
        found = pieces(model, empty)
        self.pieces = {name: piece for piece in found for name in piece.parameters}
        self.repeated = {name for piece in found for name in piece.parameters if self.pieces[name] is not piece}
        self.parameters = dict(named_parameters(model))
        names: dict[int, list[str]] = {}
        for name, parameter in self.parameters.items():
            names.setdefault(id(parameter), []).append(name)
        others = tied(Survey(model))
        self.names = {name: list(dict.fromkeys([*names[id(p)], *others.get(name, ())]))
                      for name, p in self.parameters.items()}
        self._said = _dtype_of(model.config.dtype or torch.float32)  # which a skeleton is made in
        self.dtype = getattr(torch, dtype) if dtype else self._loaded_as()
        self._assert_whole()

    def _loaded_as(self) -> torch.dtype:
        """The dtype that transformers loads the model in. Raises: Unsure."""
        said = self.model.config.dtype
        kept = {t.dtype for t in self.stored.values() if t.dtype in DTYPES}
        if said is None and len(kept) > 1:
            raise Unsure("its config.json does not say its dtype, and its files hold several")
        return _dtype_of(said or DTYPES[min(kept, default="F32")])

    def _assert_whole(self) -> None:
        lacking = [name for name in self.parameters if not any(alias in self.pieces for alias in self.names[name])]
        if lacking:
            raise Unsure(f"the files hold no {some(lacking)}")
        for piece in self.pieces.values():
            name, here = piece.parameters[0], self.stored[piece.stored[0]].shape
            if piece.converter is None and name in self.parameters and here != (shape := self.parameters[name].shape):
                raise Unsure(f"{piece.stored[0]} is {list(here)} in the files, and {list(shape)} in the model")

    def piece(self, name: str) -> tuple[str, Piece]:
        """The piece of the files that a parameter is made of, with the one of its names (one that is tied has several)
        that it has there. Raises: Unsure."""
        held = {alias: self.pieces[alias] for alias in self.names[name] if alias in self.pieces}
        if len(held) > 1 or not self.repeated.isdisjoint(held):
            raise Unsure(f"the files hold {name} several times")
        ((alias, piece),) = held.items()
        if piece.fault:
            raise Unsure(piece.fault)
        return alias, piece

    def loaded_as(self, alias: str) -> torch.dtype:
        """The dtype that a parameter, by its name in the files, is loaded in: a class may keep some in float32 where it
        is loaded in a half dtype (in float16 alone, unless it is strict), and some have a dtype of their own."""
        loose, strict = (getattr(self.model, f"_keep_in_fp32_modules{how}", None) or () for how in ("", "_strict"))
        kept = {torch.float16: (*loose, *strict), torch.bfloat16: (*strict,)}.get(self.dtype, ())
        if any(re.search(pattern.replace("*", ".*"), alias) for pattern in kept):  # as transformers reads them
            return torch.float32
        own = self.parameters[alias].dtype
        return own if own != self._said else self.dtype

    def read(self, name: str) -> Tensor:
        """A stored tensor, by its name in the files."""
        file, tensor = self.where[name]
        numbers = torch.empty(tensor.size, dtype=torch.uint8)
        if tensor.size:
            read_into(numbers.numpy().data, file.path, tensor.begin)
        return numbers.view(DTYPES[tensor.dtype]).reshape(tensor.shape)

    def parameter(self, name: str) -> Tensor:
        """A parameter, by its name in the model, as it is loaded. Raises: Unsure."""
        alias, piece = self.piece(name)
        packed = [stored for stored in piece.stored if self.stored[stored].dtype not in DTYPES]
        if packed:
            raise Unsure(f"{packed[0]} is stored as {self.stored[packed[0]].dtype}")
        dtype, shape = self.loaded_as(alias), self.parameters[name].shape
        made = piece.loaded({stored: self.read(stored).to(dtype) for stored in piece.stored})[alias]
        if made.shape != shape:
            raise Unsure(f"{name} has another shape in the files")
        return made


def _dtype_of(said: torch.dtype | str) -> torch.dtype:
    """A dtype as configurations say it."""
    return getattr(torch, said) if isinstance(said, str) else said


def read_by(placed: Placed) -> list[str]:
    """The names of the parameters that W' and b' of a weight are made of."""
    site = placed.site
    owner = site.weight_name.removesuffix(site.parameter)
    return [site.weight_name, *([f"{owner}bias"] if site.has_bias else [])]


@contextmanager
def standing_in(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, tensors stand in the places of a module's parameters, by their names in it. Raises: Unsure, for one of
    another shape."""
    before = dict(module._parameters)
    try:
        for name, tensor in tensors.items():
            if tensor.shape != own_parameter(module, name).shape:
                raise Unsure(f"the {name} of a {type(module).__name__} has another shape in the files")
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        yield
    finally:
        module._parameters.update(before)
