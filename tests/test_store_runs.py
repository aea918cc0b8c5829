"""The life of a run in runs.db: states, owners, commands, deletion, going back; and its steps in bins."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from store_samples import (
    ACTIVE,
    config,
    evaluation,
    fill,
    group,
    in_child,
    item,
    metrics,
    picture,
    to_state,
    training_run,
    wait_until,
)

from grpo_engine.config import RecordingConfig
from grpo_engine.recorder import FINAL_STATES, RUN_STATES
from grpo_engine.store import Store, StoreError
from grpo_engine.store import owner as store_owner
from grpo_engine.store.recorder import StoreRecorder
from grpo_engine.store.rows import ENDINGS, TRANSITIONS
from grpo_engine.store.schema import BLOCK
from grpo_engine.store.writes import sum_up, update_run


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "runs.db") as opened:
        yield opened


@pytest.mark.parametrize("state", RUN_STATES)
def test_exactly_the_changes_of_the_table_are_possible(store: Store, state: str) -> None:
    for following in RUN_STATES:
        run_id = to_state(store, state)
        if following in TRANSITIONS[state]:
            store.set_state(run_id, following, "because")
            run = store.run(run_id)
            assert (run.state, run.message) == (following, "because")
            assert (run.finished is not None) == (following in FINAL_STATES)
        else:
            with pytest.raises(StoreError, match=f"is {state} and can't become {following}; it can become"):
                store.set_state(run_id, following)
            assert store.run(run_id).state == state


def test_the_table_of_changes_is_the_agreed_life() -> None:
    assert set(TRANSITIONS) == set(RUN_STATES) and TRANSITIONS["finished"] == frozenset()
    for state in ACTIVE:
        assert TRANSITIONS[state] >= ENDINGS and state not in TRANSITIONS[state]
    for state in ENDINGS:
        assert TRANSITIONS[state] == {"queued", "loading"}
    path = ["queued", "loading", "baseline", "training", "paused", "training", "evaluating", "finished"]
    assert all(following in TRANSITIONS[state] for state, following in zip(path, path[1:], strict=False))


def test_a_failed_run_keeps_why_and_forgets_it_when_resumed(store: Store) -> None:
    run_id = training_run(store)
    started = store.run(run_id).started
    store.set_state(run_id, "failed", "loss is not finite", error="step 3: NaN \udc80")
    run = store.run(run_id)
    assert (run.error, run.message, run.active) == ("step 3: NaN ?", "loss is not finite", False)
    event = store.events(run_id)[-1]
    assert (event.kind, event.level, event.data) == (
        "state",
        "error",
        {"state": "failed", "from": "training"},
    )
    store.set_state(run_id, "loading")
    run = store.run(run_id)
    assert (run.error, run.finished, run.resumed_count, run.started) == (None, None, 1, started)


def test_only_runs_of_dead_processes_are_interrupted(store: Store) -> None:
    dead = in_child(time.sleep, 0)
    dead.join()
    me = store_owner.this_process()
    long_ago = time.time() - store_owner.SILENCE_S - 5
    cases: list[tuple[dict[str, Any], bool]] = [
        ({}, False),
        ({"heartbeat": long_ago}, False),  # a slow step of a living process
        ({"pid": dead.pid}, True),
        ({"process_token": "another boot:1"}, True),  # the number was given to another process
        ({"pid": None, "process_token": None}, True),
        ({"host": "elsewhere", "pid": dead.pid}, False),
        ({"host": "elsewhere", "pid": me.pid, "heartbeat": long_ago}, True),
    ]
    ids = {}
    for number, (changes, stale) in enumerate(cases):
        run_id = training_run(store)
        with store.write() as db:
            update_run(db, run_id, {"heartbeat": time.time(), **changes})
        ids[run_id] = (number, stale)
    queued, done = store.create_run(config()), to_state(store, "finished")
    assert set(store.interrupt_stale()) == {run_id for run_id, (_, stale) in ids.items() if stale}
    for run_id, (number, stale) in ids.items():
        assert store.run(run_id).state == ("interrupted" if stale else "training"), number
        assert (store.events(run_id)[-1].level == "warning") == stale
    assert (store.run(queued).state, store.run(done).state) == ("queued", "finished")
    assert store.interrupt_stale() == []


def test_a_zombie_counts_as_dead() -> None:
    child = subprocess.Popen(["true"])
    wait_until(lambda: store_owner.process_token(child.pid) is None)  # not yet waited for: a zombie
    assert child.wait() == 0
    token = store_owner.process_token(os.getpid())
    assert token is not None and token == store_owner.process_token(os.getpid())


def test_commands_reach_the_run_once_and_in_order(store: Store) -> None:
    run_id, other = training_run(store), training_run(store)
    with Store(store.path) as elsewhere:
        sent = [elsewhere.post_command(run_id, command) for command in ("pause", "resume", "save")]
        elsewhere.post_command(other, "stop")
    taken = store.take_commands(run_id)
    assert [(row.id, row.command) for row in taken] == list(zip(sent, ("pause", "resume", "save"), strict=True))
    assert store.take_commands(run_id) == []
    store.answer_command(sent[0], "paused")
    assert [row.outcome for row in store.commands(run_id)] == ["paused", None, None]


def test_a_command_that_came_too_late_never_reaches_the_resumed_run(store: Store) -> None:
    run_id = training_run(store)
    store.post_command(run_id, "stop")
    store.set_state(run_id, "interrupted")
    with pytest.raises(StoreError, match="is interrupted, so it can't be asked to stop"):
        store.post_command(run_id, "stop")
    store.set_state(run_id, "loading")
    assert store.take_commands(run_id) == []
    assert store.commands(run_id)[0].outcome == "too late, the run was interrupted"


def test_names_tags_and_notes_can_be_changed_at_any_time(store: Store) -> None:
    run_id = to_state(store, "finished")
    store.rename(run_id, "  <b>best</b>\tso far ")
    store.tag(run_id, ["paper", " paper ", "", "x\ny"])
    store.note(run_id, "first line\nsecond line")
    run = store.run(run_id)
    assert (run.name, run.tags, run.notes) == (
        "<b>best</b> so far",
        ("paper", "x y"),
        "first line\nsecond line",
    )


@pytest.mark.parametrize("state", ACTIVE)
def test_an_active_run_is_not_deleted(store: Store, state: str) -> None:
    run_id = to_state(store, state)
    with pytest.raises(StoreError, match=f"is {state}; stop it before deleting it"):
        store.delete(run_id)
    assert store.run_dir(run_id).is_dir()


def test_deleting_a_run_removes_all_of_it_and_nothing_else(store: Store) -> None:
    runs = []
    for _ in range(2):
        run_id = training_run(store)
        runs.append(run_id)
        with StoreRecorder(store, run_id, config().recording) as recorder:
            recorder.step(1, metrics(1), [group()])
            recorder.evaluation(evaluation("final", 1, item("a", shown=picture(1))))
        store.post_command(run_id, "stop")
        store.set_state(run_id, "stopped")
    store.delete(runs[0])
    assert not store.run_dir(runs[0]).exists() and store.check() == []
    assert store.run_dir(runs[1]).is_dir() and len(store.rollouts(runs[1], 1)) == 4
    with store.read() as db:
        for table in ("steps", "rollouts", "evaluations", "events", "commands", "step_blocks"):
            assert {row[0] for row in db.execute(f"SELECT run_id FROM {table}").fetchall()} <= {runs[1]}
        assert db.execute("SELECT count(*) FROM evaluation_items").fetchone() == (1,)


def test_truncating_forgets_later_steps_so_that_doing_them_again_doubles_nothing(store: Store) -> None:
    run_id = training_run(store)
    with StoreRecorder(store, run_id, RecordingConfig(images_every=10)) as recorder:
        for step in range(1, 151):
            recorder.step(step, metrics(step), [group(step, size=1)])
            if step in (100, 140):
                recorder.evaluation(evaluation("validation", step, item("a", shown=picture(1))))
        recorder.evaluation(evaluation("final", 150, item("a", shown=picture(2))))
    before = store.binned_steps(run_id, "entropy", bins=3)
    store.truncate_after(run_id, 100)
    images = store.run_dir(run_id) / "images"
    run = store.run(run_id)
    assert (run.step, run.summary) == (100, None)
    assert store.steps(run_id, [])["step"].tolist() == list(range(1, 101))
    assert store.rollouts(run_id, 101) == [] and len(store.rollouts(run_id, 100)) == 1
    assert [found.step for found in store.evaluations(run_id)] == [100]
    pictured = {"step-000001", *(f"step-{step:06d}" for step in range(10, 101, 10))}
    assert {folder.name for folder in images.iterdir()} == {*pictured, "eval-validation-000100"}
    assert store.check() == [] and store.events(run_id)[-1].data == {"step": 100, "from": 150}
    fill(store, run_id, 150)
    after = store.binned_steps(run_id, "entropy", bins=3)
    assert after.width == before.width == BLOCK
    np.testing.assert_array_equal([after.count, after.mean, after.high], [before.count, before.mean, before.high])
    with pytest.raises(StoreError, match="has recorded 150 steps and can't go on after step 151"):
        store.truncate_after(run_id, 151)
    store.truncate_after(run_id, 0)
    assert store.check() == [] and list(images.iterdir()) == []


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Store, str, np.ndarray]]:
    """1,000 steps recorded one by one, with gaps in the metric."""
    with Store(tmp_path_factory.mktemp("long") / "runs.db") as store:
        run_id = training_run(store, training={"steps": 1000})
        values = np.random.default_rng(0).normal(size=1000)
        values[100:400] = np.nan
        values[::7] = np.nan
        with store.write():
            for step, value in enumerate(values, start=1):
                store.add_step(run_id, step, {"reward_mean": value, "entropy": float(step)}, [])
        yield store, run_id, values


@given(start=st.integers(-5, 1100), length=st.integers(0, 1200), bins=st.integers(1, 1100))
@settings(max_examples=60, deadline=None)
@example(start=1, length=1000, bins=1)
@example(start=1, length=1000, bins=15)
@example(start=961, length=40, bins=1)
def test_bins_agree_with_brute_force(
    long_run: tuple[Store, str, np.ndarray], start: int, length: int, bins: int
) -> None:
    store, run_id, values = long_run
    found = store.binned_steps(run_id, "reward_mean", start, start + length - 1, bins)
    low, high = max(start, 1), min(start + length - 1, 1000)
    assert len(found) <= bins
    width = found.width
    assert width & (width - 1) == 0
    expected = []
    for first in range((low - 1) // width * width + 1, high + 1, width):
        part = values[first - 1 : first - 1 + width]
        part = part[~np.isnan(part)]
        if part.size:
            expected.append((first, min(first + width - 1, 1000), part.size, part.min(), part.mean(), part.max()))
    table = np.array([found.first, found.last, found.count, found.low, found.mean, found.high]).T
    np.testing.assert_allclose(table, np.array(expected).reshape(-1, 6), rtol=1e-12, atol=1e-15)
    if width > 1:  # no finer than asked for, nor coarser than it must be
        assert (high - 1) // (width // 2) - (low - 1) // (width // 2) + 1 > bins


def test_steps_gives_the_columns_asked_for_after_the_step_asked_for(
    long_run: tuple[Store, str, np.ndarray],
) -> None:
    store, run_id, values = long_run
    found = store.steps(run_id, ["reward_mean", "entropy"], since_step=990)
    assert list(found) == ["step", "reward_mean", "entropy"]
    assert found["step"].tolist() == list(range(991, 1001)) == found["entropy"].tolist()
    np.testing.assert_array_equal(found["reward_mean"], values[990:])
    nothing = store.steps(run_id, ["reward_mean"], since_step=1000)
    assert nothing["step"].shape == nothing["reward_mean"].shape == (0,)


def test_a_hundred_thousand_steps_come_back_in_few_points_read_from_few_rows(store: Store) -> None:
    run_id = training_run(store)
    values = np.random.default_rng(1).normal(size=100_000)
    with store.write() as db:
        rows = ((run_id, step, 0.0, float(value)) for step, value in enumerate(values, start=1))
        db.conn.executemany("INSERT INTO steps (run_id, step, time, reward_mean) VALUES (?, ?, ?, ?)", rows)
        update_run(db, run_id, {"step": 100_000})
        for block in range(100_000 // BLOCK):
            sum_up(db, run_id, block)
    found = store.binned_steps(run_id, "reward_mean", bins=800)
    assert (found.width, len(found), found.count.sum()) == (128, 782, 100_000)
    padded = np.append(values, np.full(782 * 128 - 100_000, np.nan)).reshape(782, 128)
    np.testing.assert_allclose(found.mean, np.nanmean(padded, axis=1), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(found.low, np.nanmin(padded, axis=1))
    np.testing.assert_array_equal(found.high, np.nanmax(padded, axis=1))
    with store.write() as db:  # the wide bins come from the blocks: without the steps they are still there
        db.execute("DELETE FROM steps WHERE run_id = ? AND step <= ?", [run_id, 100_000 // BLOCK * BLOCK])
    again = store.binned_steps(run_id, "reward_mean", bins=800)
    np.testing.assert_array_equal(again.high, found.high)


def test_a_full_bin_never_changes_while_the_run_goes_on(store: Store) -> None:
    run_id = training_run(store)
    fill(store, run_id, 150)
    before = store.binned_steps(run_id, "entropy", bins=20)
    fill(store, run_id, 155)
    after = store.binned_steps(run_id, "entropy", bins=20)
    assert before.width == after.width == 8
    assert after.mean[:18].tolist() == before.mean[:18].tolist() and after.mean[18] != before.mean[18]
