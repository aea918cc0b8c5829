"""How much room runs take on the disk, without a page ever waiting for a walk through a million pictures."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from grpo_engine.store import Store
from grpo_engine.store.rows import RunRow

AGAIN_S = 20.0  # a run that goes on is measured again after this many seconds

PARTS = {"images": "pictures", "thumbs": "pictures", "checkpoints": "checkpoints"}
"""What a run's folder holds, by its subfolders; the rest is "other"."""


class DiskUse:
    """Bytes by run, measured in a background thread; safe from any thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._known: dict[str, tuple[float, float, dict[str, int]]] = {}  # id -> (updated, measured at, bytes)
        self._thread: threading.Thread | None = None

    def look(self) -> dict[str, Any]:
        """What is known now, in bytes; ``measuring`` says that more is on its way."""
        runs = self._store.runs()
        now = time.monotonic()
        with self._lock:
            ids = {run.id for run in runs}
            self._known = {run_id: known for run_id, known in self._known.items() if run_id in ids}
            stale = [run for run in runs if self._is_stale(run, now)]
            if stale and self._thread is None:
                self._thread = threading.Thread(target=self._measure, args=(stale,), name="disk-use", daemon=True)
                self._thread.start()
            sizes = {run_id: dict(known[2]) for run_id, known in self._known.items()}
            measuring = self._thread is not None
        free = shutil.disk_usage(self._store.root).free
        return {"runs": sizes, "database": database_bytes(self._store.path), "free": free, "measuring": measuring}

    def _is_stale(self, run: RunRow, now: float) -> bool:
        if run.id not in self._known:
            return True
        updated, measured, _ = self._known[run.id]
        return updated != run.updated and (not run.active or now - measured > AGAIN_S)

    def _measure(self, runs: list[RunRow]) -> None:
        try:
            for run in runs:
                sizes = folder_bytes(self._store.run_dir(run.id))
                with self._lock:
                    self._known[run.id] = (run.updated, time.monotonic(), sizes)
        finally:
            with self._lock:
                self._thread = None


def folder_bytes(folder: Path) -> dict[str, int]:
    """Bytes of a run's files by kind; links are not followed, and what vanishes meanwhile counts as nothing."""
    sizes = {"pictures": 0, "checkpoints": 0, "other": 0}
    waiting = [(str(folder), "")]
    while waiting:
        path, part = waiting.pop()
        try:
            entries = list(os.scandir(path))
        except OSError:
            continue
        for entry in entries:
            try:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append((entry.path, part or PARTS.get(entry.name, "other")))
                else:
                    sizes[part or "other"] += entry.stat(follow_symlinks=False).st_size
            except OSError:
                continue
    return sizes


def database_bytes(path: Path) -> int:
    """Bytes of the database and of its write-ahead log."""
    total = 0
    for file in (path, path.with_name(f"{path.name}-wal")):
        try:
            total += file.stat().st_size
        except OSError:
            continue
    return total
