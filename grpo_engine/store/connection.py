"""Connections to ``runs.db``: one writer, many readers, and plain words when the file can't be used.

The writer holds SQLite's write lock for the length of a transaction; the threads of a process take turns,
other processes wait. Readers see the last committed state, never part of a transaction, and never wait for
the writer (write-ahead log). A reader connection is lent to one thread at a time from a small pool: kept
per thread, those of an app's short-lived worker threads would pile up.

The write-ahead log is shared memory: all processes that use a database at one time must be on one machine. On a
network file system a rollback journal takes its place (see ``journal.py``); readers then wait for a commit.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import TypeVar

from sqlite_utils import Database

from .journal import JournalError, journal_for
from .schema import APPLICATION_ID, application_id, migrations, unknown_migrations, upgrade

T = TypeVar("T")

MAGIC = b"SQLite format 3\x00"
SHARED = "mode=ro"
IMMUTABLE = "mode=ro&immutable=1"  # takes no locks: for a file that nobody writes
PATIENCE_S = 60.0  # how long a write waits for another program's
IDLE_READERS = 8
CHECKED_BYTES = 16 * 1024 * 1024  # a file up to this size is checked for damage before it is written to (0.1 s)


class StoreError(Exception):
    """The database, or what was asked of it, can't be used; the message is one plain sentence."""


