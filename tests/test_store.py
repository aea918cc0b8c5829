"""runs.db on real files: what comes back, and what crashes and other processes can do to it."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from sqlite_utils import Database, Migrations
from store_samples import (
    config,
    evaluation,
    group,
    in_child,
    item,
    metrics,
    picture,
    training_run,
    wait_until,
)

from grpo_engine.config import RecordingConfig, RunConfig
from grpo_engine.recorder import STEP_METRICS
from grpo_engine.store import Store, StoreError
from grpo_engine.store import connection as store_connection
from grpo_engine.store.recorder import StoreRecorder
from grpo_engine.store.rollouts import rollout_rows
from grpo_engine.store.rows import to_json
from grpo_engine.store.schema import APPLICATION_ID, m001_runs


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "runs.db") as opened:
        yield opened


def test_a_run_comes_back_as_it_was_created(store: Store) -> None:
    chosen = config(seed=2**63 - 1, recording={"name": "  Café \n run ", "tags": ["a", "b", "a"]})
    run_id = store.create_run(chosen, prompt_set="tiny", prompt_fingerprint="abc")
    run = store.run(run_id)
    assert re.fullmatch(r"0001-tiny-[a-z0-9]{4}", run_id)
    assert (run.number, run.state, run.active, run.step, run.total_steps) == (1, "queued", True, 0, 40)
    assert (run.name, run.tags, run.seed, run.source) == ("Café run", ("a", "b"), 2**63 - 1, "local")
    assert (run.prompt_set, run.prompt_fingerprint, run.summary, run.pid) == ("tiny", "abc", None, None)
    assert RunConfig.parse(run.config) == chosen
    assert RunConfig.load(store.run_dir(run_id) / "config.yaml") == chosen
    assert abs(run.created - time.time()) < 60


def test_ids_sort_by_age_and_are_never_used_twice(store: Store) -> None:
    ids = [store.create_run(config(preset="My preset/../x")) for _ in range(11)]
    assert ids == sorted(ids) and ids[0].startswith("0001-my-preset-x-")
    store.set_state(ids[-1], "stopped")
    store.delete(ids[-1])
    assert store.create_run(config()).startswith("0012-")
    assert [run.id for run in store.runs()][1:] == ids[-2::-1]


def test_a_recorded_step_comes_back_whole(store: Store) -> None:
    run_id = training_run(store)
    groups = [group(1, 0), group(1, 1)]
    groups[1].rewrites = (None, *groups[1].rewrites[1:])
    groups[1].pictures[0] = None
    with StoreRecorder(store, run_id, config().recording) as recorder:
        recorder.token_text = lambda ids: [f"<{token}>" for token in ids]
        recorder.step(1, metrics(1) | {"judge_mean": None, "grad_norm": math.nan, "entropy": math.inf}, groups)
    steps = store.steps(run_id)
    assert list(steps) == ["step", "time", *STEP_METRICS]
    assert steps["step"].dtype == np.int64 and steps["step"].tolist() == [1]
    assert steps["total_loss"][0] == 1.0
    assert all(np.isnan(steps[name][0]) for name in ("judge_mean", "grad_norm", "entropy"))
    rows = store.rollouts(run_id, 1)
    assert [(row.g, row.k) for row in rows] == [(g, k) for g in range(2) for k in range(4)]
    for row in rows:
        kept, real = groups[row.g], groups[row.g].completions.mask[row.k]
        assert kept.kl is not None and row.token_ids is not None and row.token_kl is not None
        assert row.token_ids.tolist() == kept.completions.token_ids[row.k][real].tolist()
        assert row.logprobs is not None and row.entropies is not None
        assert row.logprobs.tolist() == kept.completions.logprobs[row.k][real].tolist()
        assert row.entropies.tolist() == kept.completions.entropies[row.k][real].tolist()
        assert row.token_kl.tolist() == kept.kl[row.k][real].tolist()
        assert kept.shift is not None and row.shift is not None
        assert row.shift.tolist() == kept.shift[row.k][real].tolist()
        assert row.kl == pytest.approx(float(kept.kl[row.k][real].mean()), rel=1e-6)
        assert row.tokens == tuple(f"<{token}>" for token in row.token_ids)
        assert (row.reward, row.advantage) == (float(kept.rewards[row.k]), float(kept.advantages[row.k]))
        assert (row.parts, row.latent_seed) == (kept.scores[row.k].parts, kept.latent_seed)
        assert (row.prompt, row.rewrite) == (kept.prompt.text, kept.rewrites[row.k])
        assert (row.completion, row.finished) == (kept.completions.texts[row.k], row.k % 2 == 0)
        shown = kept.pictures[row.k]
        if shown is None:
            assert row.image is None and row.thumbnail is None
        else:
            assert row.image == f"runs/{run_id}/images/step-000001/g{row.g}-k{row.k}.png" == row.thumbnail
            assert np.array_equal(np.asarray(Image.open(store.file(row.image))), shown)


def test_a_database_of_before_shifts_were_recorded_upgrades_and_reads_them_as_missing(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    with closing(sqlite3.connect(path)) as connection:
        old = Database(connection)
        first = Migrations("grpo_engine")
        first()(m001_runs)
        first.apply(old)
        old.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        assert "shift" not in old.table("rollouts").columns_dict
        connection.commit()
    with Store(path) as store:
        run_id = training_run(store)
        columns = [row for row in rollout_rows(0, group()) if row.pop("shift")]  # as the first version wrote them
        store.add_step(run_id, 1, {}, columns)
        store.add_step(run_id, 2, {}, rollout_rows(0, group(2)))
        assert [row.shift for row in store.rollouts(run_id, 1)] == [None] * 4
        assert all(row.token_kl is not None for row in store.rollouts(run_id, 1))
        assert all(row.shift is not None for row in store.rollouts(run_id, 2))


def test_an_evaluation_comes_back_whole_and_the_final_one_sums_up_the_run(store: Store) -> None:
    run_id = training_run(store)
    shared = picture(1)
    items = [
        item("cat", "original", 0, shared),
        item("cat", "trained", 0, shared),
        item("Dog/../x", "trained", 1),
    ]
    with StoreRecorder(store, run_id, config().recording) as recorder:
        recorder.evaluation(evaluation("baseline", 0, *items))
        recorder.evaluation(evaluation("final", 0, *items))
    first, last = store.evaluations(run_id)
    assert (first.kind, first.step, first.split, first.items) == ("baseline", 0, "test", 3)
    assert first.summary == {"gain": 0.25, "interval": [0.1, 0.4], "odd": None} == store.run(run_id).summary
    rows = {(row.prompt_id, row.arm): row for row in store.evaluation_items(first.id)}
    row = rows["cat", "original"]
    assert row.image == f"runs/{run_id}/images/eval-baseline-000000/cat/original-0.png"
    assert rows["cat", "trained"].image == row.image, "one picture, one file"
    assert np.array_equal(np.asarray(Image.open(store.file(row.image))), shared)
    assert (row.reward, row.parts, row.judge, row.judge_parts) == (
        31.5,
        {"clip": 31.5, "length": None},
        0.5,
        {"color": [1, 2]},
    )
    assert (row.latent_seed, row.rewrite, row.index, row.tier) == (2**63 + 5, "a big cat", 0, "basic")
    assert (row.cut_tokens, row.read_chars, row.unread) == (1, 6, "cat")
    assert rows["Dog/../x", "trained"].image is None
    assert [row.arm for row in store.evaluation_items(last.id, prompt_id="cat")] == ["original", "trained"]
    assert [row.prompt_id for row in store.evaluation_items(last.id, arm="trained")] == ["Dog/../x", "cat"]


def test_a_database_of_before_cut_texts_were_counted_upgrades_and_says_that_it_does_not_know(tmp_path: Path) -> None:
    with Store(tmp_path / "runs.db") as store:
        run_id = training_run(store)
        with StoreRecorder(store, run_id, config().recording) as recorder:
            recorder.evaluation(evaluation("baseline", 0, item("cat")))
        with store.write() as db:
            for column in ("cut_tokens", "read_chars"):
                db.execute(f"ALTER TABLE evaluation_items DROP COLUMN {column}")
            db.execute("DELETE FROM _sqlite_migrations WHERE name = 'm004_cut'")
    with Store(tmp_path / "runs.db") as store:
        (row,) = store.evaluation_items(store.evaluations(run_id)[0].id)
        assert (row.cut_tokens, row.read_chars, row.unread, row.rewrite) == (None, None, "", "a big cat")
        with StoreRecorder(store, run_id, config().recording) as recorder:
            recorder.evaluation(evaluation("validation", 1, item("dog")))
        (row,) = store.evaluation_items(store.evaluations(run_id)[1].id)
        assert row.unread == "cat"


def test_an_evaluation_made_again_takes_the_place_of_the_first(store: Store) -> None:
    run_id = training_run(store)
    for prompts in (("a", "b"), ("a", "c")):
        store.add_evaluation(run_id, "validation", 0, "validation", [], {"prompts": prompts})
    (only,) = store.evaluations(run_id)
    assert only.summary == {"prompts": ["a", "c"]}


def test_events_are_read_from_where_one_left_off(store: Store) -> None:
    run_id, other = store.create_run(config()), store.create_run(config())
    before = store.events(other)[-1].id
    ids = [store.add_event(run_id, "warning", f"line {n}", n=n, bad=math.nan, text="\ud800") for n in range(5)]
    assert ids == [before + n + 1 for n in range(5)]
    assert [event.data["n"] for event in store.events(run_id, after_id=before)] == [0, 1, 2, 3, 4]
    assert [event.data["n"] for event in store.events(run_id, after_id=before, limit=2)] == [3, 4]
    assert store.events(run_id, after_id=ids[-1]) == []
    assert [event.kind for event in store.events(other, limit=None)] == ["state"]
    event = store.events(run_id)[-1]
    assert (event.level, event.message, event.data["bad"], event.data["text"]) == (
        "warning",
        "line 4",
        None,
        "?",
    )


@given(
    st.recursive(
        st.none() | st.floats() | st.text() | st.integers(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    )
)
@settings(max_examples=60, deadline=None)
@example({"set": {1.5}, "numpy": np.float32(2.0), "array": np.array([1, 2]), "path": Path("x"), "half": "\udc80"})
def test_whatever_an_event_carries_becomes_strict_json(data: Any) -> None:
    text = to_json(data)
    text.encode("utf-8")
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_the_revision_moves_with_every_visible_change_and_only_then(store: Store) -> None:
    run_id = training_run(store)
    seen = store.revision()
    changes: list[Callable[[], object]] = [
        lambda: store.add_step(run_id, 1, {}, []),
        lambda: store.set_phase(run_id, "rendering", 1, 2),
        lambda: store.rename(run_id, "other"),
        lambda: store.add_event(run_id, "note", "text"),
        lambda: store.post_command(run_id, "pause"),
        lambda: store.set_state(run_id, "paused"),
    ]
    for change in changes:
        change()
        assert store.revision() == seen + 1
        seen += 1
    store.heartbeat(run_id)
    store.take_commands(store.create_run(config()))
    assert store.revision() == seen + 1  # the new run


def record_without_end(path: Path, run_id: str) -> None:
    with Store(path) as store:
        store.interrupt_stale()
        for state in ("loading", "training"):
            store.set_state(run_id, state)
        recorder = StoreRecorder(store, run_id, RecordingConfig())
        step = store.run(run_id).step
        while True:
            step += 1
            recorder.phase("sampling", step, 0)
            recorder.step(step, metrics(step), [group(step, 0), group(step, 1)])


def test_kill_nine_at_any_moment_leaves_whole_steps_only(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    with Store(path) as store:
        run_id = store.create_run(config())
    moments = np.random.default_rng(5)
    for _ in range(10):
        with Store(path) as store:
            reached = store.run(run_id).step
        child = in_child(record_without_end, path, run_id)
        with Store(path, read_only=True) as watcher:
            wait_until(lambda watcher=watcher, reached=reached: watcher.run(run_id).step > reached)
        time.sleep(moments.uniform(0, 0.05))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        with Store(path) as store:
            assert store.check() == []
            last = store.run(run_id).step
            assert last > reached
            assert store.steps(run_id, [])["step"].tolist() == list(range(1, last + 1))
            for step in range(1, last + 1):
                rows = store.rollouts(run_id, step)
                assert [row.rewrite for row in rows] == [*group(step, 0).rewrites, *group(step, 1).rewrites]
            for row in rows:
                assert row.image is not None
                Image.open(store.file(row.image)).load()
            assert store.interrupt_stale() == [run_id]
            assert store.run(run_id).state == "interrupted"


def flush_then_die(path: Path, run_id: str) -> None:
    store = Store(path)
    store.set_state(run_id, "loading")
    recorder = StoreRecorder(store, run_id, RecordingConfig())
    recorder.state("training")
    for step in range(1, 6):
        recorder.step(step, metrics(step), [group(step)])
    recorder.event("checkpoint", "saved")
    recorder.phase("updating", 3, 4)
    recorder.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_was_flushed_survives_kill_nine(tmp_path: Path) -> None:
    with Store(tmp_path / "runs.db") as store:
        run_id = store.create_run(config())
    child = in_child(flush_then_die, tmp_path / "runs.db", run_id)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    with Store(tmp_path / "runs.db", read_only=True) as store:
        run = store.run(run_id)
        assert (run.step, run.phase, run.phase_done, run.phase_total) == (5, "updating", 3, 4)
        assert store.events(run_id)[-1].message == "saved"
        assert json.loads((store.run_dir(run_id) / "metrics.json").read_text())["metrics"]["step"] == [
            1,
            2,
            3,
            4,
            5,
        ]
        assert "step 5/40" in (store.run_dir(run_id) / "grpo_training.log").read_text()


def test_a_reader_never_sees_part_of_a_step(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    with Store(path) as store:
        run_id = store.create_run(config())
    child = in_child(record_without_end, path, run_id)
    watcher = Store(path, read_only=True)
    try:
        wait_until(lambda: watcher.run(run_id).step > 0)
        seen = set()
        while len(seen) < 12:
            with watcher.read() as db:
                count, last = db.execute("SELECT count(*), max(step) FROM steps").fetchone()
                (step,) = db.execute("SELECT step FROM runs").fetchone()
                rows = db.execute("SELECT step, count(*), count(image) FROM rollouts GROUP BY step").fetchall()
            assert count == last == step
            assert rows == [(one, 8, 8) for one in range(1, last + 1)]
            seen.add(last)
    finally:
        watcher.close()
        os.kill(child.pid, signal.SIGKILL)
        child.join()


def test_a_failed_write_leaves_nothing_behind(store: Store) -> None:
    run_id = training_run(store)
    rows = [{"g": 0, "k": 0, "prompt_id": "p"}]  # lacks what the table demands
    with pytest.raises(StoreError, match="NOT NULL"):
        store.add_step(run_id, 1, metrics(1), rows)
    assert store.run(run_id).step == 0 and store.steps(run_id)["step"].size == 0
    with pytest.raises(KeyError), store.write():
        store.rename(run_id, "never seen")
        raise KeyError
    assert store.run(run_id).name == "Run 1"


def record_forty(path: Path) -> None:
    with Store(path) as store:
        run_id = training_run(store)
        with StoreRecorder(store, run_id, RecordingConfig(images_every=0)) as recorder:
            for step in range(1, 41):
                recorder.step(step, metrics(step), [group(step)])
                recorder.event("note", f"step {step}")


def test_processes_that_open_a_new_database_and_write_to_it_at_once_get_along(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "runs.db"
    children = [in_child(record_forty, path) for _ in range(3)]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    with Store(path, read_only=True) as store:
        assert [run.step for run in store.runs()] == [40, 40, 40]
        assert store.check() == []
        for run in store.runs():
            notes = [event.message for event in store.events(run.id, limit=None) if event.kind == "note"]
            assert notes == [f"step {step}" for step in range(1, 41)]


def create_run_at_once(path: Path, start: threading.Barrier, failures: list[BaseException]) -> None:
    try:
        start.wait(10)
        with Store(path) as store:
            store.create_run(config())
    except BaseException as error:
        failures.append(error)


def test_many_may_create_one_database_at_the_same_moment(tmp_path: Path) -> None:
    for attempt in range(8):
        path, start = tmp_path / f"{attempt}" / "runs.db", threading.Barrier(6)
        failures: list[BaseException] = []
        work = (path, start, failures)
        threads = [threading.Thread(target=create_run_at_once, args=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        with Store(path) as store:
            assert sorted(run.number for run in store.runs()) == [1, 2, 3, 4, 5, 6] and store.check() == []


def test_threads_share_one_store(store: Store) -> None:
    failures = []

    def work() -> None:
        try:
            run_id = training_run(store)
            for step in range(1, 21):
                store.add_step(run_id, step, metrics(step), [])
                assert store.steps(run_id, ["entropy"])["step"].tolist() == list(range(1, step + 1))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and store.check() == []


def test_of_two_that_take_up_one_run_the_second_is_refused(store: Store) -> None:
    run_id = store.create_run(config())
    store.set_state(run_id, "loading")
    with Store(store.path) as other, pytest.raises(StoreError, match="is loading and can't become loading"):
        other.set_state(run_id, "loading")


def test_a_database_that_another_program_keeps_locked_is_waited_for_then_named(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = store.create_run(config())
    monkeypatch.setattr(store_connection, "PATIENCE_S", 0.2)
    with Store(store.path) as other:
        with store.write():
            started = time.monotonic()
            with pytest.raises(StoreError, match="is being written by another program; close that"):
                other.rename(run_id, "refused")
            assert time.monotonic() - started >= 0.2
        other.rename(run_id, "free again")
    assert store.run(run_id).name == "free again"
