"""What is said of text, Python and JSON that are no spec, and of words that another language has."""

import re
from itertools import chain

import pytest
from diagnosed import errors_of, underlined

from surgery.diagnostics import SurgeryError, nearest
from surgery.ir.operations import FUNCTIONS
from surgery.language import other_languages
from surgery.language.grammar import KEYWORDS
from surgery.language.library import load
from surgery.language.parser import MAX_ERRORS, parse_expression, parse_text
from surgery.language.tree import Argument, Binary, Boolean, Name, Number, Parameter, Spec, Target, Unary, add, pre
from surgery.planning.check import check
from surgery.semantics.distributions import DISTRIBUTIONS


@pytest.mark.parametrize(("text", "message", "place"), [
    ("spec", "expected a name after `spec`, found the end of the text", "1:5"),
    ("spec 5", "expected a name after `spec`, found `5`", "1:6"),
    ("let a = 1", "expected a statement, found `let`", "1:1"),
    ("spec a(rank: integer)", "expected a type (`int`, `float`, `bool` or `str`) after `:`, found `integer`", "1:14"),
    ("spec a(rank int)", "expected `:` after `rank`, found `int`", "1:13"),
    ("update u { let a =\n  param d = 1 return d }", "expected an expression after `=`, found `param`", "1:19"),
    ("update u { let a = 1\n}", "expected `param`, `noise`, `let`, `for`, `check` or `return` after `1`, found `}`", "1:21"),
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
    ("spec s(rank = 8)", "`rank: int = ...`"), ("update u() { param A(out, in) = 0 return A }", "`A[out, in]`"),
    ("transform t() { return I(n) }", "`on n`"), ("freeze \"**.norm\"", "`train"),
    ("update u() { learnable A[out, in] = 0 return A }", "`frozen param"),
    ("spec a(b: int = 8) {\n  target linear { add u(b) }\n}", "stand below its header"), ("spec a { }", "below its header"),
    ("update u { return s A }", "`A @ B`"), ("update u { let b = 2 A return b }", "`A @ B`"),
    ("update u { return (s) A @ B }", "`2 * A`"), ("update u { return sqrt rank * W }", "`sqrt(rank)`"),
    ("update u { let s = sqrt 2 return W }", "`sqrt(2)`"),
    ("update u { shared noise m[4] ~ bernoulli(0.5) return W }", "neither shared nor frozen"),
    ("use 'a'", "double quotes"), ("spec a;", "`;`"), ("check a & b", "`and`"), ("check a | b", "`or`"),
    ("check !a", "`not`"),
    ("check 5 %", "`5%`"), ("check .5", "both sides"), ("check a.b", "`.T`"), ("check a < b < c", "`and`"),
    ("check a = b", "`==`"), ("check 1 + if a then b else c", "parentheses"),
    ("check a ** 2", "`x * x`"), ("check a ^ 2", "`x * x`"), ("check a += 1", "once"), ("check a' @ a", "`A.T`"),
    ("check a[0] > 1", "no index"), ("check f(a)[0, 1]", "no index"), ("check f([1, 2])", "`[[1, 2]]`"),
    ("check a // 2", "`floor(a / b)`"), ("check a // a comment", "`#`"), ("// a comment\nspec a", "`#`"),
    ("update u {\n  // a comment\n  return W\n}", "`#`"), ("/* a comment */ spec a", "`#`"),
    ("update u { for i return W }", "`for i in 0..count { ... }`"),
    ("update u { let x = W while i < 3 { let x = x @ W } return x }", "its next value"),
    ("update u { for i in range(3) { let x = x @ W } return x }", "from a number up to another"),
    ("update u { for i in 0..3 { check i < 2 } return W }", "outside of a `for`, above it"),
    ("update u { for i in 0..3 { return W } }", "outside of a `for`, behind it"),
    ("check a for b", "repeats steps in a target"), ("import a", "`use"),
    ("update u { a = 3 return a }", "`let a = ...`"), ("r = 8", "`spec name(rank: int = 8)`"),
    ("spec a\nr: int = 8", "`spec name(rank: int = 8)`"), ("target_modules = [\"q\"]", "head of a target"),
    ("target linear { add f(target_modules = [\"q\"]) }", "head of a target"),
    ("target linear { add u }", "`add u()`"), ("update u { noise m[4] = 1 return W }", "drawn in every training step"),
    ("update u { param A[4] = 0 requires_grad return A }", "`frozen param"), ("check a[:, None]", "as a column"),
    ("check A^T", "`A.T`"), ("check A^-1", "`inverse(A)`"), ("check cat([A, B], 1)", "`stacked(A, B)`"),
    ("target [\"q\"] { add f() }", "without brackets"), ("target linear { lora(8) }", "`add lora(...)`"),
    ("update u { param A[4]: 0 return A }", "after `=`"), ("target linear { add u(rank: 8) }", "`rank = ...`"),
    ("spec a(b: int == 8)", "one `=`"), ("spec a(b: int := 8)", "after `=`"), ("update u(b: int = 8): return W", "braces"),
    ("update u(b: int = 8):\n  param A[out, in] = 0\n  return A", "braces"), ("spec a(b: int = 8k)", "no unit"),
    ("target linear { add u(150px) }", "no unit"), ("target linear { add u() on bias }", "its own head"),
    ("target linear add u()", "`{ add ... }`"), ("update u param A[4] = 0 return A", "`{ param ... }`"),
    ("check a in [1, 2]", "`a == 1 or a == 2`"), ("spec a -- a comment", "`#`"), ("spec a() % a comment", "`#`"),
    ("check torch.cat(A, B)", "stacked"), ("check F.tanh(A) > 1", "`tanh(...)`"), ("check A.norm() > 1", "`norm(A)`"),
    ("check A.t() > 1", "`A.T`"), ("target nn.Linear { add u() }", "`target linear"), ("check A.shape[0] > 1", "sizes are"),
])
def test_hints_for_what_other_languages_write(text, hint):
    (first, *_) = errors_of(text)
    assert hint in " ".join(first.helps) and not first.label


