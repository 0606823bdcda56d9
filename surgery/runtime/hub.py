"""Saved adapters on the hub: fetched to be attached, and pushed with a page that says what they are.

Takes the id of a repository, `OWNER/NAME`; huggingface_hub does what is sent and received. Promises: a folder on this
machine is never looked for elsewhere; whatever the hub answers becomes a diagnostic.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.diagnostics import SurgeryError, fail
from surgery.ir.notation import Maths
from surgery.runtime.atomic_folders import MANIFEST
from surgery.runtime.save import save
from surgery.runtime.saved_format import CHECKPOINT, FILES
from surgery.text import counted, said_by

if TYPE_CHECKING:
    from surgery.runtime.surgeon import Surgeon

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def adapter_folder(name: str | PathLike, revision: str | None) -> Path:
    """The folder of a saved adapter: one on this machine, or a repository's, which is fetched.

    Raises: SurgeryError (missing-file)."""
    folder = Path(name)
    if isinstance(name, PathLike) or folder.exists() or not _REPOSITORY.fullmatch(name):
        return folder  # if there is none, its reader reports that
    from huggingface_hub import snapshot_download

    return Path(_asked("missing-file", f"there is no folder {name}, and it cannot be had from the hub",
                       lambda: snapshot_download(name, revision=revision, allow_patterns=[*FILES, CHECKPOINT])))


def push(surgeon: Surgeon, repository: str, *, revision: str | None = None, private: bool | None = None,
         token: str | None = None, message: str = "A saved surgery", **about: Any) -> str:
    """Save the adapter and upload it with a page, README.md; gives the address of the commit. `about`: as in `save`.

    Raises: SurgeryError (bad-output)."""
    from huggingface_hub import HfApi

    if not _REPOSITORY.fullmatch(repository):
        raise fail("bad-output", f"`{repository}` is no repository of the hub", helps=("OWNER/NAME is one",))
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as above:
        folder = Path(above) / "adapter"
        save(surgeon, folder, **about)
        (folder / "README.md").write_text(card(surgeon, folder, repository), encoding="utf-8")

        def upload() -> Any:
            api.create_repo(repository, private=private, exist_ok=True)
            return api.upload_folder(repo_id=repository, folder_path=folder, revision=revision,
                                     commit_message=message, ignore_patterns=[MANIFEST])

        return str(_asked("bad-output", f"cannot push to {repository}", upload).commit_url)


def card(surgeon: Surgeon, folder: Path, repository: str) -> str:
    """README.md of a saved adapter: the hub's fields, what it computes, its base, how to load it."""
    from huggingface_hub import ModelCardData

    from surgery.runtime.saved_format import Saved

    saved, report = Saved(folder), surgeon.report()
    base, commit = saved.meta.get("base_model"), saved.meta.get("revision")
    is_on_hub = base is not None and _REPOSITORY.fullmatch(base) is not None
    name = saved.spec.name or "surgery"
    data = ModelCardData(base_model=base if is_on_hub else None, library_name="surgery", tags=["surgery", name])
    if is_on_hub:
        vars(data)["base_model_relation"] = "adapter"
    where = f"`{base}`{f' at `{commit}`' if commit else ''}" if base else "not said"
    load = f"surgeon = surgery.from_pretrained({repository!r})" if base else (
        f"surgeon = surgery.attach(model, {repository!r})")
    trained = [f"Trained beside it, parameters of the model: {', '.join(f'`{n}`' for n in surgeon.plan.train)}."
               ] if surgeon.plan.train else []
    parts = [
        f"---\n{data.to_yaml().strip()}\n---", f"# {name} for a {saved.model_class}",
        f"Base model: {where}.", f"{report.summary[0].upper()}{report.summary[1:]}.", *trained,
        "## What it computes", "\n".join(_formulas(surgeon)),
        "## The spec", f"```surg\n{saved.spec.to_surg().strip()}\n```",
        "## How to load it",
        f"```python\nimport surgery\n\n{load}\nmodel = surgeon.model  # surgeon.merge() writes W' into it\n```"]
    return "\n\n".join(parts) + "\n"


def _formulas(surgeon: Surgeon) -> list[str]:
    """One line for each formula, with how many weights it is for."""
    counts: dict[str, int] = {}
    for placed in surgeon.plan.placed:
        text = Maths(placed.formula.symbols).text(placed.formula.weight)
        counts[text] = counts.get(text, 0) + 1
    return [f"- `W' = {text}` for {counted(count, 'weight')}" for text, count in counts.items()]


def _asked(code: str, what: str, ask: Callable[[], Any]) -> Any:
    """What the hub answers, with its errors in words."""
    try:
        return ask()
    except (SurgeryError, KeyboardInterrupt):
        raise
    except Exception as error:  # huggingface_hub and what carries its requests raise whatever they like
        raise fail(code, f"{what}: {said_by(error)[0]}") from error
