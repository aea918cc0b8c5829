"""The app as a process of its own, for the benchmarks that measure it from outside."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import ROOT

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(database: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The app's address and process, from when its engine is imported; stopped at the end."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "app.py"), "--no-browser", "--port", str(port), "--db", str(database)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until_ready(url)
        yield url, process
    finally:
        end(process)


def wait_until_ready(url: str) -> None:
    """Until the app answers and has imported its engine, which would compete for the processor."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/grpo/pulse") as response:
                if b'"engine":"loading"' not in response.read():
                    return
        except OSError:
            pass
        time.sleep(0.5)
    raise SystemExit("The app did not become ready.")


def end(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C, and what that does not end in a while is killed."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(90)
    except subprocess.TimeoutExpired:
        process.kill()


def browser_path() -> str:
    """The system's Chromium or Chrome."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise SystemExit("This needs Chromium or Chrome; 'make browser' installs it.")
    return found
