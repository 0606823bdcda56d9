"""What pydantic finds wrong with the fields of a node, in a user's words.

Takes a `ValidationError`. Gives the `SurgeryError` with one diagnostic for each field that does not fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from pydantic import ValidationError

from surgery.diagnostics import Diagnostic, SurgeryError


def misfits(error: ValidationError, root: str) -> SurgeryError:
    """`Spec.targets[0].kind must be 'linear', 'conv', 'embedding', 'norm' or 'any', not 'lin'`."""
    diagnostics: list[Diagnostic] = []
    for details in error.errors():
        # An expression's own error has a place in its text: it is kept, and only where it stands is added.
        cause = getattr(details.get("ctx", {}).get("error"), "__cause__", None)
        if isinstance(cause, SurgeryError):
            note = f"in {_path(root, details['loc'])}"
            diagnostics += [replace(d, notes=(*d.notes, note)) for d in cause.diagnostics]
            continue
        *owner, last = details["loc"] or ("",)
        # pydantic's kinds of error are few and have stable names; what has none here is told in its own words
        if details["type"] == "json_invalid":
            message = f"this is not JSON: {details.get('ctx', {}).get('error')}"
        elif details["type"].startswith("union_tag"):
            message = f"{_path(root, details['loc'])}.what must be 'param', 'noise', 'let' or 'for'"
        elif details["type"] == "extra_forbidden":
            message = f"{_path(root, owner)} has no field `{last}`"
        elif details["type"] == "missing":
            message = f"{_path(root, owner)} needs a field `{last}`"
        else:
            must_be = details["msg"].replace("Input should be", "must be").removeprefix("Value error, ")
            message = f"{_path(root, [*owner, last])} {must_be}, not {str(details['input'])[:60]!r}"
        diagnostics.append(Diagnostic("bad-value", message))
    return SurgeryError(diagnostics)


@contextmanager
def as_misfits_of(root: str) -> Iterator[None]:
    """Inside, a pydantic error becomes the diagnostics of `misfits`."""
    try:
        yield
    except ValidationError as error:
        raise misfits(error, root) from None


def _path(root: str, steps: Iterable[str | int]) -> str:
    return root + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps if step != "")
