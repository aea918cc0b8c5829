"""The door of the app: who may ask, from where, and how much. Plain ASGI, in front of everything.

The pages are this program's own; nothing of Gradio's upload, file and call interfaces is used, so all of it is
closed. That leaves: static files, pictures, and the screens' own routes under ``/grpo``, with the tables and exports
that they hand out.
"""

from __future__ import annotations

import base64
import hmac
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.requests import ClientDisconnect

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MOST_BYTES = 32 * 2**20  # of any request's body: a bundle to import is the largest
LOOPBACK = {"127.0.0.1", "localhost", "[::1]", "::1"}

# What Gradio's own page asks for, and nothing else of it.
_GRADIO = re.compile(
    r"/|/config/?|/theme\.css|/manifest\.json|/favicon\.ico|/robots\.txt|/pwa_icon.*"
    r"|/(assets|static)/[\w./@-]+|/svelte/[\w./@-]+"
    r"|/gradio_api/(startup-events|heartbeat/[\w-]+|info/?|app_id/?)|/gradio_api/static/[\w./@-]+"
)
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


class Guard:
    """Wraps an ASGI app.

    Args:
        app: what stands behind.
        login: (user, password) that every request must bring, or None.
        any_host: accept every Host header; False when bound to this machine only, where a foreign name in it
            means that another site's page talks to us through the browser (DNS rebinding).
    """

    def __init__(self, app: Any, login: tuple[str, str] | None, *, any_host: bool) -> None:
        self.app, self.any_host = app, any_host
        self._expected = base64.b64encode(":".join(login).encode()) if login else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # no websockets here
        headers = {key.lower(): value for key, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal:
            await _refuse(send, *refusal)
            return
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            return {"type": "http.disconnect"} if seen > MOST_BYTES else message

        async def answered(message: Message) -> None:
            if seen > MOST_BYTES:  # what the screens made of the body that broke off does not matter
                return
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *_HEADERS]}
            await send(message)

        try:
            await self.app(scope, limited, answered)
        except ClientDisconnect:
            if seen <= MOST_BYTES:
                raise
        if seen > MOST_BYTES:
            await _refuse(send, 413, _too_large())

    def _refusal(self, scope: Scope, headers: MutableMapping[bytes, bytes]) -> tuple[int, str] | None:
        host = headers.get(b"host", b"").decode("latin-1")
        if not self.any_host and re.sub(r":\d+$", "", host).lower() not in LOOPBACK:
            return 403, "This app answers to this machine's own names only; start it with --host to share it."
        if self._expected is not None:
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"basic" or not hmac.compare_digest(given.strip(), self._expected):
                return 401, "Log in to use this app."
        path, method = scope["path"], scope["method"]
        if not path.isprintable():
            return 404, "There is nothing here."
        if path.startswith("/grpo/"):
            # A header that no other site's page can send without being asked first, and we never consent.
            if method not in ("GET", "HEAD") and headers.get(b"x-grpo") != b"1":
                return 403, "Actions are taken from the app's own pages only."
        elif method not in ("GET", "HEAD") or not _GRADIO.fullmatch(path):
            return 404, "There is nothing here."
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > MOST_BYTES:
            return 413, _too_large()
        return None


def _too_large() -> str:
    return f"That is more than {MOST_BYTES // 2**20} MiB at once; send less."


async def _refuse(send: Send, status: int, sentence: str) -> None:
    headers = [(b"content-type", b"application/json"), *_HEADERS]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="GRPO", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": sentence, "field": ""}).encode()})
