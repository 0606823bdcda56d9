"""What pydantic finds wrong with the fields of a node, in a user's words.

Takes a `ValidationError`. Gives the `SurgeryError` with one diagnostic for each field that does not fit.
"""

from __future__ import annotations

from pydantic import ValidationError

from surgery.diagnostics import Diagnostic, SurgeryError


def misfits(error: ValidationError, root: str) -> SurgeryError:
    """`Spec.targets[0].kind must be 'linear', 'conv', 'embedding' or 'any', not 'lin'`."""
    return SurgeryError([Diagnostic("bad-value", _message(root, e)) for e in error.errors()])


def _message(root: str, error: dict) -> str:
    if error["type"] == "json_invalid":
        return f"this is not JSON: {error['ctx']['error']}"
    *owner, last = error["loc"] or ("",)
    if error["type"] == "extra_forbidden":
        return f"{_path(root, owner)} has no field `{last}`"
    if error["type"] == "missing":
        return f"{_path(root, owner)} needs a field `{last}`"
    what = error["msg"].replace("Input should be", "must be").removeprefix("Value error, ")
    return f"{_path(root, [*owner, last])} {what}, not {str(error['input'])[:60]!r}"


def _path(root: str, steps: list[str | int]) -> str:
    return root + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps if step)
