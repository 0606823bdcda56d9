"""Models that installed Python packages carry.

Takes `package:NAME`; gives the folder or the GGUF file that it stands for. Promises: no package is imported for it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath

from surgery.diagnostics import fail

PACKAGE, CONFIG, GGUF = "package:", "config.json", ".gguf"
_WEIGHTS = (".safetensors", ".bin")


def in_package(name: str) -> Path:
    """The model's folder, or its GGUF file, of `package:NAME`, `package:NAME/FOLDER` or `package:NAME/FILE.gguf`.
    Raises: SurgeryError (unknown-model)."""
    package, _, inside = name.removeprefix(PACKAGE).partition("/")
    found = importlib.util.find_spec(module) if (module := package.replace("-", "_")).isidentifier() else None
    if found is None:
        raise fail("unknown-model", f"no installed Python package is called `{package}`",
                   helps=(f"pip install {package}", "`surgery modules` lists what installed packages carry"))
    roots = [Path(p) / inside for p in found.submodule_search_locations or ()]
    files = [root for root in roots if root.suffix == GGUF and root.is_file()]
    return files[0] if files else _model(name, roots)


def _model(name: str, roots: Iterable[Path]) -> Path:
    """The folder with a config.json that lies least deep; where there is none, the GGUF file that does."""
    roots = list(roots)
    found = sorted(path.parent for root in roots for path in root.rglob(CONFIG))
    found = found or sorted(path for root in roots for path in root.rglob(f"*{GGUF}"))
    nearest = [p for p in found if len(p.parts) == min(len(p.parts) for p in found)]
    if len(nearest) == 1:
        return nearest[0]
    what = "GGUF file" if nearest and nearest[0].suffix == GGUF else "model's folder"
    some = f" {what}s: {', '.join(p.name for p in nearest)}" if nearest else " model"
    raise fail("unknown-model", f"{name} holds {len(nearest) or 'no'}{some}",
               helps=("name the one you mean: package:NAME/FOLDER, package:NAME/FILE.gguf",) if nearest else ())


def carried() -> list[str]:
    """Every model that an installed package carries, as `package:NAME` takes it."""
    found = {name for each in importlib.metadata.distributions() for name in _carried(each.files or ())}
    return sorted(found)


def _carried(files: Sequence[PurePath]) -> set[str]:
    """The models among a distribution's files: a folder with a configuration and weights, or a GGUF file. A package's
    only model goes by the package's name."""
    folders = {file.parent for file in files if file.name == CONFIG}
    models = {file.parent for file in files if file.suffix in _WEIGHTS and file.parent in folders}
    models |= {file for file in files if file.suffix == GGUF}
    inside = [model for model in models if model.parts and model.parts[0].isidentifier()]
    tops = [model.parts[0] for model in inside]
    return {PACKAGE + (top if tops.count(top) == 1 else model.as_posix()) for top, model in zip(tops, inside)}
