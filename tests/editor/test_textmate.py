"""The TextMate grammar of editors/vscode: its words are those of grammar/surg.lark, and every shipped spec is coloured
without a rest.

`python tests/editor/test_textmate.py` writes it anew.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from surgery.language.grammar import KEYWORDS, SOFT_WORDS, WORDS, machine, pattern_of
from surgery.language.library import PRELUDE, locate, shipped

FOLDER = Path(__file__).parents[2] / "editors" / "vscode"
FILE = FOLDER / "syntaxes" / "surg.tmLanguage.json"
SPECS = {**shipped(), PRELUDE: locate(PRELUDE)}
#: The scope of the words of each terminal; those that are not named here are words of a statement.
SCOPES = {"PLACEMENT": "keyword.operator.word.placement.surg", "KIND": "storage.type.kind.surg",
          "TYPE": "storage.type.surg", "BOOLEAN": "constant.language.surg", "SIDE": "storage.modifier.surg",
          "SCOPE": "storage.modifier.surg", "MANIFOLD": "storage.modifier.surg", "FROZEN": "storage.modifier.surg",
          "SHARED": "storage.modifier.surg", "OVERRIDE": "storage.modifier.surg", "SHIFTED": "storage.modifier.surg",
          "UNTIE": "storage.modifier.surg", "_IF": "keyword.control.surg", "_THEN": "keyword.control.surg",
          "_ELSE": "keyword.control.surg", "AND": "keyword.operator.word.surg", "OR": "keyword.operator.word.surg",
          "NOT": "keyword.operator.word.surg"}
USUAL = "keyword.other.surg"
NAME = "[A-Za-z_][A-Za-z0-9_]*"
#: What stands behind a soft word where it is one: elsewhere a parameter may be called so.
BEHIND = {
    "_LANGUAGE": r"(?=\s+[0-9])", "_ON": rf"(?=\s+{NAME})", "_WITH": r"(?=\s+bias\b)", "_DROPOUT": r"(?=\s*\()",
    "_NO": r"(?=\s+decay\b)", "_RATE": r"(?=\s+[0-9A-Za-z_(-])", "_FOR": rf"(?=\s+{NAME}\s+in\b)",
    "_NOISE": rf"(?=\s+{NAME})",
}
#: And what stands before it.
BEFORE = {
    "_BIAS": r"(?<=\bon )|(?<=\bwith )", "_DECAY": r"(?<=\bno )", "MANIFOLD": r"(?<=\bon )", "SIDE": r"(?<=\bon )",
    "SCOPE": r"(?<=shared\()", "TYPE": r"(?<=:)|(?<=: )", "KIND": r"(?<=\btarget )", "_LANGUAGE": r"^\s*",
    "_IN": "|".join(rf"(?<=\b{kind} )" for kind in WORDS["KIND"]),
}


def _word_rules() -> list[dict[str, Any]]:
    """A rule for each terminal of words: reserved ones anywhere, soft ones in their places."""
    rules = []
    for terminal, words in sorted(WORDS.items(), key=lambda each: {*each[1]} <= KEYWORDS):  # the soft ones first
        before, behind = BEFORE.get(terminal, ""), BEHIND.get(terminal, "")
        before = f"(?:{before})" if "|" in before else before
        rules.append({"name": SCOPES.get(terminal, USUAL), "match": rf"{before}\b(?:{'|'.join(words)})\b{behind}",
                      "comment": terminal})
    return rules


def grammar() -> dict[str, Any]:
    declared = [{"match": rf"\b(spec|transform|update|select)\s+({NAME})",
                 "captures": {"1": {"name": USUAL}, "2": {"name": "entity.name.function.surg"}}},
                {"match": rf"\b(param|noise|let)\s+({NAME})",
                 "captures": {"1": {"name": USUAL}, "2": {"name": "variable.parameter.surg"}}},
                {"match": rf"\b(for)\s+({NAME})\s+(in)\b",
                 "captures": {"1": {"name": USUAL}, "2": {"name": "variable.parameter.surg"}, "3": {"name": USUAL}}}]
    return {
        "$schema": "https://raw.githubusercontent.com/martinring/tmlanguage/master/tmlanguage.json",
        "name": "Surgery", "scopeName": "source.surg", "fileTypes": ["surg"],
        "patterns": [
            {"name": "comment.line.number-sign.surg", "match": "#.*$"},
            {"name": "string.quoted.double.surg", "match": pattern_of("STRING")},
            *declared, *_word_rules(),
            {"name": "keyword.operator.transpose.surg", "match": pattern_of("_TRANSPOSE")},
            {"name": "constant.numeric.surg", "match": pattern_of("NUMBER")},
            {"name": "entity.name.function.call.surg", "match": rf"\b{NAME}(?=\s*\()"},
            {"name": "variable.other.surg", "match": rf"\b{NAME}\b"},
            {"name": "keyword.operator.surg", "match": rf"\.\.|{pattern_of('COMPARE')}|[-+*/@=~:]"},
            {"name": "punctuation.surg", "match": r"[{}()\[\],]"},
        ]}


def written() -> str:
    return json.dumps(grammar(), indent=2, ensure_ascii=False) + "\n"


def tokens(rules: list[dict[str, Any]], line: str) -> list[tuple[int, int, str]]:
    """(start, end, scope) of what each rule colours, as TextMate does it: at each place the rule that matches first, and
    of those the one that stands first."""
    found, at = [], 0
    nexts = {number: re.search(rule["match"], line) for number, rule in enumerate(rules)}
    while at < len(line):
        for number, rule in enumerate(rules):  # what a rule matches next stays so until it is passed
            if (match := nexts[number]) and match.start() < at:
                nexts[number] = re.compile(rule["match"]).search(line, at)
        matches = [(match.start(), number, match) for number, match in nexts.items() if match and match[0]]
        if not matches:
            break
        _, number, match = min(matches, key=lambda each: each[:2])
        captures = rules[number].get("captures", {})
        found += [(*match.span(int(group)), each["name"]) for group, each in captures.items()] or [
            (*match.span(), rules[number]["name"])]
        at = match.end()
    return found


def read() -> list[dict[str, Any]]:
    return json.loads(FILE.read_text(encoding="utf-8"))["patterns"]


def test_the_file_is_that_of_the_language() -> None:
    assert FILE.read_text(encoding="utf-8") == written()


def test_every_word_of_the_language_is_there() -> None:
    words = {word for rule in read() if rule.get("comment") in WORDS
             for word in re.search(r"\\b\(\?:([a-z|]+)\)\\b", rule["match"])[1].split("|")}
    assert words == KEYWORDS | SOFT_WORDS
    assert SCOPES.keys() | BEHIND.keys() | BEFORE.keys() <= WORDS.keys()


@pytest.mark.parametrize("name", SPECS)
def test_a_spec_without_a_rest(name: str) -> None:
    text, rules, at = SPECS[name].read_text(encoding="utf-8"), read(), 0
    scopes: dict[tuple[int, int], str] = {}
    for line in text.split("\n"):
        coloured = tokens(rules, line)
        rest = "".join(" " if any(a <= i < b for a, b, _ in coloured) else c for i, c in enumerate(line))
        assert rest.strip() == "", line
        scopes |= {(at + a, at + b): scope for a, b, scope in coloured}
        at += len(line) + 1
    # What the parser takes for a word of the language is coloured as that word, and a name as a name.
    parser = machine(text, "file")
    for token in parser.lexer_thread.lex(parser.parser_state):
        parser.feed_token(token)
        scope = scopes.get((token.start_pos, token.end_pos), "")
        if token.type in WORDS:
            assert scope == SCOPES.get(token.type, USUAL), (token, text[token.start_pos - 20 : token.end_pos + 20])
        elif token.type == "NAME":
            assert scope.startswith(("variable", "entity")), (token, text[token.start_pos - 20 : token.end_pos + 20])
        elif token.type in ("STRING", "NUMBER"):
            assert scope.startswith(("string", "constant")), token


def test_the_extension_names_what_is_there() -> None:
    package = json.loads((FOLDER / "package.json").read_text(encoding="utf-8"))
    contributed = package["contributes"]
    files = [package["main"], contributed["languages"][0]["configuration"], contributed["grammars"][0]["path"]]
    assert [file for file in files if not (FOLDER / file).is_file()] == []
    json.loads((FOLDER / "language-configuration.json").read_text(encoding="utf-8"))
    settings = re.findall(r'settings\.get\("(\w+)"\)', (FOLDER / "extension.js").read_text(encoding="utf-8"))
    assert {f"surgery.{name}" for name in settings} == {*contributed["configuration"]["properties"]}
    assert contributed["grammars"][0]["scopeName"] == grammar()["scopeName"]


if __name__ == "__main__":
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(written(), encoding="utf-8")
