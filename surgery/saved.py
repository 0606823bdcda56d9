"""A saved adapter as it lies on the disk: what its folder holds, and everything that is wrong with it.

Takes a folder; gives its spec, tensors and `meta.json`. Promises: nothing is believed before it is checked, all the
faults come in one error, nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from surgery import __version__
from surgery.diagnostics import Collector, SurgeryError, fail
from surgery.folders import Kind
from surgery.spec import parse
from surgery.syntax.tree import Spec
from surgery.words import counted, dtype_text

FORMAT = "1.0"
TENSORS, SPEC, META = FILES = ("adapter.safetensors", "adapter.surg", "meta.json")
ADAPTER = Kind("a saved adapter", earlier=frozenset(FILES))
_SHOWN = 8
_NAME_ONE = "name what `surgery apply -o` or `save()` wrote"

Shapes = Mapping[str, Sequence[int]]


def shapes(tensors: Mapping[str, torch.Tensor]) -> Shapes:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


class Saved:
    """A saved adapter: its `spec`, `tensors` and `meta`, read and checked. Raises: SurgeryError (bad-adapter,
    syntax)."""

    spec: Spec

    def __init__(self, folder: Path):
        self.folder, self.report = folder, Collector()
        if not folder.exists():
            raise fail("missing-file", f"there is no folder {folder}", helps=(_NAME_ONE,))
        if not any((folder / name).exists() for name in FILES):
            raise fail("bad-adapter", f"{folder} is not a saved adapter", helps=(_NAME_ONE,))
        self.tensors, self.meta, self.spec = self._tensors(), self._meta(), self._spec()
        if self.meta is not None and self.tensors is not None:
            self._agree()
        self.report.raise_errors()

    @property
    def model_class(self) -> str | None:
        """The class of the model that it was trained on, where that is said."""
        return self.meta.get("model_class")

    def _fault(self, message: str, *helps: str) -> None:
        self.report.error("bad-adapter", f"{self.folder}: {message}", helps=helps)

    def _bytes(self, name: str) -> bytes | None:
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            return self._fault(f"cannot read {name}: {error.strerror or error}")

    def _agree(self) -> None:
        """The tensors must be the ones that the file beside them lists."""
        listed = {name: form["shape"] for name, form in self.meta["tensors"].items()}
        compare(shapes(self.tensors), listed, META, self.report)
        wrong = [n for n in listed if n in self.tensors
                 and dtype_text(self.tensors[n].dtype) != self.meta["tensors"][n]["dtype"]]
        if wrong:
            self._fault(f"{META} gives another dtype than {TENSORS} for {_listed(wrong)}")

    def _meta(self) -> dict | None:
        text = self._bytes(META)
        if text is None:
            return None
        try:
            found = json.loads(text)
        except ValueError as error:
            return self._fault(f"{META} is not JSON: {error}")
        return found if self._known(found) else None

    def _known(self, meta: Any) -> bool:
        version = meta.get("format_version") if isinstance(meta, dict) else None
        if not isinstance(version, str) or version.split(".")[0] != FORMAT.split(".")[0]:
            self._fault(f"{META} has the format version {version!r}, and this surgery {__version__} reads {FORMAT}")
            return False
        wrong = [key for key, fits in _FIELDS.items() if not fits(meta.get(key))]
        if wrong:
            self._fault(f"{META} lacks, or has wrongly: {', '.join(wrong)}")
        return not wrong

    def _spec(self) -> Spec | None:
        text = self._bytes(SPEC)
        try:
            return parse(text.decode("utf-8"), str(self.folder / SPEC)) if text is not None else None
        except UnicodeDecodeError as error:
            self._fault(f"{SPEC} is not UTF-8 at byte {error.start}")
        except SurgeryError as error:
            self.report.add(*error.diagnostics)

    def _tensors(self) -> dict[str, torch.Tensor] | None:
        try:
            (self.folder / TENSORS).open("rb").close()  # safetensors' own error where there is none is a long one
            found = load_file(self.folder / TENSORS)
        except (OSError, SafetensorError) as error:
            return self._fault(f"cannot read {TENSORS}: {getattr(error, 'strerror', None) or error}")
        broken = [name for name, tensor in found.items() if not tensor.isfinite().all()]
        if broken:
            self._fault(f"{TENSORS} holds what is not finite: {_listed(broken)}", "the training that made it diverged")
        return found


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)


def _is_form(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("shape"), list) and _is_dtype(value.get("dtype"))


def _is_name(value: Any) -> bool:
    return value is None or isinstance(value, str)


_FIELDS = {
    "base_model": _is_name,
    "model_class": _is_name,
    "seed": lambda v: isinstance(v, int),
    "dtype": lambda v: _is_dtype(v) and getattr(torch, v).is_floating_point,
    "tensors": lambda v: isinstance(v, dict) and all(map(_is_form, v.values())),
}


def compare(saved: Shapes, wanted: Shapes, where: str, report: Collector, file: str = TENSORS) -> None:
    """Report what differs between the tensors saved in a file and the shapes that `where` asks for."""
    missing = [name for name in wanted if name not in saved]
    unknown = [name for name in saved if name not in wanted]
    wrong = [f"{n} is {saved[n]}, and {where} asks for {wanted[n]}" for n in wanted
             if n in saved and saved[n] != wanted[n]]
    for has, names, what in (("lacks", missing, f"that {where} asks for"),
                             ("holds", unknown, f"that {where} has no place for"),
                             ("holds", wrong, "of another shape")):
        if names:
            report.error("bad-adapter", f"{file} {has} {counted(len(names), 'tensor')} {what}", notes=_lines(names))


def _lines(lines: Sequence[str]) -> tuple[str, ...]:
    return (*lines[:_SHOWN], *([f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(_lines(names))
