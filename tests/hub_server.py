"""A small server that speaks as much of the hub's protocol as its client needs to look up and download models."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Repositories, each a folder of files.

    Attributes:
        repositories: name -> folder.
        gated: names of those that only the token "good" may read.
        announced: file -> bytes that it is said to have, whatever it has.
        broken: files whose first download breaks off in the middle; after that the server has an error.
        asked: (method, path) of every request.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.announced: dict[str, int] = {}
        self.broken: dict[str, int] = {}
        self.asked: list[tuple[str, str]] = []
        self.url = ""

    def files(self, name: str) -> dict[str, Path]:
        """Name -> file of a repository."""
        folder = self.repositories[name]
        return {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """A running server on this machine."""
    hub = HubServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:  # noqa: N802 (named by the library)
            self._answer(body=False)

        def do_GET(self) -> None:  # noqa: N802
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0].strip("/")
            hub.asked.append((self.command, path))
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if token == "expired":
                return self._refuse(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
            parts = path.split("/")
            name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
            if name not in hub.repositories:
                return self._refuse(401, {"X-Error-Code": "RepoNotFound"})
            files = hub.files(name)
            if parts[4:5] == ["tree"]:  # asked for a folder of chat templates, which none has
                return self._refuse(404, {"X-Error-Code": "EntryNotFound"})
            if parts[0] == "api":
                listed = [
                    {"rfilename": file, "size": hub.announced.get(file, path.stat().st_size)}
                    for file, path in files.items()
                ]
                about: dict[str, Any] = {"id": name, "sha": COMMIT, "siblings": listed, "tags": [], "private": False}
                return self._send(json.dumps(about).encode(), {"Content-Type": "application/json"}, body=body)
            if name in hub.gated and token != "good":
                return self._refuse(403 if token else 401, {"X-Error-Code": "GatedRepo"})
            file = "/".join(parts[4:])  # owner/name/resolve/main/...
            if file not in files:
                return self._refuse(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            content = files[file].read_bytes()
            tag = hashlib.sha256(name.encode() + content).hexdigest()
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"'}
            if body and file in hub.broken:
                hub.broken[file] += 1
                if hub.broken[file] > 1:
                    return self._refuse(503, {})
                self._send(content, headers, body=True, cut=len(content) // 2)
                self.close_connection = True
                return None
            return self._send(content, headers, body=body)

        def _send(self, content: bytes, headers: dict[str, str], *, body: bool, cut: int | None = None) -> None:
            self.send_response(200)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content[:cut])

        def _refuse(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
