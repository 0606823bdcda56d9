"""Sites: the places of a model that a spec can take, and those that it cannot with the reason.

Takes a model (on any device, meta too), gives a `Survey`. A site is one weight: the `weight` of a layer, or one fused
parameter of a stack of experts, then named after the parameter. Promises: module order, and one site for a module
object that stands at several names. Nothing is changed or copied.

The head is the output embedding (`get_output_embeddings()`), whatever stands beside the base model of a task model
(`classifier`, `score`, `qa_outputs`, with their inner layers), and, in a `...For...` model without a base model of its
own, the linear layers directly below its root. A module of another library that holds such models has their heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile

import torch
from torch import Tensor, nn

from surgery.layers import linearity_probe, opaque_linear
from surgery.layers.attention_sizes import attention_sizes, kernel
from surgery.layers.layouts import (
    EXPERTS,
    LINEAR,
    NORM,
    PACKED,
    TRANSPOSED_EXPERTS,
    Layout,
    Weight,
    refusal,
    weights,
)
from surgery.layers.norm_probe import is_norm
from surgery.layers.product_probe import multiplies
from surgery.layers.stack_probe import stacks
from surgery.layers.wrappers import bare, named_modules
from surgery.text import sides_text


@dataclass(frozen=True, eq=False)
class Site:
    """One weight that a spec can condition. `out`, `in_`: its shape as a matrix; `stack`: how many of those, or None.

    `layer` is the index in the model's list of layers (its outermost list), `depth` is that from 0 to 1, `layer_name`
    the module that stands there, `layers` how many the list has; None without one. `heads` and `head_size` are those of
    the attention that it stands in, None where nothing says them; `kernel` how many positions a kernel has. `ancestors`
    are the class names above it (their base classes too), `aliases` its further names.
    """

    name: str
    module: nn.Module = field(repr=False)
    layout: Layout = field(repr=False)
    parameter: str
    out: int
    in_: int
    stack: int | None
    layer: int | None
    depth: float | None
    ancestors: tuple[str, ...] = field(repr=False)
    is_head: bool
    aliases: tuple[str, ...] = field(default=(), repr=False)
    layer_name: str | None = field(default=None, repr=False)
    layers: int | None = field(default=None, repr=False)
    heads: int | None = field(default=None, repr=False)
    head_size: int | None = field(default=None, repr=False)
    kernel: int = field(default=1, repr=False)

    @property
    def kind(self) -> str:
        """The word that a target says for such a layer: `linear`, `conv`, `embedding`."""
        return self.layout.kind.word

    @property
    def sides(self) -> str:
        """Its sides in words: `12 x 18`, `8 of 64 x 128` of a stack, `12 x 9 in 12 groups`."""
        return f"{sides_text(self.out, self.in_, self.stack)} {self.layout.kind.note}".rstrip()

    @property
    def weight(self) -> Tensor:
        """The parameter, as the module stores it. A called layer has none."""
        return opaque_linear.stored_weight(self.module, self.parameter)

    @property
    def held(self) -> tuple[Tensor, ...]:
        """The tensors that W is made of."""
        return opaque_linear.pieces(self.module) if self.layout.is_called else (self.weight,)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the parameter; of a called layer, (out, in)."""
        return (self.out, self.in_) if self.layout.is_called else tuple(self.weight.shape)

    @property
    def is_meta(self) -> bool:
        """Whether there are no numbers, as in a skeleton."""
        return any(tensor.is_meta for tensor in self.held)

    @property
    def device(self) -> torch.device:
        return opaque_linear.device(self.module) if self.layout.is_called else self.weight.device

    @property
    def wide(self) -> torch.dtype:
        """float32, or what is stored where that is wider."""
        own = opaque_linear.dtype(self.module) if self.layout.is_called else self.weight.dtype
        return torch.promote_types(own, torch.float32)

    def read(self) -> Tensor:
        """The stored weight; of a called layer, a dense W [out, in] that calls of it give, in float32 or wider."""
        return opaque_linear.matrix(self.module, self.wide) if self.layout.is_called else self.weight.detach()

    @cached_property
    def answer(self) -> linearity_probe.Answer:
        """The result of probing a called layer; a stored weight, or none at all, has no fault."""
        if self.is_meta or not self.layout.is_called:
            return linearity_probe.Answer("", True)
        return linearity_probe.ask(self.module)

    @property
    def bias(self) -> Tensor | None:
        """The bias, where a spec can change it."""
        return opaque_linear.bias(self.module) if self.stack is None else None

    @property
    def has_bias(self) -> bool:
        return self.bias is not None

    @property
    def weight_name(self) -> str:
        """The name of the parameter in the model."""
        return self.name if self.stack is not None else f"{self.name}.{self.parameter}".lstrip(".")


