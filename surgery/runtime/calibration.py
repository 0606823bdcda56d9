"""Compute from data what a start may name: G, the gradient of the loss in W, and C, Σ x xᵀ over a layer's inputs.

Takes a model, operated weights whose starts name them, and batches; gives the tensors of a few weights at a time.
Promises: the model runs in evaluation mode, and is afterwards as it was, its own gradients, modes and hooks, whatever
interrupts it; the same batches give the same numbers; no more is in memory than `ROOM` numbers, or than one weight
needs. What a batch pads (`attention_mask`) is no input of a layer; where it is not known which inputs that are, it is
refused. What a checkpoint computes again in the backward pass is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn

from surgery.diagnostics import SurgeryError, fail
from surgery.ir.dense import without_autocast
from surgery.layers.wrappers import own_parameter
from surgery.planning.compile import Placed
from surgery.runtime.transaction import finish
from surgery.text import listed

ROOM = 1 << 27  # numbers that are measured at once: 512 MiB in float32
READ = -100  # the label of a token that is only read, which no loss counts
Loss = Callable[[nn.Module, Any], Tensor]
Measured = dict[str, dict[str, Tensor]]  # by the name of a site, and by operation


def of_data(model: nn.Module, placed: Sequence[Placed], data: Iterable[Any] | None,
            loss: Loss | None = None) -> Iterator[tuple[Placed, dict[str, Tensor]]]:
    """Each weight with what its starts name. Raises: SurgeryError (needs-data, bad-data, unsupported-module)."""
    needy = [p for p in placed if p.formula.of_data]
    if not needy or any(p.site.is_meta for p in placed):  # which is refused where the adapters are put in
        yield from ((p, {}) for p in placed)
        return
    if data is None:
        raise needs_data(needy)
    refuse(model, needy)
    batches = list(data)  # they are gone through once for each group of weights
    if not batches:
        raise fail("bad-data", "the data has no batch to measure on")
    for group in _groups(placed):
        found = _measured(model, [p for p in group if p.formula.of_data], batches, loss)
        yield from ((p, found.pop(p.site.name, {})) for p in group)


def needs_data(needy: Sequence[Placed]) -> Exception:
    """The error of weights whose starts name what data gives, where there is none."""
    leaf = next(leaf for leaf in needy[0].formula.leaves if leaf.of_data)
    names = {"gradient": "`G`, the gradient of the loss in W", "inputs": "`C`, the sum of x xᵀ over the layer's inputs"}
    return fail("needs-data", f"`{leaf.name}` starts at what data gives: "
                f"{' and '.join(names[op] for op in leaf.of_data)}", leaf.span,
                helps=("`surgery apply ... --data FILE`, or surgery.apply(model, spec, data=batches) in Python",
                       "`surgery train` measures it on what it learns from"))


def refuse(model: nn.Module, placed: Sequence[Placed]) -> None:
    """Raises: SurgeryError (unsupported-module) for what starts name and cannot be measured."""
    needy = [p for p in placed if p.formula.of_data]
    held: dict[int, int] = {}
    for parameter in (p for m in model.modules() for p in m._parameters.values() if p is not None):
        held[id(parameter)] = held.get(id(parameter), 0) + 1
    for what, names, why in (
            ("G", [p.site.name for p in needy if "gradient" in p.formula.of_data and p.site.layout.is_called],
             "they have no plain weight to take it in (quantised layers)"),
            ("G", [p.site.name for p in needy if "gradient" in p.formula.of_data and not p.site.layout.is_called
                   and held[id(own_parameter(p.site.module, p.site.parameter))] > 1],
             "their weights are used in other places of the model too, and it would be that of all of them"),
            ("C", [p.site.name for p in needy if "inputs" in p.formula.of_data
                   and (not p.site.layout.kind.acts_by_rows or p.site.stack)],
             "it is measured of linear layers")):
        if names:
            raise fail("unsupported-module", f"no `{what}` is known of {listed(names)}: {why}",
                       helps=("leave them out with `except`, or start the parameter at something else",))


def _groups(placed: Sequence[Placed]) -> Iterator[list[Placed]]:
    """Weights in their order, as many as there is room for at once."""
    group: list[Placed] = []
    size = 0
    for each in placed:
        sizes = {"gradient": prod(each.site.stored_shape), "inputs": each.site.in_**2}
        own = sum(sizes[op] for op in each.formula.of_data)
        if group and size + own > ROOM:
            yield group
            group, size = [], 0
        group.append(each)
        size += own
    yield group


def _measured(model: nn.Module, group: Sequence[Placed], batches: Sequence[Any], loss: Loss | None) -> Measured:
    """What the starts of a group of weights name."""
    if not group:
        return {}
    sums, restore = _Sums(model, group), _restorer(model)
    try:
        try:
            sums.run(batches, loss)
        finally:
            finish(restore)
    except BaseException:  # an interrupt at the line above too
        finish(restore)
        raise
    return sums.means()


def _restorer(model: nn.Module) -> Callable[[], None]:
    """What puts a model's modes, hooks and flags back as they are now; it may run again and again."""
    modules, takes_gradients = [*model.modules()], torch.is_grad_enabled()
    modes = [(m, m.training) for m in modules]
    hooks = [(m, {*m._forward_pre_hooks}) for m in modules]
    flags = [(p, p.requires_grad) for p in model.parameters()]

    def restore() -> None:
        for module, mode in modes:
            module.training = mode
        for module, known in hooks:
            for key in [key for key in module._forward_pre_hooks if key not in known]:
                module._forward_pre_hooks.pop(key, None)
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        torch.set_grad_enabled(takes_gradients)

    return restore


