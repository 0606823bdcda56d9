"""Wrappers that run a model and are none: what torch.compile, DataParallel, DistributedDataParallel and
FullyShardedDataParallel put around it.

Takes a model that they may be around, or around parts of; gives its modules and parameters under the names that they
have without wrappers. Promises: nothing is changed, and nothing is imported that torch has not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import cast

import torch
from torch import nn

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
# By these names torch.compile, the parallel ones and FullyShardedDataParallel hold what they run.
HELD = ("_orig_mod", "module", "_fsdp_wrapped_module")


def bare(module: nn.Module) -> nn.Module:
    """The module inside of all wrappers."""
    # where nobody has imported FullyShardedDataParallel there is no object of it, and importing it takes a second
    flattening = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    while True:
        if (inner := module._modules.get("_orig_mod")) is not None:  # of an OptimizedModule, a class slow to import
            module = inner
        elif isinstance(module, (*_PARALLEL, flattening)):
            module = cast(nn.Module, module.module)
        else:
            return module


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under all its names, in module order."""
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        module = bare(module)
        yield path, module
        inner = [(f"{path}.{name}".lstrip("."), child) for name, child in module._modules.items() if child is not None]
        waiting += reversed(inner)


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter under all its names, in module order."""
    for path, module in named_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{path}.{name}".lstrip("."), parameter


def named_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every buffer under all its names, in module order."""
    for path, module in named_modules(model):
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield f"{path}.{name}".lstrip("."), buffer


def unwrapped(model: nn.Module, name: str) -> str:
    """A name that was given to a tensor or a module where wrappers were around parts of the model, without them.

    What a module of the model is really called stays, `module` too; so does what follows the last module.

    >>> unwrapped(nn.Sequential(nn.Linear(1, 1)), "_orig_mod.0.module.weight")
    '0.weight'
    """
    parts, kept, here = name.split("."), [], bare(model)
    for i, part in enumerate(parts):
        inner = here._modules.get(part)
        if inner is None and part not in HELD:
            return ".".join((*kept, *parts[i:]))
        if inner is not None:
            here = bare(inner)
            kept.append(part)
    return ".".join(kept)


def submodule(model: nn.Module, path: str) -> nn.Module | None:
    """The module of a name, None if there is none."""
    module: nn.Module | None = bare(model)
    for name in path.split(".") if path else ():
        module = module._modules.get(name)
        if module is None:
            return None
        module = bare(module)
    return module


def parameter(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter of a name. Raises: KeyError."""
    path, _, own = name.rpartition(".")
    owner = submodule(model, path)
    if owner is None:
        raise KeyError(name)
    return own_parameter(owner, own)


def own_parameter(module: nn.Module, name: str) -> nn.Parameter:
    """The parameter that stands on a module itself. Raises: KeyError."""
    parameter = module._parameters[name]
    if parameter is None:  # a name that a module keeps for none
        raise KeyError(name)
    return parameter
