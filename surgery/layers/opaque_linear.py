"""Called layers: linear maps y = x Wᵀ + b whose W is no plain matrix (quantised, packed, in buffers, computed).

Takes a module that says how many features it takes and gives; gives W as its calls tell it: thin products, the
transposed map by autograd, the whole by slices of the identity. Promises: the numbers of the tensors in the weight's
place are not looked at, and calls that the model would not make are made to a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from surgery.diagnostics import fail
from surgery.ir.dense import without_autocast
from surgery.ir.orthogonal_maps import is_traced, is_transformed

# What modules call the numbers of features that they give and take: nn.Linear and most, AutoGPTQ, transformers' Conv1D.
_SIDES = (("out_features", "in_features"), ("outfeatures", "infeatures"), ("nf", "nx"))
_SLICE = 1024  # rows of the identity in one call
# W m + b for a small m is rounded as b is. For a power of two c, c m is exact, and its image so large that it is
# rounded as W m is. These are c for an m whose largest entry is 1.
_FAR, _FAR_IN_HALF = 1024.0, 32.0  # float16 ends at 65504
SUFFIX = "_surgery"  # how the names of adapters end
_ASIDE = "_forward_of_its_own"  # where the forward that stood on an instance waits while the layer is operated on
BASE = "surgery_base"  # by this name the class of an operated module has the one that the module had before
_HOOKED = "_old_forward"  # what a hook of accelerate's on the instance runs between moving tensors here and away


def sides(module: nn.Module) -> tuple[int, int] | None:
    """(out, in), if the module says them."""
    for names in _SIDES:
        out, in_ = (said(module, name) for name in names)
        if isinstance(out, int) and isinstance(in_, int) and out > 0 and in_ > 0:
            return out, in_
    return None


def said(module: nn.Module, name: str) -> Any:
    """What a module has under a name that is none of a tensor or a module of its own; None if it has nothing. (For what
    is not there nn.Module makes an error, which takes longer than all else that is asked of a module.)"""
    is_nothing = (name not in vars(module) and not hasattr(type(module), name)
                  and type(module).__getattr__ is nn.Module.__getattr__)
    return None if is_nothing else getattr(module, name, None)


def said_sides(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a called layer, which is one that says them."""
    both = sides(module)
    assert both is not None, f"{type(module).__name__} does not say its sides"
    return both


def is_plain(tensor: Tensor | None) -> bool:
    """Whether a parameter is plain numbers that can be read and written: a floating type of two bytes or more, and no
    class of its own (but for a shard). What is not there is plain."""
    known = type(tensor) is nn.Parameter or hasattr(tensor, "placements")
    return tensor is None or known and tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1


def has_plain_weight(module: nn.Module) -> bool:
    """True if weight and bias are plain parameters."""
    held = module._parameters
    return held.get("weight") is not None and "bias" in held and is_plain(held["weight"]) and is_plain(held["bias"])


def is_packed(module: nn.Module) -> bool:
    """Whether a module of an unknown class that says its sides is a linear layer with its weight packed: no layer that
    says its own is inside, and there are matrices of codes or bytes, an opaque pack, or buffers alone."""
    if any(sides(inner) for inner in module.modules() if inner is not module):
        return False
    matrices = [t for t in chain(module.parameters(), module.buffers()) if t.ndim > 1]
    codes = any(not t.dtype.is_floating_point or t.dtype.itemsize == 1 for t in matrices)
    packs = any(isinstance(value, torch.ScriptObject) for inner in module.modules() for value in vars(inner).values())
    return codes or packs or bool(matrices) and not any(isinstance(t, nn.Parameter) for t in matrices)


def stored(module: nn.Module, name: str) -> Tensor | None:
    """The tensor of that name that a module holds, whatever reading the attribute gives: a parameter, or what
    stands on the instance in its place (a replica's copy, a pruned or a shared view of it).

    Raises: SurgeryError (unsupported-module), if there is none any more.
    """
    for held in (module._parameters, vars(module), module._buffers):
        if name in held:
            return held[name]
    raise fail("unsupported-module", f"the {name} of this {type(module).__name__} is no tensor that it holds: "
               "a parametrisation took its place after the surgery, or it was deleted",
               helps=("remove() the surgery, change the layer, and apply the surgery again",))


def stored_weight(module: nn.Module, name: str) -> Tensor:
    """The tensor of a weight, which a layer that has a layout holds. Raises: SurgeryError (unsupported-module)."""
    tensor = stored(module, name)
    assert tensor is not None, f"{type(module).__name__} has no {name}"
    return tensor


def is_packed_again(module: nn.Module) -> bool:
    """Whether the package that quantised a layer has unpacked its weight to run it, and packs what stands there when
    the model is saved: compressed-tensors, whose mark the layer has."""
    return has_plain_weight(module) and hasattr(module, "quantization_scheme")


def bias(module: nn.Module) -> Tensor | None:
    """b [out]: its tensor, or what its method of that name gives."""
    own = module._parameters if "bias" in module._parameters else vars(module)
    held = own["bias"] if "bias" in own else getattr(module, "bias", None)
    # torch's own quantised layers have a method in the attribute's place
    return held if isinstance(held, Tensor) or not callable(held) else cast("Tensor | None", held())


