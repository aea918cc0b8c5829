"""Compare and Live on a database of 50 runs of 100,000 steps: the time to a first chart, and what answers cost.

The database is made here (about 2 GB, some minutes; ``--db`` keeps it for another time): one run's steps follow
from a seed, the others are copies of it. Goals: the first chart in under 1.5 s, a live update in under 100 ms of
server time.

    PYTHONPATH=. python benchmarks/many_runs.py --db /tmp/many/runs.db
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from common import machine, median, table
from serving import browser_path, serving

from grpo_engine.config import RunConfig
from grpo_engine.recorder import STEP_METRICS
from grpo_engine.store import Store
from grpo_engine.store.schema import BLOCK
from grpo_engine.store.writes import insert, sum_up, update_run

RUNS, STEPS = 50, 100_000
ROUNDS = 5
SHOWN = "reward_mean,kl_penalty,entropy,judge_mean"
DRAWN = "document.querySelector('.g-{screen} .js-plotly-plot .scatterlayer .trace path') !== null"


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
    """[what, ms, kB] of the questions that pages ask."""

    def get(path: str) -> bytes:
        with urllib.request.urlopen(f"{url}/grpo/{path}") as response:
            content: bytes = response.read()
            return content

    chosen, every, last = ",".join(ids[:3]), ",".join(ids), ids[-1]
    known = json.loads(get(f"compare/curves?runs={last}&metrics=reward_mean"))["state"][last]
    have = f"{last}:{known['width']}:{known['last'] - 1}"  # as a page that saw the step before
    drawn = json.loads(get(f"live/figures?run={last}"))
    seen = f"step={drawn['step'] - 1}&at={drawn['at'] - 1}&shape={drawn['shape']}"
    questions = (
        ("Compare: table of runs", "compare/runs"),
        ("Compare: first chart, 3 runs", f"compare/curves?runs={chosen}&metrics=reward_mean"),
        ("Compare: first chart, all runs", f"compare/curves?runs={every}&metrics=reward_mean"),
        ("Compare: update of 1 run, 4 charts", f"compare/curves?runs={last}&metrics={SHOWN}&have={have}"),
        ("Live: all charts", f"live/figures?run={last}"),
        ("Live: update of all charts", f"live/state?run={last}&{seen}"),
    )
    if "points" not in json.loads(get(questions[-1][1])):
        raise SystemExit("The live screen's update has no points: this would measure something else.")
    return [[what, 1000 * seconds(partial(get, path)), len(get(path)) / 1000] for what, path in questions]


def first_charts(url: str, ids: list[str]) -> list[list[object]]:
    """[what, ms] from the start of the navigation to the first drawn line, by Chromium's own clock."""
    from playwright.sync_api import sync_playwright

    rows: list[list[object]] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        for what, address in (
            ("Compare, 3 runs chosen", f"compare?runs={','.join(ids[:3])}"),
            (f"Compare, {len(ids)} runs chosen", f"compare?runs={','.join(ids)}"),
            ("Live", f"live?run={ids[-1]}"),
        ):
            drawn = DRAWN.format(screen=address.partition("?")[0])
            context = browser.new_context(viewport={"width": 1440, "height": 900})
            times: list[float] = []
            for _ in range(ROUNDS + 1):
                page = context.new_page()
                page.goto(f"{url}/#{address}", wait_until="commit")
                found = page.wait_for_function(f"{drawn} && performance.now()", polling=10, timeout=60_000)
                times.append(float(found.json_value()))
                page.close()
            rows += [[what, median(times[1:])], ["  its first visit", times[0]]]
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
        with serving(database) as (url, _):
            print(machine())
            table(("answer", "ms", "kB"), answers(url, ids))
            table(("first chart", "ms"), first_charts(url, ids))


if __name__ == "__main__":
    main()
