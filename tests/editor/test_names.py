"""Every name of a spec is known to the editor, in all that ships: a statement that the language gains and the editor does
not know leaves one over."""

from __future__ import annotations

import pytest

from surgery.editor.completion import complete
from surgery.editor.document import Document
from surgery.editor.hover import hover
from surgery.editor.names import occurrences
from surgery.language.grammar import machine
from surgery.language.library import PRELUDE, locate, shipped

FILES = {**shipped(), PRELUDE: locate(PRELUDE)}


def names(text: str) -> set[tuple[int, int]]:
    """Where the parser sees a name, but for claims, which stand between `:` and `{`, and classes of modules."""
    parser, places, before = machine(text, "file"), set(), [""]
    is_claim = False
    for token in parser.lexer_thread.lex(parser.parser_state):
        parser.feed_token(token)
        if token.type == "COLON" and before[-1] in ("NAME", "_BIAS", "RPAR") and "TYPE" not in parser.accepts():
            is_claim = True
        is_claim = is_claim and token.type != "LBRACE"
        if token.type == "NAME" and not is_claim and before[-2:] != ["KIND", "_IN"]:
            places.add((token.start_pos, token.end_pos))
        before.append(token.type)
    return places


@pytest.mark.parametrize("name", FILES)
def test_every_name(name: str) -> None:
    text = FILES[name].read_text(encoding="utf-8")
    found = occurrences(Document(str(FILES[name]), text))
    places = [(each.span.start, each.span.end) for each in found]
    assert len({*places}) == len(places) and {*places} == names(text)
    assert all(text[each.span.start : each.span.end] == each.name for each in found)


def test_what_data_gives_is_told_and_offered_where_a_start_reads_it() -> None:
    text = ("spec s()\nupdate u(r: int = 2) {\n  param A[r, in] = right_singular(G, r)\n  param B[out, r] = 0\n"
            "  return B @ A\n}\ntarget linear { add u() }\n")
    document = Document("s.surg", text)
    assert hover(document, text.index("G,"))[0] == "`G`: the gradient of the loss in W, of data"

    def offered(words: str) -> set[str]:
        return {item.text for item in complete(document, text.index(words) + len(words))}

    assert {"G", "C"} <= offered("= right_singular(") and not {"G", "C"} & offered("return ")


def test_a_primitive_is_told_as_it_is_called() -> None:
    text = ("spec s()\nupdate u() {\n  param A[out, in] = 0\n  return clamp(rows(A, out), 0, 1)\n}\n"
            "target linear { add u() }\n")
    told = [hover(Document("s.surg", text), text.index(f"{name}("))[0] for name in ("clamp", "rows")]
    assert "clamp(a, b, c)\n" in told[0] and "rows(a, places)\n" in told[1]
