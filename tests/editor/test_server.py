"""The language server as an editor sees it: `surgery lsp` over stdio, driven by the client of a library."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import begin
from lsprotocol import types
from pygls.exceptions import JsonRpcException
from pygls.io_ import run_async
from pygls.lsp.client import LanguageClient

from surgery.cli.main import main
from surgery.models.demo import load_demo

SPEC = """\
# surgery: model = demo:llama

# A low-rank update with a gain for each row.
spec mine(rank: int = 8)

target linear "**.q_proj" {
  pre diagonal()
  add low_rank(rank)
}
"""


class Editor(LanguageClient):
    """A client with one open file; keeps what the server tells of it."""

    def __init__(self, path: Path):
        super().__init__("test", "1")
        self.path, self.version, self.text = path, 0, ""
        self.told: asyncio.Queue[types.PublishDiagnosticsParams] = asyncio.Queue()

        @self.feature(types.TEXT_DOCUMENT_PUBLISH_DIAGNOSTICS)
        def _(params: types.PublishDiagnosticsParams) -> None:
            self.told.put_nowait(params)

    @property
    def document(self) -> types.TextDocumentIdentifier:
        return types.TextDocumentIdentifier(self.path.as_uri())

    async def begin(self, ours: socket.socket | None = None) -> None:
        """With the server at the other end of a socket, or one that it starts as an editor does."""
        if ours is None:
            await self.start_io(sys.executable, "-m", "surgery", "lsp")
        else:
            reader, writer = await asyncio.open_connection(sock=ours)
            self.protocol.set_writer(writer)
            self._async_tasks.append(asyncio.create_task(run_async(
                self._stop_event, reader, self.protocol, None, self.report_server_error)))
        await self.initialize_async(types.InitializeParams(
            capabilities=types.ClientCapabilities(), root_uri=self.path.parent.as_uri()))
        self.initialized(types.InitializedParams())

    async def end(self) -> None:
        await self.shutdown_async(None)
        self.exit(None)
        await self.stop()

    async def diagnostics(self) -> list[tuple[str, str, int]]:
        """(code, the text at its place, line) of what is told next of the newest version."""
        while (told := await asyncio.wait_for(self.told.get(), 60)).version != self.version:
            pass
        lines = self.text.split("\n")
        return [(str(d.code), lines[d.range.start.line][d.range.start.character:d.range.end.character],
                 d.range.start.line) for d in told.diagnostics]

    async def open(self, text: str) -> list[tuple[str, str, int]]:
        self.version, self.text = self.version + 1, text
        self.text_document_did_open(types.DidOpenTextDocumentParams(
            types.TextDocumentItem(self.path.as_uri(), "surg", self.version, text)))
        return await self.diagnostics()

    async def write(self, text: str) -> list[tuple[str, str, int]]:
        self.version, self.text = self.version + 1, text
        self.text_document_did_change(types.DidChangeTextDocumentParams(
            types.VersionedTextDocumentIdentifier(self.version, self.path.as_uri()),
            [types.TextDocumentContentChangeWholeDocument(text)]))
        return await self.diagnostics()

    async def replace(self, old: str, new: str) -> list[tuple[str, str, int]]:
        assert self.text.count(old) == 1
        return await self.write(self.text.replace(old, new))

    async def save(self) -> list[tuple[str, str, int]]:
        self.path.write_text(self.text)
        self.text_document_did_save(types.DidSaveTextDocumentParams(self.document))
        return await self.diagnostics()

    def after(self, words: str) -> dict[str, Any]:
        """The place behind some words of the text, as parameters of a request."""
        before = self.text[: self.text.index(words) + len(words)]
        place = types.Position(before.count("\n"), len(before.rpartition("\n")[2]))
        return {"text_document": self.document, "position": place}

    async def offers(self, words: str) -> list[str]:
        result = await self.text_document_completion_async(types.CompletionParams(**self.after(words)))
        assert isinstance(result, types.CompletionList)
        return [item.label for item in result.items]

    async def hover(self, words: str) -> str:
        result = await self.text_document_hover_async(types.HoverParams(**self.after(words)))
        return "" if result is None else result.contents.value

    async def fixes(self, line: int) -> list[tuple[str, str]]:
        """(title, the text after it) of each quick fix of a line."""
        place = types.Range(types.Position(line, 0), types.Position(line, 200))
        actions = await self.text_document_code_action_async(types.CodeActionParams(
            self.document, place, types.CodeActionContext([])))
        return [(action.title, self.edited(action.edit.changes[self.path.as_uri()])) for action in actions or []]

    def edited(self, edits: list[types.TextEdit]) -> str:
        lines, text = self.text.split("\n"), self.text
        starts = [sum(len(line) + 1 for line in lines[:i]) for i in range(len(lines) + 1)]
        for edit in sorted(edits, key=lambda e: (e.range.start.line, e.range.start.character), reverse=True):
            start, end = (starts[p.line] + p.character for p in (edit.range.start, edit.range.end))
            text = text[:start] + edit.new_text + text[end:]
        return text


async def renamed(editor: Editor, words: str, name: str) -> str:
    edit = await editor.text_document_rename_async(types.RenameParams(new_name=name, **editor.after(words)))
    return editor.edited(edit.changes[editor.path.as_uri()])


Play = Callable[[Editor], Awaitable[None]]
Session = Callable[[Play], None]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path, Play], None]]:
    """One server for all, a copy of this process: to start one, and to import torch in it, takes longer than the tests."""
    load_demo("llama")
    ours, its = socket.socketpair()
    number = begin(lambda: main(["lsp"]), its.fileno(), its.fileno(), 2, (ours.fileno(),))
    its.close()
    loop, editor = asyncio.new_event_loop(), Editor(tmp_path_factory.mktemp("root") / "mine.surg")
    loop.run_until_complete(editor.begin(ours))

    async def play_in(folder: Path, play: Play) -> None:
        editor.path = folder / "mine.surg"
        await play(editor)
        editor.text_document_did_close(types.DidCloseTextDocumentParams(editor.document))

    yield lambda folder, play: loop.run_until_complete(play_in(folder, play))
    loop.run_until_complete(editor.end())
    loop.close()
    assert os.waitpid(number, 0)[1] == 0


@pytest.fixture
def session(started: Callable[[Path, Play], None], tmp_path: Path) -> Session:
    """Plays with a file of the test's own."""
    return lambda play: started(tmp_path, play)


