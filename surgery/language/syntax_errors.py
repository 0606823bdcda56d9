"""Where the parser stopped, in a user's words.

Takes the stopped machine and the tokens so far. Gives one `Diagnostic`. Promises: names of terminals never show.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lark import Token
from lark.exceptions import UnexpectedCharacters
from lark.parsers.lalr_interactive_parser import InteractiveParser

from surgery.diagnostics import Diagnostic, Source, Span, did_you_mean
from surgery.language import odd_characters
from surgery.language.grammar import KEYWORDS, WORDS, extent, item_words
from surgery.language.other_languages import SYMBOLS, instead_of_statement, instead_of_symbols

#: Sets of terminals that read as one thing; the first that the grammar allows in full replaces its members.
OPERAND = {"NUMBER", "STRING", "BOOLEAN", "NAME", "LPAR", "LSQB", "MINUS"}
STATEMENT = {"_USE", "_SPEC", "_CHECK", "_SELECT", "_TRAIN", "_TRANSFORM", "_UPDATE", "OVERRIDE", "_TARGET", "$END"}
IN_BODY = {"FROZEN", "SHARED", "_PARAM", "_NOISE", "_LET", "_FOR"}
GROUPS = (
    ("a statement", STATEMENT | {"_LANGUAGE"}),
    ("a statement", STATEMENT),
    ("an expression", OPERAND | {"NOT", "_IF"}),
    ("an expression", OPERAND | {"NOT"}),
    ("an expression", OPERAND),
    # behind a parameter's start its clauses may stand too, which is seldom what was meant
    *((words, group | clauses) for words, group in (
        ("`param`, `noise`, `let`, `for`, `check` or `return`", IN_BODY | {"_CHECK", "_RETURN"}),
        ("`param`, `noise`, `let`, `for` or `}`", IN_BODY | {"RBRACE"}))
      for clauses in ({"_RATE", "_NO", "_ON"}, set())),
    ("a pattern or the name of a `select`", {"STRING", "NAME"}),
)
#: The words that begin a statement of a definition alone.
OF_DEFINITION = {"FROZEN", "SHARED", "_PARAM", "_NOISE", "_LET", "_RETURN"}
OPERATORS = {"PLUS", "MINUS", "TIMES", "COMPARE", "AND", "OR", "_TRANSPOSE"}
PLAIN = {"NAME": "a name", "STRING": "a \"string\"", "NUMBER": "a number",
         "TYPE": "a type (`int`, `float`, `bool` or `str`)",
         "LBRACE": "`{`", "RBRACE": "`}`", "LPAR": "`(`", "RPAR": "`)`", "LSQB": "`[`", "RSQB": "`]`", "COMMA": "`,`",
         "COLON": "`:`", "_UP_TO": "`..`",
         "EQUAL": "`=`", "TILDE": "`~`", "OPERATOR": "an operator", "$END": "the end of the text"}
BRACKETS = {"LBRACE": "RBRACE", "LPAR": "RPAR", "LSQB": "RSQB"}


def explain(source: Source, stopped: InteractiveParser, tokens: list[Token],
            bad: Token | UnexpectedCharacters) -> Diagnostic:
    """Why the machine stopped at `bad`: a token that cannot stand there, or characters that make no token."""
    if isinstance(bad, UnexpectedCharacters):
        return _no_token(source, bad.pos_in_stream)
    stop = Stop(source, tokens, bad, stopped.accepts() or {"$END"})
    place = stop.after if stop.at_end else Span(source, *extent(bad))  # the end of an empty text has no extent
    if bad.type == "NAME" and place.end < len(source.text) and odd_characters.is_odd(source.text[place.end]):
        return _no_token(source, place.end)  # which cuts a word in two
    if stop.is_reserved_name:
        return Diagnostic("reserved-name", f"`{bad}` is a word of the language and cannot be a name", place,
                          helps=tuple(filter(None, [_around(stop)])))
    # A bracket that was left open is the likelier mistake: then its end is what is expected, where it may stand.
    bracket, related = stop.unclosed, ()
    closer = {BRACKETS[bracket.type]} if bracket else set()
    if bracket:
        related = ((Span(source, *extent(bracket)), f"this `{bracket}` is not closed"),)
    after = f" after `{_short(tokens[-1])}`" if tokens else ""
    wrong = "the end of the text" if stop.at_end else f"`{_short(bad)}`"
    # What another language says is known for certain; how a word is spelt is a guess, made only without that.
    hint = _hint(stop)
    words = [word for terminal in sorted(stop.accepted) for word in WORDS.get(terminal, ())]
    meant = did_you_mean(str(bad), words) if bad.type == "NAME" and not hint else ""
    return Diagnostic("syntax", f"expected {_expected(closer & stop.accepted or stop.accepted)}{after}, found {wrong}",
                      stop.after if stop.is_forgotten and not meant else place, label=meant,
                      helps=(hint,) if hint else (), related=related)


@dataclass(frozen=True)
class Stop:
    """A token that cannot stand where it does, what stood before it, and which terminals could have stood there."""

    source: Source
    tokens: list[Token]
    bad: Token
    accepted: set[str]

    @property
    def at_end(self) -> bool:
        return self.bad.type == "$END"

    @property
    def after(self) -> Span:
        """Where something is missing: at the end of the last token."""
        end = extent(self.tokens[-1])[1] if self.tokens else 0
        return Span(self.source, end, end)

    @property
    def on_another_line(self) -> bool:
        return bool(self.tokens) and not self.at_end and "\n" in self.source.text[self.after.end : self.bad.start_pos]

    @property
    def is_forgotten(self) -> bool:
        """Whether something is missing before `bad`, which then begins or ends something else; where `bad` is a word or
        a sign that means nothing there, it is the mistake itself."""
        means_nothing = self.bad.type in ("NAME", "_FOR", "TIMES", "PLUS", "EQUAL") or bool(self.misplaced)
        return self.at_end or "NUMBER" in self.accepted or (self.on_another_line and not means_nothing)

    @property
    def misplaced(self) -> str:
        """What to do with a word that is right elsewhere, where a statement of something else is due; else empty."""
        if self.at_end:
            return ""
        word, kind, rest = str(self.bad), self.bad.type, self.source.text[extent(self.bad)[1] :]
        in_target, in_file = "PLACEMENT" in self.accepted, "_TARGET" in self.accepted
        called = re.match(r"[ \t]+(\w+)[ \t]*\((?![^\n{]*\)[^\n}]*\{)", rest)  # and no definition with its block
        is_misspelt = kind == "NAME" and did_you_mean(word, WORDS["PLACEMENT"])
        if called and in_target and kind in ("_UPDATE", "_TRANSFORM", "NAME") and not is_misspelt:
            steps = [f"`{placed} {called[1]}(...)`" for placed in ("pre", "post", "add")]
            known = {"_UPDATE": steps[2:], "_TRANSFORM": steps[:2]}.get(kind, steps[::-1])
            return f"say where it acts: {' or '.join(known)}"
        if kind == "PLACEMENT" and (in_file or "_LET" in self.accepted):
            return (f"`{word}` is a step of a target: `target linear {{ {word} ... }}`" if in_file else
                    f"`{word}` is a step of a target; a definition calls another: `return low_rank(...)`")
        if kind in OF_DEFINITION and (in_file or in_target):
            return (f"`{word}` stands in a definition, `update name() {{ ... }}` or `transform name() on n {{ ... }}`, "
                    "which a target places: `add name()`")
        return f"name what is taken: `target {word} ... {{ ... }}`" if kind == "KIND" and in_file else ""

    @property
    def is_reserved_name(self) -> bool:
        """Whether a name was due, and no expression, and this is a name but for the language."""
        name_due = "NAME" in self.accepted and "NUMBER" not in self.accepted
        return name_due and self.bad in KEYWORDS and not self.on_another_line

    @property
    def innermost(self) -> Token | None:
        """The innermost bracket that is open before `bad`."""
        # the tokens so far were accepted, so that the brackets among them match
        opened: list[Token] = []
        for token in self.tokens:
            if token.type in BRACKETS:
                opened.append(token)
            elif token.type in BRACKETS.values():
                opened.pop()
        return opened[-1] if opened else None

    @property
    def unclosed(self) -> Token | None:
        """The innermost open bracket, if `bad` shows that its end was forgotten, as `=` does after `[`."""
        bracket = self.innermost
        is_item = self.bad in item_words() and not self.misplaced
        ends = self.at_end or self.bad.type in BRACKETS.values() or is_item or (
            self.bad.type == "EQUAL" and bracket is not None and bracket.type == "LSQB")
        return bracket if bracket and ends and BRACKETS[bracket.type] != self.bad.type else None


def _hint(stop: Stop) -> str:
    """What to write instead, where what was written is how another language says it."""
    bad, text = stop.bad, stop.source.text
    if stop.at_end:
        return ""
    begin, end = extent(bad)
    rest = text[end:]
    # The most particular first: what a statement of another kind would be, then lists, then single signs.
    if stop.misplaced:
        return stop.misplaced
    if bad.type == "NAME" and "PLACEMENT" in stop.accepted and rest.lstrip().startswith("("):
        return f"say where it acts: `add {bad}(...)`, or `pre` or `post` for a transform"
    if bad == "in" and "COMPARE" in stop.accepted:
        return "one of several is `a == 1 or a == 2`"
    if bad.type in ("NAME", "_FOR") and stop.accepted & {"_TARGET", "_LET"}:
        return (instead_of_statement(str(bad), rest, in_file="_TARGET" in stop.accepted) or _product(stop)
                or _result(stop))
    if bad.type in ("_CHECK", "_RETURN") and {"_LET", "RBRACE"} <= stop.accepted:
        return f"`{bad}` stands outside of a `for`, " + ("behind it" if bad.type == "_RETURN" else "above it")
    if stop.accepted == {"_IN"} or "_UP_TO" in stop.accepted and bad.type in ("LBRACE", "COMMA", "COLON"):
        return "a `for` goes from a number up to another, without it: `for i in 0..count { ... }`"
    if bad in item_words() and stop.unclosed:
        return f"`{bad}` begins a statement of the file, which stands in no `{{`"
    if [token.type for token in stop.tokens[-3::2]] in (["_UPDATE", "LPAR"], ["_TRANSFORM", "LPAR"]):
        return f"a definition declares its parameters, `{stop.tokens[-2]}(rank: int = 8)`; a target gives them values"
    if form := _header(stop) or _product(stop) or _result(stop) or _around(stop) or _list(stop):
        return form
    value_due = "NUMBER" in stop.accepted
    # Where a value is due, a sign is mostly a word too many, and its own meaning says nothing.
    means_nothing = not stop.tokens or (value_due and bad.type != "_IF") or (bad.type == "EQUAL" and stop.unclosed)
    hint = "" if means_nothing else SYMBOLS.get(bad.type, "")
    return instead_of_symbols(text[:begin], str(bad), rest, value_due) or hint


def _around(stop: Stop) -> str:
    """What to write where a sign of another language stands before or after a value, or before a block."""
    bad, (before, last) = stop.bad.type, [*("", ""), *(token.type for token in stop.tokens)][-2:]
    begin = extent(stop.bad)[0]
    if bad == "COLON" and "EQUAL" in stop.accepted:
        return "a value stands after `=`" + (f": `{stop.tokens[-1]} = ...`" if last == "NAME" else "")
    if bad in ("EQUAL", "COMPARE") and last == "EQUAL":
        return "one `=` gives a value; `==` compares two"
    if last == "COLON" and before == "RPAR" and bad != "NAME":
        return "a block stands in braces: `{ ... }`"
    if bad == "NAME" and last == "NUMBER" and stop.after.end == begin:
        return "a number has no unit, and is written out: `1_000`, or `5%` for a part of a hundred"
    if last == "_ON" and stop.bad == "bias":
        return "that an update is added to the bias stands in its own head: `update name() on bias { ... }`"
    if "LBRACE" in stop.accepted and bad in {"PLACEMENT", *IN_BODY, "_RETURN"}:
        return f"`{stop.bad}` stands in the braces of its block: `{{ {stop.bad} ... }}`"
    return ""


def _list(stop: Stop) -> str:
    """What to write for a list in brackets, of which the language has matrices of numbers alone."""
    last = stop.tokens[-1].type if stop.tokens else ""
    if last == "_TARGET" and stop.bad.type == "LSQB":
        return "patterns stand without brackets: `target \"**.q_proj\", \"**.v_proj\" { ... }`"
    if stop.accepted != {"LSQB"} or last != "LSQB":
        return ""
    if stop.bad.type == "NAME":
        return "tensors are arguments, in no brackets of their own: `side_by_side(A, B)`, `stacked(A, B)`"
    if stop.bad.type == "STRING":
        return "there are no lists of texts; patterns stand in the head of a target: `target \"**.q_proj\" { ... }`"
    return "a matrix stands in two brackets, one for each row: `[[1, 2]]`"


def _header(stop: Stop) -> str:
    """What belongs to the header of a spec, of a transform, or of a parameter."""
    bad, accepted = stop.bad.type, stop.accepted
    if bad == "LBRACE" and not stop.tokens:
        return ("this looks like JSON: surgery.Spec.model_validate_json(text) reads a spec of that form, and "
                "`surgery import` an adapter of PEFT's")
    if bad == "LBRACE" and "_TARGET" in accepted:
        return "a spec has no braces of its own: its targets stand below its header"
    if bad == "LBRACE" and "_ON" in accepted:
        return "`on n` gives a name to the side that a transform acts on: `transform name() on n { ... }`"
    if bad in ("EQUAL", "COMMA", "RPAR") and accepted == {"COLON"}:
        return f"a parameter says its type: `{stop.tokens[-1]}: int{' = ...' if bad == 'EQUAL' else ''}`"
    if bad == "TIMES" and "STRING" in accepted and "NUMBER" not in accepted:
        pattern = re.compile(r"([\w.*]|\{[^\s{}]*\})+").match(stop.source.text, extent(stop.bad)[0])
        return f"a pattern stands in quotes: `\"{pattern[0]}\"`" if pattern else ""
    if bad == "_NOISE" and "_PARAM" in accepted and "_LET" not in accepted:
        return ("each module draws noise for itself, and it never trains: it is neither shared nor frozen, "
                "`noise m[rank] ~ bernoulli(0.5)`")
    if bad == "EQUAL" and accepted == {"TILDE"}:
        return "noise is drawn in every training step: `noise m[rank] ~ bernoulli(0.5)`"
    if accepted == {"LPAR"} and stop.tokens[-2:-1] and stop.tokens[-2].type == "PLACEMENT":
        return f"a step is a call: `{stop.tokens[-2]} {stop.tokens[-1]}()`"
    if bad == "LPAR" and {"LSQB", "TILDE"} <= accepted:
        return f"a shape stands in brackets: `{stop.tokens[-1]}[out, in]`"
    return ""


def _result(stop: Stop) -> str:
    """How a definition gives its value, where an expression stands in it as if it were a statement."""
    line = stop.source.text[extent(stop.bad)[0] :].split("\n")[0].split("#")[0].strip()
    is_expression = stop.bad.type in ("NAME", "LPAR", "NUMBER", "MINUS") and re.match(r"[-(]|\w+\s*([-+*@/(.]|$)", line)
    in_definition = {"_RETURN", "_LET"} <= stop.accepted and stop.on_another_line
    return f"a definition ends with what it gives: `return {line}`" if in_definition and is_expression else ""


def _product(stop: Stop) -> str:
    """What to write for two operands side by side, which are a product on paper."""
    last, bad = stop.tokens[-1:], stop.bad
    is_given = bad.type in ("NAME", "NUMBER") and [token.type for token in last] == ["NAME"]  # to a function, perhaps
    side_by_side = "TIMES" in stop.accepted and (bad.type in ("NAME", "LPAR") or is_given) and not stop.on_another_line
    # between two arguments it is rather the comma that is missing
    if not side_by_side or "COMMA" in stop.accepted:
        return ""
    return ("a product has its sign: `A @ B` of matrices, `2 * A` where one is a number"
            + f"; a function has parentheses: `{_short(last[0])}({_short(bad)})`" * is_given)


def _no_token(source: Source, offset: int) -> Diagnostic:
    character = source.text[offset]
    if character == '"':
        end = offset + len(source.text[offset:].split("\n")[0].rstrip())
        return Diagnostic("syntax", "this string is not closed", Span(source, offset, end),
                          helps=("a string ends on its line with `\"`",))
    before, after = source.text[:offset], source.text[offset + 1 :]
    hint = (instead_of_symbols(before, character, after, False) or SYMBOLS.get(character)
            or odd_characters.instead_of(character))
    return Diagnostic("syntax", f"{character!r} cannot stand here", Span(source, offset, offset + 1),
                      helps=(hint,) if hint else ())


def _expected(accepted: set[str]) -> str:
    """What may stand there, in few words."""
    # Where a complete expression ends, what may follow it matters, and not how it may go on.
    if accepted & OPERATORS and "NUMBER" not in accepted:
        accepted = accepted - OPERATORS - {"LPAR"} or {"OPERATOR"}
    left, options = set(accepted), []
    for words, group in GROUPS:
        if group <= left:
            left, options = left - group, [*options, words]
    for terminal in sorted(left):
        options += [PLAIN[terminal]] if terminal in PLAIN else [f"`{w}`" for w in WORDS.get(terminal, (terminal,))]
    return " or ".join(filter(None, [", ".join(options[:-1]), options[-1]]))


def _short(token: Token) -> str:
    return str(token) if len(token) <= 40 else f"{token[:37]}..."
