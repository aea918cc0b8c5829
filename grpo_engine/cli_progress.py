"""What the command line shows: a run's progress while it goes on, lists, and the report.

The progress display reads ``runs.db`` like any other viewer; the run goes on in a thread of its own.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .control import RunControl
from .distributed import ALONE, World
from .manager import execute
from .store import Store, StoreError
from .store.rows import RunRow

REFRESH_SECONDS = 0.25
PHASE_LINES_SECONDS = 10.0  # without a terminal: one line this often
EXIT_CODES = {"finished": 0, "stopped": 130}

ARM_NAMES = {
    "original": "original prompt",
    "untrained": "untrained rewrite, sampled",
    "untrained_greedy": "untrained rewrite, greedy",
    "trained": "trained rewrite, sampled",
    "trained_greedy": "trained rewrite, greedy",
}


def follow(store: Store, run_id: str, world: World = ALONE) -> int:
    """Run ``run_id`` in a thread, show how it goes, print its report; returns the exit code.

    Ctrl-C stops it cleanly with a checkpoint; a second Ctrl-C leaves at once. With several ranks the launcher
    passes Ctrl-C on, ``world`` takes it, and the launcher's patience is the limit.
    """
    control = RunControl()
    outcome: list[str] = []
    refused: list[StoreError] = []
    ended = threading.Event()

    def work() -> None:
        try:
            outcome.append(execute(store, run_id, control, world))
        except StoreError as error:  # the run is not, or no longer, this process's
            refused.append(error)
        finally:
            ended.set()

    # Waited for through the event: before Python 3.13 a join() that Ctrl-C interrupts takes the thread for ended.
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    console = Console()
    try:
        _show_progress(store, run_id, ended, console)
    except KeyboardInterrupt:
        console.print("Stopping; the policy is being saved. Press Ctrl-C again to leave at once.")
        control.command("stop")
        ended.wait()
    worker.join()
    if refused:
        raise refused[0]
    run = store.run(run_id)
    state = outcome[0]
    if state == "finished":
        print_run(store, run)
    elif state == "stopped":
        console.print(f"Stopped after step {run.step}. Continue with: python -m grpo_engine resume {run_id}")
    else:
        print(f"Failed: {run.error}", file=sys.stderr)
    return EXIT_CODES.get(state, 1)


def _show_progress(store: Store, run_id: str, ended: threading.Event, console: Console) -> None:
    columns = (
        TextColumn("{task.fields[state]:<11}"),
        BarColumn(bar_width=28),
        TextColumn("{task.fields[count]:>9}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    shown, said = ("", 0), 0.0
    rate = _Rate()
    with Progress(*columns, console=console, refresh_per_second=4, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None, state="", count="", note="")
        while not ended.wait(REFRESH_SECONDS):
            run = store.run(run_id)
            done, total = (run.step, run.total_steps) if run.state == "training" else (run.phase_done, run.phase_total)
            note = _note(store, run, rate)
            progress.update(
                task,
                completed=done,
                total=total or None,
                state=run.state,
                count=f"{done}/{total}" if total else "",
                note=note,
            )
            if not console.is_terminal:
                now = time.monotonic()
                if (run.state, run.step // 10) != shown or now - said > PHASE_LINES_SECONDS:
                    line = f"{run.state:<11} {done}/{total} {note}"
                    console.print(line, highlight=False, markup=False, soft_wrap=True)
                    shown, said = (run.state, run.step // 10), now


class _Rate:
    """Seconds a step, from the steps seen since watching began."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def left(self, step: int, total: int) -> float | None:
        """Seconds until ``total``, or None before two steps were seen."""
        now = time.monotonic()
        if self._first is None or step < self._first[0]:
            self._first = (step, now)
        begun, since = self._first
        return None if step <= begun else (now - since) / (step - begun) * (total - step)


def _note(store: Store, run: RunRow, rate: _Rate) -> str:
    """The newest reward, the phase and the time left."""
    parts = [run.phase or run.message]
    if run.state == "training" and run.step:
        rewards = store.steps(run.id, ["reward_mean"], since_step=max(0, run.step - 10))["reward_mean"]
        if len(rewards):
            parts.insert(0, f"reward {float(rewards.mean()):.2f}")
        left = rate.left(run.step, run.total_steps)
        if left is not None:
            parts.append(f"{int(left // 60)}:{int(left % 60):02d} left")
    return "  ".join(part for part in parts if part)


def print_runs(rows: Sequence[RunRow]) -> None:
    """A table of runs, newest first."""
    if not rows:
        print("No runs yet. Start one with: python -m grpo_engine train")
        return
    table = Table("run", "name", "state", "step", "gain", "interval", box=None, pad_edge=False)
    for row in rows:
        gain = _headline(row.summary)
        table.add_row(
            row.id,
            Text(row.name),  # a person's words, never markup
            row.state,
            f"{row.step}/{row.total_steps}",
            f"{gain['mean']:+.2f}" if gain else "",
            f"{gain['low']:+.2f} to {gain['high']:+.2f}" if gain else "",
        )
    Console().print(table)


def print_run(store: Store, row: RunRow) -> None:
    """One run in words and numbers."""
    print(f"\nRun {row.id} ({row.name}): {row.state}, step {row.step} of {row.total_steps}, seed {row.seed}")
    print(f"Folder: {store.run_dir(row.id)}")
    if row.error:
        print(f"Error: {row.error}")
    if row.summary:
        print_report(row.summary)


def _headline(summary: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    name = (summary or {}).get("headline")
    return summary["gains"][name] if summary and name else None


def print_report(summary: Mapping[str, Any]) -> None:
    """The arms, the paired gains, and the one sentence."""
    console = Console()
    arms: Mapping[str, Any] = summary["arms"]
    judged = any(arm["judge"] is not None for arm in arms.values())
    table = Table("arm", "reward", *(["judge"] if judged else []), box=None, pad_edge=False)
    for name, arm in arms.items():
        judge = [_share(arm["judge"])] if judged else []
        table.add_row(Text(ARM_NAMES.get(name, name)), f"{arm['reward']:.2f}", *judge)
    console.print(table)
    kinds = list(dict.fromkeys(kind for arm in arms.values() for kind in arm["kinds"]))
    if kinds:
        shares = Table("judge by kind", *(name.replace("_", " ") for name in arms), box=None, pad_edge=False)
        for kind in kinds:
            shares.add_row(Text(kind), *(_share(arm["kinds"].get(kind)) for arm in arms.values()))
        console.print(shares)
    gains = Table("paired gain", "reward", "interval", "wins", "judge", "interval", box=None, pad_edge=False)
    for name, gain in summary["gains"].items():
        judge_gain = gain.get("judge_gain")
        gains.add_row(
            Text(name.replace("_", " ")),
            f"{gain['mean']:+.2f}",
            f"{gain['low']:+.2f} to {gain['high']:+.2f}",
            f"{gain['win_rate']:.0%}",
            f"{100 * judge_gain['mean']:+.1f} points" if judge_gain else "",
            f"{100 * judge_gain['low']:+.1f} to {100 * judge_gain['high']:+.1f}" if judge_gain else "",
        )
    console.print(gains)
    for name, arm in arms.items():
        if cut := arm.get("cut_share"):  # older summaries have none
            who = ARM_NAMES.get(name, name)
            console.print(f"{who}: {_share(cut)} of the texts end with words that the image model does not read.")
    if "sentence" in summary:
        console.print(summary["sentence"], highlight=False, markup=False)


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
