"""Where the parser stopped, in a user's words.

Takes the stopped machine and the tokens so far. Gives one `Diagnostic`. Promises: names of terminals never show.
"""

from __future__ import annotations

from lark import Token
from lark.exceptions import UnexpectedCharacters
from lark.parsers.lalr_interactive_parser import InteractiveParser

from surgery.diagnostics import Diagnostic, Source, Span, did_you_mean
from surgery.syntax.grammar import KEYWORDS, WORDS, item_words

#: Sets of terminals that read as one thing; the first that the grammar allows in full replaces its members.
GROUPS = (
    ("an expression", {"NUMBER", "STRING", "BOOLEAN", "NAME", "LPAR", "MINUS", "_IF", "NOT"}),
    ("an expression", {"NUMBER", "STRING", "BOOLEAN", "NAME", "LPAR", "MINUS", "NOT"}),
    ("an expression", {"NUMBER", "STRING", "BOOLEAN", "NAME", "LPAR", "MINUS"}),
    ("`param`, `let`, `check` or `return`", {"FROZEN", "SHARED", "_PARAM", "_LET", "_CHECK", "_RETURN"}),
    ("a pattern or the name of a `select`", {"STRING", "NAME"}),
    ("an operator", {"PLUS", "MINUS", "TIMES"}),
)
OPERATORS = {"PLUS", "MINUS", "TIMES", "COMPARE", "AND", "OR", "_TRANSPOSE"}
PLAIN = {"NAME": "a name", "STRING": "a \"string\"", "NUMBER": "a number", "TYPE": "a type (`int`, `float`, `bool` or `str`)",
         "LBRACE": "`{`", "RBRACE": "`}`", "LPAR": "`(`", "RPAR": "`)`", "LSQB": "`[`", "RSQB": "`]`", "COMMA": "`,`",
         "COLON": "`:`", "EQUAL": "`=`", "__ANON_0": "`~`", "TILDE": "`~`", "$END": "the end of the file"}
BRACKETS = {"LBRACE": "RBRACE", "LPAR": "RPAR", "LSQB": "RSQB"}

#: What people write who know another language.
HINTS = {
    "'": "a string stands in double quotes", ";": "a statement ends where the next one begins: leave the `;` out",
    "&": "write `and`", "|": "write `or`", "!": "write `not`", "%": "a percentage has no space: `5%`",
    ".": "a number has digits on both sides of its point; of a value, only `.T` can be asked",
    "_IF": "put `if ... then ... else ...` in parentheses here",
    "COMPARE": "comparisons do not chain: join two of them with `and`",
    "EQUAL": "to compare, write `==`",
}


def explain(source: Source, stopped: InteractiveParser, tokens: list[Token], bad: Token | UnexpectedCharacters) -> Diagnostic:
    """Why the machine stopped at `bad`: a token that cannot stand there, or characters that make no token."""
    if isinstance(bad, UnexpectedCharacters):
        return _no_token(source, bad.pos_in_stream)
    accepted = stopped.accepts()
    expected = _expected(accepted)
    last = tokens[-1] if tokens else None
    place = _place(source, last, bad, expected)
    after = f" after `{last}`" if last else ""
    found = "the end of the file" if bad.type == "$END" else f"`{_short(bad)}`"
    return Diagnostic("syntax", f"expected {_choice(expected)}{after}, found {found}", place,
                      label=did_you_mean(str(bad), _words(accepted)), helps=_helps(bad, accepted),
                      related=_unclosed(source, tokens) if bad.type == "$END" or bad in item_words() else ())


def _no_token(source: Source, offset: int) -> Diagnostic:
    character = source.text[offset]
    if character == '"':
        end = offset + len(source.text[offset:].split("\n")[0].rstrip())
        return Diagnostic("syntax", "this string is not closed", Span(source, offset, end),
                          helps=("a string ends on its line with `\"`",))
    hint = HINTS.get(character)
    return Diagnostic("syntax", f"{character!r} cannot stand here", Span(source, offset, offset + 1),
                      helps=(hint,) if hint else ())


def _place(source: Source, last: Token | None, bad: Token, expected: list[str]) -> Span:
    """At what was found; or where something is missing: after the last token, if the next one is elsewhere."""
    if last is None:
        return Span(source, bad.start_pos or 0, (bad.start_pos or 0) + max(1, len(bad)))
    missing = bad.type == "$END" or "an expression" in expected or "\n" in source.text[last.end_pos : bad.start_pos]
    return Span(source, last.end_pos, last.end_pos) if missing else Span(source, bad.start_pos, bad.end_pos)


def _expected(accepted: set[str]) -> list[str]:
    """What may stand there, in words: few of them."""
    left, named = set(accepted), []
    items = {t for t in left if set(WORDS.get(t, ())) & set(item_words())}
    if len(items) > 2:
        left, named = left - items - {"$END"}, ["a statement"]
    for words, group in GROUPS:
        if group <= left:
            left, named = left - group, [words, *named]
    if named != ["an operator"] or left - OPERATORS:
        left, named = left - OPERATORS, [n for n in named if n != "an operator"]
    return list(dict.fromkeys(named + [words for t in sorted(left) for words in _spelt(t)]))


def _spelt(terminal: str) -> list[str]:
    return [PLAIN[terminal]] if terminal in PLAIN else [f"`{word}`" for word in WORDS.get(terminal, (terminal,))]


def _choice(options: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(options[:-1]), options[-1]]))


def _words(accepted: set[str]) -> list[str]:
    return [word for terminal in sorted(accepted) for word in WORDS.get(terminal, ())]


def _helps(bad: Token, accepted: set[str]) -> tuple[str, ...]:
    hint = HINTS.get(bad.type)
    reserved = str(bad) in KEYWORDS and "NAME" in accepted
    return ((hint,) if hint else ()) + ((f"`{bad}` is a word of the language and cannot be a name",) if reserved else ())


def _short(token: Token) -> str:
    return str(token) if len(token) <= 40 else f"{token[:37]}..."


def _unclosed(source: Source, tokens: list[Token]) -> tuple[tuple[Span, str], ...]:
    """The innermost bracket that is open at the end of the tokens."""
    open_ones: list[Token] = []
    for token in tokens:
        if token.type in BRACKETS:
            open_ones.append(token)
        elif token.type in BRACKETS.values() and open_ones:
            open_ones.pop()
    return tuple((Span(source, t.start_pos, t.end_pos), f"this `{t}` is not closed") for t in open_ones[-1:])
