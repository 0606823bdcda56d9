"""What the commands share that load a model with its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.cli.options import import_libraries
from surgery.cli.output import Output
from surgery.diagnostics import fail

if TYPE_CHECKING:
    from surgery.models.loading import Trained
    from surgery.runtime.atomic_folders import Kind


def free(out: str, force: bool, kind: Kind) -> None:
    """Refuse an output folder that is not ours to take, before any work. Raises: SurgeryError (bad-output)."""
    from surgery.runtime.atomic_folders import refuse_taken, refuse_unwritable

    if not out:
        raise fail("bad-output", "-o names no folder")
    refuse_taken(Path(out), kind, force)  # even with --force, only what an earlier run wrote is replaced
    refuse_unwritable(Path(out))


def loaded(output: Output, model: str, dtype: str | None, saved: Trained | None = None) -> Any:
    """MODEL with its weights; with the head that an adapter was trained with."""
    from surgery.models.loading import load, load_with_saved_head
    from surgery.models.names import revised

    with output.busy(f"loading {model}"):
        import_libraries(output)
        model = revised(model, output.revision)
        return load_with_saved_head(model, saved, dtype, output.trust) if saved else load(model, dtype, output.trust)


def base_of(output: Output, folder: str, model: str | None, dtype: str | None) -> tuple[Any, str, Mapping[str, Any]]:
    """The base model of a saved adapter, or another, with the head that the adapter has; its name; its `meta.json`.

    Raises: SurgeryError (bad-adapter, unknown-model).
    """
    from surgery.models.names import base_name
    from surgery.runtime.saved_format import Saved

    saved = Saved(Path(folder))
    base = base_name(folder, model, saved.base)
    return loaded(output, base, dtype, saved), base, saved.meta


def say_errors(output: Output, errors: Mapping[str, float],
               note: Callable[[list[str]], str] = lambda names: "") -> None:
    """The relative error of each module; modules that differ in their index alone are one line, with the largest, and
    what `note` says of them."""
    from surgery.matching.name_ranges import alike, ranged

    # A model has hundreds of modules, of which layers repeat: a line for each would hide the one that is far off.
    rows = {ranged(names): f"{max(errors[n] for n in names):.1e}{note(names)}" for names in alike(errors)}
    width = max(map(len, ["module", *rows]))
    for modules, error in {"module": "largest relative error", **rows}.items():
        output.say(f"{modules:{width}}  {error}")
