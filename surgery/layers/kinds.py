"""Kinds of layers: what programs, estimates and messages ask of a layer, whatever module it is.

A row says what a layer's input is and how its map meets it. Promises: no torch, so that `check` can ask too. A further
kind is a row here, a view of its weight in `layouts` and a frozen map in `runtime.frozen_layers`; no other code
compares kinds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LayerKind:
    """One kind of layer. `word` is what a target says for it, and `noun` what messages call one.

    `acts_by_rows`: its input is rows of `in` features and its map x Wᵀ, so that a matrix can act on them before W does.
    Elsewhere a matrix stands in W's place or acts on what comes out. `takes_ids`: its input is token ids, which look
    rows of W up: the map is Wᵀ, and nothing has a gradient there. `is_called`: W is not stored, and is what calls of
    the module say. `is_gain`: W is a vector of gains, seen as a column [n, 1]; only a target that says the word takes
    such layers, and they run their own forward with W' in W's place. `groups`: the rows of W are as many equal runs,
    and those of each run see their own part of the input alone: W is [out, in], with `in` what one row sees.
    """

    name: str
    word: str
    noun: str
    acts_by_rows: bool = False
    takes_ids: bool = False
    is_called: bool = False
    is_gain: bool = False
    groups: int = 1

    @property
    def is_product(self) -> bool:
        """True if the layer's map is a product with a stored W; its body and gradients then run as one node of
        autograd."""
        return self.acts_by_rows and not self.is_called

    def is_large(self, shape: tuple[int, ...], out: int, in_: int) -> bool:
        """True if a matrix of that shape is not thin beside the map's own, over the whole input. W' of a layer in
        groups is that map's matrix without its zeros, and never large."""
        return 2 * min(shape) > min(out, self.groups * in_) and (self.groups == 1 or {*shape} != {out, in_})

    @property
    def note(self) -> str:
        """A further description of the weight beside its two sides: `in 4 groups`."""
        return f"in {self.groups} groups" if self.groups > 1 else ""


LINEAR = LayerKind("linear", "linear", "linear layer", acts_by_rows=True)
CALLED = replace(LINEAR, name="called linear", is_called=True)
CONV = LayerKind("convolution", "conv", "convolution")
EMBEDDING = LayerKind("embedding", "embedding", "embedding", takes_ids=True)
GROUPED = replace(CONV, name="grouped convolution", groups=2)  # of a module, with as many as it has
NORM = LayerKind("norm", "norm", "norm layer", is_gain=True)
KINDS = (LINEAR, CALLED, CONV, GROUPED, EMBEDDING, NORM)
NOUNS = {kind.word: kind.noun for kind in KINDS} | {"any": "layer"}


def supposed(word: str) -> LayerKind:
    """The kind of layer that costs are estimated for before there is a model: linear where any will do."""
    return next((kind for kind in KINDS if kind.word == word), LINEAR)
