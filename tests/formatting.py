"""What formatting leaves as it was."""

import re

from surgery.language.formatter import format_text
from surgery.language.grammar import pattern_of
from surgery.language.parser import parse_text
from surgery.language.resources import folder

SHIPPED = sorted(folder("specs").glob("*.surg"))


def comments_of(text: str) -> list[str]:
    found = re.findall(f"{pattern_of('STRING')}|({pattern_of('COMMENT')})", text)
    return sorted(comment.rstrip() for comment in found if comment)


def assert_same_after_formatting(text: str) -> None:
    formatted = format_text(text)
    assert parse_text(formatted) == parse_text(text)
    assert comments_of(formatted) == comments_of(text)
    assert format_text(formatted) == formatted
