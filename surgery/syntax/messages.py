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
OPERAND = {"NUMBER", "STRING", "BOOLEAN", "NAME", "LPAR", "MINUS"}
GROUPS = (
    ("a statement", {"_USE", "_SPEC", "_CHECK", "_SELECT", "_TRAIN", "_TRANSFORM", "_UPDATE", "OVERRIDE", "_TARGET", "$END"}),
    ("an expression", OPERAND | {"NOT", "_IF"}),
    ("an expression", OPERAND | {"NOT"}),
    ("an expression", OPERAND),
    ("`param`, `let`, `check` or `return`", {"FROZEN", "SHARED", "_PARAM", "_LET", "_CHECK", "_RETURN"}),
    ("a pattern or the name of a `select`", {"STRING", "NAME"}),
)
OPERATORS = {"PLUS", "MINUS", "TIMES", "COMPARE", "AND", "OR", "_TRANSPOSE"}
PLAIN = {"NAME": "a name", "STRING": "a \"string\"", "NUMBER": "a number", "TYPE": "a type (`int`, `float`, `bool` or `str`)",
         "LBRACE": "`{`", "RBRACE": "`}`", "LPAR": "`(`", "RPAR": "`)`", "LSQB": "`[`", "RSQB": "`]`", "COMMA": "`,`",
         "COLON": "`:`", "EQUAL": "`=`", "TILDE": "`~`", "OPERATOR": "an operator", "$END": "the end of the text"}
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
    accepted = stopped.accepts() or {"$END"}
    bracket = _unclosed(tokens, bad)
    closes = bracket is not None and BRACKETS[bracket.type] in accepted
    expected = _expected({BRACKETS[bracket.type]} if closes else accepted)
    after = f" after `{_short(tokens[-1])}`" if tokens else ""
    found = "the end of the text" if bad.type == "$END" else f"`{_short(bad)}`"
    meant = did_you_mean(str(bad), _words(accepted)) if bad.type == "NAME" else ""
    missing = not meant and (bad.type == "$END" or "an expression" in expected or _on_another_line(source, tokens, bad))
    return Diagnostic("syntax", f"expected {_choice(expected)}{after}, found {found}",
                      _after(source, tokens) if missing else _span(source, bad), label=meant,
                      helps=_helps(bad, accepted, missing and _on_another_line(source, tokens, bad)),
                      related=((_span(source, bracket), f"this `{bracket}` is not closed"),) if bracket else ())


def _no_token(source: Source, offset: int) -> Diagnostic:
    character = source.text[offset]
    if character == '"':
        end = offset + len(source.text[offset:].split("\n")[0].rstrip())
        return Diagnostic("syntax", "this string is not closed", Span(source, offset, end),
                          helps=("a string ends on its line with `\"`",))
    hint = HINTS.get(character)
    return Diagnostic("syntax", f"{character!r} cannot stand here", Span(source, offset, offset + 1),
                      helps=(hint,) if hint else ())


def _span(source: Source, token: Token) -> Span:
    return Span(source, token.start_pos, token.end_pos)


def _after(source: Source, tokens: list[Token]) -> Span:
    """Where something is missing: at the end of the last token."""
    end = tokens[-1].end_pos if tokens else 0
    return Span(source, end, end)


def _on_another_line(source: Source, tokens: list[Token], bad: Token) -> bool:
    return bool(tokens) and bad.type != "$END" and "\n" in source.text[tokens[-1].end_pos : bad.start_pos]


def _expected(accepted: set[str]) -> list[str]:
    """What may stand there, in few words."""
    if "TIMES" in accepted:  # a complete expression ends here: what may follow it matters, not how it may go on
        accepted = accepted - OPERATORS - {"LPAR"} or {"OPERATOR"}
    left, named = set(accepted), []
    for words, group in GROUPS:
        if group <= left:
            left, named = left - group, [*named, words]
    return named + [words for terminal in sorted(left) for words in _spelt(terminal)]


def _spelt(terminal: str) -> list[str]:
    return [PLAIN[terminal]] if terminal in PLAIN else [f"`{word}`" for word in WORDS.get(terminal, (terminal,))]


def _choice(options: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(options[:-1]), options[-1]]))


def _words(accepted: set[str]) -> list[str]:
    return [word for terminal in sorted(accepted) for word in WORDS.get(terminal, ())]


def _helps(bad: Token, accepted: set[str], elsewhere: bool) -> tuple[str, ...]:
    hint = HINTS.get(bad.type)
    if not hint and str(bad) in KEYWORDS and "NAME" in accepted and not elsewhere:
        hint = f"`{bad}` is a word of the language and cannot be a name"
    return (hint,) if hint else ()


def _short(token: Token) -> str:
    return str(token) if len(token) <= 40 else f"{token[:37]}..."


def _unclosed(tokens: list[Token], bad: Token) -> Token | None:
    """The innermost open bracket, if `bad` shows that its end was forgotten."""
    opened: list[Token] = []
    for token in tokens:
        if token.type in BRACKETS:
            opened.append(token)
        elif token.type in BRACKETS.values():
            opened.pop()
    ends = bad.type == "$END" or bad.type in BRACKETS.values() or bad in item_words()
    return opened[-1] if opened and ends and BRACKETS[opened[-1].type] != bad.type else None