@dataclass(frozen=True, eq=False)
class Refused:
    """A module with parameters that no spec can take. `kind` is empty for a class without a layout; `matrix` says
    whether it holds a weight of two or more dimensions (a norm does not)."""

    name: str
    module: nn.Module = field(repr=False)
    kind: str
    reason: str
    matrix: bool
    ancestors: tuple[str, ...] = field(repr=False)


class Survey:
    """What a model holds: `modules` by every name, the `sites`, the `refused`, and how many children a module has.
    Wrappers are seen through: `model` is the one inside, and no name tells of them."""

    def __init__(self, model: nn.Module):
        self.model = bare(model)
        self.modules: dict[str, nn.Module] = dict(named_modules(model))
        self._sizes: dict[str | None, tuple[int | None, int | None]] = {}  # of attention, by what holds a module
        self._stacks: dict[str, dict[str, bool]] = {}  # of modules that were asked, by name
        self.counts: Mapping[str, int] = {name: len(m._modules) for name, m in self.modules.items() if m._modules}

    @cached_property
    def names(self) -> dict[int, list[str]]:
        """All the names of each module object, by its id, in module order."""
        names: dict[int, list[str]] = {}
        for name, module in self.modules.items():
            names.setdefault(id(module), []).append(name)
        return names

    @cached_property
    def heads(self) -> frozenset[int]:
        """The ids of the modules of the output head."""
        return frozenset(id(inner) for head in _heads(self.model) for inner in head.modules())

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        return tuple(s for entries in self._entries for s in entries if isinstance(s, Site))

    @cached_property
    def norms(self) -> tuple[Site, ...]:
        """The norm layers, which only a target that says `norm` takes: each is tried by calls, so that nobody else
        waits for that. To others they are modules without a weight matrix, among those refused."""
        normal = [names for key, names in self.names.items() if key not in self._parts
                  and not self._weights[key] and is_norm(self.modules[names[0]])]
        return tuple(self._site(Weight(NORM, "weight"), names) for names in normal)

    @cached_property
    def routers(self) -> tuple[Site, ...]:
        """The modules without a layout that multiply by their weight in a forward of their own, which only a pattern
        that names them takes: each is tried by a call. To others they are among those refused."""
        own = [names for key, names in self.names.items() if key not in self._parts
               and not weights(self.modules[names[0]]) and multiplies(self.modules[names[0]])]
        return tuple(self._site(Weight(LINEAR, "weight"), names) for names in own)

    def stack(self, holder: Refused, parameter: str) -> Site | Refused:
        """A parameter with three axes of a module without a layout as a stack of experts, which only a pattern that
        names it takes; refused where no call of a copy shows how its matrices lie."""
        stack, name = holder.module.get_parameter(parameter), f"{holder.name}.{parameter}".lstrip(".")
        if not all(map(opaque_linear.is_plain, holder.module._parameters.values())):
            return Refused(name, holder.module, "", PACKED, True, holder.ancestors)
        if (shown := self._stacks.get(holder.name)) is None:
            shown = self._stacks[holder.name] = stacks(holder.module)
        if parameter in shown:
            layout = TRANSPOSED_EXPERTS if shown[parameter] else EXPERTS
            return self._site(Weight(layout, parameter, len(stack)), self.names[id(holder.module)])
        reason = (f"no call of a {type(holder.module).__name__} was found in which its {len(stack)} matrices stand in "
                  "products and nowhere else, one way round, as those of experts do")
        return Refused(name, holder.module, "", reason, True, holder.ancestors)

    @cached_property
    def refused(self) -> tuple[Refused, ...]:
        return tuple(r for entries in self._entries for r in entries if isinstance(r, Refused))

    @cached_property
    def _entries(self) -> list[list[Site | Refused]]:
        # what a called layer is made of (a packed weight's own modules) is no place of its own
        return [list(self._entry(names)) for key, names in self.names.items() if key not in self._parts]

    @cached_property
    def _weights(self) -> dict[int, tuple[Weight, ...]]:
        """Of each module, by its id: to recognise them takes longer than all else here, and three ask."""
        return {key: weights(self.modules[names[0]]) for key, names in self.names.items()}

    @cached_property
    def _parts(self) -> frozenset[int]:
        """The ids of the modules that called layers are made of."""
        layers = [self.modules[names[0]] for key, names in self.names.items()
                  if any(w.layout.is_called for w in self._weights[key])]
        return frozenset(id(inner) for layer in layers for inner in layer.modules() if inner is not layer)

    def _entry(self, names: list[str]) -> Iterator[Site | Refused]:
        """The sites of a module, or what is refused of it; nothing of one without parameters of its own."""
        module, above = self.modules[names[0]], self._above(names[0])
        held = self._weights[id(module)]
        reason = refusal(module, [self.modules[name] for name in above])
        for weight in held if not reason else ():
            yield self._site(weight, names)
        if held and not reason:
            return
        if reason or any(p is not None for p in module._parameters.values()):
            matrix = bool(held) or any(p.ndim > 1 for p in module.parameters(recurse=False))
            word = held[0].layout.kind.word if held else ""
            what = "is not a linear layer, a convolution or an embedding" if matrix else "has no weight matrix"
            own = ", ".join(name for name, _ in module.named_parameters(recurse=False))
            reason = reason or f"{type(module).__name__} {what} (it holds {own})"
            yield Refused(names[0], module, word, reason, matrix, self._ancestors(names[0]))

    def _site(self, weight: Weight, names: list[str]) -> Site:
        """A weight of the module that goes by those names."""
        module, (layout, parameter, stack) = self.modules[names[0]], weight
        # each parameter of a stack of experts is a site, and goes by its own name
        spelt = names if stack is None else [f"{name}.{parameter}".lstrip(".") for name in names]
        layer, count, layer_name = self._layer(spelt[0])
        above = self._above(names[0])
        holder = above[-1] if above else None
        if (sizes := self._sizes.get(holder)) is None:
            sizes = self._sizes[holder] = attention_sizes(self.modules[name] for name in reversed(above))
        return Site(spelt[0], module, layout, parameter, *layout.shape(module, parameter), stack,
                    layer, layer / max(count - 1, 1) if layer is not None else None,
                    self._ancestors(spelt[0]), id(module) in self.heads, tuple(spelt[1:]), layer_name,
                    count or None, *sizes, kernel(module))

    def _above(self, name: str) -> list[str]:
        """The names of the modules that hold this one, outermost first."""
        parts = name.split(".") if name else []
        return [".".join(parts[:i]) for i in range(len(parts))]

    def _ancestors(self, name: str) -> tuple[str, ...]:
        """The names of the classes above, and of their own base classes, each once."""
        classes = (c for above in self._above(name)
                   for c in takewhile(lambda c: c is not nn.Module, type(self.modules[above]).__mro__))
        return tuple(dict.fromkeys(c.__name__ for c in classes))

    def _layer(self, name: str) -> tuple[int | None, int, str | None]:
        """The index in the outermost ModuleList (or else the outermost Sequential), how long that list is, and the name
        of what stands there."""
        steps = [(above, self.modules[above], name[len(above):].lstrip(".").split(".")[0])
                 for above in self._above(name)]
        # a list of layers is a ModuleList; a Sequential is one only where a model has no such list
        for kind in (nn.ModuleList, nn.Sequential):
            for above, module, step in steps:
                if isinstance(module, kind) and step.isdecimal():
                    return int(step), len(module), f"{above}.{step}".lstrip(".")
        return None, 0, None


