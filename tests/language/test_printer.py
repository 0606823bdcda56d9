"""Text, tree and JSON are the same spec; the formatter changes the layout only, and once."""

import pytest
from formatting import SHIPPED, assert_same_after_formatting
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from spec_strategies import expressions, specs

from surgery.language.formatter import expression_text, format_text, spec_text
from surgery.language.grammar import machine
from surgery.language.parser import parse_expression, parse_text
from surgery.language.tree import Binary, Name, Number, Parameter, Spec, Target, Unary, add, post, pre

random_specs = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_specs_are_in_canonical_layout(path):
    text = path.read_text(encoding="utf-8")
    assert format_text(text, path.name) == text
    assert Spec.model_validate_json(parse_text(text).model_dump_json()) == parse_text(text)


@random_specs
@given(specs())
def test_a_spec_survives_text_and_json(spec):
    text = spec_text(spec)
    assert parse_text(text) == spec
    assert Spec.model_validate_json(spec.model_dump_json()) == spec
    assert_same_after_formatting(text)


@random_specs
@given(expressions)
def test_an_expression_survives_its_text(expression):
    text = expression_text(expression)
    assert parse_expression(text) == expression
    assert expression_text(parse_expression(text)) == text


@random_specs
@given(st.sampled_from(SHIPPED), st.data())
def test_any_layout_and_any_comments_are_kept(path, data):
    """The tokens of a shipped spec with anything between them."""
    parser = machine(path.read_text(encoding="utf-8"), "file")
    tokens = []
    for token in parser.lexer_thread.lex(parser.parser_state):
        parser.feed_token(token)
        tokens.append(str(token))
    part = tokens if path.stem != "std" else tokens[: tokens.index("transform")]
    gaps = st.sampled_from([" "] * 8 + ["\n", "\r\n", "\n\n\n", " # one\n", "\n# two \n", " #\n\n# three\n\n", "\t"])
    assert_same_after_formatting("".join(token + data.draw(gaps) for token in part))


UGLY = """
# The file.


# About it.
spec mine( rank:int=1_024,dropout : float=5%, # the rate
  alpha: float = 1e-4)  # beside
target linear "**.q_proj",  # the queries
  attention except "**.0.**" untie { pre diagonal( ) on in with bias # gains


  # the update
  add low_rank(rank,alpha=((2*alpha))+1 )dropout(dropout)
  post magnitude() on out # at last
  # nothing more
} # done
"""

PRETTY = """\
# The file.

# About it.
spec mine(
  rank: int = 1_024,
  dropout: float = 5%,  # the rate
  alpha: float = 1e-4,
)  # beside
# the queries
target linear "**.q_proj", attention except "**.0.**" untie {  # done
  pre  diagonal() on in with bias  # gains

  # the update
  add  low_rank(rank, alpha = ((2 * alpha)) + 1) dropout(dropout)
  post magnitude()  # at last
  # nothing more
}
"""


def test_layout_by_example():
    assert format_text(UGLY) == PRETTY
    assert format_text(UGLY.replace("\n", "\r\n")) == PRETTY


def test_comments_beside_consecutive_lines_are_aligned():
    text = "update u() {\n  let a = 1 # one\n  let bcd = 2 # two\n  return a\n}\n"
    assert "let a = 1    # one\n  let bcd = 2  # two\n" in format_text(text)


def test_long_lists_are_wrapped():
    patterns = ", ".join(f'"**.block_{i}.{{query,key,value}}"' for i in range(9))
    for text in (f"select a = {patterns}", f"target linear {patterns} {{ add x() }}", f"train {patterns}"):
        formatted = format_text(text)
        assert formatted.count("\n") > 2
        assert max(map(len, formatted.splitlines())) <= 120
        assert parse_text(formatted) == parse_text(text)


def test_a_long_signature_has_one_parameter_a_line():
    text = f"spec a({', '.join(f'parameter_{i}: int = {i}' for i in range(9))})"
    assert format_text(text).startswith("spec a(\n  parameter_0: int = 0,\n")
    assert format_text(text).endswith("  parameter_8: int = 8,\n)\n")


@pytest.mark.parametrize(("text", "printed"), [
    ("", ""), ("\n\n# only\n\n\n# this", "# only\n\n# this\n"), ("\ufeffspec a", "spec a()\n"),
    ("target any { pre x() }", "target any {\n  pre x()\n}\n"),
    ('target any "a" { pre x() }', 'target "a" {\n  pre x()\n}\n'),
    ("check (a)", "check (a)\n"), ("check 1e3 + 1_0 * 5%", "check 1e3 + 1_0 * 5%\n"),
])
def test_small_files(text, printed):
    assert format_text(text) == printed


def test_statements_of_a_file_keep_their_order():
    text = 'target { pre x() }\ncheck a\nselect b = "c"\nspec d()\nuse "e"\n'
    heads = [line.split()[0] for line in format_text(text).splitlines() if line[0] not in " }"]
    assert heads == ["target", "check", "select", "spec", "use"]


def test_a_spec_built_in_python_is_printed_by_kind_of_statement():
    spec = Spec("mine", params=[Parameter(name="rank", type="int", default=8)],
                targets=[Target("**.q_proj", pre("diagonal"), add("low_rank", rank="2 * rank", alpha=-1),
                                post("magnitude"))])
    assert spec.to_surg() == (
        'spec mine(rank: int = 8)\n\ntarget "**.q_proj" {\n  pre  diagonal()\n'
        '  add  low_rank(rank = 2 * rank, alpha = -1)\n  post magnitude()\n}\n')


def test_parentheses_stand_where_the_tree_needs_them():
    a, b, c = Name("a"), Name("b"), Name("c")
    assert expression_text(Binary("-", a, Binary("-", b, c))) == "a - (b - c)"
    assert expression_text(Binary("-", Binary("-", a, b), c)) == "a - b - c"
    assert expression_text(Binary("<", Binary("<", a, b), c)) == "(a < b) < c"
    assert expression_text(Unary("-", Binary("@", a, b))) == "-(a @ b)"
    assert expression_text(Unary("not", Binary("==", a, b))) == "not a == b"


def test_the_text_of_a_number_never_hides_another_value():
    assert expression_text(Number(8, "4")) == "8"
    assert expression_text(Number(0.05, "5%")) == "5%"
