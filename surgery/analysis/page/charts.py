"""Line charts as inline SVG, coloured by the page's style, so that they follow light and dark.

Takes curves; gives Markup. Promises: nothing outside of the drawing is referred to; each point says its value when
pointed at; the n-th label has the n-th colour (and dashes, where colours repeat) in all charts of a page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from surgery.analysis.spectra.curves import Curve
from surgery.html import Markup, tag

WIDTH, HEIGHT = 420, 270
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 26, 38
COLOURS = 8
_DOTS = 60  # a longer curve has no dots


@dataclass(frozen=True)
class Axis:
    """A range of values on a range of places; `is_log` for a logarithmic one,
    `whole` for ticks at whole numbers alone."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False
    whole: bool = False

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float, is_log: bool = False,
               whole: bool = False) -> Axis:
        low, high = min(values), max(values)
        if is_log:
            return cls(low / 1.1, high * 1.1, start, end, True)
        # A constant curve has no extent of its own, and an axis without one maps all values to a division by zero.
        margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
        return cls(low - margin, high + margin, start, end, whole=whole)

    def at(self, value: float) -> float:
        scale: Callable[[float], float] = math.log if self.is_log else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers within the range: powers of ten on a logarithmic axis, else about six at even distances."""
        if self.is_log:
            exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits, enough in (((1,), 3), ((1, 2, 5), 2)):  # halves and doubles where powers of ten are too few
                ticks = [10.0**e * digit for e in exponents for digit in digits]
                ticks = [tick for tick in ticks if self.low <= tick <= self.high]
                if len(ticks) >= enough:
                    return ticks
        # The step is the number 1, 2 or 5 times a power of ten that is next above; a layer or step of training has no
        # half. A logarithmic axis so short that it holds no two of the above is nearly even.
        rough = (self.high - self.low) / 6
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= rough)
        step = max(1.0, step) if self.whole else step
        return [step * i for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def chart(title: str, curves: Sequence[Curve], across: str, *, labels: Sequence[str] = (), whole: bool = False,
          is_log: bool = False) -> Markup:
    """One chart. `labels` are those of the page's legend, in order; `is_log` makes both axes logarithmic."""
    x = Axis.around([v for c in curves for v in c.x], LEFT, WIDTH - RIGHT, is_log, whole)
    y = Axis.around([v for c in curves for v in c.y], HEIGHT - BOTTOM, TOP, is_log)
    # The colour of a curve is its label's place in the legend, so that it is the same in every chart of the page.
    order = list(labels) or [c.label for c in curves]
    return tag("figure", tag(
        "svg", tag("text", title, x=LEFT - 44, y=14, class_="title"), *_grid(x, y),
        tag("text", across, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 4, class_="axis middle"),
        *(_line(curve, x, y, order.index(curve.label)) for curve in curves),
        viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"{title} over {across}"))


def _grid(x: Axis, y: Axis) -> list[Markup]:
    lines = [tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=_place(y.at(v)), y2=_place(y.at(v)), class_="grid")
             for v in y.ticks()]
    ups = [tag("text", _short(v), x=LEFT - 6, y=_place(y.at(v) + 4), class_="axis end") for v in y.ticks()]
    acrosses = [tag("text", _short(v), x=_place(x.at(v)), y=HEIGHT - BOTTOM + 16, class_="axis middle")
                for v in x.ticks()]
    return [*lines, *ups, *acrosses]


def _line(curve: Curve, x: Axis, y: Axis, number: int) -> Markup:
    # Each dot carries its value as a title, which browsers show when pointed at, without any script.
    places = [(_place(x.at(a)), _place(y.at(b))) for a, b in zip(curve.x, curve.y)]
    path = tag("polyline", points=" ".join(f"{a},{b}" for a, b in places))
    dots = [tag("circle", tag("title", f"{curve.label}: {_short(v)} at {_short(at)}"), cx=a, cy=b, r=2.5)
            for (a, b), at, v in zip(places, curve.x, curve.y)] if len(places) <= _DOTS else []
    return tag("g", path, *dots, class_=colour(number))


def colour(number: int) -> str:
    """The classes of the n-th curve."""
    return f"curve c{number % COLOURS}{f' d{number // COLOURS}' if number >= COLOURS else ''}"


def legend(labels: Sequence[str]) -> Markup:
    """What the colours mean; none for one curve alone."""
    key = [tag("li", tag("svg", tag("g", tag("line", x1=0, x2=22, y1=6, y2=6), class_=colour(i)), viewBox="0 0 22 12"),
               label)
           for i, label in enumerate(labels)]
    return tag("ul", *key, class_="legend")


def _place(value: float) -> str:
    return f"{value:.1f}"


def _short(value: float) -> str:
    """A tick's or a point's number in few letters: `0.25`, `1200`, `1e-5`."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e").replace(".0e", "e")
    return f"{value:.4g}"
