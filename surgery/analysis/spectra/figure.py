"""The style of our pictures, and how they are written to a file.

Takes a file's name; gives a figure to draw on, and writes it. Promises: the same drawing gives the same file; no
display is needed. Needs the extra `plot`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

GRID, MARK = "#e5e5e5", "#2a6fbb"
_INK = "#333333"
_STYLE: dict[RcKeyType, Any] = {
          "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#999999",
          "text.color": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
          "legend.frameon": False, "svg.hashsalt": "surgery", "svg.fonttype": "path"}
# A date in the file would make it another one every day.
_DATELESS = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


@contextmanager
def picture(file: Path, size: tuple[float, float], title: str) -> Iterator[Figure]:
    """A figure of `size` inches, written when the block ends well. The ending of the name says the format."""
    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        figure.suptitle(title, fontsize=10)
        figure.savefig(file, metadata=_DATELESS.get(file.suffix), dpi=150)
