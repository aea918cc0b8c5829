"""What runs.db refuses, how it says so, and that the file is left as it was."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from store_samples import (
    config,
    fill,
    group,
    training_run,
)

from grpo_engine.recorder import STEP_METRICS
from grpo_engine.store import Store, StoreError
from grpo_engine.store.recorder import StoreRecorder
from grpo_engine.store.schema import BLOCK
from grpo_engine.store.writes import insert


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "runs.db") as opened:
        yield opened


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def make_text(path: Path) -> None:
    path.write_text("id,text\n1,a cat\n" * 100)


def make_foreign(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE bookmarks (id)")
    connection.close()


def make_newer(path: Path) -> None:
    with Store(path) as store, store.write() as db:
        row = {"migration_set": "grpo_engine", "name": "m999_future", "applied_at": "later"}
        insert(db, "_sqlite_migrations", [row])


def make_truncated(path: Path) -> None:
    with Store(path) as store:
        fill(store, training_run(store), 200)
    with path.open("r+b") as handle:
        handle.truncate(path.stat().st_size // 2)


def make_scribbled(path: Path) -> None:
    with Store(path) as store:
        fill(store, training_run(store), 200)
    size = path.stat().st_size
    with path.open("r+b") as handle:
        handle.seek(size // 4)
        handle.write(b"\xa5" * (size // 2))


def make_bruised(path: Path) -> None:
    """One row's page is spoilt, which nothing but a check would notice before it is read."""
    with Store(path) as store:
        fill(store, training_run(store), 200)
    with path.open("r+b") as handle:
        handle.seek(-4096, os.SEEK_END)
        handle.write(b"\xff" * 16)


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (make_text, "is not a database; choose another file with --db."),
        (make_foreign, "is the database of another program; choose another file with --db."),
        (make_newer, "written by a newer version of this program (its schema has m999_future); update"),
        (make_truncated, "is damaged (database disk image is malformed); restore a copy"),
        (make_scribbled, "is damaged (database disk image is malformed); restore a copy"),
        (make_bruised, "is damaged (malformed: "),
        (Path.mkdir, "is a folder; name a file in it, such as "),
        (os.mkfifo, "is not a regular file; choose another"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_a_sentence_and_left_alone(
    tmp_path: Path, make: Callable[[Path], None], sentence: str, read_only: bool
) -> None:
    path = tmp_path / "runs.db"
    make(path)
    before = snapshot(tmp_path)
    with pytest.raises(StoreError) as refusal:
        Store(path, read_only=read_only)
    assert sentence in str(refusal.value) and str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value) and str(refusal.value).endswith(".")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("missing.db", "There is no database at "), ("empty.db", "There is nothing yet at ")],
)
def test_reading_alone_creates_nothing(tmp_path: Path, name: str, sentence: str) -> None:
    (tmp_path / "empty.db").touch()
    with pytest.raises(StoreError, match=sentence):
        Store(tmp_path / name, read_only=True)
    assert snapshot(tmp_path) == {"empty.db": b""}


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "file.txt/runs.db", "~nobody_of_that_name/runs.db"])
def test_an_impossible_path_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file.txt").touch()
    with pytest.raises(StoreError, match="--db"):
        Store(name if name.startswith("~") else f"{tmp_path}/{name}")