@pytest.mark.parametrize(("text", "hint"), [
    ("spec а", "CYRILLIC SMALL LETTER A, which looks like `a`"), ("spеc a", "CYRILLIC SMALL LETTER IE"),
    ("spec a(α: int = 8)", "write `alpha`"), ("spec a(λ: int = 8)", "write `lambda`"), ("spec a(ｂ: int = 8)", "write `b`"),
    ("spec a(b: int ＝ 8)", "write `=`"), ("spec sp\u200bec", "not seen (ZERO WIDTH SPACE, U+200B): delete"),
    ("spec a\x00", "not seen"), ("update u { return A · B }", "`A @ B`"), ("update u { return A ⊙ B }", "`A * B`"),
    ("update u { return A ⊗ B }", "`kron(A, B)`"), ("update u { return Aᵀ }", "`A.T`"), ("check 1 − 1", "`-`"),
    ("check 8 ÷ 2", "`a / b`"), ("check a ≤ 8", "`<=`"), ("check √2", "`sqrt(x)`"), ("check A²", "`pow(x, 2)`"),
    ("target “**.q_proj” { add u() }", "double quotes"), ("spec 中", "letters a to z"), ("check 5€", "EURO SIGN"),
])
def test_a_character_of_another_alphabet_is_named_and_what_it_means(text, hint):
    (first, *_) = errors_of(text)
    assert hint in " ".join(first.helps) and not underlined(first).isascii() or "\x00" in text


def told_of(text: str) -> list:
    return check(parse_text(text))


@pytest.mark.parametrize(("expression", "hint"), [
    ("gelu(W)", "sigmoid"), ("zeros(out, in)", "`0 * ones(m, n)`"), ("eye(out) @ W", "`I(n)`"),
    ("concat(W, W)", "side_by_side"), ("cat(W, W)", "side_by_side"), ("transpose(W)", "`A.T`"),
    ("sum(W)", "`A @ ones(n)`"), ("clip(W, 0, 1)", "`clamp(x, low, high)`"), ("stack(W, W)", "an axis more"),
    ("det(W)", "no determinant"), ("svd(W)", "`left_singular(A, k)`"), ("inv(W)", "`inverse(A)`"), ("for", "repeats steps in a target"),
    ("True", "`true`"), ("unsqueeze(W, 1)", "as a column"), ("repeat(W, 2)", "`kron(ones(2, 1), A)`"),
    ("rearrange(W, 1)", "einsum"), ("normal()", "behind `~`"), ("topk(W, 3)", "`row_top(A, k)`"),
])
def test_hints_for_functions_of_other_languages(expression, hint):
    (error,) = told_of(f"update u {{ return {expression} }}")
    assert hint in " ".join(error.helps) and not error.label and not error.notes


