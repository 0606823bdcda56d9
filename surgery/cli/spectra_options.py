"""What `surgery spectrum` and `surgery report` share: their options, and the spectra of a saved adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from surgery.cli.output import Output
from surgery.text import counted, figure_text

if TYPE_CHECKING:
    from surgery.analysis.spectra import Spectra
    from surgery.analysis.spectra.updates import Pending

base_option = click.option("--base", metavar="MODEL",
                           help="The adapter's base model, if not the one that it was saved for.")
squared_option = click.option("--squared", is_flag=True, help="Entropies of σ² / Σ σ² instead of σ / Σ σ.")


def measured_spectra(output: Output, pending: Sequence[Pending], squared: bool, top: int) -> Spectra:
    from surgery.analysis.spectra import gathered

    return gathered(pending, squared, top, lambda weights: output.track(weights, "measuring"))


def adapter_updates(output: Output, folder: str, base: str | None) -> list[Pending]:
    from surgery.analysis.spectra.updates import of_surgeon
    from surgery.cli.opened_weights import opened_adapter

    found = opened_adapter(output, folder, base)
    return of_surgeon(found.surgeon, found.read, found.leaves)


def summary_line(spectra: Spectra) -> str:
    changed = len(spectra.rows) - len(spectra.unchanged)
    if not changed:
        return f"{counted(len(spectra.rows), 'weight')}, none of them changed"
    means = spectra.total.means
    entropy, stable, effective = (figure_text(means[f]) for f in ("entropy", "stable_rank", "effective_rank"))
    return (f"{counted(changed, 'changed weight')}: entropy {entropy}, {means['normalised_entropy']:.0%} of the "
            f"possible; stable rank {stable}; effective rank {effective} (means)")