def pieces(module: nn.Module) -> tuple[Tensor, ...]:
    """The tensors that W is made of: all of the module's but its bias and what an adapter brought."""
    own = (*module._parameters.items(), *module._buffers.items())
    inner = (child for name, child in module._modules.items() if child is not None and not name.endswith(SUFFIX))
    return (*(t for name, t in own if t is not None and name != "bias"),
            *(t for child in inner for t in (*child.parameters(), *child.buffers())))


def size(tensor: Tensor) -> int:
    """The bytes of a tensor; of one that is made of others, theirs."""
    if (flatten := getattr(tensor, "__tensor_flatten__", None)) is not None:
        return sum(size(getattr(tensor, name)) for name in flatten()[0])
    return tensor.numel() * tensor.element_size()


def dtype(module: nn.Module) -> torch.dtype:
    """The floating type of the layer's own scales and bias; float32 where it shows none."""
    dtypes = (t.dtype for t in (*pieces(module), bias(module)) if t is not None)
    return next((d for d in dtypes if d.is_floating_point and d.itemsize > 1), torch.float32)


def device(module: nn.Module) -> torch.device:
    return next((t.device for t in (*pieces(module), bias(module)) if t is not None), torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------- calls


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """The module's forward without surgery: its class's, or one on the instance, as accelerate puts it."""
    base = own_class(module)
    is_operated = base is not type(module)
    known = vars(module).get(_ASIDE if is_operated else "forward")  # what is put on an operated module runs ours
    return known or base.forward.__get__(module)


def call(module: nn.Module, x: Tensor, *more: Any, **named: Any) -> Tensor:
    """What the layer gives without surgery. It does not repack itself for inference."""
    asked = unsuspicious(module, x)
    if asked is x:
        return forward_of(module)(x, *more, **named)
    b = bias(module)
    trains = _is_trained(module) or b is not None and b.requires_grad
    with torch.set_grad_enabled(torch.is_grad_enabled() and trains):  # what is asked for nobody takes
        return forward_of(module)(asked, *more, **named)


def unsuspicious(module: nn.Module, x: Tensor) -> Tensor:
    """The input of a layer, asking for a gradient where the layer would take it for one of inference alone: on some
    processors bitsandbytes then repacks its weight for good, rounds it, and gives no gradient from that call on."""
    safe = module.training or x.requires_grad or x.device.type != "cpu" or is_traced()
    if safe or not x.is_floating_point():
        return x
    # what was made for inference can ask for nothing where gradients are taken, a copy of it can
    asks = x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x.detach()
    return asks.requires_grad_()


def unsuspected(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same as a hook before a forward pass, for a layer that is not operated on."""
    return tuple(unsuspicious(module, x) if isinstance(x, Tensor) else x for x in given)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module has, or had before it was operated on."""
    return getattr(type(module), BASE, type(module))


def has_forward_of_its_own(module: nn.Module) -> bool:
    """True if the instance has a forward that is another map, and no hook of accelerate's around the class's
    forward."""
    own = vars(module)
    inner = own.get(_HOOKED) if "_hf_hook" in own else own.get("forward")
    return inner is not None and getattr(inner, "__func__", None) is not type(module).forward


def put_forward_aside(module: nn.Module) -> None:
    """Set aside a forward on the instance, which would run in place of ours. A hook that moves tensors stays, around
    ours."""
    own = vars(module)
    if "_hf_hook" in own and _HOOKED in own:
        own[_ASIDE], own[_HOOKED] = own[_HOOKED], type(module).forward.__get__(module)
    elif "forward" in own:
        own[_ASIDE] = own.pop("forward")


def put_forward_back(module: nn.Module, ours: Callable[..., Any]) -> None:
    """Restore the forward. A hook that was put around `ours` since then, or removed from around it, runs the layer's
    own."""
    own, before = vars(module), vars(module).pop(_ASIDE, None)
    for name in (_HOOKED, "forward"):
        if getattr(own.get(name), "__func__", None) is ours:
            own[name] = before or type(module).forward.__get__(module)
            before = None
    if before is not None:
        own["forward"] = before
    elif "_hf_hook" not in own and getattr(own.get("forward"), "__func__", None) is type(module).forward:
        del own["forward"]  # the class's own needs no entry


def twin(module: nn.Module) -> nn.Module:
    """A copy without adapters, for trying things: at a call a layer may settle on a dtype, or repack itself, for good.
    What cannot be copied (under a compiler, with a forward of its own, by its nature) is the module itself."""
    if torch.compiler.is_compiling() or not {_ASIDE, "forward"}.isdisjoint(vars(module)):
        return module
    base = own_class(module)
    bare = base.__new__(base)
    own = {name: child for name, child in module._modules.items() if not name.endswith(SUFFIX)}
    vars(bare).update(vars(module), _modules=own)
    try:
        return deepcopy(bare)
    except Exception:  # a third party's tensor raises whatever it likes
        return module


def asking(rows: Tensor) -> Tensor:
    """The rows with requires_grad, since a layer may repack itself when it runs for inference alone."""
    return rows if _is_seen_through() else rows.requires_grad_()


def through(module: nn.Module, rows: Tensor) -> Tensor:
    """W m for each row m, [r, in] -> [r, out]: the layer is called, once."""
    b = bias(module)
    if b is None:
        return call(module, rows).to(rows.dtype)
    far = _FAR_IN_HALF if rows.dtype == torch.float16 else _FAR
    if is_traced() or _is_trained(module):  # whose own gradient is of what it is given
        return (call(module, far * rows).to(rows.dtype) - b.to(rows.dtype)) / far
    c = far / _size_of(rows)
    return _Multiple.apply(call(module, _Multiple.apply(rows, c)).to(rows.dtype) - b.to(rows.dtype), 1 / c)


def _is_trained(module: nn.Module) -> bool:
    """Whether what W is made of takes a gradient."""
    return any(t.requires_grad for t in pieces(module))


@torch.no_grad()
def _size_of(rows: Tensor) -> Tensor:
    """Of each row [r, in] a power of two about as large as its largest entry, and not much too small for any dtype: of
    gradients, too, the images stay within what a layer that computes in float16 can hold."""
    return rows.abs().amax(-1, keepdim=True).clamp_min(2.0**-10).log2().ceil().exp2()


class _Multiple(torch.autograd.Function):
    """c x, of two of which the second takes back what the first did. Neither does anything to a gradient: in a layer
    that computes in float16, a thousandth of it could be nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor) -> Tensor:
        return x * c

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


def back(module: nn.Module, rows: Tensor) -> Tensor:
    """Wᵀ m for each row m, [r, out] -> [r, in]: the gradient that the layer gives."""
    if _is_seen_through():
        return torch.func.vjp(forward_of(module), _ones(module, rows))[1](rows)[0]
    return _Back.apply(rows, module)


def _is_seen_through() -> bool:
    """Whether a compiler or a transform looks on, which does not see through a gradient inside of a node of ours, nor
    takes what asks for one by itself; it does see through torch.func."""
    return torch.compiler.is_compiling() or is_transformed()


def _ones(module: nn.Module, rows: Tensor) -> Tensor:
    return rows.new_ones(len(rows), said_sides(module)[1])


class _Back(torch.autograd.Function):
    """The transposed map, whose own gradient is the map: a layer's backward need not be differentiable."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, module: nn.Module) -> Tensor:
        ctx.module = module
        with torch.enable_grad():
            x = asking(_ones(module, rows))
            y = forward_of(module)(x)
            return torch.autograd.grad(y, x, rows.detach().to(y.dtype))[0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad,) = grad_outputs
        with without_autocast(grad.device.type):  # as the forward pass had it: in float16 far images would be infinite
            return through(ctx.module, grad), None


@torch.no_grad()
def matrix(module: nn.Module, wanted: torch.dtype) -> Tensor:
    """Recover W [out, in] by feeding the layer rows of the identity, in a dtype that it accepts; returned as `wanted`.

    Cost: in / 1024 calls."""
    (out, in_), given, module = said_sides(module), module, twin(module)
    accepted = taken_dtype(module, wanted)
    if module is not given:
        _drop_bias(module, accepted)
    weight = torch.empty(out, in_, dtype=wanted, device=device(module))
    columns = torch.arange(in_, device=weight.device)
    for part in columns.split(_SLICE):
        weight[:, part] = through(module, asking((columns == part[:, None]).to(accepted))).mT.to(wanted)
    return weight


def _drop_bias(copy: nn.Module, accepted: torch.dtype) -> None:
    """Make the bias of a copy zero: a layer that computes in two bytes rounds W m + b as its bias is, and beside a
    large one (of hundreds in the keys of some models) little of W is left. Where the layer adds a bias that it keeps
    elsewhere, the copy stays as it is."""
    held: dict[str, Any] = copy._parameters if copy._parameters.get("bias") is not None else copy._buffers
    if (before := held.get("bias")) is None:
        return
    zeros = torch.zeros_like(before, requires_grad=False)
    held["bias"] = nn.Parameter(zeros, requires_grad=False) if held is copy._parameters else zeros
    nothing = torch.zeros(1, said_sides(copy)[1], dtype=accepted, device=device(copy))
    if forward_of(copy)(asking(nothing)).any():  # what is not a number counts, too
        held["bias"] = before


def taken_dtype(module: nn.Module, wanted: torch.dtype) -> torch.dtype:
    """The first dtype in which the layer takes its input: the wanted one, its own, the usual ones.

    Raises: what the layer raises at the first, if it takes none.
    """
    choices = dict.fromkeys((wanted, dtype(module), torch.float32, torch.bfloat16, torch.float16))
    failures: list[Exception] = []
    for each in choices:
        try:
            forward_of(module)(asking(torch.ones(1, said_sides(module)[1], dtype=each, device=device(module))))
            return each
        except Exception as failure:  # a third party's layer raises whatever it likes
            failures.append(failure)
    raise failures[0]
