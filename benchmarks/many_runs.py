"""Compare on a database of 50 runs of 100,000 steps: how long until its first chart, and what each answer costs.

The database is made here (about 2 GB, some minutes; ``--db`` keeps it for another time): one run's steps follow
from a seed, the others are copies of it. Goals: the first chart in under 1.5 s, a live update in under 100 ms of
server time.

    PYTHONPATH=. python benchmarks/many_runs.py --db /tmp/many/runs.db
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import ROOT, machine, median, table
from first_page import free_port

from grpo_engine.config import RunConfig
from grpo_engine.recorder import STEP_METRICS
from grpo_engine.store import Store
from grpo_engine.store.schema import BLOCK
from grpo_engine.store.writes import insert, sum_up, update_run

RUNS, STEPS = 50, 100_000
ROUNDS = 5
FIRST_CHART = "document.querySelector('.g-compare .js-plotly-plot .scatterlayer .trace path') !== null"


def fill(store: Store, runs: int, steps: int) -> list[str]:
    """Runs with steps of every metric, as a recorder leaves them behind; returns their ids, the oldest first."""
    config = RunConfig.parse({"training": {"steps": steps}})
    ids = [store.create_run(config) for _ in range(runs)]
    values = np.random.default_rng(0).random((steps, len(STEP_METRICS)))
    values += np.linspace(0.0, 1.0, steps)[:, None]
    with store.write() as db:
        for step, row in enumerate(values.tolist(), start=1):
            numbers = dict(zip(STEP_METRICS, row, strict=True))
            insert(db, "steps", [{"run_id": ids[0], "step": step, "time": float(step), **numbers}])
        for block in range(steps // BLOCK):
            sum_up(db, ids[0], block)
    names = ", ".join(f'"{name}"' for name in ("step", "time", *STEP_METRICS))
    sums = "metric, block, count, low, high, total"
    for run_id in ids[1:]:
        with store.write() as db:
            for name, columns in (("steps", names), ("step_blocks", sums)):
                db.execute(
                    f"INSERT INTO {name} (run_id, {columns}) SELECT ?, {columns} FROM {name} WHERE run_id = ?",
                    [run_id, ids[0]],
                )
    with store.write() as db:
        for run_id in ids:
            update_run(db, run_id, {"step": steps, "state": "finished", "started": 0.0, "finished": float(steps)})
    return ids


def seconds(action: Callable[[], object]) -> float:
    """Median of some rounds, after one that warms up."""
    action()
    times = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        action()
        times.append(time.perf_counter() - begun)
    return median(times)


def answers(url: str, ids: list[str]) -> list[list[object]]:
    """[what, ms, kB] of the questions that the page asks."""
    chosen, every = ",".join(ids[:3]), ",".join(ids)
    last, some = ids[-1], "reward_mean,kl_penalty,entropy,judge_mean"
    have = f"{last}:{2 ** int(np.ceil(np.log2(STEPS / 400)))}:{STEPS - 1}"
    rows: list[list[object]] = []
    for what, path in (
        ("table of runs", "runs"),
        ("first chart, 3 runs", f"curves?runs={chosen}&metrics=reward_mean"),
        ("first chart, all runs", f"curves?runs={every}&metrics=reward_mean"),
        ("update of 1 run, 4 charts", f"curves?runs={last}&metrics={some}&have={have}"),
    ):

        def get(path: str = path) -> bytes:
            with urllib.request.urlopen(f"{url}/grpo/compare/{path}") as response:
                content: bytes = response.read()
                return content

        rows.append([what, 1000 * seconds(get), len(get()) / 1000])
    return rows


def first_charts(url: str, ids: list[str]) -> list[list[object]]:
    """[what, ms] from the start of the navigation to the first drawn line, by Chromium's own clock."""
    from playwright.sync_api import sync_playwright

    rows: list[list[object]] = []
    with sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        for count in (3, len(ids)):
            context = browser.new_context(viewport={"width": 1440, "height": 900})
            times: list[float] = []
            for _ in range(ROUNDS + 1):
                page = context.new_page()
                page.goto(f"{url}/#compare?runs={','.join(ids[:count])}", wait_until="commit")
                drawn = page.wait_for_function(f"{FIRST_CHART} && performance.now()", polling=10, timeout=60_000)
                times.append(float(drawn.json_value()))
                page.close()
            rows += [[f"page, {count} runs chosen", median(times[1:])], ["  its first visit", times[0]]]
            context.close()
        browser.close()
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--db", type=Path, help="keep the database here, or use the one that is there")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        database: Path = options.db or Path(name) / "runs.db"
        with Store(database) as store:
            ids = [run.id for run in reversed(store.runs())] or fill(store, options.runs, options.steps)
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        app = subprocess.Popen(
            [sys.executable, str(ROOT / "app.py"), "--no-browser", "--port", str(port), "--db", str(database)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            wait_until_ready(url)
            print(machine())
            table(("answer", "ms", "kB"), answers(url, ids))
            table(("first chart", "ms"), first_charts(url, ids))
        finally:
            app.send_signal(signal.SIGINT)
            app.wait(60)


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


if __name__ == "__main__":
    main()