class _Sums:
    """Sums over batches for a group of weights."""

    def __init__(self, model: nn.Module, group: Sequence[Placed]):
        self.model = model
        self.of_loss = [p for p in group if "gradient" in p.formula.of_data]
        self.reading = [p for p in group if "inputs" in p.formula.of_data]
        self.weights = [own_parameter(p.site.module, p.site.parameter) for p in self.of_loss]
        self.gradients: list[Tensor | None] = [None] * len(self.weights)
        self.inputs: dict[int, Tensor] = {}  # by the id of the module
        self.padding = _Padding.of({})
        self.is_backward = False
        config = getattr(model, "config", None)
        # whose decoder reads two sequences, of which the mask tells one
        encoder = cast(Any, model).get_encoder() if getattr(config, "is_encoder_decoder", False) else model
        self.masked = {id(module) for module in encoder.modules()}
        self.names = {id(p.site.module): p.site.name for p in self.reading}
        self.batches = 0

    def run(self, batches: Sequence[Any], loss: Loss | None) -> None:
        """Run the model on all batches; its modes, hooks and flags are others afterwards."""
        self.model.eval()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for parameter in self.weights:
            parameter.requires_grad_(True)
        for module in {id(p.site.module): p.site.module for p in self.reading}.values():
            module.register_forward_pre_hook(self._read, with_kwargs=True)
        self.model.register_forward_pre_hook(self._look, with_kwargs=True)
        for i, batch in enumerate(batches):
            self._add(i, batch, loss)

    def _add(self, number: int, batch: Any, loss: Loss | None) -> None:
        """Run the model on a batch. Raises: SurgeryError (bad-data)."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        batch = _on(batch, device)
        self.padding = _Padding.of(batch if isinstance(batch, Mapping) else {})  # if the loss runs a part of the model
        self.batches += 1
        with torch.set_grad_enabled(bool(self.weights)):
            try:
                value = loss(self.model, batch) if loss else _output(self.model, batch)
            except SurgeryError:
                raise
            except Exception as error:  # whatever a model of a user's raises for what it does not take
                raise fail("bad-data", f"the model does not take batch {number} of the data: {type(error).__name__}: "
                           f"{error}") from error
            if not self.weights:
                return
            value = value if loss else getattr(value, "loss", None)
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.isfinite().all():
                raise fail("bad-data", f"batch {number} of the data gives no loss that is one finite number",
                           helps=("give batches with labels, or `loss=lambda model, batch: ...`",))
            found = self._gradients(number, value)
        for i, gradient in enumerate(found):
            if gradient is not None:
                wide = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))
                before = self.gradients[i]
                self.gradients[i] = wide if before is None else before + wide

    def _gradients(self, number: int, value: Tensor) -> Sequence[Tensor | None]:
        """The gradient of a batch's loss in each weight. Raises: SurgeryError (bad-data)."""
        if not value.requires_grad:
            return [None] * len(self.weights)
        self.is_backward = True  # a checkpoint runs layers again, which were read
        try:
            return torch.autograd.grad(value.sum(), self.weights, allow_unused=True)
        except RuntimeError as error:
            raise fail("bad-data", f"batch {number} of the data gives no gradient: {error}") from error
        finally:
            self.is_backward = False

    def _look(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Note what pads the batch that the model is about to run on, however the loss gives it."""
        names = [*signature(module.forward).parameters]
        self.padding = _Padding.of({**dict(zip(names, args)), **kwargs})

    @torch.no_grad()
    def _read(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Note the inputs of a layer that is about to run."""
        x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if x is None or self.is_backward:
            return
        rows = self._rows(module, x)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        with without_autocast(x.device.type):
            before, own = self.inputs.get(id(module)), rows.mT @ rows
        self.inputs[id(module)] = own if before is None else before + own

    def _rows(self, module: nn.Module, x: Tensor) -> Tensor:
        """The inputs [n, in] that are no padding. Raises: SurgeryError (bad-data)."""
        mask, pads, is_masked = self.padding.mask, self.padding.pads, id(module) in self.masked
        if not pads or is_masked and pads == _IN_DECODER:
            return x.reshape(-1, x.shape[-1])
        if mask is not None and is_masked:
            if x.ndim > 2 and x.shape[:2] == mask.shape:
                return x[mask].reshape(-1, x.shape[-1])
            if x.ndim == 2 and len(x) == mask.numel():  # tokens of all texts in a row, as routers have them
                return x[mask.flatten()]
            if x.ndim == 2 and len(x) in (len(mask), int(mask.sum())):  # one input of each text; or without padding
                return x
        raise fail("bad-data", f"which inputs of {self.names[id(module)]} are padding is not known: they are "
                   f"{list(x.shape)}, and {pads}",
                   helps=("give batches that are not padded, of one text each for instance",))

    def means(self) -> Measured:
        """The mean gradient of each weight over the batches, and the sum over the inputs of its layer. Raises:
        SurgeryError (bad-data)."""
        unseen = [p.site.name for p, gradient in zip(self.of_loss, self.gradients) if gradient is None]
        unseen += [p.site.name for p in self.reading if id(p.site.module) not in self.inputs]
        if unseen:
            raise fail("bad-data", f"no batch of the data reaches {listed(dict.fromkeys(unseen))}",
                       helps=("leave them out with `except`, or give data that the whole model runs on",))
        found: Measured = {}
        for placed, gradient in zip(self.of_loss, self.gradients):
            assert gradient is not None  # or it is unseen
            found.setdefault(placed.site.name, {})["gradient"] = placed.site.layout.matrix(gradient / self.batches)
        for placed in self.reading:
            found.setdefault(placed.site.name, {})["inputs"] = self.inputs[id(placed.site.module)]
        broken = [name for name, tensors in found.items() if not all(t.isfinite().all() for t in tensors.values())]
        if broken:
            raise fail("bad-data", f"what the data gives of {listed(broken)} is not finite")
        return found


_IN_DECODER = "what the decoder reads is padded"


@dataclass(frozen=True)
class _Padding:
    """What pads a batch: the `mask` [texts, tokens] of what is none, where there is one like that; `pads`, in words,
    and empty where nothing does."""

    mask: Tensor | None
    pads: str

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> _Padding:
        """Of what a model is given, by the names that transformers has for it."""
        mask, of_decoder, labels = (given.get(n) for n in ("attention_mask", "decoder_attention_mask", "labels"))
        if isinstance(mask, Tensor) and not _is_whole(mask):
            is_plain = mask.ndim == 2 and bool(((mask == 0) | (mask == 1)).all())
            return cls(mask.bool() if is_plain else None, f"attention_mask is {list(mask.shape)}"
                       + ("" if is_plain else ", and not one of 0 and 1 for each token"))
        # what a decoder reads is made of the labels where nothing else is given
        shifted = of_decoder is None and given.get("decoder_input_ids") is None and isinstance(labels, Tensor)
        is_cut = isinstance(of_decoder, Tensor) and not _is_whole(of_decoder)
        return cls(None, _IN_DECODER if is_cut or shifted and bool((labels == READ).any()) else "")


def _is_whole(mask: Tensor) -> bool:
    """Whether a mask leaves nothing out, in either of its forms: 1 for what is seen, or 0 added to its scores."""
    return bool((mask == 1).all()) or mask.is_floating_point() and bool((mask == 0).all())


def _on(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Mapping):
        return {key: _on(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(_on(value, device) for value in batch)
    return batch.to(device) if isinstance(batch, Tensor) else batch


def _output(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)
