"""Transactions: a verb happens as a whole or not at all, whatever interrupts it.

Takes a method whose object says what it may change; gives one that puts everything back when it does not come to its
end: an error, or a KeyboardInterrupt at any line. Promises: nothing is copied but references, so a verb must not write
into a tensor in place: it puts another one there. Where that cannot be, because a sharding knows the memory, `put`
copies what it is about to write over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Any, Protocol

import torch
from torch import nn

from surgery.runtime.sharding import held, is_part, is_written_in_place, numbers, part


@dataclass(frozen=True)
class Scope:
    """What a verb may change: attributes of `objects`; class, attributes, children, parameters, buffers and
    requires_grad of the modules in `roots`; which numbers stand in `parameters`."""

    objects: Iterable[object]
    roots: Iterable[nn.Module]
    parameters: Iterable[torch.Tensor]


_OPEN: list[Snapshot] = []  # of the verbs that run, the outermost first


class Scoped(Protocol):
    def scope(self) -> Scope: ...


class Snapshot:
    """The state of everything in a scope. `restore` may run again and again."""

    def __init__(self, scope: Scope):
        modules = list({id(m): m for root in scope.roots for m in root.modules()}.values())
        self._classes = [(m, type(m)) for m in modules]
        # The dictionaries are named by themselves: half way back a module has no attributes to find them by.
        self._dicts = [(d, dict(d)) for owner in (*scope.objects, *modules) for d in _dicts(owner)]
        self._flags = [(p, p.requires_grad) for m in modules for p in m._parameters.values() if p is not None]
        self._numbers = [(p, p.data) for p in {id(p): p for p in scope.parameters}.values() if not is_part(p)]
        self._parts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        # Python may interrupt a `with torch.no_grad()` between its last line and its end: nobody would take gradients
        self._takes_gradients = torch.is_grad_enabled()

    def keep(self, parameter: torch.Tensor) -> None:
        """Copy a local part before it is first written over."""
        if id(parameter) not in self._parts:
            self._parts[id(parameter)] = parameter, numbers(parameter)

    def restore(self) -> None:
        for live, before in self._dicts:
            if [*map(id, live.values())] != [*map(id, before.values())] or list(live) != list(before):
                live.clear()
                live.update(before)
        for module, kind in self._classes:
            if type(module) is not kind:
                module.__class__ = kind
        for parameter, data in self._numbers:
            parameter.data = data
        for parameter, data in self._parts.values():
            held(parameter).copy_(data)
        for parameter, flag in self._flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
        torch.set_grad_enabled(self._takes_gradients)


def _dicts(owner: object) -> Iterator[dict]:
    yield vars(owner)
    if isinstance(owner, nn.Module) and not isinstance(owner, torch.jit.ScriptModule):
        yield from (owner._modules, owner._parameters, owner._buffers, owner._forward_pre_hooks)


def all_or_nothing(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a method: everything in `self.scope()` is restored unless the method returns."""

    @wraps(verb)
    def run(self: Scoped, *args: Any, **kwargs: Any) -> Any:
        before = Snapshot(self.scope())
        try:
            _OPEN.append(before)
            try:
                return verb(self, *args, **kwargs)
            finally:  # within the outer block: an interrupt here undoes the verb too
                _OPEN.remove(before)
        except BaseException:  # a KeyboardInterrupt too
            finish(before.restore)
            if before in _OPEN:
                _OPEN.remove(before)
            raise

    return run


def put(parameter: torch.Tensor, data: torch.Tensor) -> None:
    """Write numbers into a parameter. `data`: the local part, or the whole tensor that it is a part of."""
    if not is_written_in_place(parameter) or data.dtype != parameter.dtype:
        parameter.data = data
        return
    for verb in _OPEN:
        verb.keep(parameter)
    held(parameter).copy_(part(data, parameter))


def refuse_gradients_of_before(parameter: torch.Tensor) -> None:
    """Have a backward pass through what was computed with other numbers of the parameter be torch's error, as it is
    after any change in place: `put` writes unseen by autograd, since what is written is often put back before it."""
    if not (is_part(parameter) or parameter.is_inference()):
        torch.autograd.graph.increment_version(parameter)


def finish(work: Callable[[], Any]) -> None:
    """Run `work`, which can be repeated, to its end: a KeyboardInterrupt meanwhile is raised afterwards."""
    interrupt = None
    while True:
        try:
            work()
            break
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt
