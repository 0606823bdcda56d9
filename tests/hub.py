"""A stand-in of the hub on this machine: repositories with commits, as huggingface_hub asks for them."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Hub:
    """`commits` of each repository, the oldest first, each with all its files; `asked`: what was asked for."""

    commits: dict[str, dict[str, Files]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    address: str = ""

    def commit(self, repository: str, files: Files) -> str:
        """Add files to a repository; the commit."""
        known = self.commits.setdefault(repository, {})
        everything = {**(list(known.values())[-1] if known else {}), **files}
        text = repr((repository, len(known), sorted(everything.items())))
        known[sha := hashlib.sha1(text.encode()).hexdigest()] = everything
        return sha

    def at(self, repository: str, revision: str) -> tuple[str, Files] | None:
        known = self.commits.get(repository)
        if not known:
            return None
        sha = list(known)[-1] if revision == "main" else revision
        return (sha, known[sha]) if sha in known else None


def _form(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "rfilename": path, "size": len(content),
            "oid": hashlib.sha1(content).hexdigest()}


class _Answers(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *about: object) -> None:
        pass

    def _give(self, status: int, body: Any = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _absent(self, code: str) -> None:
        self._give(404, {"error": code}, X_Error_Code=code)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        self.hub.asked.append(f"{self.command} {self.path}")
        if "resolve" in parts:
            i = parts.index("resolve")
            return self._file("/".join(parts[:i]), parts[i + 1], "/".join(parts[i + 2:]))
        if parts[:2] == ["api", "models"]:
            what = parts[4] if len(parts) > 4 else "revision"
            found = self.hub.at("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
            if found is None:
                known = "/".join(parts[2:4]) in self.hub.commits
                return self._absent("RevisionNotFound" if known else "RepoNotFound")
            forms = [_form(*item) for item in sorted(found[1].items())]
            if what == "tree":
                return self._give(200, forms)
            return self._give(200, {"id": "/".join(parts[2:4]), "sha": found[0], "siblings": forms, "private": False,
                                    "downloads": 0, "likes": 0, "tags": []})
        self._absent("EntryNotFound")

    def _file(self, repository: str, revision: str, path: str) -> None:
        found = self.hub.at(repository, revision)
        if found is None:
            return self._absent("RevisionNotFound" if repository in self.hub.commits else "RepoNotFound")
        sha, files = found
        if path not in files:
            return self._give(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        self._give(200, files[path], X_Repo_Commit=sha, ETag=f'"{hashlib.sha1(files[path]).hexdigest()}"')

    def do_POST(self) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'user'}/{asked['name']}"
            self.hub.commits.setdefault(name, {})
            return self._give(200, {"url": f"{self.hub.address}/{name}", "name": name, "id": name})
        if parts == ["api", "validate-yaml"]:
            return self._give(200, {"errors": [], "warnings": []})
        repository = "/".join(parts[2:4])
        if parts[4:5] == ["preupload"]:
            files = json.loads(body)["files"]
            return self._give(200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                                              for f in files]})
        if parts[4:5] == ["commit"]:
            lines = [json.loads(line) for line in body.splitlines()]
            sha = self.hub.commit(repository, {
                line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines
                if line["key"] == "file"})
            address = f"{self.hub.address}/{repository}/commit/{sha}"
            return self._give(200, {"success": True, "commitUrl": address, "commitOid": sha, "hookOutput": ""})
        self._absent("EntryNotFound")


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that answers at its `address` while the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (_Answers,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