def sites(model: nn.Module) -> tuple[Site, ...]:
    """The sites of a model in module order."""
    return Survey(model).sites


def unsupported(model: nn.Module) -> dict[str, str]:
    """The modules with parameters that no spec can take, and why."""
    return {r.name: r.reason for r in Survey(model).refused}


def _heads(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of the output head, of the outermost models that say what they are."""
    # what a class says: an object may answer for the model inside (PeftModel)
    if not hasattr(type(model), "base_model_prefix") and not hasattr(type(model), "get_output_embeddings"):
        yield from _own_heads(model)
        for child in model.children():
            yield from _heads(child)
    else:
        yield from _own_heads(model)


def _own_heads(model: nn.Module) -> Iterator[nn.Module]:
    output = output_embedding(model)
    if output is not None:
        yield output
    base = getattr(model, getattr(type(model), "base_model_prefix", ""), None)
    if isinstance(base, nn.Module) and base is not model:
        yield from (child for child in model.children() if child is not base)
    elif "For" in type(model).__name__:
        yield from (child for child in model.children() if isinstance(child, nn.Linear))


def output_embedding(model: nn.Module) -> nn.Module | None:
    """The module that makes scores of a language model's last states, if it has one."""
    ask = getattr(model, "get_output_embeddings", None)
    try:
        return ask() if ask else None
    except (NotImplementedError, AttributeError):
        return None
