"""The grammar file, loaded: the parser's tables and the language's words.

Takes `grammar/surg.lark`. Gives the LALR machine, the reserved and the soft words, and the patterns of comments and
strings. Promises that each word and pattern is written down in the grammar file only.
"""

from __future__ import annotations

import re
from functools import cache

from lark import Lark, Token
from lark.parsers.lalr_interactive_parser import InteractiveParser

from surgery.language.resources import folder

GRAMMAR = (folder("grammar") / "surg.lark").read_text(encoding="utf-8")

# The words are read from the grammar's text and not listed here a second time: the parser, the messages and the checks
# of names can never disagree on them.
#: The words of each terminal that is made of words: `{"PLACEMENT": ("pre", "add", "post"), ...}`.
WORDS: dict[str, tuple[str, ...]] = {
    name: tuple(words.split("|"))
    for name, words in re.findall(r"^(\w+)(?:\.\d+)?: /\(?([a-z|]+)\)?\\b/$", GRAMMAR, re.MULTILINE)
}


@cache
def pattern_of(terminal: str) -> str:
    """The regular expression of a terminal."""
    return _only(rf"^{terminal}(?:\.\d+)?: /(.*)/$", GRAMMAR).replace(r"\/", "/")


def _only(pattern: str, text: str) -> str:
    """The group of a pattern that the grammar file is known to have: it ships with the package."""
    match = re.search(pattern, text, re.MULTILINE)
    assert match is not None, f"the grammar has nothing of the form {pattern}"
    return match[1]


#: Reserved: never a name.
KEYWORDS = frozenset(_only(r"^\(\?!\(([a-z|]+)\)", pattern_of("NAME")).split("|"))
#: Special in their place only: a parameter may be called `dropout`.
SOFT_WORDS = frozenset(word for words in WORDS.values() for word in words) - KEYWORDS


def is_name(text: str) -> bool:
    """Whether the text can stand as a name in a spec."""
    return re.fullmatch(pattern_of("NAME"), text) is not None


# Building the tables takes longer than reading a spec: once, and only when something is parsed.
@cache
def _lark() -> Lark:
    return Lark(GRAMMAR, parser="lalr", start=["file", "expression"], propagate_positions=True, maybe_placeholders=True)


def extent(token: Token) -> tuple[int, int]:
    """Where a token starts and ends in its text."""
    # The lexer gives both to every token; lark leaves them out of tokens that are made by hand alone.
    assert token.start_pos is not None and token.end_pos is not None
    return token.start_pos, token.end_pos


def machine(text: str, start: str) -> InteractiveParser:
    """A parser at the beginning of the text; `start` is `file` or `expression`."""
    return _lark().parse_interactive(text, start=start)


@cache
def item_words() -> tuple[str, ...]:
    """The words that begin a statement at the top of a file."""
    first = machine("", "file").accepts() - {"_LANGUAGE"}  # which stands above them all
    return tuple(word for terminal in first for word in WORDS.get(terminal, ()))


@cache
def items() -> re.Pattern[str]:
    """What begins a statement of the file, as group 1, at the start of a line; nothing behind its blanks is taken."""
    words = "|".join(word for word in item_words() if word != "check")  # which may also stand in a body
    return re.compile(rf"^[ \t]*(?=({words})\b)", re.MULTILINE)
