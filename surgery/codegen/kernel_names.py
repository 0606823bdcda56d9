"""The functions that emitted text calls by name: the kernels that rows of the table of operations name, and dense
meanings."""

from __future__ import annotations

from typing import Any

import torch

from surgery.codegen import kernels, kernels_one_pass, kernels_permute, kernels_row_sums, masks
from surgery.ir.operations import OPERATIONS

_MODULES = {"kernels": kernels, "kernels_one_pass": kernels_one_pass, "kernels_permute": kernels_permute,
            "kernels_row_sums": kernels_row_sums, "masks": masks}


def names_called(in_step: bool) -> dict[str, Any]:
    """Functions by the names that a program's text calls, or a step's, of which autograd takes no gradient."""
    names: dict[str, Any] = {"torch": torch}
    for name, row in OPERATIONS.items():
        # a step's own kernel is faster, and autograd would not see what it does: only where it takes no gradient
        kernel = in_step and row.step_kernel or row.kernel
        if kernel or row.dense is not None:
            names[name] = _kernel(kernel) if kernel else row.dense
        for form in (row.times, *(way.form for way in (row.added, row.in_place) if way is not None)):
            if form is not None and form.kernel:
                names[form.name] = _kernel(form.kernel)
    return names


def _kernel(name: str) -> Any:
    module, _, function = name.partition(".")
    return getattr(_MODULES[module], function)
