"""A text as an editor holds it: what it says now, and what it said when it last parsed.

Takes a name and a text; gives a `Document`. Promises: a broken text raises nothing, and the names that a user knows
stay known while a line is being written. No torch.
"""

from __future__ import annotations

import re
from functools import cached_property

from surgery.diagnostics import Collector, Diagnostic, Source, SurgeryError
from surgery.language.comments import STRING_OR_COMMENT
from surgery.language.library import Library, library
from surgery.language.parser import parse_text
from surgery.language.tree import Spec
from surgery.planning.check import check
from surgery.semantics.resolved_spec import ResolvedSpec

_MODEL = re.compile(r"^[ \t]*#[ \t]*surgery:[ \t]*model[ \t]*=[ \t]*(\S+)", re.MULTILINE)
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Document:
    """`spec` is what the text says, None while it does not parse (`syntax` says why); `known` is what it said last."""

    def __init__(self, name: str, text: str, before: Document | None = None):
        self.name = name
        self.text = self.kept(text)
        self.syntax: tuple[Diagnostic, ...] = ()
        self.spec: Spec | None = None
        try:
            self.spec = parse_text(self.text, name)
        except SurgeryError as error:
            self.syntax = error.diagnostics
        self.known: Spec = self.spec or (before.known if before else Spec())

    @staticmethod
    def kept(text: str) -> str:
        """The text that is worked on: the mark that Windows' editors put before one is a blank here, so that every
        offset stays where it is."""
        return " " + text[1:] if text.startswith("\ufeff") else text

    @property
    def source(self) -> Source:
        return Source(self.name, self.text)

    def findings(self) -> list[Diagnostic]:
        """What the text alone says is wrong: syntax, names, types, shapes and patterns."""
        return list(self.syntax) if self.spec is None else check(self.spec, tried=False)

    @cached_property
    def library(self) -> Library:
        """All that can be named, its own first where a file that it uses cannot be read."""
        try:
            return library(self.known)
        except SurgeryError:
            own = self.known
            ours = library(Spec())
            return Library({**ours.definitions, **{d.name: d for d in own.definitions}},
                           {**ours.selects, **{s.name: s for s in own.selects}})

    @cached_property
    def resolved(self) -> ResolvedSpec | None:
        """What was said last with its names resolved; None where a file that it uses cannot be read."""
        try:
            return ResolvedSpec(self.known, Collector())
        except SurgeryError:
            return None

    @cached_property
    def code(self) -> str:
        """The text with blanks for what stands in strings and comments: each offset stays where it is."""
        return STRING_OR_COMMENT.sub(lambda match: re.sub(r"[^\r\n]", " ", match[0]), self.text)

    @property
    def model(self) -> re.Match[str] | None:
        """Where a line `# surgery: model = NAME` stands; the name is group 1."""
        return _MODEL.search(self.text)

    def word_at(self, offset: int) -> re.Match[str] | None:
        """The word at an offset, or directly before it."""
        return next((word for word in _WORD.finditer(self.code) if word.start() <= offset <= word.end()), None)
