"""Set-ups of like layers made at once, while a user promises that no adapter changes during a forward pass.

Takes the adapters of a model; for each forward pass of it, makes the set-ups of all layers of one formula when the
first of them runs, as one batch: an operation of the set-up is then one for all of them, and so is its gradient.
Promises: values and gradients are those of set-ups made one by one; nothing is kept from one forward pass to the next;
what cannot be batched, or was replaced since, is made by its own layer, as without.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from surgery.codegen.candidates import rests_on_layer
from surgery.codegen.compiled import Compiled
from surgery.codegen.program import Program
from surgery.diagnostics import fail
from surgery.ir.dense import in_dtype, without_autocast
from surgery.ir.orthogonal_maps import is_traced
from surgery.runtime.frozen_layers import Frozen
from surgery.runtime.serving import are_same, hints

if TYPE_CHECKING:
    from surgery.runtime.adapter import Adapter


@dataclass(frozen=True)
class _Made:
    """A layer's part of a batch, and the tensors that it was made of, with torch's hints about them then."""

    values: tuple[Tensor, ...]
    of: tuple[Tensor, ...]
    hints: tuple

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        return are_same(tensors, self.of) and hints(tensors) == self.hints


class _Calls(threading.local):
    """For each thread, what was made in the forward pass that it runs just now; None outside of one."""

    made: dict[tuple, _Made] | None = None


class SetupBatches:
    """The set-ups of a model's adapters, in batches of those with equal formulas. `frugal`: a program that holds less
    by itself, or is the better one, stays alone."""

    def __init__(self, model: nn.Module, adapters: Sequence[Adapter], frugal: bool):
        self.depth, self.calls, self.frugal = 0, _Calls(), frugal
        self._may_checkpoint = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        self._like: dict[Compiled, list[Adapter]] = {}
        for adapter in adapters:
            self._like.setdefault(adapter.compiled, []).append(adapter)

    @property
    def checkpoints(self) -> bool:
        """Whether layers run again in the backward pass, when what was made for all of them is gone."""
        return any(module.gradient_checkpointing for module in self._may_checkpoint)

    def values(self, adapter: Adapter, program: Program, layer: Frozen, cast: torch.dtype,
               held: Mapping[str, Tensor]) -> tuple[Tensor, ...] | None:
        """The set-up of one of the layers; None where it is to make its own."""
        made = self.calls.made
        if made is None or is_traced() or self._stays_alone(program):
            return None
        key = (program, cast, torch.is_grad_enabled())
        if (adapter, *key) not in made:
            members = self._members(adapter, program, layer, held)
            if len(members) < 2:
                return None
            parts = _batch(adapter, program, [frozen for frozen, _ in members.values()],
                           [tensors for _, tensors in members.values()], cast)
            for (each, (_, tensors)), values in zip(members.items(), parts):
                made[each, *key] = _Made(values, tuple(tensors.values()), hints(tuple(tensors.values())))
        known = made[adapter, *key]
        return known.values if known.is_of(tuple(held.values())) else None

    def _stays_alone(self, program: Program) -> bool:
        if not program.plan.values:  # W' is W: there is nothing to make
            return True
        return self.frugal and (program.plain is not None or program.plan.recompute_cost is not None)

    def _members(self, adapter: Adapter, program: Program, layer: Frozen,
                 held: Mapping[str, Tensor]) -> dict[Adapter, tuple[Frozen, Mapping[str, Tensor]]]:
        """The adapters whose set-ups can be made with this one's, each with its layer and its tensors."""
        # a stack of whole weights would be as large as the model
        if program.reads_weight or layer.is_trained or all(key in adapter.shared for key in held):
            return {}
        # each call of a layer draws its own noise, in the order of the calls
        if layer.module.training and adapter.compiled.noises:
            return {}
        kind, members = _kind(adapter, layer, held), {}
        for other in self._like.get(adapter.compiled, []):
            module = other.owner() if other.owner is not None else None
            if other is adapter:
                members[other] = (layer, held)
            elif module is not None and other.active and module.training == layer.module.training:
                frozen = other.frozen(module)
                tensors = other.called(frozen.device)
                if _kind(other, frozen, tensors) == kind:
                    members[other] = (frozen, tensors)
        return members if adapter in members else {}


