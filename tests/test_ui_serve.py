"""What ``python app.py`` says and does around the server itself."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from grpo_engine.store import Store
from ui import serve


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "http://127.0.0.1:7860"),
        ("localhost", "http://localhost:7860"),
        ("0.0.0.0", "http://127.0.0.1:7860"),
        ("::1", "http://[::1]:7860"),
        ("::", "http://[::1]:7860"),
        ("fe80::2", "http://[fe80::2]:7860"),
    ],
)
def test_the_address_told_can_be_opened_in_a_browser(host: str, address: str) -> None:
    assert serve._address(host, 7860) == address


def test_without_a_public_address_the_app_starts_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    warm = threading.Event()
    done: list[str] = []

    class Server:
        started, should_exit = True, False

        def __init__(self, config: Any) -> None:
            pass

        def run(self) -> None:
            assert warm.wait(20), "the engine is never imported"

    def no_tunnel(*_: Any) -> str:
        raise RuntimeError("Could not get share link from Gradio API Server.")

    monkeypatch.setattr("uvicorn.Server", Server)
    monkeypatch.setattr("gradio.networking.setup_tunnel", no_tunnel)
    monkeypatch.setattr("ui.first_start.first_start", lambda store: done.append("example"))
    monkeypatch.setattr("ui.worker.Worker.warm_up", lambda worker: warm.set())
    monkeypatch.setattr("webbrowser.open", done.append)
    monkeypatch.setattr("ui.serve._has_screen", lambda: True)
    options = serve._parser().parse_args(["--share", "--auth", "a:b"])
    with Store(tmp_path / "runs.db") as store:
        serve._serve(store, ("a", "b"), options, 7860)
    assert done == ["http://127.0.0.1:7860", "example"]
    told = capsys.readouterr().out.splitlines()
    assert told[1] == (
        "There is no public address (Could not get share link from Gradio API Server), and the app goes on without "
        "one; check the internet connection and start it again."
    )
