"""Text to tree: what every construct of the language means and where it stands."""

import logging

import pytest
from diagnosed import errors_of, underlined
from lark import Lark

from surgery.language.grammar import GRAMMAR, KEYWORDS, SOFT_WORDS, WORDS, is_name
from surgery.language.parser import parse_expression, parse_text
from surgery.language.tree import (
    Argument,
    Binary,
    Boolean,
    Call,
    Definition,
    If,
    Let,
    Name,
    Number,
    Param,
    Parameter,
    Pattern,
    Reference,
    Spec,
    String,
    Target,
    Transpose,
    Unary,
    post,
    pre,
)
from surgery.language.well_formed import HEAD_WORDS

A, B, C = Name("a"), Name("b"), Name("c")


# ---------------------------------------------------------------------------------------------------- grammar


def conflicts(grammar: str, monkeypatch, **options) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("lark"), "level", logging.DEBUG)
    monkeypatch.setattr(logging.getLogger("lark"), "handle", lambda record: said.append(record.getMessage()))
    Lark(grammar, parser="lalr", debug=True, **options)
    return [message for message in said if "conflict" in message.lower()]


def test_the_grammar_has_no_conflict(monkeypatch):
    assert conflicts(GRAMMAR, monkeypatch, start=["file", "expression"], maybe_placeholders=True) == []


def test_a_conflict_would_be_seen(monkeypatch):
    assert conflicts('start: e\ne: e "+" e | "1"', monkeypatch)


def test_words():
    assert {"param", "let", "target", "override", "frozen", "if", "true"} <= KEYWORDS
    assert {"on", "in", "out", "with", "bias", "dropout", "shifted", "untie", "linear", "any", "int"} <= SOFT_WORDS
    assert {word for words in WORDS.values() for word in words} == KEYWORDS | SOFT_WORDS
    assert all(is_name(word) for word in SOFT_WORDS)
    assert not any(is_name(word) for word in KEYWORDS)


@pytest.mark.parametrize("word", sorted(SOFT_WORDS | {"T", "W", "scale", "parameter", "iffy", "spec_", "e5"}))
def test_soft_words_are_names(word):
    spec = parse_text(
        f"spec {word}({word}: int = 1) check {word} "
        f"transform t({word}: int) on {word}s : {word} {{ param d[{word}] = {word}.T return {word}({word} = {word}) }} "
        f"target linear in {word} \"a\" {{ add {word}({word}) dropout({word}) post {word}() on in }}")
    assert (spec.name, spec.params[0].name, spec.definitions[0].claims[0]) == (word,) * 3
    assert spec.targets[0].ancestor == word
    assert spec.targets[0].steps[0].dropout == Name(word)


@pytest.mark.parametrize("word", sorted(SOFT_WORDS - HEAD_WORDS))
def test_soft_words_are_names_of_selectors(word):
    spec = parse_text(f'select {word} = {word}, "a", {word} target linear "a", {word} except {word} {{ add f() }}')
    assert (spec.selects[0].name, spec.targets[0].exclude) == (word, (Reference(word),))


@pytest.mark.parametrize("word", sorted(HEAD_WORDS))
def test_the_words_of_a_target_are_not_names_of_selectors(word):
    assert errors_of(f'select {word} = "a"')[0].code == "reserved-name"


# ------------------------------------------------------------------------------------------------- expressions


@pytest.mark.parametrize(("text", "tree"), [
    ("a - b - c", Binary("-", Binary("-", A, B), C)),
    ("a + b @ c", Binary("+", A, Binary("@", B, C))),
    ("a * b @ c", Binary("@", Binary("*", A, B), C)),
    ("-a.T", Unary("-", Transpose(A))),
    ("-a @ -b", Binary("@", Unary("-", A), Unary("-", B))),
    ("(a + b).T.T", Transpose(Transpose(Binary("+", A, B)))),
    ("not a == b", Unary("not", Binary("==", A, B))),
    ("a or b and not c", Binary("or", A, Binary("and", B, Unary("not", C)))),
    ("a < b and b < c", Binary("and", Binary("<", A, B), Binary("<", B, C))),
    ("if a then b else if b then c else a", If(A, B, If(B, C, A))),
    ("f(a, k = b,)", Call("f", (Argument(None, A), Argument("k", B)))),
    ("f().T", Transpose(Call("f"))),
    ('"**.{a,b}"', String("**.{a,b}")),
    ("true", Boolean(True)),
    ("a # comment", A),
])
def test_expressions(text, tree):
    assert parse_expression(text) == tree


