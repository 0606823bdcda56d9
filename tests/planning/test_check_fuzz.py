"""Random specs with random mistakes: `check` and `apply` say what is wrong, and nothing else escapes.

Among the mistakes are huge numbers: what they make must neither be computed nor be allocated.
"""

from __future__ import annotations

import re
from contextlib import suppress

from dense_formula import some
from hypothesis import assume, given
from hypothesis import strategies as st
from random_specs import specs
from torch.nn import Linear

from surgery.diagnostics import SurgeryError
from surgery.ir.operations import FUNCTIONS
from surgery.language.grammar import pattern_of
from surgery.language.library import parse, shipped
from surgery.language.tree import Spec
from surgery.planning.check import check
from surgery.runtime.apply import apply

TOKEN = re.compile(r'"[^"\n]*"|[A-Za-z_]\w*|[0-9.]+%?|[^\s\w]')
# What may stand where a token stood, so that most texts still parse.
ALIKE = {
    re.compile(r"[0-9.]+%?"): ("0", "1", "2", "3", "7", "1.5", "5%", "1e9", "123456789", "99999999999", "out", "n",
                               "rank"),
    re.compile(r"[-+*/@]"): tuple("-+*/@"),
    re.compile(pattern_of("NAME")): (
        "n", "out", "in", "W", "b", "A", "B", "rank", "layer", "depth", "0", "1e9", "99999999999", "[[1, 2], [3]]",
        *sorted(FUNCTIONS)),
}
WORDS = ("", ".T", ",", "(", ")", "[", "]", "==", "<", "param", "frozen param", "shared param", "let", "if", "true",
         '"a"',
         "normal()", "sample(of = 2)", "dropout(2)", "shifted", "with bias", "on in", "on bias")
SHIPPED = [path.read_text(encoding="utf-8") for path in shipped().values()]


@st.composite
def mistaken(draw) -> Spec:
    """A spec of which one to three tokens are replaced. A mistake with which it does not parse, which is the business of
    test_grammar_fuzz.py, is left out again."""
    text, spec = draw(st.one_of(specs(), st.sampled_from(SHIPPED))), None
    for _ in range(draw(st.integers(1, 3))):
        token = draw(st.sampled_from(list(TOKEN.finditer(text))))
        alike = next((words for kind, words in ALIKE.items() if kind.fullmatch(token[0])), WORDS)
        changed = text[:token.start()] + draw(st.sampled_from(alike)) + text[token.end():]
        with suppress(SurgeryError):
            spec, text = parse(changed), changed
    assume(spec is not None)
    return spec


def told(run) -> bool:
    """Whether it only raises diagnostics, that can be shown; True if there are any."""
    try:
        found = run()
    except SurgeryError as error:
        found = error.diagnostics
    return any(d.render() for d in found)


@some(16)
@given(mistaken())
def test_check_says_what_is_wrong(spec):
    told(lambda: check(spec))


@some(26)
@given(mistaken())
def test_apply_says_what_is_wrong_and_leaves_the_model(spec):
    model = Linear(18, 12)
    if told(lambda: apply(model, spec).report() and ()):
        assert type(model) is Linear
