"""What a caller of a public function gave, where that is of another sort: a model's name for a model, a spec before it.

`takes` decorates such a function. Promises: imports nothing of ours but diagnostics, and never torch.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from os import PathLike
from typing import Any, ParamSpec, TypeVar

from surgery.diagnostics import fail

_P = ParamSpec("_P")
_R = TypeVar("_R")

#: By a sort: where its class is, and how a message calls one.
_CLASSES = {"model": ("torch.nn", "Module", "a model"), "spec": ("surgery.language.tree", "Spec", "a spec"),
            "surgeon": ("surgery.runtime.surgeon", "Surgeon", "a surgeon")}
_NOUNS = {**{sort: noun for sort, (_, _, noun) in _CLASSES.items()}, "path": "a path", "text": "a text"}
#: What a function that says so takes: the sorts, and their name in a message.
_TAKEN = {"model": (("model",), "a model"), "surgeon": (("surgeon",), "a surgeon"), "text": (("text",), "a text"),
          "folder": (("text", "path"), "a folder's path"),
          "spec": (("spec", "text", "path"), "a spec, its path or name"),
          "file": (("text", "path"), "a path or a name"), "name": (("text",), "a model's name")}
_FIRST = "the model comes first, and what is done to it after it"
_HELPS = {
    ("model", "text"): "surgery.load_model({value!r}) loads a model by its name",
    ("model", "path"): "surgery.load_model(\"{value}\") loads the model of a folder",
    ("model", "spec"): _FIRST, ("spec", "model"): _FIRST, ("folder", "model"): _FIRST,
    ("model", "surgeon"): "the model that it operates on is `surgeon.model`",
    ("surgeon", "text"): "surgery.attach(model, {value!r}) puts a saved adapter on a model, and gives its surgeon",
    ("surgeon", "path"): "surgery.attach(model, \"{value}\") puts a saved adapter on a model, and gives its surgeon",
    ("surgeon", "model"): "surgery.apply(model, spec) and surgery.attach(model, folder) give the surgeon of a model",
    ("folder", "spec"): "surgery.apply(model, spec) operates on a model as a spec says",
    ("folder", "surgeon"): "surgeon.save(folder) writes one",
    ("text", "path"): "surgery.load(\"{value}\") reads a file", ("text", "bytes"): "decode it: text.decode()",
    ("name", "path"): "give it as a text: str(path)",
    ("spec", "dict"): "surgery.load(\"lora\", rank=8) sets a spec's parameters",
}


def takes(**sorts: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Refuse what is given for these parameters where it is of another sort. The function then raises SurgeryError
    (bad-value)."""
    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        places = {name: list(inspect.signature(function).parameters).index(name) for name in sorts}

        @wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            for name, sort in sorts.items():
                if places[name] < len(args):
                    _assert_is(sort, args[places[name]])
                elif name in kwargs:
                    _assert_is(sort, kwargs[name])
            return function(*args, **kwargs)

        return call

    return decorate


def _assert_is(wanted: str, value: Any) -> None:
    sorts, noun = _TAKEN[wanted]
    sort = _sort(value)
    if sort in sorts:
        return
    is_shown = sort in ("text", "path") and len(str(value)) <= 60
    what = (f"{_NOUNS[sort]}, {str(value)!r}" if is_shown else _NOUNS.get(sort) or f"of the type {sort}")
    known = _HELPS.get((wanted, "dict" if isinstance(value, Mapping) else sort), "")
    raise fail("bad-value", f"{noun} is needed here, and this is {what}",
               helps=(known.format(value=value),) if known and (is_shown or sort not in ("text", "path")) else ())


def _sort(value: Any) -> str:
    """A key of `_NOUNS`, or else the name of its type."""
    for sort, (module, name, _) in _CLASSES.items():
        known = getattr(sys.modules.get(module), name, None)  # of what is not imported yet there is no object
        if known is not None and isinstance(value, known):
            return sort
    return ("text" if isinstance(value, str) else "path" if isinstance(value, PathLike) else type(value).__name__)