def _kind(adapter: Adapter, layer: Frozen, held: Mapping[str, Tensor]) -> tuple:
    """What tensors must have in common to stand in one batch; what modules share is the same object in all."""
    return (layer.device, layer.dtype, type(layer), layer.is_trained,
            *((type(t), t.shape, t.dtype, t.device, t.requires_grad, id(t) if key in adapter.shared else None)
              for key, t in held.items()))


def _batch(adapter: Adapter, program: Program, layers: Sequence[Frozen], held: Sequence[Mapping[str, Tensor]],
           cast: torch.dtype) -> Iterator[tuple[Tensor, ...]]:
    """The set-up of each layer, all made as one."""
    dtype, used = adapter.setup_dtype(layers[0], held[0].values()), {}
    alike = [adapter.shaped(tensors) for tensors in held]
    leaves = {key: in_dtype(t if key in adapter.shared else _Stacked.apply(used, *(each[key] for each in alike)), dtype)
              for key, t in alike[0].items()}
    axes = {key: None if key in adapter.shared else 0 for key in leaves}
    with without_autocast(layers[0].device.type):
        known, of_known = _fixed(program, layers, dtype)

        def make(leaves: Mapping[str, Tensor], known: tuple, bias: Tensor) -> tuple:
            return program.setup(_Layers(layers, bias), leaves, known, dtype, cast)

        reads_bias = any(value.has("bias") for value in program.plan.values)
        biases = torch.stack([layer.offset(dtype) for layer in layers]) if reads_bias else torch.empty(len(layers))
        if program.plan.computes:
            make = torch.vmap(make, in_dims=(axes, of_known, 0))
        values = make(leaves, known, biases)
    parts = (_Parts.apply(used, i, made) if made.ndim > len(value.shape) else [made] * len(layers)  # modules share it
             for i, (value, made) in enumerate(zip(program.plan.values, values)))
    return zip(*parts)


def _fixed(program: Program, layers: Sequence[Frozen], dtype: torch.dtype) -> tuple[tuple, tuple]:
    """What rests on the frozen weights alone, of each layer, and constants, once for all; and which of these it is."""
    if not program.fixed:
        return (), ()
    apart = list(map(rests_on_layer, program.fixed))
    each_layer = layers if any(apart) else layers[:1]
    known = tuple(zip(*(program.once(layer, dtype) for layer in each_layer)))
    return (tuple(torch.stack(values) if own else values[0] for values, own in zip(known, apart)),
            tuple(0 if own else None for own in apart))


