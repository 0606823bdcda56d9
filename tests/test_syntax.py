"""Text to tree: what every construct means, where it stands, and what the parser says of text that is not a spec."""

import logging

import pytest
from lark import Lark

from surgery.diagnostics import SurgeryError
from surgery.syntax.grammar import GRAMMAR, KEYWORDS, SOFT_WORDS, WORDS, is_name
from surgery.syntax.parser import MAX_ERRORS, from_json, parse_expression, parse_text
from surgery.syntax.tree import (
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
    add,
    post,
    pre,
)
from surgery.syntax.wellformed import HEAD_WORDS

A, B, C = Name("a"), Name("b"), Name("c")


def errors_of(text: str, parse=parse_text) -> list:
    with pytest.raises(SurgeryError) as caught:
        parse(text)
    return list(caught.value.diagnostics)


def underlined(diagnostic) -> str:
    span = diagnostic.span
    return span.source.text[span.start : span.end]


# ---------------------------------------------------------------------------------------------------- grammar


def conflicts(grammar: str, caplog, **options) -> list[str]:
    with caplog.at_level(logging.DEBUG, logger="lark"):
        Lark(grammar, parser="lalr", debug=True, **options)
    return [record.message for record in caplog.records if "conflict" in record.message.lower()]


def test_the_grammar_has_no_conflict(caplog):
    assert conflicts(GRAMMAR, caplog, start=["file", "expression"], maybe_placeholders=True) == []


def test_a_conflict_would_be_seen(caplog):
    assert conflicts('start: e\ne: e "+" e | "1"', caplog)


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
    assert spec.params == (Parameter(name="rank", type="int", default=16), Parameter(name="mode", type="str", default='"a"'),
                           Parameter(name="flag", type="bool"))
    assert spec.selects[0].patterns == (Pattern("**.a"), Reference("other"), Pattern("b"))
    first, second = spec.targets
    low_rank = pre("x").model_copy(update={
        "placement": "add", "dropout": Number(0.05),
        "call": Call("low_rank", (Argument(None, Name("rank")), Argument("alpha", Number(2))))})
    assert first == Target(
        Reference("some"), "**.x", pre("diagonal", on="in", with_bias=True), low_rank, post("orthogonal", rank="rank"),
        kind="linear", ancestor="LlamaMLP", exclude=["**.0.**", Reference("more")], override=True, shifted=True, untie=True)
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
                          Param(name="e", draw="normal(std = 1)", shared=True, frozen=True), Let(name="f", value="d @ e"))
    assert (first.result, len(first.checks)) == (Name("f"), 1)
    assert second == Definition(kind="update", name="u", result="W")


def test_places_of_statements():
    spec = parse_text('# c\nspec a(rank: int = 8)\ntarget "x" {\n  pre d(rank)\n}\n')
    assert (str(spec.span), str(spec.name_span), underlined(spec)) == ("<text>:2:1", "<text>:2:6", "spec a(rank: int = 8)")
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


# ------------------------------------------------------------------------------------------------- diagnostics


@pytest.mark.parametrize(("text", "message", "place"), [
    ("spec", "expected a name after `spec`, found the end of the text", "1:5"),
    ("spec 5", "expected a name after `spec`, found `5`", "1:6"),
    ("let a = 1", "expected a statement, found `let`", "1:1"),
    ("spec a(rank: integer)", "expected a type (`int`, `float`, `bool` or `str`) after `:`, found `integer`", "1:14"),
    ("spec a(rank int)", "expected `:` after `rank`, found `int`", "1:13"),
    ("update u { let a =\n  param d = 1 return d }", "expected an expression after `=`, found `param`", "1:19"),
    ("update u { let a = 1\n}", "expected `param`, `let`, `check` or `return` after `1`, found `}`", "1:21"),
    ("update u { return 1 let a = 2 }", "expected `}` after `1`, found `let`", "1:21"),
    ("update u { return (1\n}", "expected `)` after `1`, found `}`", "1:21"),
    ("transform t { return 1 }", "expected `(` or `on` after `t`, found `{`", "1:13"),
    ("check a +", "expected an expression after `+`, found the end of the text", "1:10"),
    ("check (a", "expected `)` after `a`, found the end of the text", "1:9"),
    ("check a b", "expected a statement after `a`, found `b`", "1:9"),
    ("train", "expected a pattern or the name of a `select` after `train`, found the end of the text", "1:6"),
    ('target linear "a" "b" { add x() }',
     "expected `,`, `{`, `shifted`, `untie` or `except` after `\"a\"`, found `\"b\"`", "1:19"),
    ("target linear { add x }", "expected `(` after `x`, found `}`", "1:23"),
    ("target linear {", "expected `}` after `{`, found the end of the text", "1:16"),
    ('check "a\n', "this string is not closed", "1:7"),
    ("check f(1 2)", "expected `,` or `)` after `1`, found `2`", "1:11"),
    ("check a = b", "expected a statement after `a`, found `=`", "1:9"),
    ("check 1 <= a < 2", "expected a statement after `a`, found `<`", "1:14"),
])
def test_syntax_errors(text, message, place):
    first = errors_of(text)[0]
    assert (first.code, first.message, str(first.span)) == ("syntax", message, f"<text>:{place}")


