"""What can be asked of ``runs.db``. Every answer is one committed state, and nothing is changed."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlite_utils import Database

from ..recorder import STEP_METRICS
from .connection import Connections, StoreError
from .rows import (
    Bins,
    EvaluationRow,
    EventRow,
    ItemRow,
    RolloutRow,
    RunRow,
    item_row,
    rollout_row,
    run_row,
)
from .schema import BLOCK

_RUN_ID = re.compile(r"[0-9]{4,}-[a-z0-9][a-z0-9-]*")


class RunReader:
    """Questions to one database. Methods that name a run raise `StoreError` when there is no such run.

    Attributes:
        path: the database file.
        root: its folder; run folders and all recorded paths are below it.
    """

    def __init__(self, path: str | Path, *, read_only: bool) -> None:
        try:
            self.path = Path(path).expanduser().absolute()
        except RuntimeError as error:  # ~somebody
            raise StoreError(f"{str(path)!r} names no home folder; choose another with --db.") from error
        self.root = self.path.parent
        self.connections = Connections(self.path, read_only=read_only)

    @contextmanager
    def read(self) -> Iterator[Database]:
        """The database for a block of queries that all see the same state."""
        with self.connections.read() as db:
            yield db

    def close(self) -> None:
        """Close the database. Idempotent."""
        self.connections.close()

    # Runs

    def run(self, run_id: str) -> RunRow:
        """The run with exactly this id."""
        with self.read() as db:
            return fetch_run(db, run_id)

    def runs(self) -> list[RunRow]:
        """All runs, newest first."""
        with self.read() as db:
            return [run_row(row) for row in db.query("SELECT * FROM runs ORDER BY number DESC")]

    def resolve(self, text: str) -> RunRow:
        """The run a person means: an id, "last", a name, a number, or the beginning of an id.

        Raises:
            StoreError: no run, or more than one.
        """
        text = text.strip()
        runs = self.runs()
        exact = [run for run in runs if run.id == text] or (runs[:1] if text == "last" else [])
        named = [run for run in runs if run.name == text]
        numbered = [run for run in runs if text.isdecimal() and run.number == int(text)]
        begins = [run for run in runs if text and run.id.startswith(text)]
        found = exact or named or numbered or begins
        if len(found) == 1:
            return found[0]
        if found:
            ids = ", ".join(run.id for run in found[:5]) + (", ..." if len(found) > 5 else "")
            raise StoreError(f"{text!r} stands for {len(found)} runs ({ids}); give the id of one.")
        raise _unknown(text, runs)

    def run_dir(self, run_id: str) -> Path:
        """The folder of a run's files. Refuses what is no run's id, so it never lies outside ``runs/``."""
        if not _RUN_ID.fullmatch(run_id):
            raise StoreError(f"{run_id!r} is no run's id; ids look like 0007-tiny-k3f9.")
        return self.root / "runs" / run_id

    def file(self, relative: str) -> Path:
        """The file a recorded path names. Refuses one outside ``runs/``, as a foreign database may hold."""
        path = (self.root / relative).resolve()
        if not path.is_relative_to((self.root / "runs").resolve()):
            raise StoreError(f"{relative!r} is not a file of a run; the database may have been tampered with.")
        return path

    # Steps

    def steps(self, run_id: str, columns: Sequence[str] | None = None, since_step: int = 0) -> dict[str, NDArray[Any]]:
        """Metrics of the steps after ``since_step``, in order: "step" int64 (S,), others float64, NaN = none.

        ``columns`` are keys of `STEP_METRICS` or "time"; None = all of them.
        """
        names = ["time", *STEP_METRICS] if columns is None else [name for name in columns if name != "step"]
        with self.read() as db:
            fetch_run(db, run_id)
            selected = ", ".join(["step", *(_column(db, name) for name in names)])
            rows = db.execute(
                f"SELECT {selected} FROM steps WHERE run_id = ? AND step > ? ORDER BY step",
                [run_id, since_step],
            ).fetchall()
        table = np.array(rows, dtype=np.float64).reshape(len(rows), len(names) + 1)
        return {"step": table[:, 0].astype(np.int64)} | {
            name: np.ascontiguousarray(table[:, index]) for index, name in enumerate(names, start=1)
        }

    def binned_steps(self, run_id: str, metric: str, start: int = 1, stop: int | None = None, bins: int = 800) -> Bins:
        """Smallest, mean and largest value of a metric in at most ``bins`` bins over steps start..stop.

        A bin is a power of two wide and begins at step 1 + a multiple of its width, so a bin that is full
        never changes again while a run goes on, and zooming never moves one. The outer bins are whole: they
        may reach beyond start and stop. Wide bins read the sums kept for every `BLOCK` steps.
        """
        if bins < 1:
            raise StoreError(f"bins is {bins}; ask for at least 1.")
        with self.read() as db:
            last = fetch_run(db, run_id).step
            column = _column(db, metric)
            start, stop = max(start, 1), last if stop is None else min(stop, last)
            width = 1
            while (stop - 1) // width - (start - 1) // width >= bins:
                width *= 2
            low = (start - 1) // width * width + 1
            high = min((stop - 1) // width * width + width, last) if start <= stop else low - 1
            # Steps up to here are summed up in blocks; none are when bins are narrower than a block.
            summed = min(last // BLOCK * BLOCK, high) if width >= BLOCK else 0
            rows = db.execute(
                f"""
                SELECT bin, sum(count), min(low), sum(total) / sum(count), max(high) FROM (
                    SELECT block * {BLOCK} / :width AS bin, count, low, high, total FROM step_blocks
                    WHERE run_id = :run AND metric = :metric
                        AND block >= (:low - 1) / {BLOCK} AND block < :summed / {BLOCK}
                    UNION ALL
                    SELECT (step - 1) / :width, 1, {column}, {column}, {column} FROM steps
                    WHERE run_id = :run AND step BETWEEN max(:low, :summed + 1) AND :high
                        AND {column} IS NOT NULL
                ) GROUP BY bin ORDER BY bin
                """,
                {"run": run_id, "metric": metric, "width": width, "low": low, "high": high, "summed": summed},
            ).fetchall()
        table = np.array(rows, dtype=np.float64).reshape(len(rows), 5)
        first = table[:, 0].astype(np.int64) * width + 1
        count = table[:, 1].astype(np.int64)
        lows, means, highs = (np.ascontiguousarray(table[:, index]) for index in (2, 3, 4))
        return Bins(width, first, np.minimum(first + width - 1, last), count, lows, means, highs)

    def rollouts(self, run_id: str, step: int) -> list[RolloutRow]:
        """All rewrites of one step, by group and within it; empty when the step is not recorded."""
        with self.read() as db:
            fetch_run(db, run_id)
            query = "SELECT * FROM rollouts WHERE run_id = ? AND step = ? ORDER BY g, k"
            return [rollout_row(row) for row in db.query(query, [run_id, step])]

    # Evaluations, events

    def evaluations(self, run_id: str) -> list[EvaluationRow]:
        """The run's measurements, by step and then in the order they were made."""
        with self.read() as db:
            fetch_run(db, run_id)
            rows = db.query("SELECT * FROM evaluations WHERE run_id = ? ORDER BY step, id", [run_id])
            return [EvaluationRow(**(row | {"summary": json.loads(row["summary"])})) for row in rows]

    def evaluation_items(
        self, evaluation_id: int, *, arm: str | None = None, prompt_id: str | None = None
    ) -> list[ItemRow]:
        """The pictures of a measurement, by prompt, arm and latents; of one arm or prompt where given."""
        with self.read() as db:
            rows = db.query(
                """SELECT * FROM evaluation_items WHERE evaluation_id = :evaluation
                    AND (:prompt IS NULL OR prompt_id = :prompt) AND (:arm IS NULL OR arm = :arm)
                    ORDER BY prompt_id, arm, "index" """,
                {"evaluation": evaluation_id, "arm": arm, "prompt": prompt_id},
            )
            return [item_row(row) for row in rows]

    def events(self, run_id: str, after_id: int = 0, limit: int | None = 200) -> list[EventRow]:
        """The newest ``limit`` events (None = all) after event ``after_id``, the oldest of them first."""
        with self.read() as db:
            fetch_run(db, run_id)
            rows = db.query(
                """SELECT * FROM (SELECT * FROM events WHERE run_id = ? AND id > ? ORDER BY id DESC LIMIT ?)
                    ORDER BY id""",
                [run_id, after_id, -1 if limit is None else limit],
            )
            return [EventRow(**(row | {"data": json.loads(row["data"])})) for row in rows]

    def last_event_id(self) -> int:
        """The highest id ever given to an event, of any run; it never falls."""
        with self.read() as db:
            row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'events'").fetchone()
            return int(row[0]) if row else 0

    def revision(self) -> int:
        """A number that rises with every visible change: steps, phases, states, names... not heartbeats."""
        with self.read() as db:
            return int(db.execute("SELECT revision FROM clock").fetchone()[0])

    # Health

    def check(self) -> list[str]:
        """What is wrong with the database, a sentence each: damage, steps that are missing or too many."""
        with self.read() as db:
            found = [row[0] for row in db.execute("PRAGMA integrity_check").fetchall()]
            problems = [f"{self.path} is damaged: {text}." for text in found if text != "ok"]
            for table, rowid, parent, _ in db.execute("PRAGMA foreign_key_check").fetchall():
                problems.append(f"Row {rowid} of table {table} belongs to no row of {parent}.")
            for run in db.query("SELECT id, step FROM runs ORDER BY number"):
                query = "SELECT step FROM steps WHERE run_id = ?"
                stored = {row[0] for row in db.execute(query, [run["id"]]).fetchall()}
                wanted = set(range(1, run["step"] + 1))
                for steps, what in ((wanted - stored, "missing"), (stored - wanted, "beyond its last step")):
                    if steps:
                        problems.append(f"Run {run['id']}: {_ranges(steps)} {what}.")
            return problems


