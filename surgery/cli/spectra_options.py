"""What `surgery spectrum` and `surgery report` share: their options, and the spectra of a saved adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from surgery.cli.options import import_libraries
from surgery.cli.output import Output

if TYPE_CHECKING:
    from surgery.analysis.saved_weights import Asked
    from surgery.analysis.spectra import Track

base_option = click.option("--base", metavar="MODEL",
                           help="The adapter's base model, if not the one that it was saved for.")
squared_option = click.option("--squared", is_flag=True, help="Entropies of σ² / Σ σ² instead of σ / Σ σ.")


def asked(output: Output, *folders: str) -> Asked:
    """How models are opened, for adapters in `folders`: with what this run shows of it."""
    from surgery.analysis.saved_weights import Asked

    import_libraries(output, *folders)
    return Asked(output.trust, output.busy, output.note)


def tracked(output: Output) -> Track:
    return lambda weights: output.track(weights, "measuring")