@pytest.mark.parametrize(("text", "hint"), [
    ("use 'a'", "double quotes"), ("spec a;", "`;`"), ("check a & b", "`and`"), ("check a | b", "`or`"), ("check !a", "`not`"),
    ("check 5 %", "`5%`"), ("check .5", "both sides"), ("check a.shape", "`.T`"), ("check a < b < c", "`and`"),
    ("check a = b", "`==`"), ("check 1 + if a then b else c", "parentheses"),
])
def test_hints_for_what_other_languages_write(text, hint):
    assert hint in " ".join(errors_of(text)[0].helps)


@pytest.mark.parametrize("text", ["spec target", "spec a(let: int)", "update use { return 1 }", "target linear in add { pre x() }",
                                  "select a = \"b\", if", "update u { param not = 1 return 1 }"])
def test_reserved_words_are_not_names(text):
    first = errors_of(text)[0]
    assert first.code == "reserved-name"
    assert underlined(first) in KEYWORDS


@pytest.mark.parametrize(("text", "meant"), [
    ("trget linear { add x() }", "target"), ("update u { retrun 1 }", "return"), ("update u {\n  let a = 1\n  retrun a\n}", "return"),
    ("target linear { ad x() }", "add"), ("spec a(b: flaot)", "float"), ("target linear { pre x() on inn }", "in"),
])
def test_misspelt_words(text, meant):
    first = errors_of(text)[0]
    assert first.label == f"did you mean `{meant}`?"
    assert underlined(first) in {"trget", "retrun", "ad", "flaot", "inn"}


@pytest.mark.parametrize(("text", "bracket"), [
    ("target linear {\n  add x()\n\ntrain \"a\"", "1:15"), ("spec a(\n\ntarget linear { add x() }", "1:7"),
    ("update u { param d[f(1] = 1 return 1 }", "1:21"), ("check f(g(1)", "1:8"), ("check f(1, 2", "1:8"),
])
def test_an_open_bracket_is_shown(text, bracket):
    assert [str(span) for span, label in errors_of(text)[0].related if "not closed" in label] == [f"<text>:{bracket}"]


def test_all_the_errors_of_a_file_are_told():
    text = "spec a(\n\ntarget linear {\n  add x(\n}\n\nupdate u {\n  return\n}\n\ntrain 5\n"
    assert [str(e.span) for e in errors_of(text)] == ["<text>:1:8", "<text>:4:9", "<text>:8:9", "<text>:11:7"]
    assert len(errors_of("train 5\n" * 1000)) == MAX_ERRORS


@pytest.mark.parametrize(("text", "code", "place"), [
    ("spec a(k: int, k: int)", "duplicate-name", "1:16"),
    ("transform t(k: int) on k { return 1 }", "duplicate-name", "1:13"),
    ("update u(k: int) { param k = 1 return k }", "duplicate-name", "1:26"),
    ("update u { let a = 1 let a = 2 return a }", "duplicate-name", "1:26"),
    ("update u : symmetric, symmetric { return 1 }", "duplicate-name", "1:23"),
    ("check f(k = 1, k = 2)", "duplicate-name", "1:16"),
    ("target { add f(g(k = 1, k = 2)) }", "duplicate-name", "1:25"),
    ("check f(k = 1, 2)", "syntax", "1:16"),
    ("spec a\nspec b", "syntax", "2:1"),
    ("target linear { }", "syntax", "1:1"),
    ("target { pre f() dropout(1) }", "syntax", "1:18"),
    ("target { add f() on in }", "syntax", "1:18"),
    ("target { add f() on out }", "syntax", "1:18"),
    ("target { add f() with bias }", "syntax", "1:18"),
    ("target { pre f() on in on out }", "syntax", "1:24"),
    ("check 1e999", "syntax", "1:7"), ("check " + "9" * 5000, "syntax", "1:7"), ("check 9223372036854775808", "syntax", "1:7"),
    ("check " + "(" * 10_000 + "a" + ")" * 10_000, "syntax", "1:7"), ("check " + "-" * 10_000 + "a", "syntax", "1:107"),
    ("check a" + " + a" * 5_000, "syntax", "1:7"), ("check a" + ".T" * 10_000, "syntax", "1:7"),
    ("check " + "f(" * 2_000 + ")" * 2_000, "syntax", "1:207"),
    ("check " + "if a then b else " * 1_000 + "c", "syntax", None),
])
def test_what_no_spec_may_say(text, code, place):
    found = errors_of(text)
    assert found[0].code == code
    assert place is None or [str(e.span) for e in found] == [f"<text>:{place}"]