def fetch_run(db: Database, run_id: str) -> RunRow:
    """The run with exactly this id, as ``db`` sees it. Raises `StoreError`."""
    for row in db.query("SELECT * FROM runs WHERE id = ?", [run_id]):
        return run_row(row)
    raise _unknown(run_id, [run_row(row) for row in db.query("SELECT * FROM runs ORDER BY number DESC")])


def _unknown(text: str, runs: Sequence[RunRow]) -> StoreError:
    if not runs:
        return StoreError(f"There is no run {text!r}: the database holds none yet; start one.")
    names = {run.id: run.id for run in runs} | {run.name: run.id for run in runs}
    close = difflib.get_close_matches(text, names, n=1, cutoff=0.5)
    if not close:
        return StoreError(f"There is no run {text!r}; the newest is {runs[0].id} ({runs[0].name}).")
    called = close[0] if close[0] == names[close[0]] else f"{names[close[0]]} ({close[0]})"
    return StoreError(f"There is no run {text!r}; did you mean {called}?")


def _column(db: Database, name: str) -> str:
    """SQL for a metric, or "time". Only names that are known reach the query; an absent column reads NULL."""
    present = set(db.table("steps").columns_dict) - {"run_id", "step"}
    if name in present:
        return f'"{name}"'
    if name in STEP_METRICS:  # a database of an earlier version, open for reading only
        return "NULL"
    close = difflib.get_close_matches(name, {*present, *STEP_METRICS}, n=1)
    raise StoreError(f"There is no metric {name!r}; " + (f"did you mean {close[0]!r}?" if close else "see 'show'."))


def _ranges(steps: set[int]) -> str:
    """Steps as the subject of a sentence: ``steps 3, 7-9 are``."""
    parts: list[list[int]] = []
    for step in sorted(steps):
        if parts and parts[-1][1] == step - 1:
            parts[-1][1] = step
        else:
            parts.append([step, step])
    shown = [str(low) if low == high else f"{low}-{high}" for low, high in parts[:10]]
    more = ", ..." if len(parts) > 10 else ""
    return f"step {shown[0]} is" if len(steps) == 1 else f"steps {', '.join(shown)}{more} are"