@pytest.mark.parametrize(("text", "hint"), [
    ("update u { param A[4, in] = 0 param B[out, 4] = 1 return A @ B }", "the other way round they fit"),
    ("update u { param A[4, in] = 0 param B[out, 4] = 1 return (B @ A).T }", "return `.T` of this"),
    ("update u { param A[in, 4] = 0 param B[out, 4] = 1 return B @ A }", "`.T` of the second fits"),
    ("update u { param A[4, in] = 0 param B[4, out] = 1 return B @ A }", "`.T` of the first fits"),
    ("update u { param d[in] = reshape(ones(in), 1, in) return W @ diag(d) }", "`reshape(reshape(ones(in), 1, in), in)`"),
    ("update u { param c[out] = 0 return c }", "`update u(...) on bias`"),
    ("transform t on n { param d[n] = 1 return d }", "`diag(d)`"),
    ("update u { return 0 * mystery * W }", "`(mystery: float = 1)`"),
    ("update u { return if norm(W) > 1 then W else W }", "known at compile time"),
    ("update u(r: float) { param A[out, r] = 0 return A @ ones(r, in) }", "is an `int`"),
    ("update u { param D[out * in] = 0 return reshape(D, out, -1) }", "written out"),
    ("update u { return W / norm(W, dim = 1) }", "`row_norm(A)`"),
    ("update u { param v[4] = 0 frozen param at[4] ~ sample(of = 8) return scatter(at, v, out, in) }",
     "the call is `scatter(a, places, m, n)`"), ("update u { return top(8, W) * W }", "the call is `top(a, k)`"),
    ("update u { param A[d_out, in] = 0 return A }", "is `out`"),
    ("update u { return W * pow(W, 0.5) }", "`sqrt(x)`"), ("update u { param A[out, in] ~ qr(W) return A }", "behind `=`"),
    ("spec s()\nupdate u { param A[out, in] = 0 return W + A }\ntarget linear { add u() }", "returns what is added to W"),
])
def test_what_a_first_spec_gets_wrong_is_met_with_what_to_write(text, hint):
    assert hint in " ".join(told_of(text)[0].helps)


def test_a_quotient_by_a_vector_is_told_how_rows_and_columns_are_divided():
    (error,) = told_of("update u { param A[out, in] = 0 return A / col_norm(W) }")
    assert "each column by `x @ diag(1 / d)`" in error.message


def test_a_function_is_named_once():
    text = "update u { param v[8] = 0 return scatter(v, W + W, 1, 1) }"
    (error,) = told_of(text)
    assert error.message == "`scatter` needs places here, and this is a tensor"
    assert text[error.span.start : error.span.end] == "W + W" and "`frozen param`" in error.helps[0]


def test_the_bias_is_no_other_parameter():
    """`b` is not `B` misspelt: an update that is not on the bias sees none."""
    (error,) = told_of("update u { param A[4, in] = 0 param B[out, 4] = 1 return B @ A + 0 * b }")
    assert error.label == "" and error.helps == ("`b` is the bias, which an update `on bias` reads",)


@pytest.mark.parametrize("value", ["W + B @ A", "B @ A", "diag(g)", "(B @ A)", "B", "B.T  # the update"])
def test_a_result_without_its_return_is_told_how_it_is_given(value):
    (error,) = errors_of(f"update u(r: int) {{\n  param B[out, r] = 0\n  {value}\n}}")
    assert error.helps == (f"a definition ends with what it gives: `return {value.partition('  #')[0]}`",)


@pytest.mark.parametrize(("text", "hint"), [
    ("update u(r) { return 1 }", "a parameter says its type: `r: int`"),
    ("spec s(rank, alpha = 1)", "a parameter says its type: `rank: int`"),
    ("target linear **.q_proj { add u() }", "a pattern stands in quotes: `\"**.q_proj\"`"),
    ("target linear **.{q,k}_proj, \"v\" { add u() }", "a pattern stands in quotes: `\"**.{q,k}_proj\"`"),
    ("target linear \"q\" except **.0.** { add u() }", "a pattern stands in quotes: `\"**.0.**\"`"),
    ("train *.norm", "a pattern stands in quotes: `\"*.norm\"`"),
])
def test_a_type_or_quotes_that_are_left_out(text, hint):
    assert hint in errors_of(text)[0].helps


def test_a_statement_without_its_word_is_told_where_it_stands():
    for statement, hint in (("d[n] = 1", "`param d[n] = ...` is trained"), ("d = 1", "`param d = ...` is trained")):
        text = f"transform u on n {{\n  param e[n] = 1\n  {statement}\n  return diag(e)\n}}"
        (error,) = errors_of(text)
        assert error.span.line == 3 and hint in error.helps[0]


@pytest.mark.parametrize(("draw", "hint"), [("zeros()", "= 0"), ("ones()", "= 1"), ("randn()", "`normal()`")])
def test_hints_for_draws_of_other_languages(draw, hint):
    assert hint in " ".join(told_of(f"update u {{ param A[out, in] ~ {draw} return A }}")[0].helps)


@pytest.mark.parametrize(("argument", "label", "hint"), [
    ("r = 8", "did you mean `rank`?", ""), ("lora_alpha = 8", "did you mean `alpha`?", ""),
    ("lora_dropout = 5%", "", "dropout stands after the step"), ("dropout = 5%", "", "dropout stands after the step"),
    ("target_modules = 1", "", "head of a target"), ("use_dora = true", "", "`post magnitude()`"),
    ("modules_to_save = 1", "", "`train"),
])
def test_hints_for_the_words_of_peft(argument, label, hint):
    (error,) = told_of(f"target linear {{ add low_rank({argument}) }}")
    assert error.label == label and hint in " ".join(error.helps)


def test_hints_for_the_words_of_peft_as_parameters():
    told = {name: errors_of(name, lambda name: load("lora", **{name: 1}))[0]
            for name in ("r", "lora_alpha", "lora_dropout", "target_modules")}
    assert [error.label for error in told.values()] == [
        "did you mean `rank`?", "did you mean `alpha`?", "did you mean `dropout`?", ""]
    assert "head of a target" in told["target_modules"].helps[0]


@pytest.mark.parametrize(("step", "hints"), [
    ("add lora()", ["`add low_rank(rank, alpha) dropout(dropout)`"]),
    ("pre sora()", ["`pre diagonal()`", "`post orthogonal("]),
    ("add vera()", ["`surgery show vera --emit spec`"]), ("add prompt_tuning()", ["no single W'"]),
])
def test_a_spec_is_no_update(step, hints):
    (error,) = told_of(f"target linear {{ {step} }}")
    assert error.code == "unknown-definition" and not error.label
    assert all(hint in " ".join(error.helps) for hint in hints)


def test_what_the_language_has_is_met_with_no_hint():
    """A function that the language comes to have leaves the table."""
    assert {name for name in FUNCTIONS | {*DISTRIBUTIONS, "pi"} if other_languages.instead_of(name)} == set()


def hints() -> list[str]:
    tables = [vars(other_languages)[name] for name in ("_NAMES", "_DRAWS", "_ARGUMENTS", "SYMBOLS")]
    return sorted(set(chain.from_iterable(table.values() for table in tables)))


@pytest.mark.parametrize("hint", hints())
def test_a_hint_quotes_what_can_be_written(hint):
    """Each quoted piece of text is an expression, an argument, a step, or a statement of a body or of a file, whole;
    words and signs aside."""
    wrappers = ("check {}", "check f({})", "{}", "update u {{ {} return 1 }}", "target linear {{ {} }}")

    def can_be_written(quoted: str) -> bool:
        text = quoted.replace("...", "add f()" if quoted.startswith("target") else "q")
        is_short = text in KEYWORDS or len(text) <= 2 or text in ("frozen param", "docs/language.md", "surgery specs")
        return is_short or any(parses(wrapper.format(text)) for wrapper in wrappers)

    assert [quoted for quoted in re.findall("`(.*?)`", hint) if not can_be_written(quoted)] == []


def parses(text: str) -> bool:
    try:
        parse_text(text)
    except SurgeryError:
        return False
    return True


@pytest.mark.parametrize(("word", "choices", "meant"), [
    ("cat", ["scatter"], []), ("stack", ["take"], []), ("det", ["detach"], []), ("trace", ["take"], []),
    ("lora", ["low_rank"], []), ("lora_alpha", ["alpha"], ["alpha"]), ("alhpa", ["alpha"], ["alpha"]),
    ("kaiming", ["kaiming_normal"], ["kaiming_normal"]), ("diag", ["scale", "diagonal"], ["diagonal"]),
    ("LORA", ["flora", "lora"], ["lora"]),
])
def test_what_is_near_enough_to_be_meant(word, choices, meant):
    assert nearest(word, choices) == meant


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
    ("update u {\n  param d[out = 1\n  return d\n}", "2:10"),
])
def test_an_open_bracket_is_shown(text, bracket):
    assert [str(span) for span, label in errors_of(text)[0].related if "not closed" in label] == [f"<text>:{bracket}"]


@pytest.mark.parametrize(("text", "place"), [
    ("update u {\n  d = 1\n  return d\n}", "2:3"), ("spec a\nr = 8", "2:1"), ("update u {\n  // no\n}", "2:3"),
    ("target linear {\n  lora()\n}", "2:3"), ("update u {\n  let d = 1\n  e = 2\n}", "3:3"),
])
def test_a_word_that_means_nothing_is_the_mistake_and_not_the_line_before(text, place):
    assert str(errors_of(text)[0].span) == f"<text>:{place}"


def test_all_the_errors_of_a_file_are_told():
    text = "spec a(\n\ntarget linear {\n  add x(\n}\n\nupdate u {\n  return\n}\n\ntrain 5\n"
    assert [str(e.span) for e in errors_of(text)] == ["<text>:1:8", "<text>:4:9", "<text>:8:9", "<text>:11:7"]
    assert len(errors_of("train 5\n" * 1000)) == MAX_ERRORS


@pytest.mark.parametrize(("text", "places"), [
    ("update u {\n  let a = )\n  let b = 2 +\n  param c[ = 1\n  return a\n}\n\n"
     "target linear {\n  add u(\n  post m() on inn\n}\n", ["2:10", "3:14", "4:11", "9:9", "10:15"]),
    ("update u {\n  foo = 3\n  let b = (1\n  return a +\n}\n", ["2:3", "3:13", "4:13"]),
    ("target linear {\n  lora()\n  add low_rank(r = )\n}", ["2:3", "3:19"]),
    ("update u {\n  let a = 'x'\n  let b = A[0]\n  return b ^ 2\n}\n", ["2:11", "3:12", "4:12"]),
    ("update u {\n  for i in 3\n  let a = ^\n  return 1 }", ["2:13", "3:11"]),
    ("update u {\n  for i in range(3) {\n    let a = ^\n  }\n  return 1 }", ["2:21", "3:13"]),
    ("target linear {\n  for i in range(3) {\n    add u()\n  }\n  add v\n}", ["2:21", "5:8"]),
    ("update u {\n  let a = \"x\n  return )\n}", ["2:11", "3:9"]),
    ("check 1 +\ncheck 2 +\n", ["1:10", "2:10"]),
])
def test_two_errors_in_one_body_are_both_told(text, places):
    assert [str(error.span) for error in errors_of(text)] == [f"<text>:{place}" for place in places]


