"""A PEFT adapter as it lies on the disk: `adapter_config.json` and `adapter_model.safetensors`, or in the place of the
latter a pickle of tensors (`adapter_model.bin`).

Takes a folder; gives the configuration as plain values, and the tensors: those of modules by the names that follow the
model's, those of the whole model by their full names. Promises: nothing is believed before it is checked, all the
faults come in one error, of a pickle tensors alone are read, so that none runs code; a method that is no map of a
weight is refused by its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from surgery.diagnostics import Collector, fail
from surgery.files import WRITTEN, is_number, read_json, refuse_irregular, unchanged
from surgery.language.unsupported_methods import SWITCHES, refusal
from surgery.layers.wrappers import HELD
from surgery.peft.table.methods import METHODS, WITHOUT_ROW
from surgery.runtime.atomic_folders import Kind, replacing
from surgery.runtime.saved_format import DTYPES, Name, misfits
from surgery.text import dtype_text, listed

CONFIG, TENSORS = ("adapter_config.json", "adapter_model.safetensors")
_PICKLE = "adapter_model.bin"
_BY_HAND = "where you trust who made it, load it by hand, and write its tensors with safetensors.torch.save_file"
MODEL, SHARED = "base_model.model.", "base_model."  # in front of what belongs to a module, and to the whole model
_WRAPPER = rf"(?:(?:{'|'.join(HELD)})\.)*"
_AROUND = re.compile(rf"{_WRAPPER}{re.escape(SHARED)}{_WRAPPER}")  # what is around PEFT's model, or its inner one

ADAPTER = Kind("a PEFT adapter")
TYPES = tuple(dict.fromkeys(m.family.peft_type for m in METHODS))

# The class of transformers that a model is for each of PEFT's tasks that need a head.
_TASKS = {"SEQ_CLS": "AutoModelForSequenceClassification", "TOKEN_CLS": "AutoModelForTokenClassification",
          "QUESTION_ANS": "AutoModelForQuestionAnswering"}


class Folder:
    """A PEFT adapter: its `config`, its `tensors` below modules and the `shared` ones of the model, read and checked,
    from the `file` of this name; `wrapped`: names in it that begin with what a wrapper around PEFT's model adds.

    Raises: SurgeryError (bad-adapter, no-weight, unknown-method).
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    shared: dict[str, Tensor]

    def __init__(self, path: Path):
        self.path, self.report = path, Collector()
        if not (path / CONFIG).is_file():
            # What may have been meant: PEFT keeps an adapter with a name one folder below; or it is one of ours.
            inner = ", ".join(sorted(str(p.parent) for p in path.glob(f"*/{CONFIG}"))[:3])
            helps = ([f"PEFT keeps further adapters in folders of their own: {inner}"] if inner else
                     ["it is a saved surgery already"] if (path / "adapter.surg").is_file() else [])
            what = f"has no {CONFIG}, so it is not a PEFT adapter's folder" if path.is_dir() else "is not a folder"
            raise fail("bad-adapter", f"{path} {what}", helps=tuple(helps))
        is_pickle = not (path / TENSORS).is_file() and (path / _PICKLE).is_file()
        self.file, self.wrapped = _PICKLE if is_pickle else TENSORS, list[str]()
        are_same = unchanged(path / CONFIG, path / self.file)
        self.config = self._config()
        self.report.raise_errors()
        self._refuse_method()
        self.tensors, self.shared = {}, {}
        found = self._unpickled() if is_pickle else self._tensors()
        for name, tensor in self._bare(found).items():
            if tensor.dtype not in DTYPES:
                self._fault(f"{name} is of dtype {dtype_text(tensor.dtype)}, which no adapter is trained in")
            elif not tensor.isfinite().all():
                self._fault(f"{name} is not finite", "the training that made it diverged")
            elif name.startswith(MODEL):
                self.tensors[name.removeprefix(MODEL)] = tensor
            elif name.startswith(SHARED):  # the shorter beginning, so it is asked for after the longer one
                self.shared[name] = tensor
            else:
                self._fault(f"{name} does not begin with {SHARED}, as the names of PEFT's tensors do")
        if not are_same():
            self._fault(WRITTEN, "read it again")
        self.report.raise_errors()

    @property
    def model_class(self) -> str | None:
        """The class of the model that it was trained on, where that is said."""
        known = self.config.get("auto_mapping") or {}
        return _TASKS.get(self.config.get("task_type") or "") or known.get("base_model_class")

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes of a head, which PEFT does not say."""
        return ()

    @property
    def pads_with(self) -> int | None:
        """The token that texts were padded with, which PEFT does not say."""
        return None

    def _fault(self, message: str, *helps: str) -> None:
        self.report.error("bad-adapter", f"{self.path}: {message}", helps=helps)

    def _config(self) -> dict[str, Any]:
        try:
            config = read_json(self.path / CONFIG)
        except (OSError, ValueError) as error:
            return self._fault(f"cannot read {CONFIG}: {getattr(error, 'strerror', None) or error}") or {}
        if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
            return self._fault(f"{CONFIG} names no `peft_type`") or {}
        wrong = wrong_fields(config)
        if wrong:
            self._fault(f"{CONFIG} has what cannot stand there as {', '.join(wrong)}")
        return config

    def _refuse_method(self) -> None:
        kind = self.config["peft_type"]
        # A switch of LoRA's may make it another method altogether, which has a name of its own to be refused by.
        switched = [method for switch, method in SWITCHES.items() if self.config.get(switch)]
        for name in (kind, *switched):
            if why := refusal(name):
                raise why
        if kind not in TYPES:
            why = f": {WITHOUT_ROW[kind]}" if kind in WITHOUT_ROW else ""
            raise fail("unknown-method", f"{self.path}: no spec here says what PEFT's method {kind} does{why}",
                       notes=(f"those that can be imported: {', '.join(sorted(TYPES))}",))

    def _tensors(self) -> Mapping[str, Tensor]:
        if not (self.path / TENSORS).is_file():
            return self._fault(f"there is no {TENSORS}") or {}
        try:
            return load_file(self.path / TENSORS)
        except (OSError, SafetensorError) as error:
            return self._fault(f"cannot read {TENSORS}: {getattr(error, 'strerror', None) or error}") or {}

    def _unpickled(self) -> Mapping[str, Tensor]:
        try:
            refuse_irregular(self.path / _PICKLE)
            found = torch.load(self.path / _PICKLE, map_location="cpu", weights_only=True)
        except OSError as error:
            return self._fault(f"cannot read {_PICKLE}: {error.strerror or error}") or {}
        except Exception:  # bytes of any kind make it raise whatever it likes
            return self._fault(f"{_PICKLE} is no pickle of tensors alone, and nothing else is read of a pickle, which "
                               "may run code", _BY_HAND) or {}
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
            return self._fault(f"{_PICKLE} is no table of tensors by name", _BY_HAND) or {}
        odd = [name for name, tensor in found.items() if not _is_whole(tensor)]
        if odd:
            return self._fault(f"{_PICKLE} holds what is no plain tensor: {listed(odd)}", _BY_HAND) or {}
        return {name: tensor.detach().contiguous() for name, tensor in found.items()}

    def _bare(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors by PEFT's names."""
        bare: dict[str, Tensor] = {}
        for name, tensor in found.items():
            own = _AROUND.sub(SHARED, name, count=1) if _AROUND.match(name) else name
            if own in bare or own != name and own in found:
                self._fault(f"{name} is there once more, without what wrappers add to names")
            if own != name:
                self.wrapped.append(name)
            bare[own] = tensor
        return bare


