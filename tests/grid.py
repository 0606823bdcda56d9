"""The grid of the weight-conditioning paper (arXiv 2511.00051): every placement with every transformation, on either side.

`python tests/grid.py` writes the specs of examples/grid.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "examples" / "grid"
SIDES = {"out": ("T W", "T (W + s B A)"), "in": ("W T", "(W + s B A) T")}
TRANSFORMS = {
    "diagonal": ("diagonal()", "a gain for each {row}"),
    "scale": ("scale()", "one gain for all"),
    "orthogonal": ("orthogonal()", "the Cayley rotation of a skew matrix of rank 4"),
    "skew": ("skew_rotation()", "that rotation to first order, as SORA's code has it"),
    "block": ("block_orthogonal()", "a rotation for each block of 32"),
    "householder": ("householder()", "a product of reflections"),
    "magnitude": ("magnitude()", "a trained norm for each {row}"),
}
# DoRA's magnitude is of rows: on the other side it is of columns.
COLUMNS = """
transform column_magnitude() on n : diagonal {
  param m[n] = col_norm(W)
  return diag(m / detach(col_norm(W)))
}
"""


def specs() -> dict[str, str]:
    """Each spec's text, by its name."""
    return {f"{placement}_{name}_{side}": _text(placement, side, name)
            for placement, side, name in product(("pre", "post"), SIDES, TRANSFORMS)}


def _text(placement: str, side: str, name: str) -> str:
    call, what = TRANSFORMS[name]
    row, of_columns = ("row", False) if side == "out" else ("column", name == "magnitude")
    step = f"{placement} {'column_' * of_columns}{call}{' on in' * (side == 'in')}"
    update = "low_rank(rank, alpha) dropout(dropout)"
    is_pre = placement == "pre"
    first, second = (step, f"add {update}") if is_pre else (f"add  {update}", step)
    formula = f"{SIDES[side][0]} + s B A" if is_pre else SIDES[side][1]
    return (f"# {placement.capitalize()}, on {side}: W' = {formula}, T {what.format(row=row)}\n"
            f"spec {placement}_{name}_{side}(rank: int = 16, alpha: float = 32, dropout: float = 5%)\n"
            f"{COLUMNS * of_columns}\ntarget linear {{\n  {first}\n  {second}\n}}\n")


if __name__ == "__main__":
    for spec, text in specs().items():
        (FOLDER / f"{spec}.surg").write_text(text, encoding="utf-8")
