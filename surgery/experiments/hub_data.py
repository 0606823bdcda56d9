"""Data sets by name, through the library `datasets`: of the Hugging Face hub, its cache, or a folder.

Takes `hub:NAME`, with `:CONFIGURATION` and `#SPLIT` where a name has several; gives columns and rows. Promises: classes
are their names, and a row without one (GLUE's tests have -1) has none; what the library refuses is told in its words.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

from surgery.diagnostics import fail
from surgery.extras import need

HUB = "hub:"
_NAME = re.compile(r"hub:(?P<id>[^:#@]+)(:(?P<config>[^:#@]+))?(@(?P<revision>[^:#@]+))?(#(?P<split>[^#]+))?")


def hub_rows(name: str) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """The columns and rows of `hub:ID[:CONFIGURATION][@REVISION][#SPLIT]`; without a split, of `train` or the only one.

    Raises: SurgeryError (bad-data, missing-extra, missing-file)."""
    asked = _NAME.fullmatch(name)
    if asked is None:
        raise fail("bad-data", f"{name} is not of the form hub:ID:CONFIGURATION@REVISION#SPLIT",
                   helps=("such as hub:nyu-mll/glue:rte#validation; all but the ID may be left out",))
    need("datasets", "hub", name)
    datasets: Any = import_module("datasets")
    about = {"path": asked["id"], "revision": asked["revision"]}
    try:
        split = asked["split"]
        if split is None:
            splits = datasets.get_dataset_split_names(config_name=asked["config"], **about)
            split = "train" if len(splits) > 1 else splits[0]
        data = datasets.load_dataset(name=asked["config"], split=split, **about)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:  # what its functions say that they raise
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise fail("missing-file", f"cannot read {name}: {why}") from None
    classes = {column: getattr(feature, "names", None) for column, feature in data.features.items()}
    return tuple(data.column_names), [
        {column: _named(value, classes[column]) for column, value in row.items()} for row in data]


def _named(value: Any, classes: list[str] | None) -> Any:
    """The name of a class for its number; any other value as it is."""
    if classes is None or not isinstance(value, int):
        return value
    return classes[value] if value >= 0 else None