def _is_whole(tensor: Any) -> bool:
    """Whether it is a plain tensor, whose numbers were all in the file: a few bytes can be said to be billions."""
    return (type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_nested
            and tensor.device.type == "cpu" and tensor.nbytes <= tensor.untyped_storage().nbytes())


def write(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], force: bool = True) -> None:
    """Write an adapter as PEFT does, in the place of one that we wrote if `force`; names without
    `base_model.` are below the model's.

    Raises: SurgeryError (bad-output).
    """
    named = {name if name.startswith(SHARED) else MODEL + name: t for name, t in tensors.items()}
    # safetensors refuses tensors that share memory, and stores what is contiguous
    whole = {name: t.detach().cpu().contiguous().clone() for name, t in named.items()}
    with replacing(path, ADAPTER, force) as new:
        (new / TENSORS).write_bytes(save(whole, {"format": "pt"}))
        (new / CONFIG).write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n", encoding="utf-8")


# -------------------------------------------------------------------------------------------------- what is wrong


class _Class(BaseModel):
    """The class of the model, in a configuration."""

    model_config = ConfigDict(strict=True)
    base_model_class: str | None = None
    parent_library: str | None = None


class _Config(BaseModel):
    """`adapter_config.json`: what may stand in the fields that are read whatever the method is."""

    model_config = ConfigDict(strict=True)
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_pattern: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    feedforward_modules: str | list[str] | None = None
    target_parameters: list[str] | None = None
    bias: str | None = None
    ensure_weight_tying: bool | None = None
    task_type: Name | None = None
    base_model_name_or_path: Name | None = None
    revision: Name | None = None
    auto_mapping: _Class | None = None


def wrong_fields(config: Mapping[str, Any]) -> list[str]:
    """The fields of a configuration that hold what they cannot, those of its method too: a number, or a table of
    numbers by module."""
    families = [m for m in METHODS if m.family.peft_type == config.get("peft_type")]
    numbers = {n for m in families for n in m.parameters.fields}
    tables = {table for m in families for table in m.family.patterns.values()}
    wrong = misfits(_Config, config) + sorted(n for n in numbers if n in config and not is_number(config[n]))
    for table in sorted(n for n in tables if config.get(n) is not None):
        value = config[table]
        if not isinstance(value, dict) or not all(map(is_number, value.values())):
            wrong.append(table)
    return wrong
