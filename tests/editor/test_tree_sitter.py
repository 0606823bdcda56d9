"""The tree-sitter grammar of editors/tree-sitter-surg: rule by rule that of grammar/surg.lark, and no other word.

`python tests/editor/test_tree_sitter.py` writes it anew. What makes a parser of it, the `tree-sitter` command, is run by
who installs it, and not here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from surgery.language.grammar import GRAMMAR, KEYWORDS, SOFT_WORDS, WORDS, pattern_of

FOLDER = Path(__file__).parents[2] / "editors" / "tree-sitter-surg"
TOKENS = {"NAME": "name", "NUMBER": "number", "STRING": "string"}
SIGNS = {"COMPARE": pattern_of("COMPARE").split("|"), "PLUS": ["+"], "MINUS": ["-"], "TIMES": ["*", "/", "@"],
         "_TRANSPOSE": [".T"], "_UP_TO": [".."]}
#: Which words are highlighted as what; those that are not named here are keywords.
CAPTURES = {"KIND": "type.builtin", "TYPE": "type.builtin", "BOOLEAN": "boolean", "OR": "keyword.operator",
            "AND": "keyword.operator", "NOT": "keyword.operator", "PLACEMENT": "keyword.function"}
NODES = """(comment) @comment
(string) @string
(number) @number
(call . (name) @function.call)
(keyword . (name) @variable.parameter)
(transform . (name) @function)
(update . (name) @function)
(header . (name) @module)
(select . (name) @constant)
(param (name) @variable.parameter)
(let . (name) @variable)
(noise . (name) @variable)
(parameter . (name) @variable.parameter)
"""


def rules() -> dict[str, str]:
    """The rules of the language's grammar, each with what it expands to."""
    text = re.sub(r"//[^\n]*", "", GRAMMAR)
    found = re.findall(r"^(\??_?[a-z]\w*):((?:.|\n(?=[ \t]))*)", text, re.MULTILINE)
    return {name: " ".join(body.split()) for name, body in found}


HIDDEN = {name.lstrip("?"): f"_{name.lstrip('?')}" for name in rules() if name.startswith("?")}


class Rule:
    """An expansion in lark's notation, as tree-sitter's."""

    def __init__(self, text: str):
        self.tokens = re.findall(r'"[^"]*"|->|\w+|[()\[\]|*+?]', text)

    def alternatives(self) -> str:
        parts = [self.sequence()]
        while self.tokens[:1] == ["|"]:
            self.tokens.pop(0)
            parts.append(self.sequence())
        return parts[0] if len(parts) == 1 else f"choice({', '.join(parts)})"

    def sequence(self) -> str:
        items = []
        while self.tokens and self.tokens[0] not in (")", "]", "|", "->"):
            items.append(self.item())
        made = items[0] if len(items) == 1 else f"seq({', '.join(items)})"
        if self.tokens[:1] == ["->"]:
            name, self.tokens = f"$.{self.tokens[1]}", self.tokens[2:]
            made = made if made == name else f"alias({made}, {name})"
        return made

    def item(self) -> str:
        token = self.tokens.pop(0)
        if token in "([":
            made = self.alternatives()
            self.tokens.pop(0)
            made = f"optional({made})" if token == "[" else made
        else:
            made = _atom(token)
        repeated = {"*": "repeat", "+": "repeat1", "?": "optional"}.get(self.tokens[0] if self.tokens else "")
        if repeated:
            self.tokens.pop(0)
        return f"{repeated}({made})" if repeated else made


def _atom(token: str) -> str:
    if token in WORDS or token in SIGNS:
        texts = [json.dumps(text) for text in WORDS.get(token) or SIGNS[token]]
        return texts[0] if len(texts) == 1 else f"choice({', '.join(texts)})"
    return token if token.startswith('"') else f"$.{TOKENS.get(token) or HIDDEN.get(token, token)}"


def grammar() -> str:
    lines = [f"    {HIDDEN.get(name.lstrip('?'), name)}: $ => {Rule(body).alternatives()},"
             for name, body in rules().items()]
    number, text = (pattern_of(terminal).replace("/", r"\/") for terminal in ("NUMBER", "STRING"))
    return "\n".join([
        "// Written by `python tests/editor/test_tree_sitter.py` from grammar/surg.lark.", "", "module.exports = grammar({",
        '  name: "surg",', "  word: $ => $.name,", r"  extras: $ => [/\s/, $.comment],", "", "  rules: {", *lines,
        "    name: $ => /[A-Za-z_][A-Za-z0-9_]*/,", f"    number: $ => /{number}/,", f"    string: $ => /{text}/,",
        r"    comment: $ => /#[^\r\n]*/,", "  },", "});", ""])


def highlights() -> str:
    by_capture: dict[str, list[str]] = {}
    for terminal, words in WORDS.items():
        by_capture.setdefault(CAPTURES.get(terminal, "keyword"), []).extend(words)
    lists = [f"[{' '.join(json.dumps(word) for word in dict.fromkeys(words))}] @{capture}"
             for capture, words in by_capture.items()]
    signs = " ".join(json.dumps(sign) for texts in SIGNS.values() for sign in texts)
    return "\n".join(["; Written by `python tests/editor/test_tree_sitter.py` from grammar/surg.lark.", NODES, *lists,
                      f"[{signs}] @operator", ""])


def strings(text: str) -> Iterator[str]:
    for found in re.findall(r'"[^"\n]*"', re.sub(r"/(?:\\.|[^/\n])+/(?=,)", "", text)):
        yield json.loads(found)


def test_the_files_are_what_the_language_s_grammar_makes() -> None:
    assert (FOLDER / "grammar.js").read_text(encoding="utf-8") == grammar()
    assert (FOLDER / "queries" / "highlights.scm").read_text(encoding="utf-8") == highlights()


def test_its_words_are_those_of_the_language() -> None:
    words = {text for text in strings(grammar().partition("rules: {")[2]) if text.isidentifier()}
    assert words == KEYWORDS | SOFT_WORDS
    assert {text for text in strings(highlights()) if text.isidentifier()} == KEYWORDS | SOFT_WORDS


def test_every_rule_that_is_named_is_there() -> None:
    text = grammar()
    declared = set(re.findall(r"^    (\w+): \$ =>", text, re.MULTILINE))
    aliased = set(re.findall(r", \$\.(\w+)\)", text)) | {"name"}
    assert {each for each in re.findall(r"\$\.(\w+)", text)} <= declared | aliased
    assert {HIDDEN.get(name.lstrip("?"), name) for name in rules()} <= declared
    assert set(re.findall(r"\((\w+)", highlights())) <= declared | aliased
    assert "undefined" not in text and text.count("seq(") > 30


if __name__ == "__main__":
    (FOLDER / "queries").mkdir(parents=True, exist_ok=True)
    (FOLDER / "grammar.js").write_text(grammar(), encoding="utf-8")
    (FOLDER / "queries" / "highlights.scm").write_text(highlights(), encoding="utf-8")
