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

from ..recorder import FINAL_STATES, STEP_METRICS
from .bins import bin_width, merge_bins
from .connection import Connections, StoreError
from .rows import (
    Bins,
    EvaluationRow,
    EventRow,
    ItemRow,
    PromptVisit,
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

    def ever_used(self) -> bool:
        """Whether the database holds a run or ever held one."""
        with self.read() as db:
            return db.execute("SELECT 1 FROM sqlite_sequence WHERE name = 'runs'").fetchone() is not None

    def active_runs(self) -> list[RunRow]:
        """Runs that wait or go on, the oldest first."""
        with self.read() as db:
            ended = ", ".join(f"'{state}'" for state in sorted(FINAL_STATES))
            query = f"SELECT * FROM runs WHERE state NOT IN ({ended}) ORDER BY number"
            return [run_row(row) for row in db.query(query)]

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
            selected = ", ".join(["step", *_columns(db, names)])
            rows = db.execute(
                f"SELECT {selected} FROM steps WHERE run_id = ? AND step > ? ORDER BY step",
                [run_id, since_step],
            ).fetchall()
        table = np.array(rows, dtype=np.float64).reshape(len(rows), len(names) + 1)
        return {"step": table[:, 0].astype(np.int64)} | {
            name: np.ascontiguousarray(table[:, index]) for index, name in enumerate(names, start=1)
        }

    def binned_steps(self, run_id: str, metric: str, start: int = 1, stop: int | None = None, bins: int = 800) -> Bins:
        """`binned_metrics` of one metric."""
        return self.binned_metrics(run_id, [metric], start, stop, bins)[metric]

    def binned_metrics(
        self,
        run_id: str,
        metrics: Sequence[str],
        start: int = 1,
        stop: int | None = None,
        bins: int = 800,
        *,
        width: int | None = None,
    ) -> dict[str, Bins]:
        """Smallest, mean and largest value of each metric in at most ``bins`` bins over steps start..stop.

        A bin is a power of two wide and begins at step 1 + a multiple of its width, so a bin that is full
        never changes again while a run goes on, and zooming never moves one. The outer bins are whole: they
        may reach beyond start and stop. Wide bins read the sums kept for every `BLOCK` steps. ``width``, where
        given, is taken instead of the narrowest that keeps to ``bins``.
        """
        if bins < 1:
            raise StoreError(f"bins is {bins}; ask for at least 1.")
        if width is not None and (width < 1 or width & (width - 1)):
            raise StoreError(f"width is {width}; ask for a power of two.")
        with self.read() as db:
            last = fetch_run(db, run_id).step
            columns = _columns(db, metrics)
            start, stop = max(start, 1), last if stop is None else min(stop, last)
            width = bin_width(start, stop, bins) if width is None else width
            low = (start - 1) // width * width + 1
            high = min((stop - 1) // width * width + width, last) if start <= stop else low - 1
            # Steps up to here are summed up in blocks; none are when bins are narrower than a block.
            summed = min(last // BLOCK * BLOCK, high) if width >= BLOCK else 0
            keys = {"run": run_id, "width": width, "low": low, "high": high, "summed": summed}
            blocks = db.execute(
                f"""SELECT metric, block * {BLOCK} / :width AS bin, sum(count), min(low), total(total), max(high)
                    FROM step_blocks WHERE run_id = :run AND metric IN (SELECT value FROM json_each(:metrics))
                    AND block >= (:low - 1) / {BLOCK} AND block < :summed / {BLOCK} GROUP BY metric, bin""",
                keys | {"metrics": json.dumps(list(metrics))},
            ).fetchall()
            sums = ", ".join(f"count({column}), min({column}), total({column}), max({column})" for column in columns)
            rest = db.execute(
                f"""SELECT (step - 1) / :width AS bin, {sums} FROM steps
                    WHERE run_id = :run AND step BETWEEN max(:low, :summed + 1) AND :high GROUP BY bin""",
                keys,
            ).fetchall()
        return merge_bins(metrics, blocks, rest, width, last)

    def rollouts(self, run_id: str, step: int) -> list[RolloutRow]:
        """All rewrites of one step, by group and within it; empty when the step is not recorded."""
        with self.read() as db:
            fetch_run(db, run_id)
            query = "SELECT * FROM rollouts WHERE run_id = ? AND step = ? ORDER BY g, k"
            return [rollout_row(row) for row in db.query(query, [run_id, step])]

    def prompt_visits(self, run_id: str, prompt_id: str) -> list[PromptVisit]:
        """The groups that trained on a prompt, by step: the best rewrite of each, and the group's mean reward."""
        with self.read() as db:
            fetch_run(db, run_id)
            # With a single max() in it, SQLite takes the plain columns from the row that holds the maximum.
            rows = db.query(
                """SELECT r.step, r.g, r.prompt, r.tier, count(*) AS rollouts, avg(r.reward) AS reward_mean,
                        max(r.reward) AS reward_best, r.rewrite, r.image, r.thumbnail
                    FROM rollouts v JOIN rollouts r ON r.run_id = v.run_id AND r.step = v.step AND r.g = v.g
                    WHERE v.run_id = ? AND v.prompt_id = ? AND v.k = 0 GROUP BY r.step, r.g ORDER BY r.step, r.g""",
                [run_id, prompt_id],
            )
            return [PromptVisit(**row) for row in rows]

    def visited_prompts(self, run_id: str) -> list[tuple[str, str, int]]:
        """(id, text, groups) of the prompts that were trained on, the most visited first."""
        with self.read() as db:
            fetch_run(db, run_id)
            rows = db.execute(
                """SELECT prompt_id, (SELECT prompt FROM rollouts r WHERE r.run_id = v.run_id AND r.k = 0
                        AND r.prompt_id = v.prompt_id LIMIT 1), count(*) AS groups
                    FROM rollouts v WHERE run_id = ? AND k = 0 GROUP BY prompt_id ORDER BY groups DESC, prompt_id""",
                [run_id],
            ).fetchall()
            return [(prompt_id, text, groups) for prompt_id, text, groups in rows]

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
        wanted = {"evaluation_id": evaluation_id, "prompt_id": prompt_id, "arm": arm}
        given = {name: value for name, value in wanted.items() if value is not None}
        where = " AND ".join(f"{name} = :{name}" for name in given)  # only what is given, or the key is not used
        with self.read() as db:
            rows = db.query(f'SELECT * FROM evaluation_items WHERE {where} ORDER BY prompt_id, arm, "index"', given)
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


def _columns(db: Database, names: Sequence[str]) -> list[str]:
    """SQL for metrics, or "time". Only names that are known reach the query; an absent column reads NULL."""
    present = set(db.table("steps").columns_dict) - {"run_id", "step"}
    for name in names:
        if name not in present and name not in STEP_METRICS:
            close = difflib.get_close_matches(name, {*present, *STEP_METRICS}, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "see 'show'."
            raise StoreError(f"There is no metric {name!r}; {hint}")
    # What is in STEP_METRICS and not present: a database of an earlier version, open for reading only.
    return [f'"{name}"' if name in present else "NULL" for name in names]


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
