"""What is said of text, Python and JSON that are no spec."""

import pytest
from diagnosed import errors_of, underlined

from surgery.diagnostics import SurgeryError
from surgery.language.grammar import KEYWORDS
from surgery.language.parser import MAX_ERRORS, from_json, parse_expression
from surgery.language.tree import Argument, Binary, Boolean, Name, Number, Parameter, Spec, Target, Unary, add, pre


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
    ("use 'a'", "double quotes"), ("spec a;", "`;`"), ("check a & b", "`and`"), ("check a | b", "`or`"),
    ("check !a", "`not`"),
    ("check 5 %", "`5%`"), ("check .5", "both sides"), ("check a.shape", "`.T`"), ("check a < b < c", "`and`"),
    ("check a = b", "`==`"), ("check 1 + if a then b else c", "parentheses"),
])
def test_hints_for_what_other_languages_write(text, hint):
    assert hint in " ".join(errors_of(text)[0].helps)


@pytest.mark.parametrize("text", ["spec target", "spec a(let: int)", "update use { return 1 }",
                                  "target linear in add { pre x() }",
                                  "select a = \"b\", if", "update u { param not = 1 return 1 }"])
def test_reserved_words_are_not_names(text):
    first = errors_of(text)[0]
    assert first.code == "reserved-name"
    assert underlined(first) in KEYWORDS


@pytest.mark.parametrize(("text", "meant"), [
    ("trget linear { add x() }", "target"), ("update u { retrun 1 }", "return"),
    ("update u {\n  let a = 1\n  retrun a\n}", "return"),
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
    ("check 1e999", "syntax", "1:7"), ("check " + "9" * 5000, "syntax", "1:7"),
    ("check 9223372036854775808", "syntax", "1:7"),
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
    (lambda: Spec("a", params=[Parameter(name="b", type="float", default=float("nan"))]),
     "this number is out of range"),
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
        "s.params[0].name must be a valid string, not '1'",
        "s.params[0].type must be 'int', 'float', 'bool' or 'str', not 'it'",
        "s.params[1] needs a field `name`", "s.params[1] needs a field `type`"]),
    ('{"checks": [{"condition": "1 +"}, {"condition": {}}]}', [
        "expected an expression after `+`, found the end of the text", "'{}' is not an expression"]),
    ('{"targets": [{"steps": [{"placement": "post", "call": "1"}]}]}',
     ["s.targets[0].steps[0].call must be a call, not '1'"]),
    ('{"targets": [{"steps": [{"placement": "post", "call": "f()", "dropout": 1}]}]}',
     ["`dropout` cannot follow `post`"]),
    ('{"targets": [{"steps": [], "span": {"start": 1}}]}', ["s.targets[0].span must be a span, not \"{'start': 1}\""]),
    ('{"definitions": [{"kind": "update", "name": "u", "result": 1, "body": [{"name": "a"}]}]}',
     ["s.definitions[0].body[0].what must be 'param' or 'let'"]),
    ('{"definitions": [{"kind": "transform", "name": "u", "result": 1, "body": [{"what": "param", "name": "a"}]}]}', [
        "transform `u`: a transform names its dimension with `on`, an update does not",
        "param `a` starts at a value (`=`) or at a draw (`~`), one of the two"]),
])
def test_a_mistake_in_json_is_a_diagnostic(text, messages):
    assert [e.message for e in errors_of(text, lambda t: from_json(t, "s"))] == messages
