"""A real forward pass as the proof of an operation: the model starts as it was, every adapter acts, and merged it gives
what it gives operated.

Takes an operated model and a batch (an example, or one that its configuration allows to make up); gives a `Proof`. At
the start W' = W and nothing could be seen, so the adapters' values are moved first, all by a little. Promises: the
model, its buffers, its mode and every random state are afterwards as before, bit for bit, interrupted or not.

Cost: two forward passes of a tiny batch; for models of up to 10⁹ parameters three more, one backward pass, and while
they run a second copy of the operated weights.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from surgery.diagnostics import Diagnostic, SurgeryError, fail
from surgery.ir.dense import autocasts
from surgery.layers.layouts import weights
from surgery.layers.wrappers import own_parameter
from surgery.models.demo import demo_inputs
from surgery.models.draws import same_draws
from surgery.models.modes import in_mode
from surgery.planning.compile import Placed
from surgery.planning.initial_values import IDENTITY_TOLERANCE, departure, is_finite
from surgery.runtime.adapter import Adapter
from surgery.runtime.merge import merged
from surgery.runtime.readings import Readings
from surgery.runtime.transaction import Scope, Snapshot, finish
from surgery.text import counted, listed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST = 10**9  # parameters of a model that is also run backwards, and merged
_ROUNDINGS = 4  # at the start a half dtype may be off by so many units in the last place
_FAR = 16  # and moved, where every layer rounds differently, by so many
_AGREE = 1e-4  # in float32
_MOVE = 0.05
_SOUND, _SHOWN = 4000, 8


@dataclass(frozen=True)
class Proof:
    """What the trial measured. `start`: the relative change of the outputs by the operation; `merged`: between operated
    and merged, with moved values; each None where it was not measured, and `skipped` says why. `silent`: the weights
    whose adapters change nothing in this batch."""

    start: float | None = None
    allowed: float = IDENTITY_TOLERANCE
    merged: float | None = None
    adapters: int = 0
    silent: tuple[str, ...] = ()
    skipped: str = ""

    def __str__(self) -> str:
        start = ("" if self.start is None else
                 f"the logits are unchanged (relative change {self.start:.1e}, allowed {self.allowed:.0e})")
        acts = ("" if not self.adapters else
                f"{self.adapters - len(self.silent)} of {counted(self.adapters, 'adapter')} act")
        agree = "" if self.merged is None else f"merged, it gives the same (relative difference {self.merged:.1e})"
        return "; ".join(filter(None, (start, acts, agree, self.skipped)))

    @property
    def warnings(self) -> tuple[Diagnostic, ...]:
        if not self.silent:
            return ()
        return (Diagnostic("dead-adapter", f"no output depends on {listed(self.silent)} in the batch that was tried",
                           severity="warning",
                           helps=("`surgeon.prove(example=batch)` says it for a batch of yours",)),)


class Subject:
    """An operated model that is tried by forward passes."""

    def __init__(self, model: nn.Module, placed: Sequence[Placed], adapters: Mapping[str, Adapter], scope: Scope):
        self.model, self.placed, self.adapters, self.scope = model, placed, adapters, scope

    def prove(self, example: Any = None, starts: bool = True, in_full: bool = False) -> Proof:
        """`starts`: the model must start unchanged; `in_full`: whatever the model's size, and with a batch or an error.

        Raises: SurgeryError (not-identity, dead-adapter, bad-value)."""
        if example is None and not _batches(self.model) and not in_full:
            return Proof(skipped=_without(self.model))
        with self._trial():
            self._switch(on=False)
            batch, base, why = self._first(example)
            if batch is None and in_full:
                raise fail("bad-value", why, helps=("give a batch: example=dict(...), a tuple, or a tensor",))
            if batch is None or base is None:
                return Proof(skipped=why)
            self._switch(on=True)
            if not is_finite(base):
                raise fail("not-identity",
                           "the logits of the base model are not finite, so there is nothing to compare with",
                           helps=("`check=False` operates all the same",))
            operated = self._run_seen(batch)
            allowed, change = max(IDENTITY_TOLERANCE, _ROUNDINGS * self._eps), departure(base, operated)
            if starts and not change <= allowed:
                raise fail("not-identity", f"the logits change by {change:.1e}, relative; {allowed:.0e} is allowed",
                           helps=("nothing was saved",))
            start = change if starts else None
            size = sum(p.numel() for p in self.model.parameters())
            if size > LARGEST and not in_full:
                return Proof(start, allowed, skipped=f"{size:,} parameters are too many to be run backwards unasked: "
                             "`surgeon.prove()` does")
            self._move()
            return self._compared(batch, base, start, allowed)

    # ------------------------------------------------------------------------------------------------------ one trial

    @contextmanager
    def _trial(self) -> Iterator[None]:
        """Inside, the model is in evaluation mode and may be changed; at the end everything is restored."""
        # What a layer packs its weight into is as large as the model, and no state that a pass goes on with.
        packed = {id(b) for m in self.model.modules() if any(w.layout.is_called for w in weights(m))
                  for b in m.buffers()}
        before = Snapshot(self.scope)
        buffers = [(b, b.clone()) for b in self.model.buffers() if id(b) not in packed]
        numpy = sys.modules.get("numpy")
        states = random.getstate(), numpy.random.get_state() if numpy else None

        def put_back() -> None:
            before.restore()
            with torch.no_grad():
                for buffer, value in buffers:
                    is_dense = buffer.layout == torch.strided and not buffer.is_nested  # others have no `equal`
                    if not (is_dense and torch.equal(buffer, value)):
                        buffer.copy_(value)
            random.setstate(states[0])
            if numpy:
                numpy.random.set_state(states[1])

        try:
            try:
                self.model.eval()
                yield
            finally:
                finish(put_back)
        finally:  # done already, but for an interrupt at the line above
            finish(put_back)

    def _switch(self, on: bool) -> None:
        for adapter in self.adapters.values():
            adapter.active = on

    def _first(self, example: Any) -> tuple[Any, Tensor | None, str]:
        """(a batch that the base model accepts, its output, ""), or (None, None, why there is no batch)."""
        if example is not None:
            return example, self._run(example), ""
        failures = []
        for make in _batches(self.model):
            try:
                like = next(p for p in self.model.parameters() if p.is_floating_point())
                batch = {name: t.to(like.device, like.dtype if t.is_floating_point() else t.dtype)
                         for name, t in make().items()}
                return batch, self._run(batch), ""
            except Exception as error:  # a model that wants another kind of batch fails in its own way
                failures.append(type(error).__name__)
        return None, None, _without(self.model, *failures[:1])

    def _call(self, batch: Any) -> Tensor:
        with same_draws(devices={p.device for p in self.model.parameters() if p.device.type == "cuda"}):
            output = (self.model(**batch) if isinstance(batch, Mapping) else
                      self.model(*batch) if isinstance(batch, (tuple, list)) else self.model(batch))
        return torch.cat([t.flatten().double() for t in _floats(output)])

    def _run(self, batch: Any) -> Tensor:
        with torch.no_grad():
            return self._call(batch)

    def _run_seen(self, batch: Any) -> Tensor:
        """The output, where nobody beside a called layer reads its tensors. Raises: SurgeryError."""
        readings = Readings(self.placed)
        with readings if readings.owners else nullcontext():  # each operation of torch's is asked
            output = self._run(batch)
        readings.refuse()
        return output

    @property
    def _eps(self) -> float:
        held = [p for p in self.model.parameters() if p.is_floating_point()]
        narrow = {torch.get_autocast_dtype(p.device.type) for p in held if autocasts(p.device.type)}
        return max((torch.finfo(dtype).eps for dtype in narrow | {p.dtype for p in held}), default=0.0)

    # ------------------------------------------------------------------------------------------- acts, and is the same

    def _move(self) -> None:
        draw = torch.Generator().manual_seed(0)
        moved: set[int] = set()  # what modules share is moved once
        for tensor in (t for own in self._trained().values() for t in own):
            if id(tensor) not in moved:
                moved.add(id(tensor))
                noise = _MOVE * torch.randn(tensor.shape, generator=draw, dtype=torch.float32, device="cpu")
                tensor.data = tensor.data + noise.to(tensor.device, tensor.dtype)

    def _trained(self) -> dict[str, list[nn.Parameter]]:
        """The tensors of each adapter that are trained."""
        trained = {}
        for placed in self.placed:
            tensors = self.adapters[placed.site.name].tensors()
            trained[placed.site.name] = [tensors[leaf.key] for leaf in placed.formula.leaves
                                       if not leaf.frozen and tensors[leaf.key].is_floating_point()]
        return trained

    def _compared(self, batch: Any, base: Tensor, start: float | None, allowed: float) -> Proof:
        trained, skipped = {name: own for name, own in self._trained().items() if own}, []
        operated, silent = self._silent(batch, trained, skipped)
        plain = [p for p in self.placed if not p.site.layout.is_called]
        bound, difference = max(_AGREE, _FAR * self._eps), None
        if not is_finite(operated):
            skipped.append("the moved model gives no finite numbers, so it was not merged")
        elif plain:
            difference = self._difference(batch, operated, plain)
            if not difference <= bound:
                self._refuse(batch, operated, plain, bound, difference)
        return Proof(start, allowed, difference, len(trained), tuple(silent), "; ".join(skipped))

    def _silent(self, batch: Any, trained: Mapping[str, list[nn.Parameter]],
                skipped: list[str]) -> tuple[Tensor, list[str]]:
        """The output of the moved model, and the names of the adapters that no gradient reaches."""
        leaves = list({id(t): t for own in trained.values() for t in own}.values())
        try:
            for leaf in leaves:
                leaf.requires_grad_(True)
            with torch.enable_grad():
                y = self._call(batch)
                # a random direction: along a plain sum, what a norm follows has no gradient
                draw = torch.Generator().manual_seed(1)
                direction = torch.randn(y.shape, generator=draw, dtype=y.dtype, device="cpu")
                gradients = torch.autograd.grad(y, leaves, direction.to(y.device), allow_unused=True)
        except SurgeryError as error:  # a layer that gives no gradient to its input
            skipped.append(f"no backward pass: {error.diagnostics[0].message}")
            return self._run(batch), []
        except RuntimeError as error:
            skipped.append(f"no backward pass ({str(error).splitlines()[0]})")
            return self._run(batch), []
        reached = {id(leaf) for leaf, gradient in zip(leaves, gradients) if gradient is not None and gradient.any()}
        return y.detach(), [name for name, own in trained.items() if not any(id(t) in reached for t in own)]

    def _difference(self, batch: Any, operated: Tensor, placed: Sequence[Placed]) -> float:
        """The relative change of the outputs when some of the weights are merged. (After an error the trial puts them
        back.)"""
        merged_values = [(own_parameter(each.site.module, name), value) for each in placed
                for name, value in merged(each, self.adapters[each.site.name]).tensors.items()]
        before = [(parameter, parameter.data) for parameter, _ in merged_values]
        for parameter, value in merged_values:
            parameter.data = value
        for each in placed:
            self.adapters[each.site.name].active = False
        difference = departure(operated, self._run(batch))
        for parameter, data in before:
            parameter.data = data
        for each in placed:
            self.adapters[each.site.name].active = True
        return difference

    def _refuse(self, batch: Any, operated: Tensor, placed: Sequence[Placed], bound: float, difference: float) -> None:
        """Raises: SurgeryError (dead-adapter), naming the weights: halves are merged, and halves of those that differ.
        """
        names, waiting = [], [list(placed)]
        while waiting and len(names) < _SHOWN:
            part = waiting.pop()
            # one pass for each half, and not one for each weight of the model
            if not self._difference(batch, operated, part) <= bound:
                half = len(part) // 2
                names += [part[0].site.weight_name] if not half else []
                waiting += [part[half:], part[:half]] if half else []
        about = listed(names) if names else "the operated weights together"
        raise fail("dead-adapter", f"operated and merged, the model gives different outputs (by {difference:.1e}, "
                   f"relative; {bound:.0e} is allowed): {about}",
                   notes=("the model reads such a weight in a way that an adapter does not see",),
                   helps=("`except` leaves it out; `check=False` operates all the same",))


def outputs(model: nn.Module) -> Tensor | None:
    """The numbers that a model in evaluation gives for a batch that is made up, the same for each model of its
    configuration: [n] in float64; None where none can be made up. Its random state is afterwards as it was."""
    with in_mode(model, False):
        return Subject(model, (), {}, Scope((), (), ()))._first(None)[1]


def _without(model: nn.Module, *why: str) -> str:
    return f"no batch for a {type(model).__name__}{''.join(f' ({each})' for each in why)}: not compared"


def _floats(output: Any) -> Iterator[Tensor]:
    """The tensors of numbers that an output holds."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        yield from (t for value in output.values() for t in _floats(value))
    elif isinstance(output, (tuple, list)):
        yield from (t for value in output for t in _floats(value))


def _batches(model: nn.Module) -> list[Callable[[], Any]]:
    """Ways to make up a batch, each of which may fail."""
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or main is None:
        return []
    draw, known = torch.Generator().manual_seed(0), cast("PreTrainedModel", model)  # as what has both is

    def spectrogram() -> dict[str, Tensor]:
        shape = (1, config.num_mel_bins, 2 * config.max_source_positions)
        ids = {"decoder_input_ids": torch.full((1, 4), 3)} if config.is_encoder_decoder else {}
        return {main: torch.randn(shape, generator=draw), **ids}

    by_name = {"input_values": lambda: {main: torch.randn(2, _SOUND, generator=draw)}, "input_features": spectrogram}
    return [by_name.get(main, lambda: demo_inputs(known)), lambda: dict(known.dummy_inputs)]
