"""Figures and names in words: what messages, reports and tables have in common.

Takes counts, sizes, measured values, names; gives texts. Promises: one form for each, everywhere; no torch.
"""

from __future__ import annotations

from collections.abc import Iterable


def plain(text: str, keep: str = "") -> str:
    """Text that does nothing but stand there: what is not printable, `keep` excepted, is shown by number, `\\u001b`.

    A name from a file may hold what moves a terminal's cursor, colours it, or turns the direction of writing. The form
    is one that JSON and Python read back.
    """
    if text.isprintable():
        return text
    shown = []
    for character in text:
        if character.isprintable() or character in keep:
            shown.append(character)
        else:  # beyond 16 bits it is two numbers, as JSON writes it; half of such a pair is one
            units = character.encode("utf-16-be", "surrogatepass")
            shown += [f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2)]
    return "".join(shown)


def said_by(error: BaseException) -> list[str]:
    """The lines of an error's message, or the name of its class where it has none."""
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]


def counted(number: int, noun: str) -> str:
    """`1 module`, `1,024 modules`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first names, marked as names, and how many more there are."""
    return some([f"`{name}`" for name in names], most)


def some(texts: Iterable[str], most: int = 3) -> str:
    """The first texts, and how many more there are: `a, b, c and 4 more`."""
    texts = list(texts)
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def some_lines(lines: Iterable[str], most: int = 8) -> list[str]:
    """The first lines, and behind them how many more there are: `and 4 more`."""
    lines = list(lines)
    return [*lines[:most], *([f"and {len(lines) - most} more"] if len(lines) > most else [])]


def size_text(count: int) -> str:
    """A size in bytes with its unit: `361 KiB`."""
    size, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.4g} {units[0]}"


def sides_text(out: int, in_: int, stack: int | None = None) -> str:
    """The sides of a matrix, `64 x 128`, or of those of a stack, `8 of 64 x 128`."""
    return f"{f'{stack} of ' if stack else ''}{out} x {in_}"


def figure_text(value: float | None) -> str:
    """A measured value in three figures, a count as it is: `2.71`, `0.061`, `4e-09`, `28`; `-` where there is none."""
    if value is None or isinstance(value, int) or not value:
        return "-" if value is None else str(int(value))
    if abs(value) < 0.001:
        return f"{value:.0e}"
    return f"{value:.{sum(abs(value) < limit for limit in (1, 10, 100))}f}"


def dtype_text(dtype: object) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")
