"""What a node does by modules that are built on the nodes: it is parsed, checked and printed.

`rank="2 * rank"` in Python parses a text, `Spec(...)` checks itself and `str(spec)` formats it. The parser, the checks
and the formatter all read the tree, so the tree cannot import them without a circle. They are put in here instead, by
`surgery/language/__init__.py`, which Python runs before any module of the folder: whoever has a node has them too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from surgery.diagnostics import Collector
    from surgery.language.expressions import Expression
    from surgery.language.tree import Spec


class Registered:
    """The functions, under the names that their own modules give them."""

    parse_expression: Callable[[str], Expression]
    expression_text: Callable[[Expression], str]
    check_spec: Callable[[Spec], Collector]
    spec_text: Callable[[Spec], str]
    retarget: Callable[..., Spec]
