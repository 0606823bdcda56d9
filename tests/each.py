"""One test over several combinations of values, where to start a test would take as long as the test itself: over all of
them, or over some that differ from case to case (`python3 dev.py test -m sweep`: over all)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any
from zlib import crc32

import pytest

SWEEP = "SURGERY_SWEEP"  # set by conftest.py: what is thinned tries everything


def in_turns(of: int, together: bool = False) -> pytest.MarkDecorator:
    """Marks a test over many cases, of which the whole suite tries those in daily use and one in so many of the others,
    by the test's name, or by the case's where its tests share what it takes long to make (`together`). It is for what
    hardly rests on the formula: that each case computes what it says is asked of all. A sweep tries every case, and so
    does pytest where a file, a folder or a test is named."""
    return pytest.mark.in_turns(of, together)


def is_its_turn(nodeid: str, of: int, together: bool) -> bool:
    return crc32(nodeid.partition("[" if together else "\0")[2 if together else 0].encode()) % of == 0


def of_each(**values: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[[Any], None]]:
    """Makes of a test of a `case` and further arguments one of the case alone, which tries all of those `values`. No
    failure hides another: all are raised, each with the values that it is of."""
    rows = list(product(*values.values()))
    return _over(tuple(values), lambda case: rows)


def of_some(names: str, always: Sequence[Any], *turns: Sequence[Any]) -> Callable[[Callable], Callable[[Any], None]]:
    """The same for the rows that are `always` tried and for one of each of the `turns`, which the cases take in turn:
    with many cases each row is tried with some. A sweep tries all with every case."""
    def rows_of(case: Any) -> list[Any]:
        place = crc32(str(case).encode())
        kept = turns if SWEEP in os.environ else [[turn[place % len(turn)]] for turn in turns]
        return [*always, *(row for turn in kept for row in turn)]

    return lambda test: pytest.mark.sweep(_over(tuple(names.split()), rows_of)(test))


def _over(names: tuple[str, ...], rows_of: Callable[[Any], Iterable[Any]]) -> Callable[[Callable], Callable[[Any], None]]:
    def decorate(test: Callable[..., None]) -> Callable[[Any], None]:
        def with_each(case: Any) -> None:
            failures = []
            for row in rows_of(case):
                row = row if isinstance(row, tuple) else (row,)
                try:
                    test(case, **dict(zip(names, row, strict=True)))
                except Exception as failure:
                    failure.add_note(f"with {', '.join(map(str, row))}")
                    failures.append(failure)
            if failures:
                raise failures[0] if len(failures) == 1 else ExceptionGroup(f"{len(failures)} failures", failures)

        with_each.__name__, with_each.__doc__ = test.__name__, test.__doc__
        return with_each

    return decorate
