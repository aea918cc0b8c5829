"""The few statements that change ``runs.db``; the caller holds the write transaction."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from sqlite_utils import Database

from ..recorder import STEP_METRICS
from .rows import storable, to_json
from .schema import BLOCK

_LEVELS = {"warning": "warning", "skipped_step": "warning", "error": "error"}


def insert(db: Database, table: str, rows: Sequence[Mapping[str, Any]]) -> int:
    """Insert rows, all with the columns of the first; returns the last rowid (0 where there is none)."""
    last = 0
    if rows:
        columns = ", ".join(f'"{name}"' for name in rows[0])
        values = ", ".join(f":{name}" for name in rows[0])
        for row in rows:
            query = f"INSERT INTO {table} ({columns}) VALUES ({values})"
            last = db.execute(query, _storable(row)).lastrowid or 0
    return last


def update_run(db: Database, run_id: str, changes: Mapping[str, Any]) -> None:
    """Change columns of a run."""
    assignments = ", ".join(f'"{name}" = :{name}' for name in changes)
    db.execute(f"UPDATE runs SET {assignments} WHERE id = :run_id_", _storable(changes) | {"run_id_": run_id})


def add_event(db: Database, run_id: str, kind: str, message: str, data: Any, level: str | None = None) -> int:
    """Add an event; returns its id. Without a level its kind gives it: "info" unless it says otherwise."""
    row = {"run_id": run_id, "time": time.time(), "kind": kind, "level": level or level_of(kind)}
    return insert(db, "events", [row | {"message": message, "data": to_json(data)}])


def level_of(kind: str) -> str:
    """The level an event has by its kind: "info", "warning" or "error"."""
    return _LEVELS.get(kind, "info")


def sum_up(db: Database, run_id: str, block: int) -> None:
    """Write a block's row of every metric that has a value in it."""
    names = list(STEP_METRICS)
    sums = ", ".join(f'count("{name}"), min("{name}"), max("{name}"), total("{name}")' for name in names)
    found = db.execute(
        f"SELECT {sums} FROM steps WHERE run_id = ? AND step > ? AND step <= ?",
        [run_id, block * BLOCK, (block + 1) * BLOCK],
    ).fetchone()
    rows = []
    for index, name in enumerate(names):
        count, low, high, total = found[4 * index : 4 * index + 4]
        if count:
            row = {"run_id": run_id, "metric": name, "block": block, "count": count}
            rows.append(row | {"low": low, "high": high, "total": total})
    insert(db, "step_blocks", rows)


def refresh_summary(db: Database, run_id: str) -> None:
    """The run's summary is that of its last final evaluation, if there is one."""
    db.execute(
        """UPDATE runs SET summary = (SELECT summary FROM evaluations
            WHERE run_id = :run AND kind = 'final' ORDER BY step DESC LIMIT 1) WHERE id = :run""",
        {"run": run_id},
    )


def _storable(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: storable(value) if isinstance(value, str) else value for key, value in row.items()}
