"""Two specs or two adapters compared, whoever wrote them: `surgery diff`.

Takes files, names, or folders of ours or of PEFT's, and a model where modules and costs are asked for; gives a
`Difference`. Promises: nothing of the model but its layers' shapes is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.diagnostics import fail
from surgery.language.library import inlined, load
from surgery.language.tree import Spec
from surgery.runtime.difference import Difference, Side

if TYPE_CHECKING:
    from torch import nn


def diff(a: Spec | str | PathLike, b: Spec | str | PathLike, model: nn.Module | None = None) -> Difference:
    """Compare two specs (files, shipped names) or two adapters (folders that `save` or PEFT wrote); with a `model` (on
    the meta device too) also their modules and costs. A PEFT adapter is read with the layers of `model`, or of the
    base model that it names. Raises: SurgeryError.

    >>> import surgery
    >>> print(surgery.diff("lora", "lora"))
    no difference
    """
    sides = [_side(each, model) for each in (a, b)]
    if bool(sides[0].tensors) is not bool(sides[1].tensors):
        raise fail("bad-value", "a spec cannot be compared with an adapter",
                   helps=("an adapter's own spec is the file `adapter.surg` in its folder; `surgery import` writes one "
                          "for PEFT's",))
    return Difference(*sides)


def _side(each: Spec | str | PathLike, model: nn.Module | None) -> Side:
    tensors: Mapping[str, Any] = {}
    if isinstance(each, Spec):
        spec, name = each, each.name or "the spec"
    else:
        name = str(each)
        spec, tensors = _adapter(Path(each), model) if Path(each).is_dir() else (load(each), {})
    spec = inlined(spec)
    if model is None:
        return Side(name, spec, tensors)
    # Imported here: two specs are compared without torch.
    from surgery.planning.compile import compile
    from surgery.planning.figures import Report

    return Side(name, spec, tensors, Report(compile(model, spec)))


def _adapter(folder: Path, model: nn.Module | None) -> tuple[Spec, Mapping[str, Any]]:
    """The spec and the tensors of a folder: ours, or what PEFT's is as one of ours."""
    from surgery.models.loading import skeleton, with_saved_head
    from surgery.models.names import base_name
    from surgery.peft.folder import CONFIG, Folder
    from surgery.peft.import_adapter import read
    from surgery.runtime.saved_format import Saved

    if not (folder / CONFIG).is_file() or (folder / "adapter.surg").is_file():
        saved = Saved(folder)
        return saved.spec, {**saved.tensors, **saved.remade}
    theirs = Folder(folder)
    if model is None:
        base = base_name(folder, None, theirs.config.get("base_model_name_or_path"), "say which: --model MODEL")
        model = with_saved_head(base, skeleton(base), theirs)
    imported = read(model, theirs)
    return imported.surgeon.spec, imported.tensors