def test_a_path_with_odd_characters_is_no_problem(tmp_path: Path) -> None:
    path = tmp_path / "a b?mode=ro#%41é" / "runs.db"
    with Store(path) as store:
        run_id = training_run(store)
        with StoreRecorder(store, run_id, config().recording) as recorder:
            recorder.step(1, {}, [group()])
    with Store(path, read_only=True) as store:
        assert store.file(store.rollouts(run_id, 1)[0].image or "").is_file()


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder that this process, no longer root if it was, may read but not write."""
    folder = Path(tempfile.mkdtemp())
    with Store(folder / "runs.db") as store:
        store.create_run(config())
    folder.chmod(0o555)
    (folder / "runs.db").chmod(0o444)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield folder
    if root:
        os.seteuid(0)
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_without_permission_writing_is_refused_and_reading_works(unprivileged: Path) -> None:
    before = snapshot(unprivileged)
    for name in ("runs.db", "new.db", "new/runs.db"):
        with pytest.raises(StoreError, match="permission|Permission denied|may read and write"):
            Store(unprivileged / name)
    with Store(unprivileged / "runs.db", read_only=True) as store:
        assert [run.name for run in store.runs()] == ["Run 1"]
        with pytest.raises(StoreError, match="open for reading only; open it for writing"):
            store.rename(store.runs()[0].id, "x")
    assert snapshot(unprivileged) == before


def test_a_closed_store_says_so(store: Store) -> None:
    store.close()
    store.close()
    for use in (store.runs, store.interrupt_stale):
        with pytest.raises(StoreError, match="is closed; open it again"):
            use()


def test_a_metric_of_a_later_version_gets_its_column_and_reads_as_missing_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store(tmp_path / "runs.db") as store:
        run_id = training_run(store)
        fill(store, run_id, BLOCK)
    monkeypatch.setitem(STEP_METRICS, "new_metric", "made for this test")
    with Store(tmp_path / "runs.db", read_only=True) as store:
        assert np.isnan(store.steps(run_id, ["new_metric"])["new_metric"]).all()
        assert len(store.binned_steps(run_id, "new_metric")) == 0
    with Store(tmp_path / "runs.db") as store:
        store.add_step(run_id, BLOCK + 1, {"new_metric": 2.5}, [])
        assert store.steps(run_id, ["new_metric"], since_step=BLOCK)["new_metric"].tolist() == [2.5]
        assert store.binned_steps(run_id, "new_metric", bins=1).mean.tolist() == [2.5]
        assert store.check() == []


def test_unknown_names_are_refused_with_the_nearest_known(store: Store) -> None:
    with pytest.raises(StoreError, match="holds none yet"):
        store.run("0001-tiny-abcd")
    run_id = training_run(store, recording={"name": "baseline"})
    for ask, sentence in (
        (lambda: store.run(run_id[:-1] + "!"), f"did you mean {run_id}?"),
        (lambda: store.resolve("basline"), f"did you mean {run_id} (baseline)?"),
        (lambda: store.steps("nothing like it"), f"the newest is {run_id} (baseline)."),
        (lambda: store.steps(run_id, ["reward_men"]), "did you mean 'reward_mean'?"),
        (lambda: store.binned_steps(run_id, 'step" FROM runs --'), "There is no metric"),
        (lambda: store.binned_steps(run_id, "entropy", bins=0), "bins is 0"),
        (lambda: store.add_step(run_id, 1, {"reward": 1.0}, []), "recorder.STEP_METRICS"),
        (lambda: store.add_step(run_id, 2, {}, []), "Step 2 can't follow step 0"),
        (lambda: store.add_event("0009-tiny-abcd", "note", "x"), "There is no run"),
        (lambda: store.post_command(run_id, "explode"), "use one of stop, pause, resume, save, evaluate"),
        (lambda: store.answer_command(77, "done"), "There is no command 77"),
        (lambda: store.set_state(run_id, "flying"), "There is no state 'flying'"),
        (lambda: store.run_dir("../../etc"), "is no run's id"),
        (lambda: store.file("runs/../../etc/passwd"), "is not a file of a run"),
        (lambda: store.file("runs.db"), "is not a file of a run"),
        (lambda: store.rename(run_id, " \n "), "can't be empty"),
        (lambda: store.rename(run_id, "x" * 121), "121 characters; 120 are allowed"),
        (lambda: store.note(run_id, "x" * 20_001), "20,000 are allowed"),
        (lambda: store.run("\ud800"), "There is no run|cannot hold"),
        (lambda: store.rollouts(run_id, 10**30), "cannot hold a value"),
    ):
        with pytest.raises(StoreError, match=sentence if "|" in sentence else re.escape(sentence)):
            ask()


def test_resolve_takes_what_people_type(store: Store) -> None:
    first = store.create_run(config(recording={"name": "warm-up"}))
    second = store.create_run(config())
    for text, run_id in (
        (first, first),
        ("warm-up", first),
        ("1", first),
        ("0002", second),
        ("last", second),
    ):
        assert store.resolve(text).id == run_id
    store.rename(second, "warm-up")
    with pytest.raises(StoreError, match=f"'warm-up' stands for 2 runs .{second}, {first}."):
        store.resolve("warm-up")
    with pytest.raises(StoreError, match="stands for 2 runs"):
        store.resolve("000")


def test_check_finds_missing_steps_doubtful_steps_and_orphans(store: Store) -> None:
    run_id = training_run(store)
    fill(store, run_id, 9)
    assert store.check() == []
    with sqlite3.connect(store.path) as connection:  # no foreign keys here
        connection.execute("DELETE FROM steps WHERE step IN (3, 5, 6)")
        connection.execute("INSERT INTO steps (run_id, step, time) VALUES (?, 12, 0)", [run_id])
        connection.execute("INSERT INTO events VALUES (NULL, 'gone', 0, 'note', 'info', '', '{}')")
    missing, beyond = (text for text in store.check() if text.startswith("Run"))
    assert missing == f"Run {run_id}: steps 3, 5-6 are missing."
    assert beyond == f"Run {run_id}: step 12 is beyond its last step."
    assert any("of table events belongs to no row of runs" in text for text in store.check())
