"""Frozen tensors that a saved adapter leaves out, because the spec, the seed and W determine them.

Takes tensors as they were computed, and gives a summary of each for the folder; takes the summaries, and gives the
tensors, computed once more. Promises: a tensor is left out of a folder only if it still has the bits that it was
computed with; a recomputed tensor is compared with its summary, by a digest of its bits and, if that differs, by sums
over all its entries: a difference of more than rounding is an error, one of rounding a warning.

Draws are computed on the CPU, by generators of their own. A tensor that follows from W is left out only if it was
computed on the CPU, and is recomputed there: decompositions on other devices differ by more than rounding. A tensor
that rounding decides is saved, since another number of threads gives another one; so is one that takes minutes to
compute, for which whoever attaches the adapter would wait each time.
"""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgery.diagnostics import Diagnostic, fail
from surgery.planning.compile import Placed, Plan
from surgery.planning.initial_values import Origin, again, departure, follows
from surgery.runtime.fingerprint import fingerprint_of
from surgery.runtime.step_tensors import as_held
from surgery.text import counted, dtype_text, listed

if TYPE_CHECKING:
    from surgery.runtime.saved_format import Saved
    from surgery.runtime.surgeon import Surgeon

ROOM = 4  # times the model: a spec that makes more frozen numbers than that is saved with all of them
LONG = 1e11  # rows · columns · the smaller of both, of all decomposed weights: a minute or two on one core
_ROUNDING = 1e-5  # relative; of a dtype that is coarser, an eighth of its eps: nearly all entries round alike
_SUMS, _PRIME, _CHUNK = 8, 2**31 - 1, 1 << 18


# --------------------------------------------------------------------------------------------- summaries of tensors


def digest_of(tensor: Tensor) -> str:
    """128 bits of a hash of its dtype, shape and bits."""
    held = tensor.detach().cpu().contiguous()
    seen = hashlib.sha256(f"{dtype_text(held.dtype)} {list(held.shape)} ".encode())
    seen.update(held.flatten().view(torch.uint8).numpy().data)
    return seen.hexdigest()[:32]


def summary_of(tensor: Tensor) -> dict[str, Any]:
    """The summary of a tensor that a folder does not hold: its shape, dtype, digest and sums."""
    numbers = struct.pack(f"<{_SUMS + 1}f", *_sums(tensor))
    return {"shape": list(tensor.shape), "dtype": dtype_text(tensor.dtype), "digest": digest_of(tensor),
            "sums": base64.b64encode(numbers).decode()}


def _sums(tensor: Tensor) -> list[float]:
    """The norm, and sums of all entries with signs that their places decide. Sums of a difference are as large as the
    difference: its norm is the root of the mean of their squares, whatever it looks like."""
    flat, sums, squares = tensor.detach().cpu().flatten(), torch.zeros(_SUMS, dtype=torch.float64, device="cpu"), 0.0
    for start in range(0, len(flat), _CHUNK):
        part = flat[start:start + _CHUNK].to(torch.float64)
        # Whole numbers below 2^62, which every machine computes alike: a cubic of the place modulo a prime.
        place = (torch.arange(start, start + len(part), device="cpu") * 48271 + 12345) % _PRIME
        mixed = (place * place % _PRIME * place + 0x2545F49) % _PRIME
        signs = 1 - 2 * ((mixed[None] >> torch.arange(5, 5 + _SUMS, device="cpu")[:, None]) & 1)
        sums += signs.to(torch.float64) @ part
        squares += float(part.square().sum())
    return [squares**0.5, *sums.tolist()]


def departure_from_summary(summary: Mapping[str, Any], made: Tensor) -> float:
    """The distance of a tensor from the one that was summarised, relative to its norm: 0 for equal bits, infinite for
    another shape or dtype, and for other places."""
    return 0.0 if digest_of(made) == summary["digest"] else departure_between(summary, summary_of(made))