def test_the_first_of_two_is_shown():
    (error,) = errors_of("spec a(k: int,\n  k: int)")
    assert [str(span) for span, _ in error.related] == ["<text>:1:8"]


def test_expressions_have_errors_too():
    assert errors_of("", parse_expression)[0].message == "expected an expression, found the end of the text"
    assert errors_of("1 +", parse_expression)[0].span.source.name == "<expression>"
    assert errors_of("f(k = 1, k = 2)", parse_expression)[0].code == "duplicate-name"


# -------------------------------------------------------------------------------------------- Python and JSON


def test_python_values_are_expressions():
    assert add("low_rank", rank="2 * rank", alpha=-0.5, flag=True).call.arguments == (
        Argument("rank", Binary("*", Number(2), Name("rank"))), Argument("alpha", Unary("-", Number(0.5))),
        Argument("flag", Boolean(True)))


@pytest.mark.parametrize(("build", "message"), [
    (lambda: Target("x", kind="lin"), "Target.kind must be 'linear', 'conv', 'embedding' or 'any', not 'lin'"),
    (lambda: Target("x", knd="linear"), "Target has no field `knd`"),
    (lambda: Target(5), "Target.selectors[0] must be a pattern or {\"select\": name}, not '5'"),
    (lambda: Parameter(name="a"), "Parameter needs a field `type`"),
    (lambda: pre("d", on="up"), "Step.side must be 'out' or 'in', not 'up'"),
    (lambda: pre("d", rank=None), "'None' is not an expression"),
    (lambda: add("d", rank="1 +"), "expected an expression after `+`, found the end of the text"),
    (lambda: Spec("my spec"), "'my spec' is not a name"),
    (lambda: Spec("target"), "`target` is a word of the language and cannot be a name"),
    (lambda: Spec("a", targets=[Target("x")]), "a target needs at least one step"),
    (lambda: Spec("a", targets=[Target('"', add("d"))]), "the string '\"' cannot be written in a spec"),
    (lambda: Spec("a", params=[Parameter(name="b", type="float", default=float("nan"))]), "this number is out of range"),
    (lambda: Spec(params=[Parameter(name="b", type="int")]), "a spec with parameters needs a name"),
])
def test_a_mistake_in_python_is_a_diagnostic(build, message):
    with pytest.raises(SurgeryError) as caught:
        build()
    assert caught.value.diagnostics[0].message == message


@pytest.mark.parametrize(("text", "messages"), [
    ("{", ["this is not JSON: EOF while parsing an object at line 1 column 1"]),
    ("[" * 100_000, ["this is not JSON: recursion limit exceeded at line 1 column 202"]),
    ("[]", ["s must be an object, not '[]'"]),
    ('{"nme": "a"}', ["s has no field `nme`"]),
    ('{"name": "a", "params": [{"name": 1, "type": "it"}, {}]}', [
        "s.params[0].name must be a valid string, not '1'", "s.params[0].type must be 'int', 'float', 'bool' or 'str', not 'it'",
        "s.params[1] needs a field `name`", "s.params[1] needs a field `type`"]),
    ('{"checks": [{"condition": "1 +"}, {"condition": {}}]}', [
        "expected an expression after `+`, found the end of the text", "'{}' is not an expression"]),
    ('{"targets": [{"steps": [{"placement": "post", "call": "1"}]}]}', ["s.targets[0].steps[0].call must be a call, not '1'"]),
    ('{"targets": [{"steps": [{"placement": "post", "call": "f()", "dropout": 1}]}]}', ["`dropout` cannot follow `post`"]),
    ('{"targets": [{"steps": [], "span": {"start": 1}}]}', ["s.targets[0].span must be a span, not \"{'start': 1}\""]),
    ('{"definitions": [{"kind": "update", "name": "u", "result": 1, "body": [{"name": "a"}]}]}',
     ["s.definitions[0].body[0].what must be 'param' or 'let'"]),
    ('{"definitions": [{"kind": "transform", "name": "u", "result": 1, "body": [{"what": "param", "name": "a"}]}]}', [
        "transform `u`: a transform names its dimension with `on`, an update does not",
        "param `a` starts at a value (`=`) or at a draw (`~`), one of the two"]),
])
def test_a_mistake_in_json_is_a_diagnostic(text, messages):
    assert [e.message for e in errors_of(text, lambda t: from_json(t, "s"))] == messages
