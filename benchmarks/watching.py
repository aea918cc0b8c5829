"""What watching a live run costs the app's process: 0, 1 and 10 pages in real Chromium, a minute each.

The run is trained by a process of its own (``python -m grpo_engine train`` on the same database), so all
processor time of the app's process is the cost of serving. Goal: at most 3 % of one core for a page, 10 % for ten.

    PYTHONPATH=. python benchmarks/watching.py --seconds 60
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from common import ROOT, bars, machine, table
from serving import browser_path, end, serving

from grpo_engine.store import Store

COUNTS = (0, 1, 10)


def processor_seconds(process: psutil.Process) -> float:
    """User and system time so far, all threads."""
    times = process.cpu_times()
    return float(times.user + times.system)


@contextmanager
def training(database: Path) -> Iterator[None]:
    """A run that goes on in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "grpo_engine", "train", "--db", str(database), "--set", "training.steps=100000",
         "--set", "evaluation.prompts=2", "--set", "placement.threads=1"],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield
    finally:
        end(process)


def main() -> None:
    """Measure and print."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60)
    seconds: int = parser.parse_args().seconds
    rows: list[list[object]] = []
    shares: list[tuple[str, float]] = []
    with tempfile.TemporaryDirectory() as name:
        database = Path(name) / "runs.db"
        with serving(database) as (url, app), training(database), sync_playwright() as playwright:
            wait_for_steps(database, 3)
            browser = playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
            process, pages = psutil.Process(app.pid), 0
            for count in COUNTS:
                for _ in range(count - pages):
                    page = browser.new_context(viewport={"width": 1440, "height": 900}).new_page()
                    page.goto(f"{url}/#live")
                    page.wait_for_selector(".js-plotly-plot", timeout=120_000)
                pages = count
                time.sleep(5)
                step, begun, before = current_step(database), time.perf_counter(), processor_seconds(process)
                time.sleep(seconds)
                share = (processor_seconds(process) - before) / (time.perf_counter() - begun)
                made = current_step(database) - step
                if not made:
                    raise SystemExit("The run made no step meanwhile; measure for longer.")
                rows.append([count, 100 * share, made])
                shares.append((f"{count} pages", 100 * share))
            browser.close()
    print(machine())
    table(["pages", "% of a core", "steps of the run meanwhile"], rows)
    bars(shares, "% of a core")
    print("goal: at most 3 % for one page, 10 % for ten")


def current_step(database: Path) -> int:
    """How far the newest run is."""
    with Store(database, read_only=True) as store:
        return store.runs()[0].step


def wait_for_steps(database: Path, steps: int) -> int:
    """Until the run has made ``steps`` steps."""
    for _ in range(1800):
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
