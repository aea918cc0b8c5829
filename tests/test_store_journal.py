"""runs.db where machines share its file system: a rollback journal, and what changes with it."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from store_samples import config, fill, training_run

from grpo_engine.config import ROOT
from grpo_engine.doctor import examine, print_findings
from grpo_engine.store import Store, StoreError
from grpo_engine.store.journal import VARIABLE, filesystem, is_network, journal_for

MOUNTS = [
    ("/", "ext4"),
    ("/home", "nfs4"),
    ("/home/local", "xfs"),
    ("/scratch", "lustre"),
    ("/remote", "fuse.sshfs"),
    ("/again", "ext4"),
    ("/again", "nfs"),
]


def mode(path: Path) -> str:
    """The journal that the file itself asks for."""
    connection = sqlite3.connect(path)
    try:
        (found,) = connection.execute("PRAGMA journal_mode").fetchone()
    finally:
        connection.close()
    return str(found)


@pytest.mark.parametrize(
    ("path", "kind", "journal"),
    [
        ("/data/runs.db", "ext4", "wal"),
        ("/home/me/runs.db", "nfs4", "rollback"),
        ("/home/local/me/runs.db", "xfs", "wal"),
        ("/homestead/runs.db", "ext4", "wal"),
        ("/scratch/runs.db", "lustre", "rollback"),
        ("/remote/a/b/runs.db", "fuse.sshfs", "rollback"),
        ("/again/runs.db", "nfs", "rollback"),
    ],
)
def test_the_journal_follows_from_the_file_system(path: str, kind: str, journal: str) -> None:
    assert filesystem(Path(path), MOUNTS) == kind
    assert journal_for(Path(path), MOUNTS) == journal


def test_this_machines_mounts_can_be_asked(tmp_path: Path) -> None:
    kind = filesystem(tmp_path / "runs.db")
    assert kind
    assert journal_for(tmp_path / "runs.db") == ("rollback" if is_network(kind) else "wal")


def test_a_journal_nobody_knows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "memory")
    with pytest.raises(StoreError, match="GRPO_JOURNAL is 'memory'; set it to auto, wal or rollback"):
        Store(tmp_path / "runs.db")


@pytest.fixture
def rollback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a database gets a rollback journal."""
    monkeypatch.setenv(VARIABLE, "rollback")
    return tmp_path / "runs.db"


def test_a_run_is_recorded_and_watched_without_the_write_ahead_log(rollback: Path) -> None:
    with Store(rollback) as store, Store(rollback, read_only=True) as watcher:
        run_id = training_run(store)
        fill(store, run_id, 30)
        assert watcher.run(run_id).step == 30
        assert watcher.steps(run_id, ["reward_mean"])["step"].tolist() == list(range(1, 31))
        assert not (rollback.parent / "runs.db-wal").exists()
        assert store.check() == []
    assert mode(rollback) == "delete"


def test_a_writer_waits_for_a_reader_and_a_reader_for_a_commit(rollback: Path) -> None:
    with Store(rollback) as store, Store(rollback, read_only=True) as watcher:
        run_id = training_run(store)
        reading, done = threading.Event(), threading.Event()

        def read() -> None:
            with watcher.connections.read() as db:
                assert db.execute("SELECT step FROM runs").fetchone() == (0,)
                reading.set()
                done.wait(1.0)
                assert db.execute("SELECT step FROM runs").fetchone() == (0,), "one state for a whole block"

        reader = threading.Thread(target=read)
        reader.start()
        assert reading.wait(10)
        fill(store, run_id, 1)  # returns once the reader has let go
        reader.join(10)
        assert watcher.run(run_id).step == 1


def test_a_database_moves_between_journals_with_what_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "runs.db"
    for journal, expected in (("wal", "wal"), ("rollback", "delete"), ("auto", "wal")):
        monkeypatch.setenv(VARIABLE, journal)
        with Store(path) as store:
            store.create_run(config())
        assert mode(path) == expected
    with Store(path, read_only=True) as store:
        assert len(store.runs()) == 3
        assert store.check() == []


DIE_WRITING = """
import os, sys
from grpo_engine.store import Store
store = Store(sys.argv[1])
with store.write() as db:
    db.execute("PRAGMA cache_size = 1")  # so that pages reach the file before the end of the transaction
    db.execute("PRAGMA cache_spill = 1")
    db.execute("CREATE TABLE filler (text)")
    for _ in range(2000):
        db.execute("INSERT INTO filler VALUES (?)", ["x" * 2000])
    os._exit(1)
"""


def test_what_a_dead_writer_left_half_done_is_undone_by_the_next(rollback: Path) -> None:
    with Store(rollback) as store:
        run_id = store.create_run(config())
    subprocess.run([sys.executable, "-c", DIE_WRITING, str(rollback)], cwd=ROOT, check=False, timeout=60)
    assert (rollback.parent / "runs.db-journal").stat().st_size > 0
    with pytest.raises(StoreError, match="left in the middle of a write; open it once for writing"):
        Store(rollback, read_only=True)
    with Store(rollback) as store:
        assert [run.id for run in store.runs()] == [run_id]
        assert store.check() == []
    with Store(rollback, read_only=True) as store, store.connections.read() as db:
        assert "filler" not in db.table_names()


def test_doctor_says_which_journal_a_database_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "runs.db"
    monkeypatch.setenv(VARIABLE, "rollback")
    print_findings(examine(str(path), "tiny", ()))
    assert f"Database {path} on {filesystem(path)}: rollback journal." in capsys.readouterr().out
    monkeypatch.setenv(VARIABLE, "of old")
    findings = examine(str(path), "tiny", ())
    assert "GRPO_JOURNAL is 'of old'; set it to auto, wal or rollback." in findings["problems"]
    print_findings(findings)
    assert "GRPO_JOURNAL" in capsys.readouterr().out
