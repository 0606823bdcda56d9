"""`surgery lsp`: the language server that editors start."""

from __future__ import annotations

from surgery.cli.options import command
from surgery.cli.output import Output
from surgery.extras import need


@command(example="surgery lsp", as_project=False)
def lsp(output: Output) -> None:
    """Serve editors: a language server over stdin and stdout.

    Diagnostics as you type, hover, completion, definitions, rename, formatting and quick fixes. A line
    `# surgery: model = demo:llama` in a spec chooses the model whose modules are offered. Needs the extra `lsp`.
    """
    need("pygls", "lsp", "the language server")
    from surgery.editor.server import serve

    serve()
