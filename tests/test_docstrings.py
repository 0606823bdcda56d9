"""The examples in the docstrings of the public names run, and say what they print."""

import doctest
import inspect
from pathlib import Path
from typing import Any

import pytest

import surgery

# Each public name of Python's API that is documented by an example; a class with the public methods of its own.
PUBLIC = sorted(name for name in surgery.__all__ if not name.startswith("__"))


def examples(name: str) -> list[doctest.DocTest]:
    """The examples of a public name, without those that a class inherits."""
    thing: Any = getattr(surgery, name)
    found = doctest.DocTestFinder(exclude_empty=True).find(thing, name, globs={})
    return [each for each in found if each.examples]


WITH_EXAMPLES = [name for name in PUBLIC if examples(name)]


def test_what_a_user_meets_first_has_an_example() -> None:
    assert {"add", "apply", "attach", "check", "explain", "load", "modules", "parse", "plan", "pre", "shipped",
            "spectrum", "Spec", "Surgeon", "SurgeryError"} <= set(WITH_EXAMPLES)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_of_docstrings_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some write a folder
    runner = doctest.DocTestRunner()
    said: list[str] = []
    for each in examples(name):
        runner.run(each, out=said.append)
    assert runner.tries > 0 and runner.failures == 0, "".join(said)


def test_an_example_that_says_something_else_is_seen() -> None:
    """The check itself: a wrong answer is a failure."""
    def wrong() -> None:
        """
        >>> 1 + 1
        3
        """

    runner = doctest.DocTestRunner()
    for each in doctest.DocTestFinder().find(wrong, "wrong", module=inspect.getmodule(wrong)):
        runner.run(each, out=lambda text: None)
    assert runner.failures == 1
