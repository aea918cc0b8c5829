"""What watching a live run costs the app's process: 0, 1 and 10 pages in real Chromium, a minute each.

The run is trained by a process of its own (``python -m grpo_engine train`` on the same database), so all
processor time of the app's process is the cost of serving. Goal: at most 3 % of one core for a page, 10 % for ten.

    python benchmarks/watching.py --seconds 60
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from common import ROOT, bars, machine, table
from first_page import free_port

from grpo_engine.store import Store

COUNTS = (0, 1, 10)


def processor_seconds(process: psutil.Process) -> float:
    """User and system time so far, all threads."""
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> None:
    """Measure and print."""
    from playwright.sync_api import Page, sync_playwright

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60)
    seconds: int = parser.parse_args().seconds
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        database = folder / "runs.db"
        app = subprocess.Popen(
            [sys.executable, str(ROOT / "app.py"), "--no-browser", "--port", str(port), "--db", str(database)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        training = subprocess.Popen(
            [sys.executable, "-m", "grpo_engine", "train", "--db", str(database), "--set", "training.steps=100000",
             "--set", "evaluation.prompts=2", "--set", "placement.threads=1"],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            step = wait_for_steps(database, 3)
            with sync_playwright() as playwright:
                found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
                browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
                pages: list[Page] = []
                for count in COUNTS:
                    while len(pages) < count:
                        page = browser.new_context(viewport={"width": 1440, "height": 900}).new_page()
                        page.goto(f"http://127.0.0.1:{port}/#live")
                        page.wait_for_selector(".js-plotly-plot", timeout=120_000)
                        pages.append(page)
                    time.sleep(5)
                    process, first = psutil.Process(app.pid), current_step(database)
                    begun, before = time.perf_counter(), processor_seconds(psutil.Process(app.pid))
                    time.sleep(seconds)
                    share = (processor_seconds(process) - before) / (time.perf_counter() - begun)
                    rows.append([count, 100 * share, current_step(database) - first])
                browser.close()
            assert current_step(database) > step
        finally:
            training.send_signal(signal.SIGINT)
            training.wait(60)
            app.terminate()
            app.wait(60)
    print(machine())
    table(["pages", "% of a core", "steps of the run meanwhile"], rows)
    bars([(f"{count} pages", float(str(share))) for count, share, _ in rows], "% of a core")
    print("goal: at most 3 % for one page, 10 % for ten")


def current_step(database: Path) -> int:
    """How far the newest run is."""
    with Store(database, read_only=True) as store:
        return store.runs()[0].step


def wait_for_steps(database: Path, steps: int) -> int:
    """Until the run has made ``steps`` steps."""
    for _ in range(600):
        if database.exists() and (at := current_step_or_none(database)) >= steps:
            return at
        time.sleep(0.5)
    raise SystemExit("the run does not get going")


def current_step_or_none(database: Path) -> int:
    """As `current_step`; 0 while the database holds no run that trains."""
    with Store(database, read_only=True) as store:
        active = store.active_runs()
        return active[0].step if active else 0


if __name__ == "__main__":
    main()
