"""The table of runs as browsers see it: what a run is and what it gained, and only the rows that changed.

Many pages watch one table, and most of a second's changes are one run's step. So the rows are made once a
revision of the database, each remembers when it last changed, and a page is sent what is newer than what it has.
"""

from __future__ import annotations

import math
import secrets
import threading
from collections.abc import Mapping
from typing import Any

from grpo_engine.store import Store
from grpo_engine.store.rows import RunRow

COMPARISONS = {
    "trained_vs_untrained": "trained against untrained",
    "trained_greedy_vs_untrained_greedy": "trained against untrained, likeliest rewrite",
    "trained_vs_original": "trained against the original prompt",
    "trained_greedy_vs_original": "trained against the original prompt, likeliest rewrite",
    "untrained_vs_original": "untrained against the original prompt",
}
"""Paired gains that a final evaluation may hold, the headline first, and what each compares."""


class RunTable:
    """The rows of one database, for any number of pages; safe from any thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._epoch = secrets.token_hex(4)  # versions of an earlier process mean nothing here
        self._revision = -1
        self._version = 0
        self._rows: dict[str, dict[str, Any]] = {}  # newest first
        self._changed: dict[str, int] = {}  # version at which a row last changed

    def changes(self, since: str = "") -> dict[str, Any]:
        """Rows that changed after version ``since`` ("" or a version of an earlier process: all of them).

        ``ids`` names all runs, newest first; a run that a page has and ``ids`` lacks was deleted.
        """
        with self._lock:
            revision = self._store.revision()  # before the rows: what comes between is seen next time
            if revision != self._revision:
                self._refresh()
                self._revision = revision
            epoch, _, number = since.partition(".")
            seen = int(number) if epoch == self._epoch and number.isdecimal() else -1
            fresh = [row for run_id, row in self._rows.items() if self._changed[run_id] > seen]
            return {"version": f"{self._epoch}.{self._version}", "ids": list(self._rows), "runs": fresh}

    def _refresh(self) -> None:
        self._version += 1
        rows = {run.id: run_row(run) for run in self._store.runs()}
        self._changed = {
            run_id: self._changed[run_id] if self._rows.get(run_id) == row else self._version
            for run_id, row in rows.items()
        }
        self._rows = rows


def run_row(run: RunRow) -> dict[str, Any]:
    """A run as a row: times in seconds since 1970, ``seconds`` from its start to its end or last sign of life."""
    end = run.finished or run.updated
    return {
        "id": run.id,
        "number": run.number,
        "name": run.name,
        "state": run.state,
        "active": run.active,
        "recorded": run.source == "imported",
        "preset": run.preset,
        "prompt_set": run.prompt_set,
        "seed": run.seed,
        "tags": list(run.tags),
        "notes": run.notes,
        "created": run.created,
        "seconds": None if run.started is None else max(0.0, end - run.started),
        "step": run.step,
        "total": run.total_steps,
    } | gains(run.summary)


def gains(summary: Mapping[str, Any] | None) -> dict[str, Any]:
    """The paired gains of a final evaluation: ``gain`` is the headline's, None where nothing was measured.

    A summary may come from a bundle that somebody else wrote: what is no number is left out.
    """
    summary = summary if isinstance(summary, Mapping) else {}
    found = summary.get("gains")
    found = found if isinstance(found, Mapping) else {}
    told = {name: gain for name in COMPARISONS if (gain := _gain(found.get(name))) is not None}
    headline = summary.get("headline")
    if not isinstance(headline, str) or headline not in told:
        headline = next(iter(told), None)
    confidence = number(summary.get("confidence"))
    return {"headline": headline, "confidence": confidence, "gain": told.get(headline or ""), "gains": told}


def _gain(data: Any) -> dict[str, Any] | None:
    if not isinstance(data, Mapping):
        return None
    gain = {name: number(data.get(name)) for name in ("mean", "low", "high", "n", "win_rate", "before", "after")}
    if gain["mean"] is None:
        return None
    return gain | {"judge": _gain(data.get("judge_gain"))}


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None
