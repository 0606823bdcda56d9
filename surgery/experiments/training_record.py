"""What a training was asked for, as a TOML file beside the adapter that it made, which asks for the same again.

Takes plain values by name, and tables of them; gives text, and back. Promises: what is written is read as it was; what
is not known is told with what is meant, if that is near.
"""

from __future__ import annotations

import json
import os
import platform
import tomllib
from collections.abc import Iterable, Mapping
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from surgery import __version__
from surgery.diagnostics import Collector, did_you_mean, fail
from surgery.experiments.hub_data import HUB, hub_rows

FILE = "training.toml"
ABOUT = ("versions", "data_sha256")  # tables that say how it was, and ask for nothing


def toml(values: Mapping[str, Any], tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Values and tables of them as TOML; None is left out."""
    parts = [_lines(values)] + [f"[{name}]\n{_lines(table)}" for name, table in tables.items()]
    return "\n".join(parts)


def _lines(values: Mapping[str, Any]) -> str:
    return "".join(f"{_key(name)} = {_value(value)}\n" for name, value in values.items() if value is not None)


def _key(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() and name.isascii() else _value(name)


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, (bool, int, float)):
        return str(value).lower() if isinstance(value, bool) else repr(value)
    # not in ASCII: JSON writes what is beyond 16 bits as two surrogates, which TOML refuses
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def read(path: str | os.PathLike, known: Iterable[str]) -> dict[str, Any]:
    """The values that a file asks for, by names that are `known`. Raises: SurgeryError (missing-file, bad-data) with
    all that are not."""
    try:
        found = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise fail("missing-file", f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:  # TOML's, and UTF-8's
        raise fail("bad-data", f"{path} is not TOML: {error}") from None
    asked = {name.replace("-", "_"): value for name, value in found.items() if name not in ABOUT}
    names, report = sorted(known), Collector()
    for name in asked:
        if name not in names:
            near = did_you_mean(name, names)
            report.error("bad-data", f"{path} asks for `{name}`, which is no setting",
                         helps=(near or f"the settings are {', '.join(names)}",))
    report.raise_errors()
    return asked


def unequal(one: str, other: str) -> list[str]:
    """The names of what two records do not say alike, as numbers and not as text: 2 epochs are 2.0."""
    def said(text: str) -> dict[str, Any]:
        found = tomllib.loads(text)
        tables = {name: value for table in ABOUT for name, value in found.pop(table, {}).items()}
        return {**found, **tables}

    a, b = said(one), said(other)
    return sorted(name for name in {**a, **b} if a.get(name) != b.get(name))


def versions() -> dict[str, str]:
    """What a training was made with."""
    import accelerate
    import torch
    import transformers

    return {"surgery": __version__, "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "accelerate": accelerate.__version__}


def digest_of(path: str | os.PathLike) -> str:
    """The SHA-256 of a file's bytes, or of the rows of a data set by name."""
    if str(path).startswith(HUB):
        return sha256(json.dumps(hub_rows(str(path)), default=str).encode()).hexdigest()
    with Path(path).open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
