"""What a training step takes of memory, predicted from a skeleton.

Takes a model on the meta device, a spec and how it is to be trained; gives bytes by what they are for. The step is run,
forward and backward, on tensors that have shapes and no numbers, and what is alive at each operation is counted: so the
activations are those of the model's own code with the adapter's programs in it. Promises: no weight is read or made.
What it leaves out: what libraries that torch calls hold for themselves, and what an allocator rounds up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from surgery.diagnostics import SurgeryError
from surgery.experiments.timing import Allocations
from surgery.layers.survey import Survey
from surgery.models.demo import demo_inputs
from surgery.planning.figures import Report
from surgery.runtime.apply import prepare
from surgery.runtime.operated import hold_common, install
from surgery.runtime.surgeon import Surgeon

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from surgery.language.tree import Spec

# Bytes of an optimiser's state for each trained number, over what the number's own dtype is: two moments in that dtype;
# in 8 bits, with a float32 for each 256; none.
OPTIMISERS: Mapping[str, Callable[[int], float]] = {
    "adamw": lambda itemsize: 2 * itemsize, "adamw-8bit": lambda itemsize: 2 * (1 + 4 / 256), "sgd": lambda itemsize: 0}
_SHAPES = "surgery_shapes"  # an attention that has shapes alone, by its name in transformers


@dataclass(frozen=True)
class Training:
    """How a model is to be trained: `batch` texts of `length` tokens on each of `gpus`; `sharded`: each holds a part of
    the parameters (FSDP2, ZeRO-3), else all of them."""

    batch: int
    length: int
    optimiser: str = "adamw"
    checkpointing: bool = False
    gpus: int = 1
    sharded: bool = False


def training_memory(model: PreTrainedModel, spec: Spec, how: Training) -> dict[str, int]:
    """Bytes on each device at the peak of a step, by what they are for. The model, a skeleton, is operated on and kept
    so.

    Raises: SurgeryError; RuntimeError (of which NotImplementedError is one), if a step of it cannot be run without
    numbers, or not on a batch that is made up."""
    surgeon = prepare(model, spec)
    parts, memory = how.gpus if how.sharded else 1, Report(surgeon.plan).memory
    layer = _largest_layer(model)
    _operated(surgeon)
    trained = [p for p in model.parameters() if p.requires_grad]
    state = sum(p.numel() * OPTIMISERS[how.optimiser](p.element_size()) for p in trained)
    gradients = sum(p.numel() * p.element_size() for p in trained)
    activations = _step(model, how) - gradients
    # DistributedDataParallel sends copies of the gradients.
    copies = 2 if how.gpus > 1 and not how.sharded else 1
    held = {"base": memory["base"], "adapter": memory["adapter"], "optimiser": state, "gradients": copies * gradients}
    # Of a sharded model, a layer that runs is whole, and so is the next, which is on its way.
    gathered = {"gathered layers": 2 * layer} if parts > 1 else {}
    return {**{name: math.ceil(size / parts) for name, size in held.items()}, **gathered, "activations": activations}


def _largest_layer(model: nn.Module) -> int:
    """Bytes of the largest layer of a model's lists of layers."""
    layers = [each for m in model.modules() if isinstance(m, nn.ModuleList) for each in m]
    return max((sum(p.numel() * p.element_size() for p in each.parameters()) for each in layers), default=0)


def _operated(surgeon: Surgeon) -> None:
    """Put the adapters into a skeleton, which a surgeon refuses to do: nobody could train that."""
    for placed in surgeon.plan.placed:
        install(placed.site.module, surgeon.adapters[placed.site.name])
    hold_common(surgeon.model, surgeon.adapters.values())
    trained = {id(adapter.tensors()[leaf.key]) for adapter in surgeon.adapters.values()
               for leaf in adapter.formula.leaves if not leaf.frozen}
    for name, parameter in surgeon.model.named_parameters():
        parameter.requires_grad_(id(parameter) in trained or name in surgeon.plan.train)


def _step(model: PreTrainedModel, how: Training) -> int:
    """The most bytes that a step makes, its gradients among them. Raises: RuntimeError."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_SHAPES, _attention)
    AttentionMaskInterface.register(_SHAPES, sdpa_mask)
    model.set_attn_implementation(_SHAPES)
    if any(site.stack for site in Survey(model).sites):
        with suppress(ValueError):  # of experts that are run in one way alone
            model.set_experts_implementation("eager")  # a product for each expert: the others sort tokens by numbers
    model.train()
    if how.checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    try:
        batch = demo_inputs(model, batch=how.batch, length=how.length)
        shapes = {name: tensor.to("meta") for name, tensor in batch.items()}
        with Allocations() as counted, _Supposed():
            _loss(model, shapes).backward()
    except (SurgeryError, RuntimeError):
        raise
    except Exception as error:  # whatever a model's own code says to a batch that is made up
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
    return counted.peak


def _loss(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Of a batch whose labels are its own tokens, where a model gives numbers for each of the vocabulary (a classifier
    has other labels), or else of the numbers that the model gives; nothing holds those."""
    tokens = [tensor for tensor in batch.values() if tensor.dtype == torch.int64]
    takes_tokens = "labels" in signature(model.forward).parameters and model.get_output_embeddings() is not None
    output = model(**batch, **({"labels": tokens[-1]} if tokens and takes_tokens else {}))
    return output[0] if output[0].ndim == 0 else output[0].float().square().mean()


class _Attention(torch.autograd.Function):
    """What a fused attention holds for its backward pass: its inputs, its output and a number a row of scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
               **rest: Any) -> tuple[Tensor, None]:
    """Attention without a matrix of scores, as devices run it, in the form of transformers' interface: [B, heads, T, d]
    to [B, T, heads, d]."""
    return _Attention.apply(query, key, value).transpose(1, 2).contiguous(), None


class _Supposed(TorchFunctionMode):
    """Answers where a model looks at numbers, of which there are none: yes, to what it asks of a whole batch (whether
    all of it are tokens, whether each row is one text); all of them, to which experts have tokens; and of those as many
    for each expert."""

    experts = 1

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        asked = args[0] if args and isinstance(args[0], Tensor) and args[0].is_meta else None
        if asked is not None and function is Tensor.__bool__:
            return True
        if asked is not None and function in (Tensor.nonzero, torch.nonzero) and asked.ndim == 1:
            self.experts = len(asked)
            return torch.arange(len(asked), device="cpu")[:, None]
        if asked is not None and function is torch.where and len(args) == 1:
            tokens = math.ceil(asked.numel() / self.experts)
            return tuple(asked.new_empty(tokens, dtype=torch.int64) for _ in range(asked.ndim))
        return function(*args, **kwargs or {})
