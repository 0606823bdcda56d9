"""How Pygments colours a spec: in pages built with mkdocs or Sphinx, and in what prints code by it.

Its words are those of the grammar. A soft word (`rate`, `on`) is one wherever it stands: Pygments shows text, it does
not judge it.
"""

from __future__ import annotations

from pygments.lexer import RegexLexer, bygroups, words
from pygments.token import Comment, Keyword, Name, Number, Operator, Punctuation, String, Text

from surgery.language.grammar import WORDS, pattern_of

_TYPES = {*WORDS["TYPE"], *WORDS["KIND"]}
_WORDS = {word for each in WORDS.values() for word in each} - _TYPES
_NAME = r"[^\W\d]\w*"


class SurgLexer(RegexLexer):
    """`.surg` files."""

    name, aliases, filenames = "Surgery", ["surg"], ["*.surg"]
    tokens = {"root": [
        (r"#.*$", Comment.Single),
        (r'"[^"\r\n]*"', String),
        (rf"(spec|transform|update|select)(\s+)({_NAME})", bygroups(Keyword.Declaration, Text, Name.Function)),
        (rf"(param|let|noise|for)(\s+)({_NAME})", bygroups(Keyword.Declaration, Text, Name.Variable)),
        (words(sorted(_TYPES), prefix=r"\b", suffix=r"\b"), Keyword.Type),
        (words(sorted(_WORDS), prefix=r"\b", suffix=r"\b"), Keyword),
        (rf"({_NAME})(\s*)(\()", bygroups(Name.Function, Text, Punctuation)),
        (_NAME, Name),
        (pattern_of("NUMBER"), Number),
        (r"==|!=|<=|>=|\.\.|[-+*/@=<>~^.]", Operator),
        (r"[(){}\[\],:;]", Punctuation),
        (r"\s+", Text),
    ]}
