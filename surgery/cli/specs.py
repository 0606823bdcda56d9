"""`surgery specs`: list the specs that ship."""

from __future__ import annotations

import click

from surgery.cli.options import command
from surgery.cli.output import Output

# As `planning.families` has them, which takes long to import.
_FAMILIES = ("additive", "multiplicative", "orthogonal", "diagonal", "magnitude", "spectral", "kronecker", "hadamard",
             "sparse", "shared", "bias", "unfrozen")


@command(click.option("--family", type=click.Choice(_FAMILIES), help="Those of one family alone."),
         example="surgery specs --family orthogonal")
def specs(output: Output, family: str | None) -> None:
    """List the specs that ship, one a line.

    With what each trains on a linear layer [1024, 4096], how it runs (on activations, with a built weight, or dense),
    and what a training step costs by the cost model, as a multiple of the frozen layer's. What has G or C under
    data starts at what a calibration set gives (`surgery apply --data`). Families are told from the formulas; a spec
    may be of several.
    """
    from surgery.planning.families import FAMILIES
    from surgery.planning.shipped_specs import catalogue

    entries = [entry for entry in catalogue() if family in (None, *entry.families)]
    rows = [("spec", "trains", "runs", "step", "data", "formula")]
    for entry in entries:
        # a library of definitions trains nothing itself and has no step
        trains = f"{entry.parameters:,}" if entry.parameters is not None else ""
        step = f"{entry.step_ratio:.2f} x" if entry.step_ratio is not None else ""
        rows.append((entry.name, trains, entry.program, step, " ".join(entry.data), entry.description))
    if family:
        output.note(f"{family}: {FAMILIES[family].means}")
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        output.say("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths)).rstrip())
    output.data(specs=[entry.to_json() for entry in entries])
