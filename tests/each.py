"""One test over all combinations of some values, where to start a test would take as long as the test itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any


def of_each(**values: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[[Any], None]]:
    """Makes of a test of a `case` and further arguments one of the case alone, which tries all of those `values`. No
    failure hides another: all are raised, each with the values that it is of."""

    def decorate(test: Callable[..., None]) -> Callable[[Any], None]:
        def with_each(case: Any) -> None:
            failures = []
            for row in product(*values.values()):
                try:
                    test(case, **dict(zip(values, row)))
                except Exception as failure:
                    failure.add_note(f"with {', '.join(map(str, row))}")
                    failures.append(failure)
            if failures:
                raise failures[0] if len(failures) == 1 else ExceptionGroup(f"{len(failures)} failures", failures)

        with_each.__name__, with_each.__doc__ = test.__name__, test.__doc__
        return with_each

    return decorate
