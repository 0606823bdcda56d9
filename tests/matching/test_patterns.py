"""Globs: what they match, what they expand to, and where a bad one is bad."""

import fnmatch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.diagnostics import Source, Span, SurgeryError
from surgery.language.tree import Pattern
from surgery.matching.patterns import compile_pattern

COUNTS = {"": 3, "model": 2, "model.layers": 12, "h": 4}

MATCHES = [
    ("**.q_proj", "model.layers.0.self_attn.q_proj"),
    ("**.q_proj", "q_proj"),
    ("*.q", "a.q"),
    ("**", ""),
    ("**", "a.b.c"),
    ("a.**", "a"),
    ("a.**.b", "a.b"),
    ("a.**.b", "a.x.y.b"),
    ("**.**.a", "a"),
    ("a?c", "abc"),
    ("*_proj", "_proj"),
    ("{a,b}", "b"),
    ("{a,{b,c.d}}.e", "c.d.e"),
    ("{q*,?}_proj", "query_proj"),
    ("{**.a,b}.c", "x.y.a.c"),
    ("a{,_x}", "a"),
    ("a{,.b}", "a.b"),
    ("{3}", "3"),
    ("{0..11}", "11"),
    ("layer{1..2}", "layer2"),
    ("layers.*.x", "layers.3.x"),
    ("model.layers.{-1}.x", "model.layers.11.x"),
    ("**.layers.{-4..-1}.**", "model.layers.8"),
    ("h.{-1}.x", "h.3.x"),
    ("{-1}", "2"),
    ("h.{2..-2}.x", "h.2.x"),
    ("h.{0..3,-4..-1}", "h.2"),
    ("h.{0,-1}.x", "h.3.x"),
]

MISSES = [
    ("q_proj", "a.q_proj"),
    ("proj", "q_proj"),
    ("q", "q_proj"),
    ("**.q_proj", "a.q_proj.b"),
    ("*.q", "a.b.q"),
    ("*", ""),
    ("*", "a.b"),
    ("a?c", "a.c"),
    ("a?c", "ac"),
    ("a.b", "axb"),
    ("a.**", "ab"),
    ("**.attn.*", "x.attn.y.z"),
    ("{a,b}", "c"),
    ("{0..11}", "12"),
    ("{0..11}", "011"),
    ("layer{1..2}", "layer12"),
    ("model.layers.{-1}.x", "model.layers.1.x"),
    ("**.layers.{-4..-1}.**", "model.layers.7.x"),
    ("h.{-1}.x", "h.11.x"),
    ("h.{2..-2}.x", "h.3.x"),
    ("h.{2..-2}.x", "h.1.x"),
    ("h.{-1}", "h.x"),
    ("unknown.{-1}", "unknown.3"),
    ("Q_proj", "q_proj"),
]


@pytest.mark.parametrize(("pattern", "name"), MATCHES)
def test_matches(pattern, name):
    assert compile_pattern(pattern).matches(name, COUNTS)


@pytest.mark.parametrize(("pattern", "name"), MISSES)
def test_does_not_match(pattern, name):
    assert not compile_pattern(pattern).matches(name, COUNTS)


def test_an_index_from_the_end_counts_the_list_that_holds_it():
    glob = compile_pattern("**.{-1}.x")
    assert glob.matches("h.3.x", {"h": 4}) and not glob.matches("h.3.x", {"h": 5})
    assert glob.matches("3.x", {"": 4})
    assert glob.matches("experts.1.h.3.x", {"experts": 9, "experts.1.h": 4})