@pytest.mark.parametrize("text", [
    "update u {\n  let a = 1\n  retrun a\n}", "update u(\n  5: int\n) {\n  let a = 1\n  return a\n}",
    "update u {\n  let a = (1\n     + 2\n  param p = 1\n  return 2\n}", "update u {\n  return 1\n  return 2\n}",
    "update u {\n let a = 1\n", "target linear {\n  add x() dropout 5%\n}\n",
    "update u {\n  return (1\n}\ntrain \"a\"", "transform t on n {\n  let a = 1 2\n  check a > 1\n  return I(n)\n}",
    "spec a\nr = 8\ntarget linear {\n  add f()\n}",
])
def test_one_error_makes_no_second_one(text):
    assert len(errors_of(text)) == 1


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
    (lambda: Target("x", kind="lin"), "Target.kind must be 'linear', 'conv', 'embedding', 'norm' or 'any', not 'lin'"),
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
    ("[]", ["Spec must be an object, not '[]'"]),
    ('{"nme": "a"}', ["Spec has no field `nme`"]),
    ('{"name": "a", "params": [{"name": 1, "type": "it"}, {}]}', [
        "Spec.params[0].name must be a valid string, not '1'",
        "Spec.params[0].type must be 'int', 'float', 'bool' or 'str', not 'it'",
        "Spec.params[1] needs a field `name`", "Spec.params[1] needs a field `type`"]),
    ('{"checks": [{"condition": "1 +"}, {"condition": {}}]}', [
        "expected an expression after `+`, found the end of the text", "'{}' is not an expression"]),
    ('{"targets": [{"steps": [{"placement": "post", "call": "1"}]}]}',
     ["Spec.targets[0].steps[0].call must be a call, not '1'"]),
    ('{"targets": [{"steps": [{"placement": "post", "call": "f()", "dropout": 1}]}]}',
     ["`dropout` cannot follow `post`"]),
    ('{"targets": [{"steps": [], "span": {"start": 1}}]}', ["Spec.targets[0].span must be a span, not \"{'start': 1}\""]),
    ('{"definitions": [{"kind": "update", "name": "u", "result": 1, "body": [{"name": "a"}]}]}',
     ["Spec.definitions[0].body[0].what must be 'param', 'noise', 'let' or 'for'"]),
    ('{"definitions": [{"kind": "transform", "name": "u", "result": 1, "body": [{"what": "param", "name": "a"}]}]}', [
        "transform `u`: a transform names its dimension with `on`, an update does not",
        "param `a` starts at a value (`=`) or at a draw (`~`), one of the two"]),
])
def test_a_mistake_in_json_is_a_diagnostic(text, messages):
    assert [e.message for e in errors_of(text, Spec.model_validate_json)] == messages


MISPLACED = [
    ("target linear { update low_rank(2) }", "update", "`add low_rank(...)`"),
    ("target linear {\n  transform diagonal()\n}", "transform", "`pre diagonal(...)` or `post diagonal(...)`"),
    ("target linear { apply low_rank(2) }", "apply", "`add low_rank(...)`"),
    ("target linear {\n  param A[2, in] = 0\n}", "param", "stands in a definition"),
    ("target linear {\n  post diagonal()\n  let x = 2\n}", "let", "stands in a definition"),
    ("spec s\nreturn 2", "return", "stands in a definition"), ("spec s\nadd low_rank(2)", "add", "is a step of a target"),
    ("update u() {\n  add low_rank(2)\n}", "add", "`return low_rank(...)`"),
    ("spec s\nlinear \"**.q_proj\" { add low_rank(2) }", "linear", "`target linear ... { ... }`"),
    ("update low_rank(2) on \"**.q_proj\"", "2", "a target gives them values"),
]


@pytest.mark.parametrize(("text", "word", "hint"), MISPLACED)
def test_a_word_that_is_right_elsewhere_is_told_what_stands_there(text, word, hint):
    (first, *_) = errors_of(text)
    assert first.span.source.text[first.span.start : first.span.end] == word
    assert hint in " ".join(first.helps)


@pytest.mark.parametrize("text", ["target linear {\n  add low_rank()\nupdate u() {\n  return W\n}",
                                  "target linear {\n  add low_rank()\ntransform t(k: int = 2) on n : orthogonal {\n return I(n) }"])
def test_a_definition_behind_an_open_bracket_is_no_step(text):
    (first, *_) = errors_of(text)
    assert first.related[0][1] == "this `{` is not closed" and "begins a statement of the file" in first.helps[0]


def test_a_function_that_is_not_called_is_told_as_one():
    (error,) = told_of("transform t() on n { param X[n, n] = 0 return I - X } target linear { post t() }")
    assert error.code == "unknown-name" and error.helps == ("`I` is a function: `I(...)`",)


def test_matrices_that_are_multiplied_entry_by_entry_could_be_a_product():
    (error,) = told_of("update u() { param A[2, in] = 0 param B[out, 2] = 0 return B * A } target linear { add u() }")
    assert "`A @ B`" in error.message