class Connections:
    """Gives out the writer and the readers of one database file.

    Opening for writing creates the file and its folder where they are missing, and upgrades an older schema.
    A file that is refused is left as it was.

    Raises:
        StoreError: the file is no database, another program's, damaged, of a newer version, or out of reach.
    """

    def __init__(self, path: Path, *, read_only: bool) -> None:
        self.path = path
        self.read_only = read_only
        self._lock = threading.RLock()
        self._pool_lock = threading.Lock()
        self._idle: list[Database] = []
        self._closed = False
        self._immutable = False  # on a medium that can't be written, where no log can be shared
        self._writer: Database | None = None
        with plain_errors(path):
            if _holds_bytes(path, read_only=read_only):
                self._inspect()
            if not read_only:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._writer = _open_writer(path)

    @contextmanager
    def write(self, *, visible: bool = True) -> Iterator[Database]:
        """One transaction: all of it is stored, or, when the block raises, nothing.

        Inside another ``write`` of the same thread it is part of that one. ``visible`` moves the clock that
        watchers read (see `Store.revision`).
        """
        with self._lock, plain_errors(self.path):
            if self._writer is None:
                raise StoreError(
                    f"{self.path} is closed; open it again."
                    if self._closed
                    else f"{self.path} is open for reading only; open it for writing to change it."
                )
            db = self._writer
            if db.conn.in_transaction:
                with db.atomic():
                    yield db
                return
            # Not atomic() alone: its BEGIN takes the write lock only at the first change, and fails at once
            # when another process has written since this one's first read.
            _patiently(lambda: db.execute("BEGIN IMMEDIATE"))
            try:
                yield db
                if visible:
                    db.execute("UPDATE clock SET revision = revision + 1")
                _patiently(db.commit)  # with a rollback journal it waits for readers to be done
            except BaseException:
                db.rollback()
                raise

    @contextmanager
    def read(self) -> Iterator[Database]:
        """A reader for one block; every query in it sees the same committed state."""
        with plain_errors(self.path):
            db = self._borrow()
            try:
                db.begin()
                yield db
                db.rollback()
            except BaseException:
                db.close()
                raise
            with self._pool_lock:
                if not self._closed and len(self._idle) < IDLE_READERS:
                    self._idle.append(db)
                    return
            db.close()

    def checkpoint(self) -> None:
        """Move the log into the database file, as far as readers allow: synced to the disk afterwards."""
        with self._lock, plain_errors(self.path):
            if self._writer is not None:
                self._writer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def close(self) -> None:
        """Close all connections; a block that is still reading closes its own. Idempotent."""
        with self._lock, self._pool_lock:
            self._closed = True
            idle, self._idle = self._idle, []
            writer, self._writer = self._writer, None
        with plain_errors(self.path):
            # The writer last: closing the last connection folds the log into the file.
            for db in [*idle, *([writer] if writer else [])]:
                db.close()

    def _borrow(self) -> Database:
        with self._pool_lock:
            if self._closed:
                raise StoreError(f"{self.path} is closed; open it again.")
            if self._idle:
                return self._idle.pop()
        return _connect(self.path, IMMUTABLE if self._immutable else SHARED)

    def _inspect(self) -> None:
        """Refuse a file that is not ours to use, without changing it or leaving anything beside it."""
        alone, before = not _in_use(self.path), self.path.stat()
        # A rollback journal may be that of a process that died: then only who may write can undo its last steps.
        shared = SHARED if self.read_only or not _journal_of(self.path).exists() else "mode=rw"
        try:
            self._refuse_strange(IMMUTABLE if alone else shared)
        except (StoreError, sqlite3.Error) as error:
            after = self.path.stat()
            same = (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size)
            if self.read_only and "readonly" in str(error) and _journal_of(self.path).exists():
                raise StoreError(
                    f"{self.path} was left in the middle of a write; open it once for writing, as "
                    "'python -m grpo_engine runs' does."
                ) from error
            if not alone or (same and not _in_use(self.path)):
                raise
            self._refuse_strange(SHARED)  # somebody began to write while it was being read as if nobody did
        if self.read_only:
            self._immutable = not self._can_share()

    def _refuse_strange(self, options: str) -> None:
        path, db = self.path, _connect(self.path, options)
        try:
            tables = _patiently(db.table_names)
            program = application_id(db)
            if program != APPLICATION_ID and (program or tables):
                raise StoreError(f"{path} is the database of another program; choose another file with --db.")
            newer = unknown_migrations(db)
            if newer:
                raise StoreError(
                    f"{path} was written by a newer version of this program (its schema has {newer[-1]}); "
                    "update the program, or choose another file with --db."
                )
            if self.read_only and migrations.pending(db):
                raise StoreError(f"{path} has an older schema and is open for reading only; open it once for writing.")
            if path.stat().st_size <= CHECKED_BYTES:
                (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
                if verdict != "ok":
                    raise sqlite3.DatabaseError(f"malformed: {' '.join(verdict.split())}")
        finally:
            db.close()

    def _can_share(self) -> bool:
        """Whether readers can see what others write meanwhile: not where the lock files can't be made."""
        db = _connect(self.path, SHARED)
        try:
            _patiently(db.table_names)
            return True
        except sqlite3.OperationalError as error:
            if _log_of(self.path).exists() or not any(word in str(error) for word in ("unable", "readonly")):
                raise
            return False
        finally:
            db.close()


@contextmanager
def plain_errors(path: Path) -> Iterator[None]:
    """Turn what SQLite and the file system raise into a `StoreError` of one sentence."""
    try:
        yield
    except sqlite3.Error as error:
        raise StoreError(_sentence(path, error)) from error
    except OSError as error:
        raise StoreError(f"{path} cannot be used: {error.strerror or error}; choose another with --db.") from error
    except JournalError as error:
        raise StoreError(str(error)) from error
    except (UnicodeEncodeError, OverflowError) as error:
        raise StoreError(f"{path} cannot hold a value: {error}; correct the text or the number.") from error


def _sentence(path: Path, error: sqlite3.Error) -> str:
    # By SQLite's words: Python has its error codes only from 3.11 on, and not for every error.
    said = str(error)
    for words, sentence in (
        (("locked", "busy"), "is being written by another program; close that or try again later."),
        (("malformed", "not a database"), "is damaged ({}); restore a copy, or choose another with --db."),
        (("disk is full",), "has no room to grow, the disk is full; free some space, then resume the run."),
        (("readonly",), "may not be written; change its permissions or choose another file with --db."),
        (("unable to open",), "cannot be opened; check that you may read and write the file and its folder."),
    ):
        if any(word in said for word in words):
            return f"{path} {sentence.format(said)}"
    return f"{path} could not be used: {said}; check the disk and the file with 'doctor'."


def _holds_bytes(path: Path, *, read_only: bool) -> bool:
    """Whether there is an SQLite file to look into; False for a missing or empty one that may be filled."""
    try:
        status = path.stat()
    except FileNotFoundError:
        status = None
    except ValueError as error:  # a NUL in the path
        raise StoreError(f"{str(path)!r} is no file name; choose another with --db.") from error
    if status is None or (S_ISREG(status.st_mode) and status.st_size == 0):
        if read_only:
            what = "There is no database" if status is None else "There is nothing yet"
            raise StoreError(f"{what} at {path}; start a run first, or choose another file with --db.")
        return False
    if S_ISDIR(status.st_mode):
        raise StoreError(f"{path} is a folder; name a file in it, such as {path / 'runs.db'}.")
    if not S_ISREG(status.st_mode):
        raise StoreError(f"{path} is not a regular file; choose another with --db.")
    with path.open("rb") as handle:
        if handle.read(len(MAGIC)) != MAGIC:
            raise StoreError(f"{path} is not a database; choose another file with --db.")
    return True


def _open_writer(path: Path) -> Database:
    db = _connect(path, "mode=rwc")
    try:
        if journal_for(path) == "wal":
            _patiently(db.enable_wal)
            # Survives the death of the process at any moment; of the machine, up to the last checkpoint().
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute("PRAGMA journal_size_limit = 67108864")
        else:
            _patiently(lambda: _enable_rollback(db))
            db.execute("PRAGMA synchronous = FULL")
        _patiently(lambda: db.execute("BEGIN IMMEDIATE"))
        try:
            upgrade(db)
            db.commit()
        finally:
            db.rollback()  # does nothing after a commit
    except BaseException:
        db.close()
        raise
    return db


def _enable_rollback(db: Database) -> None:
    (mode,) = db.execute("PRAGMA journal_mode = DELETE").fetchone()
    if mode != "delete":  # SQLite does not say why: somebody else still uses the write-ahead log
        raise sqlite3.OperationalError("database is locked")


def _connect(path: Path, options: str) -> Database:
    # Used by one thread at a time, though not always the one that opened it.
    connection = sqlite3.connect(
        f"{path.as_uri()}?{options}", uri=True, timeout=min(5.0, PATIENCE_S), check_same_thread=False
    )
    try:
        db = Database(connection, execute_plugins=False)  # no other package's plugin changes our database
        db.execute("PRAGMA foreign_keys = ON")
    except BaseException:
        connection.close()
        raise
    return db


def _patiently(action: Callable[[], T]) -> T:
    """``action()``, again and again while another program has the database.

    SQLite's own waiting does not cover every case: not the switch to the write-ahead log, not its recovery.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return action()
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() >= deadline:
                raise
            time.sleep(0.02)


def _log_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def _journal_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-journal")


def _in_use(path: Path) -> bool:
    """Whether somebody writes, or died writing."""
    return _log_of(path).exists() or _journal_of(path).exists()
