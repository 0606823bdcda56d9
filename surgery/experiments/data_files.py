"""Data files as rows: TSV, CSV, JSON Lines, a JSON list, Parquet, and plain text.

Takes a path; gives its columns and rows. Promises: a value is what the file holds (text, in TSV and CSV; TSV has no
quotes, as GLUE has it); every row says where it stands; what is wrong is told with every line that it is wrong on.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from surgery.diagnostics import Collector, did_you_mean, fail
from surgery.experiments.hub_data import HUB, hub_rows
from surgery.extras import need

_LONGEST_CELL = 1 << 30  # characters; csv would stop at 131,072


@dataclass(frozen=True)
class Rows:
    """The rows of a file, or of a data set by name. `places` says where each stands: its line, or its number where a
    file has no lines."""

    file: Path | str
    columns: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]
    places: tuple[int, ...]

    @property
    def name(self) -> str:
        """What the rows are called beside others."""
        return self.file.removeprefix(HUB) if isinstance(self.file, str) else self.file.stem

    def has(self, *columns: str) -> bool:
        return set(columns) <= set(self.columns)

    def column(self, name: str, *kinds: type) -> list[Any]:
        """The values of a column: texts, or of these kinds. Raises: SurgeryError (bad-data) with the rows that have
        another or none, or with the columns that are there."""
        if name not in self.columns:
            raise fail("bad-data", f"{self.file} has no column `{name}`, only {', '.join(self.columns)}",
                       helps=tuple(filter(None, [did_you_mean(name, self.columns)])))
        kinds = kinds or (str,)
        self.refuse(f"has no `{name}` that is {_KINDS[kinds[0]]}",
                    [not isinstance(row.get(name), kinds) for row in self.rows])
        return [row[name] for row in self.rows]

    def refuse(self, what: str, wrong: Sequence[bool], *helps: str) -> None:
        """Raises: SurgeryError (bad-data) for the rows of which `what` is said, if there are any."""
        places = [place for place, is_wrong in zip(self.places, wrong) if is_wrong]
        more = f", and so {'has' if len(places) == 2 else 'have'} {len(places) - 1} more" if len(places) > 1 else ""
        if places:
            raise fail("bad-data", f"{self.file}:{places[0]} {what}{more}", helps=helps)


_KINDS: dict[type, str] = {str: "a text", list: "a list", int: "a whole number"}


def read_rows(path: str | PathLike) -> Rows:
    """The rows of a data file, which its ending tells how to read, or of `hub:NAME`, as `hub_data` has it.

    Raises: SurgeryError (missing-file; missing-extra; bad-data)."""
    if str(path).startswith(HUB):
        columns, values = hub_rows(str(path))
        if not values:
            raise fail("bad-data", f"{path} holds no row")
        return Rows(str(path), columns, tuple(values), tuple(range(1, len(values) + 1)))
    file = Path(path)
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise fail("bad-data", f"{file} is of no kind that is read: its name ends in none of {', '.join(_READERS)}")
    try:
        found = reader(file)
    except OSError as error:
        raise fail("missing-file", f"cannot read {file}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise fail("bad-data", f"{file} is not UTF-8 at byte {error.start}") from None
    if not found.rows:
        raise fail("bad-data", f"{file} holds no text" + " under a header line" * (file.suffix in (".tsv", ".csv")))
    return found


def _table(file: Path, lines: Iterable[tuple[int, Sequence[str]]]) -> Rows:
    """The rows under a header line."""
    kept = [(number, cells) for number, cells in lines if any(cell.strip() for cell in cells)]
    (_, header), *rows = kept or [(1, ())]
    report = Collector()
    for number, cells in rows:
        if len(cells) != len(header):
            report.error("bad-data", f"{file}:{number} has {len(cells)} columns, and the header {len(header)}")
    report.raise_errors()
    twice = [name for name in header if list(header).count(name) > 1]
    if twice:
        raise fail("bad-data", f"{file} has two columns `{twice[0]}`")
    return Rows(file, tuple(header), tuple(dict(zip(header, cells)) for _, cells in rows), tuple(n for n, _ in rows))


def _tsv(file: Path) -> Rows:
    lines = _text(file).split("\n")
    return _table(file, ((number, line.removesuffix("\r").split("\t")) for number, line in enumerate(lines, start=1)))


def _csv(file: Path) -> Rows:
    reader = csv.reader(io.StringIO(_text(file), newline=""), strict=True)
    longest = csv.field_size_limit(_LONGEST_CELL)
    try:
        return _table(file, [(reader.line_num, cells) for cells in reader])
    except csv.Error as error:
        raise fail("bad-data", f"{file}:{reader.line_num} is not CSV: {error}") from None
    finally:
        csv.field_size_limit(longest)


def _json_lines(file: Path) -> Rows:
    lines = [(number, line) for number, line in enumerate(_text(file).split("\n"), start=1) if line.strip()]
    return _objects(file, [(number, _json(file, line, number)) for number, line in lines])


def _json_list(file: Path) -> Rows:
    found = _json(file, _text(file))
    if not isinstance(found, list):
        raise fail("bad-data", f"{file} is no list of objects", helps=("one object a line is a .jsonl file",))
    return _objects(file, list(enumerate(found, start=1)))


def _json(file: Path, text: str, line: int | None = None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise fail("bad-data", f"{file}:{line or error.lineno} is not JSON: {error.msg}") from None
    except RecursionError:
        raise fail("bad-data", f"{file}:{line or 1} is nested too deeply") from None


def _objects(file: Path, found: Sequence[tuple[int, Any]]) -> Rows:
    """Objects with names for their values: a column is what any of them names."""
    columns = tuple(dict.fromkeys(name for _, row in found if isinstance(row, dict) for name in row))
    rows = Rows(file, columns, tuple(row for _, row in found), tuple(number for number, _ in found))
    rows.refuse("is no object with names for its values", [not isinstance(row, dict) for row in rows.rows])
    return rows


def _parquet(file: Path) -> Rows:
    need("pyarrow", "parquet", "reading Parquet")
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import read_table

    with file.open("rb") as opened:  # which says what is wrong with a path as it is said of the others
        try:
            return _objects(file, list(enumerate(read_table(opened).to_pylist(), start=1)))
        except ArrowInvalid as error:
            raise fail("bad-data", f"{file} is not Parquet: {str(error).splitlines()[0]}") from None


def _plain(file: Path) -> Rows:
    """Each line that is not blank as a text."""
    return _objects(file, [(number, {"text": line}) for number, line in enumerate(_text(file).split("\n"), start=1)
                           if line.strip()])


def _text(file: Path) -> str:
    return file.read_bytes().decode("utf-8").removeprefix("\ufeff")


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".tsv": _tsv, ".csv": _csv, ".jsonl": _json_lines, ".json": _json_list, ".parquet": _parquet, ".txt": _plain}
