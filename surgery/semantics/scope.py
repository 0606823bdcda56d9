"""What a name in scope may stand for, and how messages speak of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Any

from surgery.diagnostics import Collector, Span, SurgeryError, did_you_mean, fail
from surgery.ir import sizes
from surgery.ir.expression import Expr
from surgery.ir.operations import FUNCTIONS, is_whole, shape_text
from surgery.ir.sizes import Dim
from surgery.language.other_languages import instead_of
from surgery.language.tree import Call, Definition
from surgery.semantics.distributions import DISTRIBUTIONS

UNDECIDED = object()  # a truth value or a text that is not known yet
POISON = object()  # the value of a name whose own statement failed and was reported
_LONGEST = 100  # characters of a value in a message
NUMBERS = (int, Fraction, float, Dim)


class Poisoned(Exception):
    """A value rests on a name that was already reported; nothing more to say."""


class Body(dict[str, Any]):
    """The names in the body of a definition, where other definitions may be called: `known` are those, and
    `call(call, name)` is what one returns there, `name` being its own among the calls of the body."""

    def __init__(self, values: Mapping[str, Any], known: Mapping[str, Definition], call: Callable[[Call, str], Expr]):
        super().__init__(values)
        self.known, self.call = known, call
        self.inside: dict[str, str] = {}  # what a round of a `for` above named, with that `for`
        self._counts: dict[str, int] = {}

    def named(self, function: str) -> str:
        """A name for the next call of a definition, in the order of the text: `low_rank`, `low_rank_2`."""
        self._counts[function] = count = self._counts.get(function, 0) + 1
        return function if count == 1 else f"{function}_{count}"


def describe(value: Any) -> str:
    """What a value is, in words for a message."""
    if isinstance(value, Expr):
        what = "places" if is_whole(value) else "a tensor"
        return f"{what} {shape_text(value.shape)}" if value.shape else "a scalar tensor"
    if value is UNDECIDED:
        return "a truth value or a text"
    names = {bool: "bool", int: "int", Fraction: "float", str: "str", Dim: "size"}
    return f"{'float' if sizes.is_real(value) else names[type(value)]} `{text(value)}`"


def text(value: Any) -> str:
    """A value as a spec would write it, a long one cut."""
    written = str(value).lower() if isinstance(value, bool) else (
        value.rounded if isinstance(value, Dim) else str(value))
    return written if len(written) <= _LONGEST else f"{written[:_LONGEST - 3]}..."


def unknown(code: str, what: str, name: str, known: Iterable[str], span: Span | None,
            helps: tuple[str, ...] = ()) -> SurgeryError:
    """The error for a name that is not among the known ones. `helps` say what to write instead where that is known, as
    it is of what other languages call a thing; then nothing is guessed."""
    # What another language calls it says for certain what was meant; how it is spelt is a guess.
    known = sorted(known)
    if code == "unknown-name" and name in FUNCTIONS:
        helps = (*helps, f"`{name}` is a function: `{name}(...)`")
    if code == "unknown-primitive" and name in DISTRIBUTIONS:
        helps = (*helps, f"`{name}` is a draw, which stands behind `~` alone: `param z[m, n] ~ {name}(...)`; a `let` "
                 "or a later start computes with it")
    if code == "unknown-distribution" and name in FUNCTIONS:
        helps = (*helps, f"what is computed stands behind `=`: `param z[m, n] = {name}(...)`")
    if instead := instead_of(name, drawn=code == "unknown-distribution"):
        helps = (*helps, instead)
    label = "" if helps else did_you_mean(name, known)
    notes = (f"known here: {', '.join(known)}",) if known and not helps else ()
    if code == "unknown-name" and not helps and not label:
        helps = (f"what a definition is given stands in its header, `({name}: float = 1)`, and a target passes it",)
    return fail(code, f"unknown {what} `{name}`", span, label=label, notes=notes, helps=helps)


#: What a name means that nothing declares.
MEANINGS = {"out": "the number of rows of W", "in": "the number of columns of W", "W": "the weight", "b": "the bias",
             "layer": "the module's index in its list of layers", "depth": "how deep the module's layer lies, 0 to 1"}
#: What a name means in what a parameter starts at, where the definition has none like it.
OF_DATA_MEANINGS = {"G": "the gradient of the loss in W, of data", "C": "Σ x xᵀ over the layer's inputs, of data"}
_IN_A_LIST = "the module stands in a list of layers"
_BY_HEADS = "an attention around the module, or its configuration, says it"
#: The names that the steps of a target have for facts about the module, each with the condition that it is known.
OF_A_MODULE = {"layer": _IN_A_LIST, "depth": _IN_A_LIST, "layers": _IN_A_LIST, "heads": _BY_HEADS,
               "head_size": _BY_HEADS, "kernel": "there is a module"}
#: The names that neither a parameter of a spec nor a `for` of a target can have. (Those that came later are not among
#: them: an older spec may have a parameter `heads`.)
TAKEN_IN_TARGETS = ("out", "in", "layer", "depth")


def known_elsewhere(name: str) -> tuple[str, ...]:
    """What to do where a name is read that means something elsewhere: in an update `on bias`, or in the steps of a
    target, and there not of every module."""
    if name == "b":
        return ("`b` is the bias, which an update `on bias` reads",)
    if name not in OF_A_MODULE:
        return ()
    return (f"the steps of a target know `{name}`, where {OF_A_MODULE[name]}; a definition gets it as an argument: "
            f"`definition({name} = {name})`",)


def assert_is_free(name: str, taken: Iterable[str], span: Span | None, report: Collector) -> None:
    """Report a name that something is given and that means something already where it would be read."""
    if name in taken:
        report.error("duplicate-name", f"`{name}` is {MEANINGS[name]} here, and cannot name anything else", span,
                     helps=("give it another name",))
