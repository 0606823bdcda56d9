"""`surgery lsp`: a language server over stdin and stdout.

Takes requests of the Language Server Protocol; gives what the other modules of this folder say, in its words. Promises:
what a user wrote never stops it, and nothing but the protocol reaches stdout.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from lsprotocol import types
from pygls.exceptions import JsonRpcInvalidParams
from pygls.lsp.server import LanguageServer
from pygls.uris import from_fs_path, to_fs_path

import surgery
from surgery.diagnostics import Diagnostic, Span, SurgeryError
from surgery.editor.completion import complete
from surgery.editor.document import Document
from surgery.editor.hover import hover
from surgery.editor.model import Model
from surgery.editor.names import at, occurrences
from surgery.editor.navigation import Symbol, declaration, file_of, outline, renamable, rename
from surgery.editor.positions import Positions
from surgery.language.formatter import format_text
from surgery.planning.check import check
from surgery.planning.fixes import fix
from surgery.settings import Settings, settings

_KINDS = types.CompletionItemKind
_ITEM_KINDS = {"keyword": _KINDS.Keyword, "transform": _KINDS.Function, "update": _KINDS.Function,
               "argument": _KINDS.Field, "primitive": _KINDS.Function, "distribution": _KINDS.Function,
               "name": _KINDS.Variable, "selector": _KINDS.Constant, "pattern": _KINDS.Value, "file": _KINDS.File,
               "class": _KINDS.Class, "claim": _KINDS.Keyword, "model": _KINDS.Module}
_SYMBOL_KINDS = {"spec": types.SymbolKind.Module, "definition": types.SymbolKind.Function,
                 "selector": types.SymbolKind.Constant, "target": types.SymbolKind.Object,
                 "train": types.SymbolKind.Object, "parameter": types.SymbolKind.Variable}
_SEVERITIES = {"error": types.DiagnosticSeverity.Error, "warning": types.DiagnosticSeverity.Warning}


class Server(LanguageServer):
    """The open documents, what was last found in each, and the models that they are written for."""

    def __init__(self) -> None:
        # whole texts: a spec is short, and so no client's idea of a line can put them out of step
        super().__init__("surgery", surgery.__version__, types.TextDocumentSyncKind.Full)
        self.documents: dict[str, Document] = {}
        self.found: dict[str, list[Diagnostic]] = {}
        self.default_model = ""
        self._models: dict[str, Future[Model]] = {}

    def positions(self, document: Document) -> Positions:
        return Positions(document.text, self.workspace.position_encoding)

    def take(self, uri: str) -> Document:
        """The document as its client has it now."""
        text = self.workspace.get_text_document(uri).source
        known = self.documents.get(uri)
        if known is None or known.text != Document.kept(text):
            known = self.documents[uri] = Document(to_fs_path(uri) or uri, text, known)
        return known

    def place(self, params: Any) -> tuple[Document, int]:
        """The document and the offset that a request is about."""
        document = self.take(params.text_document.uri)
        return document, self.positions(document).offset(params.position)

    # ----------------------------------------------------------------------------------------------------- models

    def model_named(self, document: Document) -> str:
        line = document.model
        return line[1] if line else self.default_model or project_of(document).model

    def model(self, document: Document) -> Model | None:
        """The model of a document, if it is there by now: nobody waits for it but a save."""
        asked = self.asked_model(document)
        return asked.result() if asked and asked.done() and not asked.exception() else None

    def asked_model(self, document: Document) -> Future[Model] | None:
        name = self.model_named(document)
        if name and name not in self._models:
            self._models[name] = self.thread_pool.submit(Model, name)
        return self._models.get(name)

    # ------------------------------------------------------------------------------------------------ diagnostics

    def publish(self, uri: str, document: Document, found: list[Diagnostic]) -> None:
        self.found[uri] = found = project_of(document).applied(found)
        sent = [self.to_lsp(document, each) for each in found]
        version = self.workspace.get_text_document(uri).version
        self.text_document_publish_diagnostics(types.PublishDiagnosticsParams(uri, sent, version))

    def to_lsp(self, document: Document, each: Diagnostic) -> types.Diagnostic:
        span, related = each.span, list(each.related)
        if span is not None and span.source.text != document.text:  # it stands in a file that this one uses
            related = [(span, each.label or each.message), *related]
            uses = document.spec.uses if document.spec else ()
            span = uses[0].span if uses else None
        message = "\n".join([each.message, *([each.label] if each.label else []), *(f"note: {n}" for n in each.notes),
                             *(f"help: {h}" for h in each.helps)])
        place = self.positions(document).range(span.start, span.end) if span else types.Range(
            types.Position(0, 0), types.Position(0, 0))
        return types.Diagnostic(place, message, _SEVERITIES[each.severity], each.code, source="surgery",
                                related_information=[types.DiagnosticRelatedInformation(self.location(document, s), t)
                                                     for s, t in related])

    def location(self, document: Document, span: Span) -> types.Location:
        if span.source.text == document.text:
            return types.Location(from_fs_path(document.name) or "", self.positions(document).range(
                span.start, span.end))
        path = file_of(span.source)
        text = span.source.text or path.read_text(encoding="utf-8", errors="replace")
        places = Positions(text, self.workspace.position_encoding)
        return types.Location(from_fs_path(str(path)) or "", places.range(span.start, span.end))

    def check_in_full(self, document: Document) -> list[Diagnostic]:
        """What a save finds: starts, claims and the model too."""
        if document.spec is None:
            return document.findings()
        asked = self.asked_model(document)
        try:
            model = asked.result().skeleton if asked else None
        except SurgeryError as error:  # there is no such model: the spec is checked all the same
            line, [said, *_] = document.model, error.diagnostics
            span = Span(document.source, *line.span(1)) if line else None
            return [*check(document.spec), Diagnostic(said.code, said.message, span, said.label, said.notes,
                                                      said.helps, severity="warning")]
        return check(document.spec, model)


def project_of(document: Document) -> Settings:
    """What the nearest `surgery.toml` says; of one that is wrong, which `surgery check` tells, nothing."""
    try:
        return settings(Path(document.name).parent)
    except SurgeryError:
        return Settings()


server = Server()


def _told_error(error: SurgeryError) -> JsonRpcInvalidParams:
    """A request that cannot be done, in words that an editor shows."""
    return JsonRpcInvalidParams("; ".join(each.message for each in error.diagnostics))


# --------------------------------------------------------------------------------------------------------- documents


@server.feature(types.INITIALIZE)
def initialize(params: types.InitializeParams) -> None:
    options = params.initialization_options
    server.default_model = str(options.get("model") or "") if isinstance(options, dict) else ""


@server.feature(types.TEXT_DOCUMENT_DID_OPEN)
def opened(params: types.DidOpenTextDocumentParams) -> None:
    document = server.take(params.text_document.uri)
    server.asked_model(document)
    server.publish(params.text_document.uri, document, document.findings())


@server.feature(types.TEXT_DOCUMENT_DID_CHANGE)
def changed(params: types.DidChangeTextDocumentParams) -> None:
    document = server.take(params.text_document.uri)
    server.asked_model(document)
    server.publish(params.text_document.uri, document, document.findings())


@server.feature(types.TEXT_DOCUMENT_DID_SAVE)
async def saved(params: types.DidSaveTextDocumentParams) -> None:
    """Tried in a thread: it may take seconds, and other requests are answered meanwhile."""
    uri = params.text_document.uri
    document = server.take(uri)
    found = await asyncio.get_running_loop().run_in_executor(server.thread_pool, server.check_in_full, document)
    if server.documents.get(uri) is document:  # else it was changed meanwhile, and this is about another text
        server.publish(uri, document, found)


@server.feature(types.TEXT_DOCUMENT_DID_CLOSE)
def closed(params: types.DidCloseTextDocumentParams) -> None:
    server.documents.pop(params.text_document.uri, None)
    server.found.pop(params.text_document.uri, None)
    server.text_document_publish_diagnostics(types.PublishDiagnosticsParams(params.text_document.uri, []))


# ---------------------------------------------------------------------------------------------------------- requests


@server.feature(types.TEXT_DOCUMENT_HOVER)
def hovered(params: types.HoverParams) -> types.Hover | None:
    document, offset = server.place(params)
    found = hover(document, offset, server.model(document))
    if found is None:
        return None
    text, place = found
    return types.Hover(types.MarkupContent(types.MarkupKind.Markdown, text),
                       server.positions(document).range(*place))


@server.feature(types.TEXT_DOCUMENT_COMPLETION,
                types.CompletionOptions(trigger_characters=["(", ",", '"', "~", ".", ":", "="]))
def completed(params: types.CompletionParams) -> types.CompletionList:
    document, offset = server.place(params)
    positions = server.positions(document)
    items = []
    # in this order: what is named here stands above the words of the language
    for number, each in enumerate(complete(document, offset, server.model(document))):
        edit = types.TextEdit(positions.range(each.start, offset), each.text)
        documentation = types.MarkupContent(types.MarkupKind.Markdown, each.doc) if each.doc else None
        items.append(types.CompletionItem(each.text.removesuffix(" = "), kind=_ITEM_KINDS[each.kind],
                                          detail=each.detail or None, documentation=documentation, text_edit=edit,
                                          filter_text=each.text, sort_text=f"{number:05}"))
    return types.CompletionList(is_incomplete=False, items=items)


@server.feature(types.TEXT_DOCUMENT_DEFINITION)
def defined(params: types.DefinitionParams) -> types.Location | None:
    document, offset = server.place(params)
    span = declaration(document, offset)
    return server.location(document, span) if span else None


@server.feature(types.TEXT_DOCUMENT_REFERENCES)
def referred(params: types.ReferenceParams) -> list[types.Location]:
    document, offset = server.place(params)
    found = at(document, offset)
    return [server.location(document, each.span) for each in occurrences(document)
            if found and each.key == found.key and (params.context.include_declaration or not each.declares)]


@server.feature(types.TEXT_DOCUMENT_DOCUMENT_SYMBOL)
def outlined(params: types.DocumentSymbolParams) -> list[types.DocumentSymbol]:
    document = server.take(params.text_document.uri)
    positions = Positions(document.known.span.source.text if document.known.span else document.text,
                          server.workspace.position_encoding)

    def to_lsp(symbol: Symbol) -> types.DocumentSymbol:
        whole, name = (positions.range(s.start, s.end) for s in (symbol.span, symbol.name_span))
        return types.DocumentSymbol(symbol.name, _SYMBOL_KINDS[symbol.kind], whole, name, symbol.detail,
                                    children=[to_lsp(child) for child in symbol.children])

    return [to_lsp(symbol) for symbol in outline(document)]


@server.feature(types.TEXT_DOCUMENT_PREPARE_RENAME)
def rename_prepared(params: types.PrepareRenameParams) -> types.Range:
    document, offset = server.place(params)
    try:
        span = renamable(document, offset).span
    except SurgeryError as error:
        raise _told_error(error) from None
    return server.positions(document).range(span.start, span.end)


@server.feature(types.TEXT_DOCUMENT_RENAME, types.RenameOptions(prepare_provider=True))
def renamed(params: types.RenameParams) -> types.WorkspaceEdit:
    document, offset = server.place(params)
    try:
        places = rename(document, offset, params.new_name)
    except SurgeryError as error:
        raise _told_error(error) from None
    positions = server.positions(document)
    edits = [types.TextEdit(positions.range(span.start, span.end), params.new_name) for span in places]
    return types.WorkspaceEdit(changes={params.text_document.uri: edits})


@server.feature(types.TEXT_DOCUMENT_FORMATTING)
def formatted(params: types.DocumentFormattingParams) -> list[types.TextEdit]:
    """None for a text with a syntax error, which its diagnostics tell."""
    document = server.take(params.text_document.uri)
    try:
        text = format_text(document.text, document.name)
    except SurgeryError:
        return []
    return [types.TextEdit(server.positions(document).everything, text)] if text != document.text else []


@server.feature(types.TEXT_DOCUMENT_CODE_ACTION,
                types.CodeActionOptions(code_action_kinds=[types.CodeActionKind.QuickFix]))
def acted(params: types.CodeActionParams) -> list[types.CodeAction]:
    uri = params.text_document.uri
    document = server.take(uri)
    positions = server.positions(document)
    start, end = positions.offset(params.range.start), positions.offset(params.range.end)
    model = server.model(document)
    actions = []
    for each in server.found.get(uri, []):
        if each.span is None or each.span.end < start or each.span.start > end or not each.meant:
            continue
        checked: Callable[[str], list[Diagnostic]] = _checked(document, model, each)
        if change := fix(document.text, each, checked):
            edit = types.TextEdit(positions.range(change.start, change.end), change.new)
            actions.append(types.CodeAction(
                f"Change to {change.new}", types.CodeActionKind.QuickFix, is_preferred=True,
                diagnostics=[server.to_lsp(document, each)], edit=types.WorkspaceEdit(changes={uri: [edit]})))
    return actions


def _checked(document: Document, model: Model | None, each: Diagnostic) -> Callable[[str], list[Diagnostic]]:
    """A function that looks for a diagnostic again in a changed text, with the model too if it came from the model."""
    of_text = {(d.code, d.message) for d in document.findings()}

    def checked(text: str) -> list[Diagnostic]:
        changed = Document(document.name, text)
        if (each.code, each.message) in of_text or changed.spec is None or model is None:
            return changed.findings()
        return check(changed.spec, model.skeleton, tried=False)

    return checked


def serve() -> None:
    """Serve until the client ends it."""
    # What torch and transformers print would be read as a part of the protocol: it goes to stderr.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    server.start_io(sys.stdin.buffer, answers)
