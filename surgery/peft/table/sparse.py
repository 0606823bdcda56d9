"""The rows of PEFT's methods that train numbers at chosen places: of the weight, of its spectrum, of its wavelets."""

from __future__ import annotations

import torch

from surgery.peft.table.additive import linears
from surgery.peft.table.method import NO_BIAS, OFF, Config, Family, Method, Renamed
from surgery.peft.tensor_mapping import PLACES, ROW_AND_COLUMN, ROW_AND_COLUMN_32, SAME, Place, View, pairs

_COUNTS = {"n_frequency": "n_frequency_pattern"}
_FOURIER = Family("FOURIERFT", "FourierFTConfig", {"bias": NO_BIAS}, patterns=_COUNTS, biases="fourier_only")
_WAVE = Family("WAVEFT", "WaveFTConfig", {"bias": NO_BIAS, "wavelet_family": ("db1",), "use_idwt": (True,),
                                         "proportional_parameters": OFF}, patterns=_COUNTS, biases="waveft_only")
_SHIRA = Family("SHIRA", "ShiraConfig", {})
_SUPER = Family("SUPERTUNING", "SupertuningConfig", {"r": (None,), "select_top": (True, None)})
_SPECTRUM = Renamed({"count": "n_frequency", "scale": "scaling"})

# PEFT's WaveFT with `use_idwt = False`: the numbers are entries of the weight itself.
_WAVE_OFF = """
update scaled_entries(count: int, scale: float) {
  frozen param at[count] ~ sample(of = out * in)
  param c[count] = 0
  return scale * scatter(c, at, out, in)
}
spec waveft_without_waves(count: int = 2592, scale: float = 25)
target any "**" {
  add scaled_entries(count, scale)
}
"""


def _drawn(name: str):
    """The first places, as rows and columns, of a random order of all entries; the same in every module of one shape.
    """

    def first(config: Config, place: Place) -> torch.Tensor:
        # On the CPU whatever the model is on: the order that a seed gives is another one on each kind of device.
        generator = torch.Generator().manual_seed(config["random_loc_seed"])
        at = torch.randperm(place.out * place.in_, generator=generator, device="cpu")[:config["n_frequency"]]
        return torch.stack([at // place.in_, at % place.in_])

    return lambda config, places: [{name: first(config, place)} for place in places]


def _quadrants(row: torch.Tensor, column: torch.Tensor, place: Place) -> tuple[torch.Tensor, torch.Tensor]:
    """A place in the coefficients with the two off-diagonal quadrants exchanged: PEFT's upper right one is that of
    differences between rows, ours that of differences between columns.
    """
    m, n = place.out // 2, place.in_ // 2
    upper_right, lower_left = (row < m) & (column >= n), (row >= m) & (column < n)
    return row + m * upper_right - m * lower_left, column - n * upper_right + n * lower_left


def _own_places(at: torch.Tensor, place: Place) -> torch.Tensor:
    row, column = at
    return ROW_AND_COLUMN.to_ours(torch.stack(_quadrants(row, column, place)), place)


def _pefts_places(at: torch.Tensor, place: Place) -> torch.Tensor:
    row, column = ROW_AND_COLUMN.to_peft(at, place)
    return torch.stack(_quadrants(row, column, place))


def _odd(config: Config, place: Place) -> str:
    return "PEFT pads a side that is odd" if place.out % 2 or place.in_ % 2 else ""


PLACED: tuple[Method, ...] = (
    Method("fourierft", _FOURIER, "fourierft", _SPECTRUM, linears(pairs(
        ("fourierft_spectrum", "add_spectrum.c", SAME), ("indices", "add_spectrum.at", ROW_AND_COLUMN))),
           again=_drawn("indices")),
    Method("waveft", _WAVE, "waveft", _SPECTRUM, linears(pairs(
        ("waveft_spectrum", "add_wavelets.c", SAME),
        ("waveft_indices", "add_wavelets.at", View(_own_places, _pefts_places)))),
           refuses=_odd, again=_drawn("waveft_indices")),
    Method("waveft without waves", _WAVE, _WAVE_OFF, _SPECTRUM, linears(pairs(
        ("waveft_spectrum", "add_scaled_entries.c", SAME),
        ("waveft_indices", "add_scaled_entries.at", ROW_AND_COLUMN))),
           {"use_idwt": False}, again=_drawn("waveft_indices")),
    Method("shira", _SHIRA, "shira", Renamed({"rank": "r"}), {"linear": pairs(
        ("shira_weight", "add_sparse.v", SAME), ("shira_indices", "add_sparse.at", ROW_AND_COLUMN_32))}),
    Method("supertuning", _SUPER, "supertuning", Renamed({"sparsity": "sparsity"}), {"linear": pairs(
        ("supertuning_values", "add_sparse_at_top.v", SAME), ("supertuning_indices", "add_sparse_at_top.at", PLACES))}),
)
