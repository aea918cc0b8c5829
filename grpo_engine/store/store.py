"""``runs.db``: everything every run did, and what others ask of it.

    store = Store("runs.db")
    run_id = store.create_run(config)
    with StoreRecorder(store, run_id, config.recording) as recorder: ...    # what the trainer is given
    store.resolve("last"), store.steps(run_id, ["reward_mean"])             # what a reader asks

The file layout: tables in ``schema.py``, connections and refusals in ``connection.py``, questions
in ``reader.py``, files beside the database in ``files.py``, recording in ``recorder.py``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlite_utils import Database

from ..recorder import FINAL_STATES, STEP_METRICS
from .connection import StoreError
from .files import remove_folder, remove_pictures_after, write_text
from .names import NAME_CHARS, NOTE_CHARS, new_run_id, one_line, tidy_tags
from .owner import is_alive, owner_of, this_process
from .reader import RunReader, fetch_run
from .rows import COMMANDS, ENDINGS, TRANSITIONS, CommandRow, RunRow, number, run_row, to_json
from .schema import BLOCK
from .writes import add_event, insert, refresh_summary, sum_up, update_run

if TYPE_CHECKING:
    from ..config import RunConfig

__all__ = ["Store", "StoreError"]


class Store(RunReader):
    """A database of runs, opened for reading and, unless ``read_only``, for writing.

    Usable from any thread, and by several processes of one machine at a time. As a context manager it closes
    itself. Every change is one transaction, however many tables it touches.

    Raises:
        StoreError: the file can't be used; it is left as it was.
    """

    def __init__(self, path: str | Path, *, read_only: bool = False) -> None:
        super().__init__(path, read_only=read_only)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextmanager
    def write(self, *, visible: bool = True) -> Iterator[Database]:
        """One transaction; changes made inside the block by this thread's other calls are part of it."""
        with self.connections.write(visible=visible) as db:
            yield db

    # The life of a run

    def create_run(self, config: RunConfig, *, prompt_set: str = "", prompt_fingerprint: str = "") -> str:
        """A new queued run with its folder and ``config.yaml``; returns its id, as ``0007-tiny-k3f9``."""
        now = time.time()
        with self.write() as db:
            count = _next_number(db)
            run_id = self._make_folder(count, config)
            try:
                row = {
                    "number": count,
                    "id": run_id,
                    "name": one_line(config.recording.name, NAME_CHARS, "name") or f"Run {count}",
                    "state": "queued",
                    "preset": config.preset,
                    "config": to_json(config.model_dump(mode="json")),
                    "seed": config.seed,
                    "prompt_set": prompt_set,
                    "prompt_fingerprint": prompt_fingerprint,
                    "tags": to_json(tidy_tags(config.recording.tags)),
                    "notes": "",
                    "source": "local",
                    "created": now,
                    "updated": now,
                    "total_steps": config.training.steps,
                }
                insert(db, "runs", [row])
                add_event(db, run_id, "state", "queued", {"state": "queued"})
            except BaseException:
                remove_folder(self.run_dir(run_id))
                raise
        return run_id

    def import_run(
        self, config: RunConfig, run: Mapping[str, Any], files: Path, fill: Callable[[Database, str], None]
    ) -> str:
        """Add a run that was recorded elsewhere, to be looked at and never continued; returns its id here.

        Args:
            run: columns of table ``runs`` as recorded, in a final state; the settings come from ``config``.
            files: a finished folder below `root`; it becomes the run's.
            fill: inserts the rows of the other tables, in the same transaction.

        Raises:
            StoreError: the database or the disk refused; or whatever ``fill`` raises. There is no run then,
                and ``files`` is gone.
        """
        if run["state"] not in FINAL_STATES:
            raise StoreError(f"A run that is {run['state']} can't be imported; only one that has ended can.")
        folder = files
        try:
            with self.write() as db:
                count = _next_number(db)
                run_id = new_run_id(count, config.preset, lambda name: self.run_dir(name).exists())
                os.rename(files, self.run_dir(run_id))
                folder = self.run_dir(run_id)
                own = {"number": count, "id": run_id, "source": "imported", "preset": config.preset}
                own |= {"config": to_json(config.model_dump(mode="json")), "seed": config.seed}
                own |= {"name": one_line(run["name"], NAME_CHARS, "name"), "tags": to_json(tidy_tags(run["tags"]))}
                insert(db, "runs", [{**run, **own}])
                fill(db, run_id)
                for block in range(run["step"] // BLOCK):
                    sum_up(db, run_id, block)
                refresh_summary(db, run_id)
        except BaseException:
            remove_folder(folder)
            raise
        return run_id

    def require_local(self, run_id: str) -> RunRow:
        """The run, if it was recorded here: what was imported is never continued. Raises `StoreError`."""
        run = self.run(run_id)
        _refuse_imported(run)
        return run

    def require_idle(self, run_id: str) -> RunRow:
        """The run, if it was recorded here and no process carries it. Raises `StoreError`."""
        run = self.require_local(run_id)
        if run.active and run.state != "queued":  # a queued run has no process
            raise StoreError(f"Run {run.id} is {run.state} in process {run.pid} on {run.host}; stop it first.")
        return run

    def set_state(self, run_id: str, state: str, message: str = "", *, error: str | None = None) -> None:
        """Move a run to ``state``, if `TRANSITIONS` allows it.

        "loading" makes this process its owner: of two that try, one is refused. A final state closes what was
        asked of the run and not yet taken; "failed" keeps ``error`` (or else the message).
        """
        if state not in TRANSITIONS:
            raise StoreError(f"There is no state {state!r}; states are {', '.join(TRANSITIONS)}.")
        now = time.time()
        with self.write() as db:
            run = fetch_run(db, run_id)
            _refuse_imported(run)
            if state not in TRANSITIONS[run.state]:
                allowed = ", ".join(sorted(TRANSITIONS[run.state])) or "nothing else"
                raise StoreError(f"Run {run_id} is {run.state} and can't become {state}; it can become {allowed}.")
            changes: dict[str, Any] = {"state": state, "message": message, "phase": "", "phase_done": 0}
            changes |= {"phase_total": 0, "updated": now}
            if run.state in ENDINGS:
                changes |= {"finished": None, "error": None, "resumed_count": run.resumed_count + 1}
            if state == "loading":
                owner = this_process()
                changes |= {"host": owner.host, "pid": owner.pid, "process_token": owner.token}
                changes |= {"heartbeat": now, "started": run.started or now}
            if state in FINAL_STATES:
                changes |= {
                    "finished": now,
                    "error": (error or message or None) if state == "failed" else None,
                }
                expire = "UPDATE commands SET taken = ?, outcome = ? WHERE run_id = ? AND taken IS NULL"
                db.execute(expire, [now, f"too late, the run was {state}", run_id])
            update_run(db, run_id, changes)
            level = {"failed": "error", "interrupted": "warning"}.get(state, "info")
            add_event(db, run_id, "state", message or state, {"state": state, "from": run.state}, level)

    def set_phase(self, run_id: str, name: str, done: int = 0, total: int = 0) -> None:
        """What the run is doing inside its state; ``total`` 0 = unknown."""
        now = time.time()
        with self.write() as db:
            changes = {
                "phase": name,
                "phase_done": done,
                "phase_total": total,
                "updated": now,
                "heartbeat": now,
            }
            update_run(db, run_id, changes)

    def heartbeat(self, run_id: str) -> None:
        """Say that the run's process lives."""
        with self.write(visible=False) as db:
            _refuse_imported(fetch_run(db, run_id))
            update_run(db, run_id, {"heartbeat": time.time()})

    def interrupt_stale(self) -> list[str]:
        """Mark the runs of dead processes as interrupted; returns their ids. Queued runs belong to none."""
        now = time.time()
        ids = []
        with self.write() as db:
            rows = [run_row(row) for row in db.query("SELECT * FROM runs WHERE state != 'queued'")]
            for run in rows:
                if run.active and not is_alive(owner_of(run), run.heartbeat or 0.0, now):
                    message = f"its process ({run.pid} on {run.host}) ended while it was {run.state}"
                    self.set_state(run.id, "interrupted", message)
                    ids.append(run.id)
        return ids

    def truncate_after(self, run_id: str, step: int) -> None:
        """Forget everything after ``step``, so that a run resumed there records each step once.

        Steps, rollouts and evaluations of later steps go, and their pictures; the history of events stays.
        """
        with self.write() as db:
            run = fetch_run(db, run_id)
            if not 0 <= step <= run.step:
                raise StoreError(
                    f"Run {run_id} has recorded {run.step} steps and can't go on after step {step}; "
                    "resume it from an earlier checkpoint."
                )
            for table in ("rollouts", "steps", "evaluations"):
                db.execute(f"DELETE FROM {table} WHERE run_id = ? AND step > ?", [run_id, step])
            db.execute("DELETE FROM step_blocks WHERE run_id = ? AND block >= ?", [run_id, step // BLOCK])
            update_run(db, run_id, {"step": step, "updated": time.time()})
            refresh_summary(db, run_id)
            if step < run.step:
                text = f"steps {step + 1} to {run.step} set aside to do them again from step {step}"
                add_event(db, run_id, "truncated", text, {"step": step, "from": run.step})
        self._remove(lambda: remove_pictures_after(self.run_dir(run_id), step), run_id)

    def delete(self, run_id: str) -> None:
        """Remove a run, its rows and its folder; refused while it is active."""
        folder = self.run_dir(run_id)
        with self.write() as db:
            run = fetch_run(db, run_id)
            if run.active:
                raise StoreError(f"Run {run_id} is {run.state}; stop it before deleting it.")
            db.execute("DELETE FROM runs WHERE id = ?", [run_id])
        self._remove(lambda: remove_folder(folder), run_id)

    # What a person says about a run

    def rename(self, run_id: str, name: str) -> None:
        """Give a run another name: one line of at most 120 characters."""
        text = one_line(name, NAME_CHARS, "name")
        if not text:
            raise StoreError("A run's name can't be empty; type at least one letter.")
        self._annotate(run_id, {"name": text})

    def tag(self, run_id: str, tags: Iterable[str]) -> None:
        """Replace a run's tags; each is one line of at most 40 characters."""
        self._annotate(run_id, {"tags": to_json(tidy_tags(tags))})

    def note(self, run_id: str, notes: str) -> None:
        """Replace a run's notes, at most 20,000 characters."""
        if len(notes) > NOTE_CHARS:
            raise StoreError(f"The notes have {len(notes):,} characters; {NOTE_CHARS:,} are allowed, shorten them.")
        self._annotate(run_id, {"notes": notes})

    # What happened, and what is asked

    def add_event(self, run_id: str, kind: str, message: str, **data: Any) -> int:
        """Add a line to a run's history; returns its id. Its level follows from its kind."""
        with self.write() as db:
            fetch_run(db, run_id)
            return add_event(db, run_id, kind, message, data)

    def post_command(self, run_id: str, command: str) -> int:
        """Ask a run, of whatever process, for one of `COMMANDS`; returns the command's id."""
        if command not in COMMANDS:
            raise StoreError(f"There is no command {command!r}; use one of {', '.join(COMMANDS)}.")
        with self.write() as db:
            run = fetch_run(db, run_id)
            if not run.active:
                raise StoreError(f"Run {run_id} is {run.state}, so it can't be asked to {command}.")
            row = {"run_id": run_id, "command": command, "created": time.time()}
            return insert(db, "commands", [row])

    def take_commands(self, run_id: str) -> list[CommandRow]:
        """What was asked of a run since the last call, oldest first. Each is given out once."""
        waiting = "SELECT * FROM commands WHERE run_id = ? AND taken IS NULL ORDER BY id"
        with self.read() as db:  # cheap, and nearly always empty: no write lock for it
            if not db.execute(waiting, [run_id]).fetchone():
                return []
        now = time.time()
        with self.write() as db:
            rows = list(db.query(waiting, [run_id]))
            db.execute("UPDATE commands SET taken = ? WHERE run_id = ? AND taken IS NULL", [now, run_id])
        return [CommandRow(**(row | {"taken": now})) for row in rows]

    def answer_command(self, command_id: int, outcome: str) -> None:
        """Say what became of a command that was taken."""
        with self.write() as db:
            changed = db.execute("UPDATE commands SET outcome = ? WHERE id = ?", [outcome, command_id]).rowcount
            if not changed:
                raise StoreError(f"There is no command {command_id} to answer.")

    def commands(self, run_id: str) -> list[CommandRow]:
        """Everything ever asked of a run, oldest first."""
        with self.read() as db:
            rows = db.query("SELECT * FROM commands WHERE run_id = ? ORDER BY id", [run_id])
            return [CommandRow(**row) for row in rows]

    # What a recorder stores

    def add_step(
        self,
        run_id: str,
        step: int,
        metrics: Mapping[str, float | None],
        rollouts: Sequence[Mapping[str, Any]],
        *,
        at: float | None = None,
    ) -> None:
        """Store step ``step``, the one after the run's last: its metrics and its rows of ``rollouts``.

        Raises:
            StoreError: a metric that is not in `STEP_METRICS`, a step that is doubled or leaves a gap.
        """
        strange = [name for name in metrics if name not in STEP_METRICS]
        if strange:
            raise StoreError(f"Metric {strange[0]!r} is unknown; name it in recorder.STEP_METRICS.")
        at = time.time() if at is None else at
        with self.write() as db:
            last = fetch_run(db, run_id).step
            if step != last + 1:
                raise StoreError(f"Step {step} can't follow step {last} of run {run_id}; steps are counted one by one.")
            row = {"run_id": run_id, "step": step, "time": at}
            insert(db, "steps", [row | {name: number(metrics.get(name)) for name in STEP_METRICS}])
            insert(db, "rollouts", [{"run_id": run_id, "step": step, **rollout} for rollout in rollouts])
            if step % BLOCK == 0:
                sum_up(db, run_id, step // BLOCK - 1)
            update_run(db, run_id, {"step": step, "updated": at, "heartbeat": time.time()})

    def add_evaluation(
        self,
        run_id: str,
        kind: str,
        step: int,
        split: str,
        items: Sequence[Mapping[str, Any]],
        summary: Mapping[str, Any],
        *,
        at: float | None = None,
    ) -> int:
        """Store a measurement and its rows of ``evaluation_items``; returns its id.

        It takes the place of an earlier one of the same kind and step, as a resumed run makes it again.
        """
        at = time.time() if at is None else at
        with self.write() as db:
            fetch_run(db, run_id)
            key = [run_id, kind, step]
            db.execute("DELETE FROM evaluations WHERE run_id = ? AND kind = ? AND step = ?", key)
            row = {"run_id": run_id, "kind": kind, "step": step, "split": split, "time": at}
            row |= {"items": len(items), "summary": to_json(summary)}
            evaluation_id = insert(db, "evaluations", [row])
            insert(db, "evaluation_items", [{"evaluation_id": evaluation_id, **item} for item in items])
            update_run(db, run_id, {"updated": at})
            refresh_summary(db, run_id)
        return evaluation_id

    def _annotate(self, run_id: str, changes: Mapping[str, Any]) -> None:
        with self.write() as db:
            fetch_run(db, run_id)
            update_run(db, run_id, changes)

    def _make_folder(self, count: int, config: RunConfig) -> str:
        try:
            (self.root / "runs").mkdir(exist_ok=True)
            # One may be there: of an earlier database in the same place.
            run_id = new_run_id(count, config.preset, lambda name: self.run_dir(name).exists())
            self.run_dir(run_id).mkdir()
            write_text(self.run_dir(run_id) / "config.yaml", config.dump_yaml())
            return run_id
        except OSError as error:
            raise StoreError(
                f"{self.root / 'runs'} can't hold the run's files: {error.strerror}; choose another --db."
            ) from error

    def _remove(self, action: Callable[[], None], run_id: str) -> None:
        try:
            action()
        except OSError as error:
            raise StoreError(
                f"Files of run {run_id} can't be removed: {error.strerror} ({error.filename}); "
                "the database has let go of them, delete them by hand."
            ) from error


def _next_number(db: Database) -> int:
    used = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'runs'").fetchone()
    return (used[0] if used else 0) + 1


def _refuse_imported(run: RunRow) -> None:
    if run.source == "imported":
        raise StoreError(
            f"Run {run.id} was imported; it can be looked at and its policy tried or exported, not resumed."
        )