# (pattern, the part that the carets stand under, words of the message)
BAD = [
    ("", '"', "empty segment"),
    ("a..b", "..", "empty segment"),
    (".a", ".", "empty segment"),
    ("a.", ".", "empty segment"),
    ("a**b", "**", "segment of its own"),
    ("x.q**", "**", "segment of its own"),
    ("***", "***", "neither"),
    ("{a", "{", "never closed"),
    ("x.{a,{b}", "{", "never closed"),
    ("a}", "}", "closes nothing"),
    ("q,k", ",", "outside braces"),
    ("x.{}", "{}", "empty braces"),
    ("{,a}", "{,a}", "empty segment"),
    ("{3..1}", "3..1", "backwards"),
    ("h.{-1..-4}", "-1..-4", "backwards"),
    ("{-1..3}", "-1..3", "stops from the start"),
    ("{0..5000}", "0..5000", "more than 1000"),
    ("x{-1}", "-1", "segment of its own"),
    ("{a..b}", "a..b", "no range"),
    ("{0..99999999999}", "0..99999999999", "no range"),
    (r".*\.q_proj", "\\", "cannot stand"),
    ("(q|k)_proj", "(", "cannot stand"),
    ("{q, k}_proj", " ", "cannot stand"),
    ("^model", "^", "cannot stand"),
    ("{a,b}" * 13, "{a,b}" * 13, "more than 4096"),
    ("{" * 100, "{" * 100, "braces"),
]


@pytest.mark.parametrize(("text", "part", "words"), BAD)
def test_a_bad_pattern_says_where(text, part, words):
    source = Source("x.surg", f'target "{text}" {{')
    with pytest.raises(SurgeryError) as caught:
        compile_pattern(Pattern(text, Span(source, 7, 9 + len(text))))
    (found,) = caught.value.diagnostics
    assert found.code == "bad-pattern" and words in found.message
    assert source.text[found.span.start:found.span.end] == part


def test_a_bad_pattern_without_a_place_is_named():
    with pytest.raises(SurgeryError, match=r'in pattern "a\.\.b"'):
        compile_pattern("a..b")


def test_alternatives_are_patterns_of_their_own():
    glob = compile_pattern("{a,{b,c}}.{q,kk}_{0..3}")
    assert [a.text for a in glob.alternatives] == [
        f"{x}.{y}_{{0..3}}" for x in "abc" for y in ("q", "kk")]
    for alternative in glob.alternatives:
        assert compile_pattern(alternative.text).alternatives[0].names == alternative.names


@pytest.mark.parametrize(("text", "name", "dead"), [
    ("**.{q,kk}_proj", "x.q_proj", ["kk"]),
    ("{a,{b,c}}.q", "b.q", ["a", "c"]),
    ("{a,{b,c}}.q", "a.q", ["{b,c}"]),
    ("{q,k}_{x,y}", "q_x", ["k", "y"]),
    ("h.{0..1,-1}.x", "h.0.x", ["-1"]),
    ("**.q", "x.q", []),
])
def test_dead_choices(text, name, dead):
    source = Source("x.surg", f'"{text}"')
    glob = compile_pattern(Pattern(text, Span(source, 0, len(text) + 2)))
    live = [a for a in glob.alternatives if compile_pattern(a.text).matches(name, COUNTS)]
    places = [glob.place(c) for c in glob.unmatched(live)]
    assert sorted(source.text[p.start:p.end] for p in places) == sorted(dead)


SEGMENT = st.text("ab*?", min_size=1, max_size=4).filter(lambda s: "**" not in s)
NAME = st.lists(st.text("ab", min_size=1, max_size=4), max_size=4).map(".".join)


def _naive(pattern: list[str], name: list[str]) -> bool:
    if not pattern:
        return not name
    if pattern[0] == "**":
        return any(_naive(pattern[1:], name[i:]) for i in range(len(name) + 1))
    return bool(name) and fnmatch.fnmatchcase(name[0], pattern[0]) and _naive(pattern[1:], name[1:])


@settings(max_examples=300, deadline=None)
@given(st.lists(SEGMENT | st.just("**"), min_size=1, max_size=4), NAME)
def test_against_a_naive_matcher(segments, name):
    assert compile_pattern(".".join(segments)).matches(name, {}) == _naive(segments, name.split(".") if name else [])


@settings(max_examples=300, deadline=None)
@given(st.text("ab.*?{},-0123 \\", max_size=14))
def test_any_text_compiles_or_is_a_bad_pattern(text):
    try:
        compile_pattern(text).matches("a.b", {"": 1})
    except SurgeryError as error:
        assert [d.code for d in error.diagnostics] == ["bad-pattern"]