def test_an_editor_starts_it(tmp_path: Path) -> None:
    """As a process of its own, which needs no torch for a spec that names no model."""

    async def play() -> None:
        editor = Editor(tmp_path / "mine.surg")
        await editor.begin()
        assert await editor.open("target linear { add low_rnk() }") == [("unknown-definition", "low_rnk", 0)]
        await editor.end()

    asyncio.run(play())


def test_ten_edits(session: Session) -> None:
    """A spec is written, with the mistakes that people make: each is told as it is typed, and none ends the server."""

    async def play(editor: Editor) -> None:
        assert await editor.open(SPEC) == []
        # 1, 2: a misspelt definition, and its quick fix
        found = await editor.replace("low_rank", "low_rnk")
        assert found == [("unknown-definition", "low_rnk", 7)]
        assert await editor.fixes(7) == [("Change to low_rank", SPEC)]
        assert await editor.write(SPEC) == []
        text = await editor.hover("add low_")
        assert "update low_rank(rank: int = 8, alpha: float = 16)" in text and "W' = W + 2 B A" in text
        assert "A [8, in]" in text and "trained numbers" in text and "x the frozen layer's" in text
        # 3: a text that breaks off, in which what may follow is offered all the same
        found = await editor.replace("add low_rank(rank)\n}\n", "add low_rank(")
        assert [code for code, *_ in found] == ["syntax"]
        offered = await editor.offers("add low_rank(")
        assert offered[:3] == ["rank", "alpha", "rank"] and "update" not in offered
        # 4: a step without its definition
        await editor.replace("add low_rank(", "add ")
        assert (await editor.offers("  add "))[:2] == ["low_rank", "shift"]
        assert "low_rank" not in await editor.offers("  pre ")
        # 5: an argument that there is not, and one of another type
        found = await editor.write(SPEC.replace("(rank)", "(rnk = 4)"))
        assert found == [("unknown-argument", "rnk", 7)]
        assert [title for title, _ in await editor.fixes(7)] == ["Change to rank"]
        # 6: a definition with shapes that do not agree
        own = SPEC.replace("low_rank(rank)", "own(rank)") + (
            "\nupdate own(rank: int) {\n  param A[rank, in] ~ normal(std = 0.02)\n  param B[out, rank] = 1\n"
            "  return A @ B\n}\n")
        found = await editor.write(own)
        assert [code for code, *_ in found] == ["shape-mismatch"]
        # 7: the right order; it starts elsewhere than W, which only a save tries
        assert await editor.replace("A @ B", "B @ A") == []
        assert [code for code, *_ in await editor.save()] == ["not-identity"]
        assert "param A[rank, in] ~ normal(std = 0.02)" in await editor.hover("return B @ A")
        offered = await editor.offers("return B")
        assert {"A", "B", "rank", "out", "W", "diag"} <= {*offered}
        # 8: a start at zero
        assert await editor.replace("param B[out, rank] = 1", "param B[out, rank] = 0") == []
        assert "kaiming_uniform" in await editor.offers("param A[rank, in] ~ ")
        assert await editor.save() == []
        # 9: a pattern that matches nothing of the model that the first line names
        await editor.replace('"**.q_proj"', '"**.q_prj"')
        found = await editor.save()
        assert found == [("no-match", '"**.q_prj"', 5)]
        assert [title for title, _ in await editor.fixes(5)] == ['Change to "**.q_proj"']
        offered = await editor.offers('target linear "')
        assert "**.q_proj" in offered and "**.down_proj" in offered
        # 10: as it was
        assert await editor.write(SPEC) == [] and await editor.save() == []
        assert "matches 4 weights of demo:llama" in await editor.hover('"**.q_')
        # and a model that there is not, which keeps the spec from nothing
        assert await editor.replace("demo:llama", "demo:lama") == []
        assert await editor.save() == [("unknown-model", "demo:lama", 0)]

    session(play)


