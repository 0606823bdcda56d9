"""Formulas as a page of a paper: what a target makes of a weight.

Takes a target and its formula (with symbolic sizes); gives lines of text. Promises: each symbol means one thing; what
is not written out in the first line stands below it, every parameter with its shape and its start.
"""

from __future__ import annotations

from dataclasses import dataclass

from surgery.ir.expression import Draw, Expr, Formula, Leaf, noises, walk
from surgery.ir.notation import Maths, parts_to_name
from surgery.ir.notation_forms import number_text
from surgery.ir.operations import operation, shape_text
from surgery.ir.table import Source
from surgery.language.formatter import expression_text
from surgery.language.tree import Spec, Step, Target
from surgery.semantics.resolved_spec import resolved

_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
_RESERVED = ("W", "I")
_OPERANDS = "XZYHSTUV"  # what a step acts on is called by the first of these that a formula does not have
_SHORT = 24  # an update whose text is no longer stands in the first line
Row = tuple[str, str]
_SHARERS = {"target": "the modules of the target", "module": "the steps of the module",
            "layer": "the modules of a layer", "model": "all modules"}


@dataclass(frozen=True)
class Made:
    """A step with the expression that its definition returned, and the operand that it calls `W`."""

    step: Step
    expr: Expr
    operand: Expr
    times: str = ""

    @property
    def dropout(self) -> float:
        return self.expr.data[0] if operation(self.expr).is_transparent else 0.0

    @property
    def plain(self) -> Expr:
        """The expression without dropout."""
        return self.expr.args[0] if operation(self.expr).is_transparent else self.expr


# ------------------------------------------------------------------------------------------------------ symbols


