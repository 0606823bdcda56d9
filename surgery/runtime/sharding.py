"""Sharded models, of whose parameters each process holds a part: whole tensors from parts, parts of whole tensors.

Takes parameters as `torch.distributed.fsdp.fully_shard` and other users of DTensor leave them; gives their numbers.
Promises: a plain tensor goes through as it is, and nothing of torch.distributed is imported for it. To make a whole
tensor takes all processes: each of them has to ask, in the same order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard, cast
from weakref import ref

import torch
from torch import Tensor, nn

from surgery.diagnostics import SurgeryError, fail
from surgery.text import listed

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def _loaded(module: str, name: str) -> type | tuple[()]:
    """A class of torch's, for `isinstance`; of a module that nobody has imported there is no object."""
    return getattr(sys.modules.get(module), name, ())


def is_part(tensor: Any) -> TypeGuard[DTensor]:
    """Whether this process holds a part of the tensor, which knows of the others."""
    return isinstance(tensor, _loaded("torch.distributed.tensor", "DTensor"))


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered with its gradient."""
    return tensor.full_tensor() if is_part(tensor) else tensor


def is_written_in_place(parameter: Tensor) -> bool:
    """Whether other code may know the memory of a parameter, and not the parameter: it holds a part, or, in a run of
    several processes, may be a view of a flat tensor (FullyShardedDataParallel's). What is put in its place is then
    lost without a word."""
    return is_part(parameter) or _has_company()


def _has_company() -> bool:
    """Whether this may be one of several processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@torch.no_grad()
def held(parameter: Tensor) -> Tensor:
    """The local tensor of a parameter."""
    return parameter.to_local() if is_part(parameter) else parameter.data


def numbers(parameter: Tensor) -> Tensor:
    """The local numbers of a parameter, to be kept: a copy if the parameter is written over in place."""
    return held(parameter).clone() if is_written_in_place(parameter) else parameter.data


@torch.no_grad()
def part(tensor: Tensor, like: Tensor) -> Tensor:
    """The local part of a tensor, which is given whole or as that part already; `like` says how it is sharded."""
    if not is_part(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(like.device)  # no rank sends: each has the whole tensor and cuts its own part
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).to_local().clone()


@torch.no_grad()
def joined(own: Tensor, like: Tensor) -> Tensor:
    """The whole tensor from this process's part `own` (or from all of it); `like` says how it is sharded."""
    if not is_part(like):
        return own
    from torch.distributed.tensor import DTensor

    # By what one process holds it cannot tell whether the others hold all of it: so all of them ask.
    parts = DTensor.from_local(part(own, like), like.device_mesh, like.placements, shape=like.shape,
                               stride=like.stride())
    return parts.full_tensor()


def gather_up(model: nn.Module) -> None:
    """Have each unit of FSDP2 hold its parts again: after a forward pass the outermost still holds whole tensors, in
    the dtype of its mixed precision, and what is written into those is lost."""
    unit = _loaded("torch.distributed.fsdp", "FSDPModule")
    for module in model.modules() if unit else ():
        if isinstance(module, unit):
            cast(Any, module).reshard()  # a unit of FSDP2 has it, whatever else its class is


def refuse_sharded(model: nn.Module) -> None:
    """Raises: SurgeryError (unsupported-module) for a model that is in parts: what shards it averages the gradients of
    the parameters that it found, and each process would train an adapter of its own."""
    units = (_loaded("torch.distributed.fsdp", "FSDPModule"),
             _loaded("torch.distributed.fsdp", "FullyShardedDataParallel"))
    if any(isinstance(m, units) for m in model.modules()):
        raise fail("unsupported-module", "this model is sharded over processes, which hold and average the parameters "
                   "that it had then, and no adapter's", helps=("operate on the model first, then shard it",))
    divided = {name: p for name, p in model.named_parameters() if is_part(p)}
    if divided:
        (name, first), more = next(iter(divided.items())), len(divided) - 1
        raise fail("unsupported-module", f"`{name}` ({', '.join(map(repr, first.placements))} of {list(first.shape)}) "
                   f"{f'and {more} more are' if more else 'is'} divided over processes that each compute with a part "
                   "(tensor parallelism), and an adapter is one of the whole weight", helps=_UNDIVIDED)


_UNDIVIDED = ("to train: operate on the whole model, then shard it with torch.distributed.fsdp.fully_shard",
              "to serve: merge_and_remove() gives a plain model, which tensor parallelism can divide (or save_merged() "
              "one and load it divided)")


def refuse_divided(module: nn.Module, name: str, words: Callable[[nn.Module], str], *tensors: Any,
                   shape: tuple[int, ...] | None = None) -> None:
    """Raises: SurgeryError (unsupported-module) where an operated module (`words` of it) is to compute with a part of
    the weight `name`, which has `shape` as a whole, or of an input: an adapter is one of the whole, and a norm of a
    part, say, is another number. (FSDP2 gathers the weights of a unit before it runs.) Of another size where there is
    no other process, it was resized: changed-model."""
    weight = module._parameters.get(name)
    now = shape if weight is None else tuple(weight.shape)
    is_cut, is_shared_out = shape not in (None, now), any(map(is_part, (weight, *tensors)))
    if is_cut and not (is_shared_out or _has_company()):  # nobody is there who could have the rest
        raise fail("changed-model", f"the {name} of the operated {words(module)} is {list(now or ())} now, and was "
                   f"{list(shape or ())} when it was operated on: its adapter has no numbers for it",
                   helps=("resize_token_embeddings(...) first, and apply the spec to the model as it is then",
                          "remove(partly=True) gives back what still stands"))
    if is_cut or is_shared_out:
        raise fail("unsupported-module", f"the operated {words(module)} was to compute with a part of its "
                   f"{name}{f' ({list(shape)})' if shape else ''} or of its input, and an adapter is one of the whole "
                   "weight (tensor parallelism, or a layer of a sharded model that is called by itself)",
                   helps=_UNDIVIDED)


_UNSHARDED = {"merge_and_remove": "merge(), and save_merged(surgeon, folder) writes the plain model",
              "batched_setups": "leave it out: a sharded model makes each set-up where its layer runs",
              "prove": "prove() before sharding it", "serving": "merge() it, or attach what was saved to a whole model",
              "remove": "disabled() is the base model; save() writes the adapter, and a whole model takes it"}


def refuse_parts(part: Tensor | None, verb: str) -> None:
    """`part`: a sharded tensor of a surgery, if there is one. Raises: SurgeryError (unsupported-module) for what a
    surgeon does not do to a sharded model."""
    if part is not None:
        raise fail("unsupported-module", f"{verb}() is for a model that this process holds as a whole, and this one is "
                   "sharded", helps=(_UNSHARDED[verb],))


def refuse_unshared(tensors: Mapping[str, Tensor], beside: Iterable[Tensor | None] = ()) -> None:
    """Raises: SurgeryError (unsupported-module) where some tensors, or those that stand `beside` them, are sharded and
    others that train are not: their gradients are averaged by nothing, and each process would train values of its
    own."""
    alone = [name for name, tensor in tensors.items() if tensor.requires_grad and not is_part(tensor)]
    if alone and any(map(is_part, (*tensors.values(), *beside))):
        raise fail("unsupported-module", f"{listed(alone)} {'are' if len(alone) > 1 else 'is'} in no unit of this "
                   "sharded model: nothing averages the gradients, and each process would train values of its own",
                   helps=("fully_shard the model itself too, after its layers: it holds what modules share",))


def refuse_replicated(model: nn.Module) -> None:
    """Raises: SurgeryError (unsupported-module) for a DistributedDataParallel of several processes: gradients of
    parameters that come after it are averaged by nothing, and each process would train an adapter of its own."""
    parallel = nn.parallel.DistributedDataParallel
    groups = (m.process_group for m in model.modules() if isinstance(m, parallel))
    if any(group is not None and group.size() > 1 for group in groups):
        raise fail("unsupported-module", "DistributedDataParallel averages the gradients of those parameters alone "
                   "that the model had when it was wrapped", helps=("operate on the model first, then wrap it",))


def refuse_flattened(parameters: Iterable[tuple[str, Tensor | None]]) -> None:
    """Raises: SurgeryError (unsupported-module) for parameters that FullyShardedDataParallel has put into one."""
    for name, parameter in parameters:
        if parameter is None or not getattr(parameter, "_fsdp_flattened", False):
            continue
        if parameter.ndim < 2 and not parameter.is_meta:
            raise fail("unsupported-module", f"{name} is a piece of a flat tensor of FullyShardedDataParallel, and "
                       "this process has not all of it",
                       helps=("call it inside `with FullyShardedDataParallel.summon_full_params(wrapped):`",
                              "or shard with torch.distributed.fsdp.fully_shard, which needs no more"))


def refuse_elsewhere(parameters: Mapping[str, Tensor | None]) -> None:
    """Raises: SurgeryError (unsupported-module) for parameters of which DeepSpeed's ZeRO-3 has left nothing here."""
    for name, parameter in parameters.items():
        if parameter is not None and parameter.numel() != getattr(parameter, "ds_numel", parameter.numel()):
            raise fail("unsupported-module", f"{name} is kept in parts by DeepSpeed's ZeRO-3, and this process has not "
                       "all of it", helps=("on every process, call it inside `with deepspeed.zero.GatheredParameters("
                                           "list(model.parameters()), modifier_rank=0):`",))


def refuse_unseen(now: Mapping[str, Tensor], before: Mapping[str, ref[Tensor]]) -> None:
    """Raises: SurgeryError (unsupported-module) where a plain parameter was put in another's place in a run of several
    processes: a module outside of the model, which no verb can ask, may have gathered it for a moment."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for name, tensor in now.items():
        if isinstance(tensor, nn.Parameter) and name in before and before[name]() is not tensor and not is_part(tensor):
            raise fail("unsupported-module", f"{name} is another tensor than when the model was operated on: a module "
                       "around the model that is sharded may hold its parts",
                       helps=("operate on the module that is sharded last, the outermost",))


def is_first(like: Tensor | None) -> bool:
    """Whether this is the first of the processes that a tensor is divided among; where none is divided, it is."""
    return like is None or torch.distributed.get_rank() == int(cast("DTensor", like).device_mesh.mesh.flatten()[0])


def on_first(like: Tensor | None, work: Callable[[], None]) -> None:
    """`work()`, on the first of the processes that a tensor is divided among; its error is one on each of them. Where
    no tensor is divided (None), on this one."""
    if like is None:
        return work()
    import torch.distributed as dist

    mesh = cast("DTensor", like).device_mesh
    first, group = int(mesh.mesh.flatten()[0]), mesh.get_group() if mesh.ndim == 1 else None
    outcome: list[Any] = [None]
    try:
        if is_first(like):
            outcome = ["it was interrupted"]
            work()
            outcome = [None]
    except BaseException as error:
        outcome = [error.diagnostics if isinstance(error, SurgeryError) else f"{type(error).__name__}: {error}"]
        raise
    finally:
        dist.broadcast_object_list(outcome, src=first, group=group)
    if isinstance(outcome[0], str):
        raise fail("bad-output", f"the first process, which writes for all, failed: {outcome[0]}")
    if outcome[0]:
        raise SurgeryError(outcome[0])