def departure_between(summary: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """The same for a tensor of which only a summary is known."""
    if other["digest"] == summary["digest"]:
        return 0.0
    is_alike = other["shape"] == summary["shape"] and other["dtype"] == summary["dtype"]
    if not is_alike or not getattr(torch, summary["dtype"]).is_floating_point:
        return float("inf")
    (norm, *then), (_, *now) = (struct.unpack(f"<{_SUMS + 1}f", base64.b64decode(each["sums"]))
                                for each in (summary, other))
    change = sum((one - other)**2 for one, other in zip(now, then)) / _SUMS
    relative = change**0.5 / norm if norm else float("inf")
    return relative if relative == relative else float("inf")


def is_rounding(change: float, dtype: torch.dtype) -> bool:
    return change <= max(_ROUNDING, torch.finfo(dtype).eps / 8)


# ------------------------------------------------------------------------------------------------------------- made


def made_by_rule(surgeon: Surgeon) -> dict[str, str]:
    """The digests of the tensors, as they were just made, that can be made again anywhere."""
    most = latest_origin(surgeon.plan)
    made: dict[str, str] = {}
    for placed in surgeon.plan.placed:
        tensors = surgeon.adapters[placed.site.name].tensors()
        for key in made_again(placed, tensors, most, surgeon.seed, surgeon.made_in):
            if (name := surgeon.name_of(placed, key)) not in made:
                made[name] = digest_of(tensors[key])
    return made


def latest_origin(plan: Plan) -> Origin | None:
    """The latest origin of what whoever attaches an adapter can be asked to make again; None for nothing."""
    if plan.frozen > ROOM * plan.total:
        return None
    decomposed = [placed.site for placed in plan.placed if Origin.DECOMPOSITION in follows(placed).values()]
    is_long = sum(s.out * s.in_ * min(s.out, s.in_) * (s.stack or 1) for s in decomposed) > LONG
    return Origin.WEIGHT if is_long else Origin.DECOMPOSITION


def made_again(placed: Placed, tensors: Mapping[str, Tensor], most: Origin | None, seed: int,
               dtype: torch.dtype) -> list[str]:
    """The keys of a weight's tensors, as they were just made, that can be made again anywhere."""
    if most is None:
        return []
    rules, most = follows(placed), most if placed.site.device.type == "cpu" else Origin.SEED
    keys = [key for key, origin in rules.items() if origin <= most and not tensors[key].is_meta]
    loose = _loose(placed, {key: tensors[key] for key in keys}, rules, seed, dtype)
    return [key for key in keys if key not in loose]


def _loose(placed: Placed, tensors: Mapping[str, Tensor], rules: Mapping[str, Origin], seed: int,
           dtype: torch.dtype) -> set[str]:
    """The keys of places and of decompositions that rounding decides: of vectors whose singular values are equal or
    zero, of numbers that are all but equal. Another number of threads may give others, and nobody could attach the
    adapter any more."""
    computed = {leaf.key for leaf in placed.formula.leaves if leaf.draw is None}
    fine = {key: t for key, t in tensors.items() if key in computed and (
        rules[key] is Origin.DECOMPOSITION or not t.is_floating_point())}
    if not fine:
        return set()
    weight = placed.site.read() if any(rules[key] is not Origin.SEED for key in fine) else None
    loose: set[str] = set()
    for nudge in (1, -1):  # of two equal numbers one is larger in the first, the other in the second
        made = again(placed, fine, seed, dtype, {}, weight, nudge)
        loose |= {key for key, t in fine.items() if not _is_alike(t, made[key].reshape(t.shape))}
    return loose


def _is_alike(tensor: Tensor, made: Tensor) -> bool:
    """Whether two tensors that are both here differ by rounding at most: places not at all."""
    if not tensor.is_floating_point():
        return torch.equal(tensor.cpu(), made)
    return is_rounding(departure(tensor.detach().cpu(), made.detach()), tensor.dtype)


class Remade:
    """Makes the tensors that a saved adapter does not hold; `rounded` are those that are off by rounding."""

    def __init__(self, surgeon: Surgeon, saved: Saved):
        self.surgeon, self.saved, self.rounded = surgeon, saved, dict[str, float]()
        self.of_rounded: set[str] = set()  # what is made of W in a narrower dtype than it has here
        self._shared: dict[str, Tensor] = {}
        self._agreed: set[str] = set()  # of what is shared, one comparison is enough

    def names(self, placed: Placed) -> dict[str, str]:
        """The names of what is made for a weight, by key."""
        names = {leaf.key: self.surgeon.name_of(placed, leaf.key) for leaf in placed.formula.leaves if leaf.frozen}
        return {key: name for key, name in names.items() if name in self.saved.remade}

    def of(self, placed: Placed, read: Callable[[], Tensor]) -> dict[str, Tensor]:
        """The tensors of a weight by key; `read` gives the stored W. Raises: SurgeryError (not-remade)."""
        return self._made(placed, None) | self._made(placed, read)

    def drawn(self, placed: Placed) -> dict[str, Tensor]:
        """Those for which W is not read. Raises: SurgeryError (not-remade)."""
        return self._made(placed, None)

    def of_weight(self, placed: Placed, stored: Tensor) -> dict[str, Tensor]:
        """Those for which W is read. Raises: SurgeryError (not-remade)."""
        return self._made(placed, lambda: stored)

    def _made(self, placed: Placed, read: Callable[[], Tensor] | None) -> dict[str, Tensor]:
        rules = follows(placed)
        names = {key: name for key, name in self.names(placed).items()
                 if (rules[key] is Origin.SEED) is (read is None)}
        if not names:
            return {}
        stored = None
        if read:
            stored = self._as_it_was(placed, now := read())
            self.of_rounded |= {*names.values()} if stored.dtype != now.dtype else set()
        made = again(placed, names, self.saved.meta["seed"], getattr(torch, self.saved.meta["dtype"]), self._shared,
                     stored)
        made = {key: as_held(t) for key, t in made.items()}
        for key, tensor in made.items():
            if names[key] in self._agreed:
                continue
            change = departure_from_summary(self.saved.remade[names[key]], tensor)
            is_base = rules[key] is Origin.SEED or stored is not None and fingerprint_of(stored) == self._known(placed)
            if change and not (is_base and tensor.is_floating_point() and is_rounding(change, tensor.dtype)):
                raise self._refused(placed, names[key], change, is_base, stored)
            self._agreed.add(names[key])
            if change:
                self.rounded[names[key]] = change
        return made

    def warnings(self) -> list[Diagnostic]:
        if not self.rounded:
            return []
        return [Diagnostic("not-remade", f"{counted(len(self.rounded), 'frozen tensor')} of the adapter in "
                           f"{self.saved.folder} {'was' if len(self.rounded) == 1 else 'were'} made again, and "
                           f"differ{'s' * (len(self.rounded) == 1)} by rounding from what it was trained with, by up "
                           f"to {max(self.rounded.values()):.1e}: {listed([*self.rounded])}", severity="warning",
                           notes=self._versions(),
                           helps=("saved with self_contained=True (`--self-contained`), they are the same bits",))]

    def _known(self, placed: Placed) -> str | None:
        return self.saved.meta.get("base_weights", {}).get(placed.site.weight_name)

    def _as_it_was(self, placed: Placed, stored: Tensor) -> Tensor:
        """W in the dtype that it was trained in, where the one that it has here holds all of its numbers."""
        said = (self._known(placed) or "").partition(" ")[0]
        then = getattr(torch, said) if said else stored.dtype
        return stored.to(then) if torch.promote_types(then, stored.dtype) == stored.dtype else stored

    def _versions(self) -> tuple[str, ...]:
        then = self.saved.meta.get("torch_version")
        return () if then == torch.__version__ else (
            f"it was made with torch {then}, and here it is {torch.__version__}",)

    def _refused(self, placed: Placed, name: str, change: float, is_base: bool, stored: Tensor | None) -> Exception:
        notes, known = [*self._versions()], self._known(placed)
        helps = ["save it with self_contained=True (`--self-contained`) where it can be attached"]
        if not is_base and stored is not None:
            then = (known or "").partition(" ")[0]
            narrower = then and then != dtype_text(stored.dtype)
            notes[:0] = [f"it follows from {placed.site.weight_name}, which was {then} then and is "
                         f"{dtype_text(stored.dtype)} here" if narrower else
                         f"it follows from {placed.site.weight_name}, which is not the one that it was trained on"]
            helps[:0] = [f"load the base model in {then}" if narrower else
                         "load the model, and the revision of it, that the adapter was trained on"]
        off = "it has other places" if change == float("inf") else f"it differs by {change:.1e}"
        return fail("not-remade", f"{name}, which the adapter in {self.saved.folder} does not hold but has made again, "
                    f"comes out otherwise here: {off}", notes=tuple(notes), helps=tuple(helps))