class _Stacked(torch.autograd.Function):
    """Tensors of layers as one, [layers, ...]. A layer none of whose parts was used, as one that a pass skips, gets no
    gradient, as it would alone: of zeros an optimiser would make a step, by its momentum and its weight decay.

    `used`: by the number of a value of the set-up, which layers' parts of it the latest backward pass came through."""

    @staticmethod
    def forward(ctx: Any, used: dict[int, list[bool]], *tensors: Tensor) -> Tensor:
        ctx.used = used
        return torch.stack(tensors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple:
        is_used = [any(each) for each in zip(*ctx.used.values())]
        return None, *(g if used else None for g, used in zip(grad_outputs[0].unbind(), is_used, strict=True))


class _Parts(torch.autograd.Function):
    """A value [layers, ...] of a set-up as that of each layer; its backward pass notes in `used` whose are used."""

    @staticmethod
    def forward(ctx: Any, used: dict[int, list[bool]], number: int, value: Tensor) -> tuple[Tensor, ...]:
        ctx.used, ctx.number = used, number
        ctx.set_materialize_grads(False)
        return value.unbind()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple:
        given = next((g for g in grad_outputs if g is not None), None)
        ctx.used[ctx.number] = [g is not None for g in grad_outputs]
        whole = None if given is None else torch.stack(
            [torch.zeros_like(given) if g is None else g for g in grad_outputs])
        return None, None, whole


# -------------------------------------------------------------------------------- layers, as a set-up sees them


class _Layers:
    """The layers of a batch in the place of the one that a set-up calls. `bias` is theirs if it is read, and in any
    case has the batch's axis, so that what is run through the layers has one, and is run through each."""

    def __init__(self, layers: Sequence[Frozen], bias: Tensor):
        self._layers, self._bias = layers, bias

    def __getattr__(self, name: str) -> Any:  # `eye`, `fill`, `like`: the same of all
        return getattr(self._layers[0], name)

    def offset(self, dtype: torch.dtype) -> Tensor:
        return self._bias.to(dtype)

    def frozen_rows(self, rows: Tensor) -> Tensor:
        return _Rows.apply(rows, self._bias, self._layers, "frozen_rows")

    def frozen_back(self, rows: Tensor) -> Tensor:
        return _Rows.apply(rows, self._bias, self._layers, "frozen_back")

    def frozen_exact(self, rows: Tensor) -> Tensor:
        return _Rows.apply(rows, self._bias, self._layers, "frozen_exact")

    def frozen_back_exact(self, rows: Tensor) -> Tensor:
        return _Rows.apply(rows, self._bias, self._layers, "frozen_back_exact")


# Of each way of a layer's with rows the other, which is its gradient.
_BACK = {"frozen_rows": "frozen_back", "frozen_exact": "frozen_back_exact"}
_BACK |= {back: way for way, back in _BACK.items()}


class _Rows(torch.autograd.Function):
    """A few rows for each layer [layers, r, in] through its map in a `way`: [layers, r, out], or those turned."""

    @staticmethod
    def forward(rows: Tensor, bias: Tensor, layers: Sequence[Frozen], way: str) -> Tensor:
        given = rows if way.endswith("exact") else rows.to(layers[0].dtype)  # once for all
        return torch.stack([getattr(layer, way)(each) for layer, each in zip(layers, given)]).to(rows.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, ctx.bias, ctx.layers, ctx.way = inputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple:
        return _Rows.apply(*grad_outputs, ctx.bias, ctx.layers, _BACK[ctx.way]), None, None, None

    @staticmethod
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride]  # as torch's documentation writes it
            info: Any, in_dims: tuple, rows: Tensor, bias: Tensor, layers: Sequence[Frozen],
             way: str) -> tuple[Tensor, int]:
        each = rows.expand(info.batch_size, *rows.shape) if in_dims[0] is None else rows.movedim(in_dims[0], 0)
        return _Rows.apply(each, bias, layers, way), 0


# ------------------------------------------------------------------------------------------------------- the promise


_BATCHES: WeakKeyDictionary[nn.Module, SetupBatches] = WeakKeyDictionary()


def _begin(model: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling() and (batches := _BATCHES.get(model)) is not None:
        # asked here too: a Trainer switches it on when it begins
        batches.calls.made = None if batches.checkpoints else {}


def _end(model: nn.Module, args: Any, output: Any) -> None:
    if not torch.compiler.is_compiling() and (batches := _BATCHES.get(model)) is not None:
        batches.calls.made = None


@contextmanager
def batched_setups(model: nn.Module, adapters: Sequence[Adapter], frugal: bool = False) -> Iterator[None]:
    """Inside, a forward pass of the model makes set-ups in batches. `frugal`: but those that are made again in the
    backward pass, or make W' at once. Nests.

    Raises: SurgeryError (unsupported-module), for a model that checkpoints gradients."""
    # the hooks find the batches by the model, so that a copy or a pickle of it holds nothing of them
    batches = _BATCHES.get(model) or SetupBatches(model, adapters, frugal)
    if batches.checkpoints:
        raise fail("unsupported-module", "this model checkpoints gradients: it runs layers again in the backward pass, "
                   "when a batch of set-ups is gone", helps=("train it without batched_setups()",))
    _BATCHES[model] = batches
    hooks = [model.register_forward_pre_hook(_begin, prepend=True),
             model.register_forward_hook(_end, always_call=True)] if not batches.depth else []
    batches.depth += 1
    for adapter in adapters:
        adapter.batches = batches
    try:
        yield
    finally:
        batches.depth -= 1
        if not batches.depth:
            del _BATCHES[model]
            for adapter in adapters:
                adapter.batches = None
        for hook in hooks:
            hook.remove()
