"""The language reference: its blocks are specs, and its tables are those of the code.

`python tests/language/test_language_reference.py` writes the tables anew.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from surgery.ir.operations import FUNCTIONS, OPERATORS, PRIMITIVES, Operation
from surgery.language.formatter import format_text
from surgery.language.grammar import KEYWORDS
from surgery.language.library import parse
from surgery.planning.check import check
from surgery.semantics.distributions import DISTRIBUTIONS

PAGE = Path(__file__).parents[2] / "docs" / "language.md"
BLOCK = re.compile(r"^```surg\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SIGNS = {op: f"`a {sign} b`" for sign, op in OPERATORS.items()} | {"neg": "`-a`", "T": "`a.T`",
                                                                   "literal": "`[[1, 2], [3, 4]]`",
                                                                   "einsum": '`einsum("nab,ncd->acbd", a, b)`'}


def primitives() -> str:
    return table(("call", "is"), ((_call(row), row.doc) for row in PRIMITIVES.values() if row.public))


def _call(row: Operation) -> str:
    return SIGNS.get(row.name) or f"`{row.call}`"


def distributions() -> str:
    return table(("draw", "of"), ((f"`{name}({', '.join(map(_argument, row.arguments.items()))})`", _what(name))
                                  for name, row in DISTRIBUTIONS.items()))


def _argument(argument: tuple) -> str:
    name, default = argument
    return name if default is None else f"{name} = {default:g}" if isinstance(default,
                                                                              float) else f'{name} = "{default}"'


def _what(name: str) -> str:
    row = DISTRIBUTIONS[name]
    return {"sample": "different whole numbers", "integers": "whole numbers",
            "bernoulli": "1 with the probability p, else 0"}.get(name, f"torch.nn.init.{row.init}")


def table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in row)} |"
                     for row in (head, ("---", "---"), *rows))


def written(page: str) -> str:
    """The page with the tables of the code."""
    for name, make in (("primitives", primitives), ("distributions", distributions)):
        page = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{make()}\n{m[2]}", page, count=1,
                      flags=re.DOTALL)
    return page


def test_the_tables_are_those_of_the_code():
    page = PAGE.read_text(encoding="utf-8")
    assert written(page) == page
    assert all(f"`{name}(" in page for name in FUNCTIONS)


@pytest.mark.parametrize("block", BLOCK.findall(PAGE.read_text(encoding="utf-8")), ids=lambda b: b.splitlines()[0][:30])
def test_a_block_is_a_spec_in_order(block):
    assert format_text(block) == block
    assert [d.message for d in check(parse(block)) if d.severity == "error"] == []


def test_the_reserved_words_are_all_named():
    sentence = re.search(r"Reserved: (.*?)\. ", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
    assert set(re.findall(r"[a-z]+", sentence)) == set(KEYWORDS)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