@pytest.mark.parametrize(("text", "value"), [
    ("8", 8), ("1_024", 1024), ("0.05", 0.05), ("1e-4", 1e-4), ("2.5E+3", 2500.0), ("5%", 0.05), ("0.7%", 0.007),
    ("12.5%", 0.125), ("9223372036854775807", 2**63 - 1),
])
def test_numbers(text, value):
    number = parse_expression(text)
    assert (number, number.text) == (Number(value), text)


def test_one_is_not_one_point_zero():
    assert parse_expression("1") != parse_expression("1.0")


def test_spans_and_parentheses_of_an_expression():
    outer = parse_expression("f( (a + b), kk = 2)")
    first, second = outer.arguments
    assert (underlined(outer), outer.name_span.start, outer.name_span.end) == ("f( (a + b), kk = 2)", 0, 1)
    assert (underlined(first.value), first.value.parens) == ("(a + b)", 1)
    assert (second.name_span.start, second.name_span.end) == (12, 14)


# -------------------------------------------------------------------------------------------------- statements


def test_a_whole_spec():
    text = """
    use "roles.surg"
    spec sora(rank: int = 16, mode: str = "a", flag: bool,)
    check rank >= 1
    select some = "**.a", other, "b"
    override target linear in LlamaMLP some, "**.x", except "**.0.**", more untie shifted {
      pre diagonal() on in with bias add low_rank(rank, alpha = 2) dropout(5%) post orthogonal(rank = rank) on out
    }
    target { post f() }
    train "**.norm.weight", "c.*",
    """
    spec = parse_text(text)
    assert [u.path for u in spec.uses] == ["roles.surg"]
    assert spec.params == (Parameter(name="rank", type="int", default=16),
                           Parameter(name="mode", type="str", default='"a"'),
                           Parameter(name="flag", type="bool"))
    assert spec.selects[0].patterns == (Pattern("**.a"), Reference("other"), Pattern("b"))
    first, second = spec.targets
    low_rank = pre("x").model_copy(update={
        "placement": "add", "dropout": Number(0.05),
        "call": Call("low_rank", (Argument(None, Name("rank")), Argument("alpha", Number(2))))})
    assert first == Target(
        Reference("some"), "**.x", pre("diagonal", on="in", with_bias=True), low_rank, post("orthogonal", rank="rank"),
        kind="linear", ancestor="LlamaMLP", exclude=["**.0.**", Reference("more")], override=True, shifted=True,
        untie=True)
    assert second == Target(post("f"))
    assert spec.train[0].patterns == (Pattern("**.norm.weight"), Pattern("c.*"))


def test_a_definition():
    text = """transform t(k: int) on n : orthogonal, symmetric {
      check k >= 1
      param d[n / k, k] = 1
      shared frozen param e ~ normal(std = 1)
      let f = d @ e
      return f
    }
    update u { return W }"""
    first, second = parse_text(text).definitions
    assert (first.dim, first.claims, [str(s) for s in first.claims_spans]) == (
        "n", ("orthogonal", "symmetric"), ["<text>:1:28", "<text>:1:40"])
    assert first.body == (Param(name="d", dims=["n / k", "k"], init=1),
                          Param(name="e", draw="normal(std = 1)", shared=True, frozen=True),
                          Let(name="f", value="d @ e"))
    assert (first.result, len(first.checks)) == (Name("f"), 1)
    assert second == Definition(kind="update", name="u", result="W")


def test_places_of_statements():
    spec = parse_text('# c\nspec a(rank: int = 8)\ntarget "x" {\n  pre d(rank)\n}\n')
    assert (str(spec.span), str(spec.name_span), underlined(spec)) == ("<text>:2:1", "<text>:2:6",
                                                                       "spec a(rank: int = 8)")
    assert (str(spec.params[0].name_span), str(spec.targets[0].span)) == ("<text>:2:8", "<text>:3:1")
    assert str(spec.targets[0].selectors[0].span) == "<text>:3:8"
    assert str(spec.targets[0].steps[0].call.name_span) == "<text>:4:7"


def test_doc_is_the_comment_block_directly_above():
    text = "# The file.\n\n# About d,\n# in two lines.\ntransform d on n { return I(n) } # beside\n# end\n"
    definition = parse_text(text).definitions[0]
    assert definition.doc == "About d,\nin two lines."
    assert definition.trivia.beside == "# beside"
    assert parse_text("# far\n\nspec a").doc == ""


@pytest.mark.parametrize("text", ["", "\n", "\ufeff", "# only a comment", "#\r\n\t# two\r\n"])
def test_a_file_without_statements_is_an_empty_spec(text):
    assert parse_text(text) == Spec()


def test_line_ends_tabs_and_a_byte_order_mark_mean_nothing():
    text = 'spec a(rank: int = 8) # c\ntarget "x" {\n  pre d(rank)\n}\n'
    assert parse_text("\ufeff" + text.replace("\n", "\r\n").replace(" ", "\t")) == parse_text(text)
