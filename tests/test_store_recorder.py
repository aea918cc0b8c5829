"""The recorder: order, pressure, failures, pictures and the names of files."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from store_samples import (
    config,
    evaluation,
    fill,
    group,
    item,
    metrics,
    picture,
    training_run,
    wait_until,
)

from grpo_engine.config import RecordingConfig
from grpo_engine.recorder import STEP_METRICS, Recorder
from grpo_engine.store import Store, StoreError
from grpo_engine.store import owner as store_owner
from grpo_engine.store import recorder as store_recorder
from grpo_engine.store.files import evaluation_stem, file_name, step_stem, write_text
from grpo_engine.store.recorder import CAPACITY, StoreRecorder
from grpo_engine.store.writes import update_run


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "runs.db") as opened:
        yield opened


def test_half_of_a_surrogate_pair_in_an_event_ends_no_recording(store: Store) -> None:
    run_id = store.create_run(config())
    with StoreRecorder(store, run_id, config().recording) as recorder:
        recorder.event("note", "a name with \ud800 in it")
        recorder.flush()
    assert [event.message for event in store.events(run_id) if event.kind == "note"] == ["a name with ? in it"]
    log = (store.run_dir(run_id) / "grpo_training.log").read_text(encoding="utf-8")
    assert "a name with ? in it" in log


def test_the_recorder_keeps_the_protocol(store: Store) -> None:
    def takes(recorder: Recorder) -> None:
        recorder.state("loading", "reading weights")
        recorder.phase("loading", 1, 3)
        recorder.state("training")
        recorder.step(1, {"reward_mean": 1.25, "reward_std": 0.5}, [])
        recorder.event("warning", "careful,\nit is slow", seconds=3)
        recorder.flush()

    run_id = store.create_run(config())
    with StoreRecorder(store, run_id, config().recording) as recorder:
        takes(recorder)
        run = store.run(run_id)
        assert (run.state, run.step, run.phase) == ("training", 1, "")
        assert (run.host, run.pid) == (store_owner.this_process().host, os.getpid())
    log = (store.run_dir(run_id) / "grpo_training.log").read_text().splitlines()
    assert [re.sub(r"^[0-9-]+ [0-9:,]+ ", "", line) for line in log] == [
        "INFO    loading: reading weights",
        "INFO    training",
        "INFO    step 1/40 reward 1.25 spread 0.5",
        "WARNING warning: careful, it is slow",
    ]
    content = json.loads((store.run_dir(run_id) / "metrics.json").read_text())
    assert content["metrics"]["reward_mean"] == [1.25] and content["metrics"]["entropy"] == [None]
    assert content["units"] == STEP_METRICS and content["run"] == run_id


def test_what_the_engine_logs_meanwhile_stands_in_the_runs_log_with_its_traceback(store: Store) -> None:
    run_id = training_run(store)
    log = logging.getLogger("grpo_engine.session")
    log.warning("before")
    with StoreRecorder(store, run_id, config().recording):
        try:
            raise ZeroDivisionError("as an example")
        except ZeroDivisionError:
            log.exception("run failed")
    log.warning("after")
    text = (store.run_dir(run_id) / "grpo_training.log").read_text()
    assert "ERROR   run failed\nTraceback" in text and "ZeroDivisionError: as an example" in text
    assert "before" not in text and "after" not in text


def test_what_the_trainer_changes_after_a_call_does_not_reach_the_record(store: Store) -> None:
    run_id = training_run(store)
    recorder = StoreRecorder(store, run_id, config().recording)
    with store.write():  # the recorder's thread has to wait
        one, values, data = group(), {"entropy": 1.0}, {"list": [1]}
        recorder.step(1, values, [one])
        recorder.event("note", "text", **data)
        expected = one.completions.logprobs[3].tolist()
        one.completions.logprobs.zero_()
        one.pictures.clear()
        values["entropy"] = 2.0
        data["list"].append(2)
    recorder.close()
    row = store.rollouts(run_id, 1)[3]
    assert row.logprobs is not None and row.logprobs.tolist() == expected and row.image is not None
    assert store.steps(run_id, ["entropy"])["entropy"].tolist() == [1.0]
    assert store.events(run_id)[-1].data == {"list": [1]}


@pytest.mark.parametrize(("every", "pictured"), [(0, []), (1, [1, 2, 3, 4]), (3, [1, 3])])
def test_pictures_are_kept_of_the_first_and_every_nth_step(store: Store, every: int, pictured: list[int]) -> None:
    run_id = training_run(store)
    with StoreRecorder(store, run_id, RecordingConfig(images_every=every)) as recorder:
        for step in range(1, 5):
            recorder.step(step, {}, [group(step)])
    assert [step for step in range(1, 5) if store.rollouts(run_id, step)[0].image] == pictured
    folder = store.run_dir(run_id) / "images"
    assert len(list(folder.rglob("*.png"))) == 4 * len(pictured)


def test_identical_pictures_of_a_group_are_one_file(store: Store) -> None:
    run_id = training_run(store)
    one, two = picture(1), picture(2)
    shown = group(1, size=5, pictures=[one, two, one, two.copy(), None])
    shown.rewrites = ("a", "b", "c", "b", None)  # a and c: one array; b twice: one text on the same latents
    with StoreRecorder(store, run_id, config().recording) as recorder:
        recorder.step(1, {}, [shown])
    names = [row.image and Path(row.image).name for row in store.rollouts(run_id, 1)]
    assert names == ["g0-k0.png", "g0-k1.png", "g0-k0.png", "g0-k1.png", None]
    assert len(list((store.run_dir(run_id) / "images").rglob("*.*"))) == 2


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_large_pictures_get_a_thumbnail(store: Store, image_format: Any) -> None:
    run_id = training_run(store)
    large = np.zeros((300, 600, 3), np.uint8)
    with StoreRecorder(store, run_id, RecordingConfig(image_format=image_format)) as recorder:
        recorder.step(1, {}, [group(1, size=2, pictures=[large, picture(3, 256)])])
    first, second = store.rollouts(run_id, 1)
    assert first.image and first.thumbnail and first.image.endswith(f"images/step-000001/g0-k0.{image_format}")
    assert first.thumbnail.endswith("thumbs/step-000001/g0-k0.webp")
    assert Image.open(store.file(first.image)).size == (600, 300)
    assert Image.open(store.file(first.thumbnail)).size == (256, 128)
    assert second.image == second.thumbnail


def test_tokens_are_left_out_where_the_configuration_says_so(store: Store) -> None:
    run_id = training_run(store)
    with StoreRecorder(store, run_id, RecordingConfig(tokens=False)) as recorder:
        recorder.token_text = lambda ids: ["x"] * len(ids)
        recorder.step(1, {}, [group()])
    row = store.rollouts(run_id, 1)[3]
    assert [row.token_ids, row.tokens, row.logprobs, row.entropies, row.token_kl, row.shift] == [None] * 6
    assert row.kl is not None and row.reward is not None


def test_of_many_phases_the_newest_is_stored_and_few_others(store: Store) -> None:
    run_id = training_run(store)
    with StoreRecorder(store, run_id, config().recording) as recorder:
        before, started = store.revision(), time.monotonic()
        for done in range(1000):
            recorder.phase("rendering", done, 999)
        wait_until(lambda: store.run(run_id).phase_done == 999)
        assert store.revision() - before <= 2 + (time.monotonic() - started) / store_recorder.PHASE_S
        recorder.phase("rendering", 1, 2)
        recorder.state("evaluating")
        recorder.flush()
        assert store.run(run_id).phase == "", "the phase belonged to the state before"


def test_a_full_queue_makes_the_trainer_wait_and_loses_nothing(store: Store) -> None:
    run_id = training_run(store)
    sent: list[int] = []
    with StoreRecorder(store, run_id, config().recording) as recorder:

        def send() -> None:
            for n in range(CAPACITY * 3):
                recorder.event("note", "text", n=n)
                sent.append(n)

        thread = threading.Thread(target=send)
        with store.write():  # the recorder's own writes have to wait
            thread.start()
            wait_until(lambda: len(sent) >= CAPACITY)
            thread.join(0.3)
            assert thread.is_alive() and CAPACITY <= len(sent) <= CAPACITY + 1
        thread.join()
    notes = [event.data["n"] for event in store.events(run_id) if event.kind == "note"]
    assert notes == list(range(CAPACITY * 3))


def test_a_full_disk_is_told_to_the_trainer_at_every_later_call(store: Store) -> None:
    run_id = training_run(store)
    with store.write() as db:
        (pages,) = db.execute("PRAGMA page_count").fetchone()
        db.execute(f"PRAGMA max_page_count = {pages + 8}")
    recorder = StoreRecorder(store, run_id, RecordingConfig(images_every=0))
    full = "has no room to grow, the disk is full; free some space, then resume the run"
    with pytest.raises(StoreError, match=full):
        for step in range(1, 500):
            recorder.step(step, metrics(step), [group(step)])
    for call in (
        recorder.flush,
        lambda: recorder.phase("x"),
        lambda: recorder.event("a", "b"),
        recorder.close,
    ):
        with pytest.raises(StoreError, match=full):
            call()
    recorder.close()
    last = store.run(run_id).step
    assert 0 < last < 499 and len(store.rollouts(run_id, last)) == 4 and store.check() == []


def test_pictures_that_cannot_be_written_end_the_recording_before_their_step(store: Store) -> None:
    run_id = training_run(store)
    (store.run_dir(run_id) / "images").write_text("in the way")
    recorder = StoreRecorder(store, run_id, config().recording)
    recorder.step(1, {}, [group()])
    with pytest.raises(StoreError, match=f"files of run {run_id} can't be written to .*; make room"):
        recorder.flush()
    with pytest.raises(StoreError, match="make room"):
        recorder.close()
    assert store.run(run_id).step == 0


def test_the_trainers_own_error_is_not_hidden_by_the_recorders(store: Store) -> None:
    run_id = training_run(store)
    with pytest.raises(ZeroDivisionError), StoreRecorder(store, run_id, config().recording) as recorder:
        recorder.state("finished")  # not possible from training
        raise ZeroDivisionError


def test_a_process_that_lost_its_run_stops_recording_it(store: Store) -> None:
    run_id = training_run(store)
    recorder = StoreRecorder(store, run_id, config().recording)
    with store.write() as db:
        update_run(db, run_id, {"process_token": "a later process"})
    recorder.step(1, {}, [])
    with pytest.raises(StoreError, match="taken over by another process"):
        recorder.close()
    assert store.run(run_id).step == 0


def test_a_recorder_on_a_read_only_store_is_refused_at_once(store: Store) -> None:
    run_id = training_run(store)
    with Store(store.path, read_only=True) as watcher, pytest.raises(StoreError, match="for reading only"):
        StoreRecorder(watcher, run_id, config().recording)


def test_a_closed_recorder_takes_nothing_more(store: Store) -> None:
    run_id = training_run(store)
    recorder = StoreRecorder(store, run_id, config().recording)
    recorder.close()
    recorder.close()
    with pytest.raises(StoreError, match="is closed"):
        recorder.event("note", "late")


def test_the_living_recorder_gives_signs_of_life(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_recorder, "HEARTBEAT_S", 0.02)
    run_id = training_run(store)
    with StoreRecorder(store, run_id, config().recording):
        first = store.run(run_id).heartbeat or 0.0
        wait_until(lambda: (store.run(run_id).heartbeat or 0.0) > first)


def test_an_evaluation_of_many_pictures_gives_signs_of_life_in_between(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = training_run(store)
    beats: list[str] = []
    monkeypatch.setattr(store_recorder, "HEARTBEAT_S", 0.0)
    with StoreRecorder(store, run_id, config().recording) as recorder:
        recorder.flush()
        monkeypatch.setattr(store, "heartbeat", beats.append)
        during: list[int] = []
        save = recorder._pictures.save
        monkeypatch.setattr(recorder._pictures, "save", lambda *what: during.append(len(beats)) or save(*what))
        items = [item(f"p{number}", "original", shown=picture(number)) for number in range(5)]
        recorder.evaluation(evaluation("baseline", 0, *items))
        recorder.flush()
    assert len(set(during)) == 5, "one before each picture"


def test_metrics_json_of_a_long_run_is_rewritten_rarely_but_ends_complete(store: Store) -> None:
    run_id = training_run(store)
    fill(store, run_id, 100)
    path = store.run_dir(run_id) / "metrics.json"
    with StoreRecorder(store, run_id, config().recording) as recorder:
        written = []
        for step in range(101, 111):
            recorder.step(step, {}, [])
            recorder.flush()
            written.append(len(json.loads(path.read_text())["metrics"]["step"]))
        assert written == [101] * 6 + [107] * 4
    assert len(json.loads(path.read_text())["metrics"]["step"]) == 110


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
@example("")
@example("..")
@example("../../etc/passwd")
@example("a/b\\c:d\0")
@example("\udc80")
@example("x" * 5000)
def test_a_file_name_is_one_plain_component_whatever_the_text(text: str) -> None:
    name = file_name(text)
    assert re.fullmatch(r"[a-z0-9_][a-z0-9_.-]{0,59}", name) and ".." not in name
    for stem in (evaluation_stem(text, 3, text, text, 0), step_stem(1, 0, 0)):
        assert all(part not in ("", ".", "..") for part in stem.split("/")) and not stem.startswith("/")
        assert os.path.normpath(stem) == stem


ids = st.text(alphabet="aAbÅå.-_/ ", max_size=4)


@given(ids, ids)
@settings(max_examples=300, deadline=None)
@example("Cat", "cat")
@example("a/b", "a_b")
def test_different_texts_have_different_file_names_even_where_case_does_not_count(one: str, two: str) -> None:
    assert (one == two) == (file_name(one).lower() == file_name(two).lower())
    assert file_name(file_name(one)) != file_name(two) or file_name(one) == two or one == two


def test_prompt_ids_cannot_lead_a_picture_out_of_the_runs_folder(store: Store) -> None:
    run_id = training_run(store)
    wild = ["../../../x", "/etc/passwd", "..", ".", "", "a\0b", "CON", "é" * 300, "a\\b"]
    with StoreRecorder(store, run_id, config().recording) as recorder:
        recorder.evaluation(evaluation("../final", 1, *(item(name, shown=picture(1).copy()) for name in wild)))
    (stored,) = store.evaluations(run_id)
    rows = store.evaluation_items(stored.id)
    files = {store.file(row.image or "") for row in rows}
    assert len(files) == len(wild) and {row.prompt_id for row in rows} == set(wild)
    assert all(path.is_file() and path.is_relative_to(store.run_dir(run_id) / "images") for path in files)
    outside = {path.name for path in store.root.iterdir()} - {"runs.db", "runs.db-wal", "runs.db-shm", "runs"}
    assert outside == set()


def test_a_text_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old" and [entry.name for entry in tmp_path.iterdir()] == ["metrics.json"]
