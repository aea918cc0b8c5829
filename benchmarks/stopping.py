"""How long a run goes on after a click on Stop, and how soon its memory is given back.

A run of the embedded models is started and stopped several times through the app's own interface, each time at
another moment of a step. Measured from the request on: until the run has left its active states, and until the
app's process would start the next one. Goal: at most 2 s.

    PYTHONPATH=. python benchmarks/stopping.py --stops 6
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from common import bars, machine, median, table
from serving import serving

from grpo_engine.store import Store

GOAL_S = 2.0
SETTINGS = {"training.steps": 100_000, "evaluation.prompts": 2}


def ask(url: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The app's answer to a question, or with a ``body`` to an action."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/grpo/{path}", data, {"Content-Type": "application/json", "X-GRPO": "1"})
    try:
        with urllib.request.urlopen(request, timeout=600) as response:
            found: dict[str, Any] = json.load(response)
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{path}: {error.read().decode()}") from None
    return found


def wait_for_step(store: Store, run_id: str, step: int) -> None:
    """Until the run has made ``step`` steps."""
    deadline = time.monotonic() + 900
    while store.run(run_id).step < step:
        if time.monotonic() > deadline or store.run(run_id).state == "failed":
            raise SystemExit(f"the run does not get going: {store.run(run_id).error}")
        time.sleep(0.02)


def stop(url: str, store: Store, run_id: str) -> tuple[str, float, float]:
    """What the run did when it was asked to stop; seconds until it had, and until the queue was free again."""
    doing, begun = store.run(run_id).phase, time.perf_counter()
    ask(url, "live/command", {"run": run_id, "command": "stop"})
    while store.run(run_id).active:
        time.sleep(0.005)
    ended = time.perf_counter() - begun
    while ask(url, "pulse")["worker"]["current"] is not None:
        time.sleep(0.005)
    return doing, ended, time.perf_counter() - begun


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stops", type=int, default=6)
    stops: int = parser.parse_args().stops
    rows: list[list[object]] = []
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        database = Path(name) / "runs.db"
        with serving(database) as (url, _), Store(database) as store:
            values = {key: str(value) for key, value in SETTINGS.items()}
            asked = {"preset": "tiny", "values": values, "token": "stopping-benchmark"}
            run_id = ask(url, "train/start", asked)["run"]
            for index in range(stops):
                if index:
                    ask(url, "live/command", {"run": run_id, "command": "resume"})
                wait_for_step(store, run_id, store.run(run_id).step + 2)
                times = store.steps(run_id, ["time"])["time"]
                time.sleep(float(times[-1] - times[-2]) * index / stops)  # another moment of a step each time
                doing, stopped, free = stop(url, store, run_id)
                rows.append([index + 1, doing, stopped, free])
                seconds.append(stopped)
    print(machine())
    table(["stop", "while", "s until stopped", "s until free"], rows)
    bars([(f"{row[0]}, {row[1]}", taken) for row, taken in zip(rows, seconds, strict=True)], "s")
    print(f"median {median(seconds):.2f} s, longest {max(seconds):.2f} s (goal: at most {GOAL_S:g} s)")


if __name__ == "__main__":
    main()
