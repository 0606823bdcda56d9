"""Reading the weight of an operated layer gives W', computed when it is used.

Takes the stored tensor and how to make W'. Promises: its shape, dtype and device are answered from the stored tensor
(models ask for those in every forward pass, and W' costs a matrix); everything that computes with it computes with W'
as it is then, with its gradient; what is written through it is written to the frozen weight; what would take its
memory, and a gradient that autograd brings here by a way that went around W', is refused. Code that holds and moves
parameters (accelerate, `torch.nn.utils.prune`) is not given this but the stored parameter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from surgery.diagnostics import fail

ASKED = set("""size dim ndimension numel nelement stride element_size is_contiguous is_floating_point is_complex
    get_device storage_offset is_inference __len__ is_signed""".split()) | {
    f"{name}.__get__" for name in """shape dtype device layout ndim is_cuda is_cpu is_meta is_sparse is_sparse_csr
    is_quantized is_mps is_xpu is_nested is_mkldnn itemsize nbytes names grad""".split()}
_VIEWED = set("""view view_as reshape flatten unflatten squeeze unsqueeze t transpose permute movedim swapaxes select
    narrow expand expand_as detach diagonal unbind chunk split tensor_split __getitem__""".split()) | {
    f"{name}.__get__" for name in ("T", "mT", "H", "mH", "data")}
_WRITTEN = {"__setitem__", "data.__set__", "grad.__set__", "grad.__delete__", "requires_grad.__set__", "register_hook",
            "register_post_accumulate_grad_hook", "retain_grad", *(f"__i{name}__" for name in (
                "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"))}
_MEMORY = {"data_ptr", "storage", "untyped_storage", "_typed_storage"}

# Modules that read a parameter by its attribute in order to move, load, tie, start, prune or reparametrise it.
_HOLDERS = ("torch.nn.modules.module", "torch.nn.utils.", "torch.nn.parallel.", "torch.distributed.", "accelerate.",
            "transformers.modeling_utils", "transformers.initialization", "transformers.core_model_loading",
            "transformers.integrations.", "deepspeed.", "peft.")
_FUSION = "torch.nn.utils.fusion."  # which computes with a weight, and puts what comes out in its place


class EffectiveWeight(Tensor):
    """W' of an operated layer. Itself it is a tensor without memory, so that no code can compute with it unseen."""

    _make: Callable[[], Tensor]
    _stored: Tensor
    _trains: bool

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name, kwargs = name_of(func), kwargs or {}
        first = args[0] if args else kwargs.get("tensor", kwargs.get("input"))
        if name in _MEMORY or isinstance(kwargs.get("out"), cls):
            raise fail("unsupported-module", f"W' of an operated layer is computed, and has no memory for `{name}`",
                       helps=("take `layer.weight.clone()` to read it; merge() to have it stored",))
        if not isinstance(first, cls):
            return func(*values_of(args), **values_of(kwargs))
        if name == "requires_grad.__get__":  # W' may take a gradient where the stored weight is frozen
            return first._trains
        if name in ASKED:
            return func(first._stored, *args[1:], **kwargs)
        is_in_place = name.endswith("_") and not name.endswith("__") or bool(kwargs.get("inplace"))
        if is_in_place or name in _WRITTEN:
            rest = {key: value for key, value in kwargs.items() if value is not first}
            named = {key: first._stored for key, value in kwargs.items() if value is first}
            return func(*([first._stored] if args else []), *values_of(args[1:]), **named, **values_of(rest))
        if name in _VIEWED:
            return _view(first, lambda t: func(t, *values_of(args[1:]), **values_of(kwargs)), name)
        return func(*values_of(args), **values_of(kwargs))


# Models ask for these in every call, where the protocol takes a part of a token's time.
for _name in ("shape", "dtype", "device"):
    setattr(EffectiveWeight, _name, property(lambda weight, name=_name: getattr(weight._stored, name)))


def effective_weight(make: Callable[[], Tensor], stored: Tensor, trains: bool) -> EffectiveWeight:
    """W', which `make` makes; `trains`: whether a parameter that trains is reached through it."""
    trains = trains and torch.is_grad_enabled()
    weight = hollow(stored, trains).as_subclass(EffectiveWeight)
    weight._make, weight._stored, weight._trains = make, stored, trains
    return weight


def hollow(stored: Tensor, trains: bool) -> Tensor:
    """A tensor without memory that looks like the stored one. Autograd refuses a real gradient for it, as for all on
    the meta device: that of a kernel that took this one unseen."""
    return torch.empty_strided(stored.shape, stored.stride(), dtype=stored.dtype, device="meta", requires_grad=trains)


def holds_parameters() -> bool:
    """True if the code that reads or sets the attribute (two frames up) is known to hold and move parameters."""
    frame = sys._getframe(2)
    if frame.f_code is torch.nn.Module.__setattr__.__code__ and frame.f_back is not None:
        frame = frame.f_back
    name = f"{frame.f_globals.get('__name__')}."
    return name != _FUSION and name.startswith(tuple(f"{holder.removesuffix('.')}." for holder in _HOLDERS))


def name_of(func: Callable) -> str:
    """`size` of a function or method, `shape.__get__` of the reading of a property."""
    name = getattr(func, "__name__", "")
    owner = getattr(func, "__self__", None)
    if name not in ("__get__", "__set__", "__delete__"):
        return name
    return f"{getattr(owner, '__name__', None) or getattr(getattr(owner, 'fget', None), '__name__', '')}.{name}"


def values_of(given: Any) -> Any:
    """Replace each EffectiveWeight in the arguments of a call by W'."""
    if isinstance(given, EffectiveWeight):
        return given._make()
    if type(given) in (tuple, list):
        return type(given)(map(values_of, given))
    return {key: values_of(value) for key, value in given.items()} if type(given) is dict else given


def _view(weight: EffectiveWeight, change: Callable[[Tensor], Any], name: str) -> Any:
    """A view of W', which is read as one of W' and written as one of the stored tensor."""
    seen, trains = change(weight._stored), weight._trains and name not in ("detach", "data.__get__")
    if isinstance(seen, Tensor):
        return effective_weight(lambda: change(weight._make()), seen, trains)
    return type(seen)(effective_weight(lambda i=i: change(weight._make())[i], part, trains)
                      for i, part in enumerate(seen))
