"""What the name of a model means: a hub id with or without a revision, a local folder or GGUF file, `package:NAME`, or
`demo:NAME`.

Takes that text; gives its parts, and where the model lies. Nothing is loaded.
"""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path

from surgery.diagnostics import fail
from surgery.models.packages import GGUF, PACKAGE, in_package

DEMO = "demo:"
HUB_ID = re.compile(r"(?P<id>\w[\w.-]*(/\w[\w.-]*)?)(@(?P<revision>[\w.-][\w./-]*))?")


def at_revision(name: str, revision: str | None) -> str:
    """A model's name with a revision of it (a commit, a branch, a tag): `OWNER/NAME@REVISION`. What has no revisions, a
    folder, keeps its name."""
    has = revision and HUB_ID.fullmatch(name) and "@" not in name and not Path(name).exists()
    return f"{name}@{revision}" if has else name


def revised(name: str, revision: str | None) -> str:
    """A model's name with another revision than it has, if one is asked for. Raises: SurgeryError (unknown-model)."""
    if revision is None:
        return name
    found = at_revision(parted(name)[0], revision)
    if parted(found)[1] != revision:
        raise fail("unknown-model", f"{name} has no revisions, and `{revision}` is asked for",
                   helps=("a model of the hub has: OWNER/NAME",))
    return found


def parted(name: str) -> tuple[str, str | None]:
    """A model's name without the revision, and that."""
    found = HUB_ID.fullmatch(name) if not Path(name).exists() else None
    return (found["id"], found["revision"]) if found else (name, None)


def place(name: str) -> str:
    """What transformers knows a model by: a hub id, or the path of a folder or of a GGUF file, which that of
    `package:NAME`, `package:NAME/FOLDER` or `package:NAME/FILE.gguf` is found without importing the package.

    Raises: SurgeryError (unknown-model)."""
    return str(in_package(name)) if name.startswith(PACKAGE) else parted(name)[0]


def only_whole(name: str) -> bool:
    """Whether a model's weights cannot be read one at a time: a demo's, and those of a GGUF file."""
    return name.startswith(DEMO) or Path(place(name)).suffix == GGUF


def base_name(folder: str | PathLike, named: str | None, said: str | None,
              how: str = "name the model after the folder") -> str:
    """The model that is named, or that an adapter says it is for. Raises: SurgeryError (unknown-model) without any."""
    if base := named or said:
        return base
    raise fail("unknown-model", f"{folder} does not say which model it is for", helps=(how,))
