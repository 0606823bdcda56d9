"""The format of a saved adapter: what its folder holds, and everything that is wrong with it.

Takes a folder; gives its spec, tensors and `meta.json`. Promises: nothing is believed before it is checked, all the
faults come in one error, nothing is unpickled.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from surgery import __version__
from surgery.diagnostics import Collector, Diagnostic, SurgeryError, fail
from surgery.files import SPEC_BYTES, WRITTEN, read_bytes, read_json, refuse_irregular, unchanged
from surgery.language.library import parse
from surgery.language.tree import Spec
from surgery.models.names import at_revision
from surgery.runtime.atomic_folders import Kind
from surgery.runtime.fingerprint import another_base, differing
from surgery.text import counted, dtype_text, some_lines

FORMAT, WITH_RULES = "1.0", "2.0"  # of a folder that holds every tensor, and of one that has some made again
REMADE = "surgery.remade"  # in a checkpoint's tensors: what is said of those that it does not hold, as JSON
CHECKPOINT = "model.safetensors"  # holds the tensors where `save_pretrained` wrote, which the Trainer looks for
TENSORS, SPEC, META = FILES = ("adapter.safetensors", "adapter.surg", "meta.json")
ADAPTER = Kind("a saved adapter", earlier=frozenset(FILES))
SEEDS = (-(1 << 63), (1 << 64) - 1)  # the least and the largest that a generator of torch takes
DIVERGED = "the training that made it diverged"
_NAME_ONE = "name what `surgery apply -o` or `save()` wrote"
_RESUME_IT = ("it is a checkpoint in shards, which holds the whole model: resume the training from it, then "
              "`surgeon.save()`; or train with `callbacks=[surgery.AdapterCheckpoints()]`, which writes the adapter")

# The whole numbers are for places.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64)
Shapes = Mapping[str, Sequence[int]]


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it holds characters that no name has")
    return text


Name = Annotated[str, AfterValidator(_printable)]  # of a model or a class: it is shown, looked up and loaded


def _fingerprint(text: str) -> str:
    dtype, _, numbers = text.partition(" ")
    if dtype not in ("float16", "bfloat16", "float32", "float64") or len(base64.b64decode(numbers, validate=True)) % 4:
        raise ValueError("it is no fingerprint of a weight")
    return text


Fingerprint = Annotated[str, AfterValidator(_fingerprint)]


class _Form(BaseModel):
    """What `meta.json` says of a tensor."""

    model_config = ConfigDict(strict=True)
    shape: list[Annotated[int, Field(ge=0)]]
    dtype: Literal["float16", "bfloat16", "float32", "float64", "int32", "int64"]


def _sums(text: str) -> str:
    if len(base64.b64decode(text, validate=True)) != 36:
        raise ValueError("these are no sums of a tensor")
    return text


class _Remade(_Form):
    """What `meta.json` says of a tensor that is made again."""

    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    sums: Annotated[str, AfterValidator(_sums)]


class _Task(BaseModel):
    """What an adapter was trained on: the names of the classes that its head tells apart, in the order of its outputs,
    and the token that texts were padded with."""

    model_config = ConfigDict(strict=True)
    kind: Name
    classes: list[Name] = []
    pad_token_id: Annotated[int, Field(ge=0)] | None = None


class _Meta(BaseModel):
    """`meta.json`: what may stand in the fields that are read."""

    model_config = ConfigDict(strict=True)
    base_model: Name | None = None
    revision: Name | None = None
    model_class: Name | None = None
    seed: Annotated[int, Field(ge=SEEDS[0], le=SEEDS[1])]
    dtype: Literal["float16", "bfloat16", "float32", "float64"]
    tensors: dict[str, _Form]
    remade: dict[str, _Remade] = {}
    torch_version: Name | None = None
    base_weights: dict[str, Fingerprint] = {}
    quantization: dict[str, Any] | None = None
    peft: dict[str, Any] | None = None
    task: _Task | None = None


def misfits(kind: type[BaseModel], values: Any) -> list[str]:
    """The names of missing or invalid fields."""
    try:
        kind.model_validate(values)
    except ValidationError as error:
        return list(dict.fromkeys(str(fault["loc"][0]) for fault in error.errors(include_input=False)))
    return []


def shapes(tensors: Mapping[str, torch.Tensor]) -> Shapes:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


class Saved:
    """A saved adapter: its `spec`, `tensors` and `meta`, read and checked. Raises: SurgeryError (bad-adapter,
    syntax)."""

    tensors: dict[str, torch.Tensor]
    meta: dict[str, Any]
    spec: Spec

    def __init__(self, folder: Path):
        self.folder, self.report = folder, Collector()
        if not folder.exists():
            raise fail("missing-file", f"there is no folder {folder}", helps=(_NAME_ONE,))
        if not any((folder / name).exists() for name in FILES):
            # what torch.distributed.checkpoint writes, of a Trainer whose FSDP keeps its state in shards
            is_sharded = folder.is_dir() and any(folder.glob("*/.metadata"))
            raise fail("bad-adapter", f"{folder} is not a saved adapter", helps=(
                _RESUME_IT if is_sharded else _NAME_ONE,))
        self.file = TENSORS if (folder / TENSORS).exists() or not (folder / CHECKPOINT).exists() else CHECKPOINT
        are_same = unchanged(*(folder / name for name in (self.file, META, SPEC)))
        tensors, meta, spec = self._tensors(), self._meta(), self._spec()
        if not are_same():  # the numbers of one adapter, and the formula of another
            self._fault(WRITTEN, "read it again")
        if meta is not None and tensors is not None:  # the tensors must be those that the file beside them lists
            listed = {name: form["shape"] for name, form in meta["tensors"].items()}
            compare(shapes(tensors), listed, META, self.report, self.file)
            wrong = [n for n in listed if n in tensors and dtype_text(tensors[n].dtype) != meta["tensors"][n]["dtype"]]
            if wrong:
                self._fault(f"{META} gives another dtype than {self.file} for {_listed(wrong)}")
        self.report.raise_errors()
        assert tensors is not None and meta is not None and spec is not None  # what is None was reported
        self.tensors, self.meta, self.spec = tensors, meta, spec

    @property
    def model_class(self) -> str | None:
        """The class of the model that it was trained on, where that is said."""
        return self.meta.get("model_class")

    @property
    def remade(self) -> Mapping[str, Mapping[str, Any]]:
        """What is said of the tensors that it does not hold, since they are made again."""
        return self.meta.get("remade", {}) if self.meta["format_version"].split(".")[0] != FORMAT[0] else {}

    @property
    def classes(self) -> Sequence[str]:
        """The names of the classes that the head which was trained with it tells apart, where that is said."""
        return (self.meta.get("task") or {}).get("classes", ())

    @property
    def pads_with(self) -> int | None:
        """The token that the texts it was trained on were padded with, where that is said."""
        return (self.meta.get("task") or {}).get("pad_token_id")

    @property
    def base(self) -> str | None:
        """The model that it was trained on, at the revision that is said."""
        said = self.meta.get("base_model")
        return said and at_revision(said, self.meta.get("revision"))

    def differing(self, now: Mapping[str, str]) -> list[Diagnostic]:
        """What to say, where operated weights with these fingerprints are not those that it was trained on."""
        then = self.meta.get("base_weights", {})
        both = [name for name in now if name in then]
        return another_base(differing(then, now), len(both), self.folder, self.base)

    def _fault(self, message: str, *helps: str) -> None:
        self.report.error("bad-adapter", f"{self.folder}: {message}", helps=helps)

    def _meta(self) -> dict | None:
        try:
            meta = read_json(self.folder / META)
        except OSError as error:
            return self._fault(f"cannot read {META}: {error.strerror or error}")
        except ValueError as error:
            return self._fault(f"{META} is not JSON: {error}")
        # the version first: another one's fields may be others, and to list them as missing would mislead
        version = meta.get("format_version") if isinstance(meta, dict) else None
        if not isinstance(version, str) or version.split(".")[0] not in (FORMAT[0], WITH_RULES[0]):
            return self._fault(
                f"{META} has the format version {version!r}, and this surgery {__version__} reads {FORMAT} "
                f"and {WITH_RULES}")
        if wrong := misfits(_Meta, meta):
            return self._fault(f"{META} lacks, or has wrongly: {', '.join(wrong)}")
        return meta

    def _spec(self) -> Spec | None:
        try:
            text = read_bytes(self.folder / SPEC, SPEC_BYTES).decode("utf-8")
            spec = parse(text, str(self.folder / SPEC))
        except OSError as error:
            return self._fault(f"cannot read {SPEC}: {error.strerror or error}")
        except UnicodeDecodeError as error:
            return self._fault(f"{SPEC} is not UTF-8 at byte {error.start}")
        except SurgeryError as error:
            return self.report.add(*error.diagnostics)
        if spec.uses:  # another's files on this machine: what lies there is not what the adapter was made with
            self.report.error("bad-adapter", "a saved spec stands on its own, and this one uses another file",
                              spec.uses[0].span, helps=("save() writes what a spec uses into it",))
        return spec

    def _tensors(self) -> dict[str, torch.Tensor] | None:
        try:
            refuse_irregular(self.folder / self.file)
            tensors = load_file(self.folder / self.file)
            if self.file == CHECKPOINT:
                tensors.pop(REMADE, None)  # `meta.json` says it too
        except (OSError, SafetensorError) as error:
            return self._fault(f"cannot read {self.file}: {getattr(error, 'strerror', None) or error}")
        odd = [f"{n} ({dtype_text(t.dtype)})" for n, t in tensors.items() if t.dtype not in DTYPES]
        if odd:
            return self._fault(f"{self.file} holds dtypes that no adapter is trained in: {_listed(odd)}")
        if broken := not_finite(tensors):
            self._fault(f"{self.file} holds what is not finite: {broken}", DIVERGED)
        return tensors


def not_finite(tensors: Mapping[str, torch.Tensor]) -> str:
    """The names of those tensors that nobody attaches, listed; empty if there are none."""
    return _listed([name for name, tensor in tensors.items() if not tensor.isfinite().all()])


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
            report.error("bad-adapter", f"{file} {has} {counted(len(names), 'tensor')} {what}",
                         notes=tuple(some_lines(names)))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(some_lines(names))