class Page:
    """The symbols of a formula and its lines: updates' parameters are named first, then transforms, then the rest."""

    def __init__(self, target: Target, formula: Formula):
        self.formula = formula
        self.steps = [Made(part.step, part.expr, part.operand, part.times) for part in formula.parts]
        self.symbols: dict[Expr, str] = {}
        self.operand_symbols: dict[Expr, str] = {}
        # A short update (`s B A`) says more in the first line than a symbol that stands for it. A transform never
        # stands there in full: the line would no longer show what is multiplied with what.
        self.written_out = [
            made for made in self.steps if operation(made.plain).source is Source.ADAPTER
            or made.step.placement == "add" and made.plain.unfolded <= 2 * _SHORT
            and len(Maths({}).text(made.plain)) <= _SHORT]
        for made in self.written_out:
            self._name_leaves(made.plain)
        for made in self.steps:
            if made not in self.written_out:
                self.symbols.setdefault(made.plain, self._free(*self._wishes(made)))
        for expr in (*(made.plain for made in self.steps), *(leaf.expr for leaf in self.formula.leaves)):
            self._name_leaves(expr)
        self.operands = list(dict.fromkeys(m.operand for m in self.steps if self._reads(m)))
        letter = next((c for c in _OPERANDS if c not in self.symbols.values()), "X'")
        self.operand_symbols = {o: _numbered(letter, i) for i, o in enumerate(self.operands)}
        # What several lines have in common gets a symbol last, when it is known how the lines are written.
        starts = (leaf.init for leaf in self.formula.leaves if leaf.init is not None)
        written = (self.formula.weight, self.formula.bias, *self.operands, *(m.plain for m in self.steps), *starts)
        self.parts = parts_to_name(written, {**self.symbols, **self.operand_symbols})
        for part in self.parts:
            self.symbols[part] = self._free("S")

    def _name_leaves(self, expr: Expr) -> None:
        for node in walk(expr):
            if operation(node).source in (Source.ADAPTER, Source.DRAWN) and node not in self.symbols:
                key = node.data.key if operation(node).source is Source.DRAWN else node.data
                self.symbols[node] = self._free(key.rpartition(".")[2])

    def _wishes(self, made: Made) -> list[str]:
        """An orthogonal matrix is P, Q or R; anything else goes by its definition's initials, or is T or U."""
        words = [w[0].upper() for w in made.step.call.function.split("_") if w[:1].isalpha()]
        return [*("PQR" if "orthogonal" in self._claims(made) else ""), *words,
                "U" if made.step.placement == "add" else "T"]

    def _claims(self, made: Made) -> list[str]:
        return list(dict.fromkeys(c.name for c in self.formula.claims if c.expr is made.plain))

    def _free(self, *wishes: str) -> str:
        """The first wish that is not taken, else the first one numbered."""
        taken = {*_RESERVED, *self.symbols.values(), *self.operand_symbols.values(),
                 *(["b"] if self.formula.changes_bias else [])}
        numbered = (_numbered(wishes[0], i) for i in range(1, len(taken) + 2))
        return next(s for s in (*wishes, *numbered) if s not in taken)

    def _reads(self, made: Made) -> bool:
        """Whether a step names an operand that is not the frozen weight."""
        return operation(made.operand).source is not Source.LAYER and any(n is made.operand for n in walk(made.expr))

    # ---------------------------------------------------------------------------------------------------- lines

    def lines(self) -> list[str]:
        """The equations, and below them what each symbol stands for."""
        operands = Maths(self.symbols)  # the W of a step is written out, and not with the symbol that it gives itself
        maths = Maths({**self.symbols, **self.operand_symbols})
        first = maths if self.parts else operands
        equations = [f"W' = {first.text(self.formula.weight)}"]
        if self.formula.changes_bias:
            equations.append(f"b' = {first.text(self.formula.bias)}")
        # Reversed, so that of the steps that read an operand the first one is named.
        readers = {m.operand: f"the W of {_step_text(m.step)}" for m in reversed(self.steps) if self._reads(m)}
        rows = [(f"{self.operand_symbols[o]} = {operands.text(o)}", readers[o]) for o in self.operands]
        rows += [(f"{self.symbols[m.plain]} = {maths.text(m.plain)}",
                  ", ".join([_step_text(m.step), *filter(None, [m.times]), *self._claims(m)]))
                 for m in self.steps if m not in self.written_out]
        rows += [(f"{self.symbols[part]} = {maths.text(part)}", "") for part in reversed(self.parts)]
        rows += map(self._leaf_row, self.formula.leaves)
        rows += map(self._noise_row, noises(self.formula.weight, self.formula.bias))
        width = min(max((len(left) for left, _ in rows), default=0), 64)  # a very long line moves no other note
        dropouts = [f"{operands.short(m.plain)} reads its input with dropout {number_text(100 * m.dropout)}%"
                    for m in self.steps if m.dropout]
        lines = [f"{left:{width}}   {right}".rstrip() for left, right in rows]
        return [*equations, *(f"  {line}" for line in (*lines, *dropouts))]

    def _leaf_row(self, leaf: Leaf) -> Row:
        maths = Maths({**self.symbols, **self.operand_symbols})
        shape = f" {shape_text(leaf.shape)}" if leaf.shape else ""
        start = f"= {maths.short(leaf.init)}" if leaf.init is not None else f"~ {_draw_text(leaf.law)}"
        notes = ["frozen"] * leaf.frozen + [f"shared by {_SHARERS[leaf.scope]}"] * bool(leaf.group)
        notes += [f"rate {number_text(leaf.rate)}"] * (leaf.rate != 1) + ["no decay"] * (not leaf.decays)
        notes += [f"kept on {leaf.manifold}"] * bool(leaf.manifold)
        return f"{self.symbols[leaf.expr]}{shape} {start}", ", ".join(notes)

    def _noise_row(self, noise: Expr) -> Row:
        shape = f" {shape_text(noise.shape)}" if noise.shape else ""
        return (f"{self.symbols[noise]}{shape} ~ {_draw_text(noise.data.law)}",
                "drawn anew in every training step, its mean otherwise")


def formulas(spec: Spec) -> list[tuple[Target, Formula]]:
    """Each target with its formula for a weight of any size. Raises: SurgeryError with all that is wrong."""
    return resolved(spec).formulas()


def formula_lines(target: Target, formula: Formula) -> list[str]:
    """The page of one target."""
    return Page(target, formula).lines()


def _step_text(step: Step) -> str:
    return f"{step.placement} {expression_text(step.call)}"


def _numbered(symbol: str, index: int) -> str:
    return symbol if not index else symbol + str(index + 1).translate(_SUBSCRIPTS)


def _draw_text(law: Draw) -> str:
    return f"{law.distribution}({', '.join(f'{name} = {number_text(value)}' for name, value in law.arguments)})"
