"""``python app.py``: arguments -> database -> worker -> app -> server."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import socket
import sys
import threading
import webbrowser
from collections.abc import Sequence

from grpo_engine.config import ConfigError
from grpo_engine.store import Store, StoreError

log = logging.getLogger(__name__)

FIRST_PORT, PORTS = 7860, 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the app until it is stopped; returns the exit code (0 stopped, 2 refused)."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        login = _login(options.auth)
        if options.share and login is None:
            raise ConfigError("--share puts the app on the public internet: it needs --auth user:password.")
        if login is None and options.host not in ("127.0.0.1", "localhost", "::1"):
            print(f"Note: everybody who can reach {options.host} can use this app; --auth user:password closes it.")
        port = _free_port(options.host, options.port)
        store = Store(options.db)
    except (ConfigError, StoreError) as error:
        print(f"Refused: {error}", file=sys.stderr)
        return 2
    with store:
        _serve(store, login, options, port)
    return 0


def _serve(store: Store, login: tuple[str, str] | None, options: argparse.Namespace, port: int) -> None:
    import uvicorn

    from .app import build_app
    from .first_start import first_start
    from .worker import Worker

    store.interrupt_stale()
    local = options.host in ("127.0.0.1", "localhost", "::1")
    worker = Worker(store)
    app = build_app(store, worker, login, any_host=not local or options.share)
    server = uvicorn.Server(
        uvicorn.Config(app, host=options.host, port=port, log_level="warning", timeout_graceful_shutdown=3)
    )
    address = _address(options.host, port)

    def announce() -> None:
        while not server.started:
            if server.should_exit:
                return
            threading.Event().wait(0.05)
        print(f"Open {address} in a browser. Ctrl-C stops the app; a run that goes on is saved first.", flush=True)
        if options.share:
            print(_shared(port), flush=True)
        if not options.no_browser and _has_screen():
            webbrowser.open(address)
        threading.Event().wait(0.5)  # the first page goes first, then the example, then the engine's imports
        first_start(store)
        worker.warm_up()

    threading.Thread(target=announce, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn sends Ctrl-C on once it has stopped and all is saved
        server.run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python app.py", description="Train a prompt rewriter with GRPO, and watch.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=0, help=f"port (default: the first free one from {FIRST_PORT})")
    parser.add_argument("--db", default="runs.db", metavar="PATH", help="database (default: runs.db)")
    parser.add_argument("--auth", default="", metavar="USER:PASSWORD", help="ask for this login")
    parser.add_argument("--share", action="store_true", help="also serve through a public address; needs --auth")
    parser.add_argument("--no-browser", action="store_true", help="do not open a browser")
    return parser


def _login(text: str) -> tuple[str, str] | None:
    if not text:
        return None
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise ConfigError("--auth takes user:password, both not empty.")
    return user, password


def _free_port(host: str, port: int) -> int:
    """``port`` if it can be listened on, or for 0 the first free one from `FIRST_PORT`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in [port] if port else range(FIRST_PORT, FIRST_PORT + PORTS):
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, candidate))
            except (OSError, OverflowError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                continue
            return candidate
    if port:
        raise ConfigError(f"Port {port} of {host} can't be used: {reason}; give another --port.")
    raise ConfigError(
        f"No port from {FIRST_PORT} to {FIRST_PORT + PORTS - 1} of {host} is free ({reason}); give --port."
    )


def _address(host: str, port: int) -> str:
    """Where a browser on this machine finds the app."""
    here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # all addresses are none to open
    return f"http://{f'[{here}]' if ':' in here else here}:{port}"


def _shared(port: int) -> str:
    """What to say of the public address."""
    try:
        return f"Shared at {_share(port)}"
    except Exception as error:  # a download, a program and a server of others: all of them can fail, in any way
        log.debug("no public address", exc_info=True)
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".") or type(error).__name__
        return (
            f"There is no public address ({reason}), and the app goes on without one; "
            "check the internet connection and start it again."
        )


def _share(port: int) -> str:
    """A public address for the app, through Gradio's tunnel."""
    import secrets

    from gradio.networking import setup_tunnel

    return setup_tunnel("127.0.0.1", port, secrets.token_urlsafe(32), None, None)


def _has_screen() -> bool:
    """Whether opening a browser can't end up in this terminal."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