def test_places_and_layout(session: Session, tmp_path: Path) -> None:
    (tmp_path / "roles.surg").write_text('select queries = "**.q_proj"\n\n# A gain.\ntransform gain() on n {\n'
                                         "  param g = 1\n  return g * I(n)\n}\n")
    text = ('use "roles.surg"\n# é 𝒳 before\nspec mine(rank: int = 8)   \ntarget queries {\n  pre gain()\n'
            "  add low_rank(rank = rank)\n}\n")

    async def play(editor: Editor) -> None:
        assert await editor.open(text) == []
        for words, file, line in (("pre ga", "roles.surg", 3), ("add low_", "std.surg", None),
                                  ("target quer", "roles.surg", 0), ('use "ro', "roles.surg", 0),
                                  ("rank = ra", "mine.surg", 2)):
            found = await editor.text_document_definition_async(types.DefinitionParams(**editor.after(words)))
            assert isinstance(found, types.Location)
            assert found.uri.endswith(file) and line in (None, found.range.start.line)
        symbols = await editor.text_document_document_symbol_async(types.DocumentSymbolParams(editor.document))
        assert [(s.name, [c.name for c in s.children]) for s in symbols] == [
            ("mine", ["rank"]), ("target queries", [])]
        edits = await editor.text_document_formatting_async(types.DocumentFormattingParams(
            editor.document, types.FormattingOptions(2, True)))
        assert editor.edited(edits) == text.replace("   \n", "\n")
        assert await renamed(editor, "mine(ra", "r") == text.replace("mine(rank", "mine(r").replace("= rank)", "= r)")
        with pytest.raises(JsonRpcException, match="not declared in this file"):
            await renamed(editor, "add low_", "r")
        # what is wrong in a file that is used is told where it is used
        (tmp_path / "roles.surg").write_text("select queries = \n")
        found = await editor.replace("   \n", "\n")
        assert [(code, line) for code, _, line in found] == [("syntax", 0)]

    session(play)


LOCAL = """\
spec local(a: int = 2)
target linear { add own(rank = a) for i in 0..2 { pre part(i) } for i in 0..a { pre part(at = i) } }
transform part(at: int) on n { param d[n] = 1  return at * diag((d)) }
update own(rank: int) { param A[rank, in] = 0  let n = A  param B[out, rank] ~ normal(std = 0.02)  return B @ n }
"""
# Each new name, by a place where the old one stands, and the text after it; what is taken is refused.
RENAMED = [
    ("own(ra", "r", LOCAL.replace("own(rank = a)", "own(r = a)").replace("own(rank: int)", "own(r: int)")
     .replace("A[rank,", "A[r,").replace(", rank]", ", r]")),
    ("for i", "j", LOCAL.replace("for i in 0..2 { pre part(i)", "for j in 0..2 { pre part(j)")),
    ("part(at = i", "j", LOCAL.replace("for i in 0..a { pre part(at = i)", "for j in 0..a { pre part(at = j)")),
    ("on n", "m", LOCAL.replace("on n {", "on m {").replace("d[n]", "d[m]")),
    ("diag((d", "gain", LOCAL.replace("d[n]", "gain[n]").replace("((d))", "((gain))")),
    ("add own", "update_of", LOCAL.replace("own(", "update_of(")),
    ("local(a", "n", LOCAL.replace("local(a:", "local(n:").replace("= a)", "= n)").replace("0..a", "0..n")),
    ("let n", "A", ""), ("let n", "out", ""), ("let n", "return", ""), ("let n", "1", ""), ("let n", "rank", ""),
    ("add own", "part", ""), ("add own", "low_rank", ""), ("local(a", "i", ""), ("on n", "d", ""), ("at * di", "e", ""),
]


def test_new_names(session: Session) -> None:
    async def play(editor: Editor) -> None:
        assert await editor.open(LOCAL) == []
        for words, name, text in RENAMED:
            if text:
                assert await renamed(editor, words, name) == text, (words, name)
            else:
                with pytest.raises(JsonRpcException):
                    await renamed(editor, words, name)

    session(play)


BROKEN = ["", "\ufeff", "\0", "{", '"', "#", "target", "}" * 50, "(" * 3000, "é𝒳\u2028\x0b\r", "target linear { add low_rank(",
          "use \"mine.surg\"", "use \"\0\"", "spec a(b: int = b) spec a",
          "update f() { return f } target linear { add f() }", "language 99"]


def test_nothing_that_is_written_ends_it(session: Session) -> None:
    async def play(editor: Editor) -> None:
        await editor.open("")
        for text in BROKEN:
            await editor.write(text)
            for place in (types.Position(0, 0), types.Position(0, 3), types.Position(7, 7)):
                where = {"text_document": editor.document, "position": place}
                await editor.text_document_hover_async(types.HoverParams(**where))
                await editor.text_document_completion_async(types.CompletionParams(**where))
                await editor.text_document_definition_async(types.DefinitionParams(**where))
            await editor.text_document_document_symbol_async(types.DocumentSymbolParams(editor.document))
            await editor.fixes(0)

    session(play)
