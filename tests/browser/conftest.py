"""The app as a person meets it: ``python app.py`` in a process of its own, and a real Chromium in front of it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine_runs import small
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright
from served import Served

from grpo_engine.store import Store

ROOT = Path(__file__).resolve().parent.parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
START_SECONDS = 120.0  # of a cold, busy machine
expect.set_options(timeout=60_000)  # the same as pages wait
RECORDED = ("training.steps=6", "training.batch_size=3", "evaluation.prompts=6", "evaluation.images_per_prompt=2",
            "evaluation.samples=2", "models.image.steps=4")  # fmt: skip


@pytest.fixture(scope="session")
def recorded_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose ``runs.db`` holds two short finished runs of the real engine. Copy it; don't change it."""
    from grpo_engine.manager import execute

    folder = tmp_path_factory.mktemp("recorded")
    with Store(folder / "runs.db") as store:
        for name, seed in (("First", 0), ("Second", 1)):
            config = small(
                *RECORDED, f"seed={seed}", f"recording.name={name}", f"training.learning_rate={1e-3 * (seed + 1)}"
            )
            run_id = store.create_run(config, prompt_set="tiny")
            assert execute(store, run_id) == "finished"
    return folder


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Served]]:
    """``serve(folder, "--auth", "a:b")``: starts the app on ``folder/runs.db`` (a fresh folder without one)."""
    started: list[Served] = []

    def start(folder: Path | None = None, *arguments: str) -> Served:
        home = folder or tmp_path_factory.mktemp("app")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        log = (home / "app.log").open("wb")
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "app.py"), "--db", str(home / "runs.db"), "--port", str(port), "--no-browser",
             *arguments],
            stdout=log, stderr=subprocess.STDOUT, cwd=home, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        url = f"http://127.0.0.1:{port}"
        _wait_for(url, process, home / "app.log")
        served = Served(url, home / "runs.db", Store(home / "runs.db"), process)
        started.append(served)
        return served

    yield start
    for served in started:
        served.store.close()
        served.process.send_signal(signal.SIGINT)
    faults = []
    for served in started:
        try:
            if served.process.wait(60):
                faults.append(served.log())
        except subprocess.TimeoutExpired:
            served.process.kill()
            faults.append(f"the app did not stop: {served.log()}")
    assert not faults, "\n".join(faults)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the app ended: {log.read_text(errors='replace')}"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except urllib.error.HTTPError as error:
            if error.code == 401:
                return
            raise
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"the app did not answer: {log.read_text(errors='replace')}")


@pytest.fixture(scope="session")
def served(serve: Callable[..., Served], recorded_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """One app for all tests that add to its database but spoil nothing: two recorded runs, First and Second."""
    home = tmp_path_factory.mktemp("shared")
    shutil.copytree(recorded_runs, home, dirs_exist_ok=True)
    return serve(home)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """The system's browser. A machine without one fails: these tests are not optional."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    assert found, "The browser tests need Chromium or Chrome; 'make browser' installs it."
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def new_page(chromium: Browser, served: Served) -> Iterator[Callable[..., Page]]:
    """``new_page(width=390)``: a page of its own, as of another person. At the end, every page must have been
    without console errors (a refused action's 4xx answer aside) and without a request to any other host."""
    faults: list[str] = []
    contexts = []

    def on_console(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not re.search(r"status of 4\d\d", message.text):
            faults.append(f"console {message.type}: {message.text}")

    def on_request(request: Request) -> None:
        if not re.match(r"(http://127\.0\.0\.1:\d+/|data:|blob:)", request.url):
            faults.append(f"request to {request.url}")

    def open_page(*, width: int = 1440, height: int = 900, dark: bool = False, **options: object) -> Page:
        context = chromium.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light", **options
        )  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        page.on("console", on_console)
        page.on("pageerror", lambda error: faults.append(f"script error: {error}"))
        page.on("request", on_request)
        page.set_default_timeout(60_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults, "\n".join(faults)


@pytest.fixture
def page(new_page: Callable[..., Page]) -> Page:
    """A desktop page, still blank; go to ``f"{served.url}/#live"``."""
    return new_page()
