"""A formula on its way to the programs of one layer: the back half of the compiler, which can stop after each stage.

    formula -> normal form -> cheapest form -> candidates -> programs

Takes a formula, the kind of its layer and whether that adds a bias; gives each stage when it is asked for. Whoever
wants one (an adapter, a report, a merge, spectra, `check`, `show`) asks this object, so that what is told is what runs.
Promises: a value that can be copied and pickled; a stage is computed once for equal ones; no torch but for programs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from surgery.codegen.candidates import Candidate, by_tokens, candidates, weights
from surgery.codegen.cost_model import CPU, TOKENS_SUPPOSED, Machine
from surgery.codegen.row_blocks import RowBlocks, row_blocks
from surgery.ir.expression import Expr, Formula, in_evaluation, in_training, noises
from surgery.ir.notation import brief, listing
from surgery.layers.kinds import LayerKind, supposed
from surgery.rewrite.cheaper_forms import cheapest
from surgery.rewrite.normal_form import simplify

if TYPE_CHECKING:
    from surgery.codegen.program import Program

# The stages that are expressions, in order, as `Compiled.lines` and `surgery show --emit` call them.
STAGES = ("ir", "normal-form", "cheapest", "lowered")


@dataclass(frozen=True, repr=False)
class Compiled:
    """A formula for a layer of a `kind`; `has_bias`: the layer adds one, so that programs give its output with b'."""

    formula: Formula
    kind: LayerKind
    has_bias: bool

    @classmethod
    def supposed(cls, formula: Formula, word: str = "linear") -> Compiled:
        """For the kind of layer that a target names, where there is no model to ask. Its bias counts if the formula
        changes it, and layers of the kind add one."""
        kind = supposed(word)
        return cls(formula, kind, formula.changes_bias and not kind.takes_ids)

    def of_weight(self, weight: Expr) -> Compiled:
        """The same layer with another expression over the same leaves in the place of W', and no bias."""
        return Compiled(replace(self.formula, weight=weight), self.kind, has_bias=False)

    @property
    def normal_form(self) -> Formula:
        """The formula with every rule of the normal form applied."""
        return self._changed(simplify)

    @property
    def cheapest(self) -> Formula:
        """The formula in its cheapest known form, from which the candidates for training are made."""
        return self._changed(lambda expr: cheapest(in_training(expr)))

    @property
    def merged_form(self) -> Formula:
        """The cheapest form without dropout, from which W' itself is computed."""
        return self._changed(lambda expr: cheapest(in_evaluation(expr)))

    def _changed(self, change: Callable[[Expr], Expr]) -> Formula:
        return replace(self.formula, weight=change(self.formula.weight), bias=change(self.formula.bias))

    def candidates(self, training: bool = True, tokens: int = TOKENS_SUPPOSED,
                   machine: Machine = CPU) -> tuple[Candidate, ...]:
        """The equal programs of the layer's output as expressions over activations, first the one that runs for so
        many tokens on a machine."""
        return candidates(self.formula, self.kind, training, self.has_bias, tokens, machine)

    def by_tokens(self, training: bool = True, machine: Machine = CPU) -> tuple[tuple[float, Candidate], ...]:
        """Which candidate runs up to how many tokens, in rising order; empty where one runs for any number: in
        evaluation, and for a called layer, of which the user was told whether it copies the weight."""
        if not training or self.kind.is_called:
            return ()
        return by_tokens(self.candidates(training, machine=machine), machine)

    def program(self, training: bool = True, tokens: int = TOKENS_SUPPOSED, machine: Machine = CPU) -> Program:
        """The code of the layer's output: the cheapest for so many tokens on a machine, with those for other numbers in
        `up_to`."""
        from surgery.codegen.program import compiled

        best, *others = self.candidates(training, tokens, machine)
        return compiled(best, tuple(others), self.by_tokens(training, machine))

    @property
    def noises(self) -> tuple[Expr, ...]:
        """What a training step draws anew."""
        return noises(self.formula.weight, self.formula.bias)

    @property
    def weights(self) -> Program:
        """The code of W' (and b') themselves: for merging, and for layers that only their own forward knows."""
        from surgery.codegen.program import compiled

        return compiled(weights(self.formula, self.has_bias))

    @property
    def weight_rows(self) -> RowBlocks | None:
        """The same in runs of rows, where a row of W' rests on no other row of W."""
        return row_blocks(weights(self.formula, self.has_bias))

    @property
    def drawn_weights(self) -> Program:
        """The code of W' (and b') in a training step of a layer that only its own forward knows, noise given."""
        from surgery.codegen.program import compiled

        return compiled(weights(self.formula, self.has_bias, draws=True))

    def lines(self, stage: str, tokens: int = TOKENS_SUPPOSED) -> list[str]:
        """A stage (one of `STAGES`) as text, a distinct node a line. The last two need sizes that are numbers."""
        outputs: dict[str, Callable[[], tuple[Expr, ...]]] = {
            "ir": lambda: (self.formula.weight,), "normal-form": lambda: (self.normal_form.weight,),
            "cheapest": lambda: (self.cheapest.weight,), "lowered": lambda: self.candidates(True, tokens)[0].outputs}
        return listing(*outputs[stage]())

    def __repr__(self) -> str:
        return f"<Compiled: W' = {brief(self.formula.weight)} for a {self.kind.noun}>"
