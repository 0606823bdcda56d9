"""What is said of a text, and where."""

import pytest

from surgery.diagnostics import SurgeryError
from surgery.language.parser import parse_text


def errors_of(text: str, parse=parse_text) -> list:
    with pytest.raises(SurgeryError) as caught:
        parse(text)
    return list(caught.value.diagnostics)


def underlined(diagnostic) -> str:
    span = diagnostic.span
    return span.source.text[span.start : span.end]
