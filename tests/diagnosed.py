"""What is said of a text, and where."""

from collections.abc import Callable
from typing import Any

import pytest

from surgery.diagnostics import SurgeryError
from surgery.language.parser import parse_text


def refusal(call: Callable, *arguments: Any, **options: Any) -> str:
    """What a call says that is to fail."""
    with pytest.raises(SurgeryError) as caught:
        call(*arguments, **options)
    return str(caught.value)


def errors_of(text: str, parse=parse_text) -> list:
    with pytest.raises(SurgeryError) as caught:
        parse(text)
    return list(caught.value.diagnostics)


def underlined(diagnostic) -> str:
    span = diagnostic.span
    return span.source.text[span.start : span.end]
