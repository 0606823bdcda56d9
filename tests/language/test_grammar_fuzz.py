"""The grammar and broken specs as fuzzers: whatever the text, only diagnostics escape."""

import json

from formatting import SHIPPED, assert_same_after_formatting
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.lark import from_lark
from spec_strategies import names

from surgery.diagnostics import SurgeryError
from surgery.language.grammar import WORDS, _lark
from surgery.language.parser import parse_expression, parse_text
from surgery.language.tree import Spec

PARSER_WORDS = {terminal.name for terminal in _lark().terminals}
fuzz = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
SPACES = st.sampled_from([" ", "\n", "  # c\n", "\n\n"])
#: Each terminal with a space after it, so that words do not run together.
TERMINALS = {
    "NAME": names, "NUMBER": st.sampled_from(["0", "1_024", "5%", "1e-4", "0.5", "1e999", "9" * 30]),
    "STRING": st.sampled_from(['"a"', '"**.{q,k}_proj"', '""', '"#"']),
    "COMPARE": st.sampled_from(["<", "<=", "==", "!="]), "TIMES": st.sampled_from("*/@"), "_TRANSPOSE": st.just(".T"),
    **{name: st.sampled_from(words) for name, words in WORDS.items()},
}
TERMINALS = {name: st.tuples(words, SPACES).map("".join) for name, words in TERMINALS.items()}
TERMINALS |= {"COMMENT": st.just("# comment\n"), "SPACE": SPACES}


def accepted(parse, text: str) -> bool:
    """Whether the text parses; anything but a SurgeryError with a rendering goes through."""
    try:
        parse(text)
    except SurgeryError as error:
        assert error.diagnostics
        assert all(str(d.span) in d.render() for d in error.diagnostics if d.span)
        shown = {d.message.partition(", found ")[0].partition(" after ")[0] for d in error.diagnostics}
        assert not any(f"`{terminal}`" in words for words in shown for terminal in PARSER_WORDS)
        return False
    return True


@fuzz
@given(from_lark(_lark(), start="file", explicit=TERMINALS))
def test_what_the_grammar_makes_parses_or_is_diagnosed(text):
    if accepted(parse_text, text):
        assert_same_after_formatting(text)


@st.composite
def broken(draw):
    """A shipped spec with pieces cut out, doubled, or replaced."""
    text = draw(st.sampled_from(SHIPPED)).read_text(encoding="utf-8")[:1500]
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 12)))
        piece = draw(st.sampled_from(["", text[start:end] * 2, "{", "}", "(", ")", '"', "#", "\n", "target", "param",
                                      "=", "%",
                                      "\x00", "é", "\r", "1e999", "if", "-", "dropout(1)", "on in", ","]))
        text = text[:start] + piece + text[end:]
    return text


@fuzz
@given(broken())
def test_broken_specs_parse_or_are_diagnosed(text):
    if accepted(parse_text, text):
        assert_same_after_formatting(text)


@fuzz
@given(st.one_of(st.text(max_size=40), st.text("spec{}()[]\"#=~.,:-+@*/<>!% \n\raT01e_", max_size=40)))
def test_any_text_parses_or_is_diagnosed(text):
    for parse in (parse_text, parse_expression, Spec.model_validate_json):
        accepted(parse, text)


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                           lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(
                               ["name", "params", "type", "default", "targets", "steps", "call", "what", "select",
                                "kind"]), v))


@fuzz
@given(st.sampled_from(SHIPPED), st.data())
def test_json_with_a_wrong_value_is_diagnosed(path, data):
    """A shipped spec's JSON with one value, anywhere, replaced."""
    tree = json.loads(parse_text(path.read_text(encoding="utf-8")).model_dump_json())
    holder, key = {"": tree}, ""
    while isinstance(holder[key], (dict, list)) and holder[key] and data.draw(st.booleans()):
        holder = holder[key]
        key = data.draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
    holder[key] = data.draw(json_values)
    accepted(Spec.model_validate_json, json.dumps(tree))
