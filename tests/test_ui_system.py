"""Runs and system: exports and imports as jobs, disk use, the queue, checks, and everything that is refused."""

from __future__ import annotations

import io
import os
import re
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import saved_policy
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from peft import PeftModel
from store_samples import config, evaluation, fill, group, in_child, item, metrics, picture, to_state, training_run
from transformers import AutoModelForImageTextToText, AutoTokenizer

from grpo_engine.checkpoint import save_checkpoint
from grpo_engine.config import RecordingConfig, RunConfig
from grpo_engine.loading import load_policy
from grpo_engine.manager import RunManager
from grpo_engine.store import Store
from grpo_engine.store.recorder import StoreRecorder
from grpo_engine.store.writes import update_run
from ui import system
from ui.context import Context, Refused
from ui.disk import DiskUse, folder_bytes
from ui.exports import ExportFolder, upload_name
from ui.jobs import MOST_WAITING, Job, JobFailed, Jobs
from ui.system import queue, routes
from ui.worker import Worker

UNKNOWN = "9999-none-zzzz"


class IdleManager(RunManager):
    """A run manager that never gets to its queue."""

    def _work(self) -> None:
        pass


class ReadyWorker(Worker):
    """A worker whose engine is imported already."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._manager = IdleManager(store)
        self._ready.set()

    def warm_up(self) -> None:
        pass


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "runs.db") as opened:
        yield opened


@pytest.fixture
def worker(store: Store) -> Worker:
    return ReadyWorker(store)


def client_of(store: Store, worker: Worker) -> TestClient:
    app = FastAPI()
    app.include_router(routes(Context(store, worker)), prefix="/grpo")
    return TestClient(app)


@pytest.fixture
def client(store: Store, worker: Worker) -> TestClient:
    return client_of(store, worker)


def ask(client: TestClient, what: str, **params: Any) -> Any:
    response = client.get(f"/grpo/system/{what}", params=params)
    assert response.status_code == 200, response.text
    return response.json()


def done(client: TestClient, response: Any) -> dict[str, Any]:
    """The job that an answer began, once it is over."""
    assert response.status_code == 200, response.text
    token = response.json()["job"]["token"]
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        job: dict[str, Any] = next(job for job in ask(client, "state")["jobs"] if job["token"] == token)
        if job["state"] in ("done", "failed"):
            return job
        time.sleep(0.02)
    raise AssertionError("the job did not end")


def recorded(store: Store, **changes: Any) -> str:
    """A finished run with two steps, their pictures, and a measured picture."""
    run_id = training_run(store, **changes)
    with StoreRecorder(store, run_id, RecordingConfig()) as recorder:
        for step in (1, 2):
            recorder.step(step, metrics(step), [group(step)])
        recorder.state("evaluating")
        found = evaluation("final", 2, item("p-1", shown=picture(1)))
        recorder.evaluation(replace(found, summary={"arms": {}, "gains": {}, "confidence": 0.95}))
        recorder.state("finished")
    return run_id


def files_of(store: Store) -> list[Path]:
    return [path for path in (store.root / "exports").rglob("*") if path.is_file()]


# Exports and imports


def test_a_bundle_is_made_downloaded_and_opens_in_another_database(
    store: Store, client: TestClient, tmp_path: Path
) -> None:
    run_id = recorded(store)
    job = done(client, client.post("/grpo/system/export", json={"run": run_id, "format": "bundle"}))
    assert (job["state"], job["file"]) == ("done", f"{run_id}.zip"), job["message"]
    answer = client.get(f"/grpo/system/download/{job['token']}")
    assert answer.status_code == 200 and len(answer.content) == job["size"]
    assert f'filename="{run_id}.zip"' in answer.headers["content-disposition"]

    with Store(tmp_path / "elsewhere" / "runs.db") as other:
        there = client_of(other, ReadyWorker(other))
        sent = there.post("/grpo/system/import", content=answer.content, headers={"X-Name": "my%20run.zip"})
        job = done(there, sent)
        assert (job["state"], job["title"]) == ("done", "Import of my_run.zip"), job["message"]
        (row,) = ask(there, "state")["table"]["runs"]
        assert (row["id"], row["recorded"], row["step"]) == (job["run"], True, 2)
        shown = other.rollouts(row["id"], 1)[0].image
        assert shown is not None and other.file(shown).is_file()
        assert files_of(other) == []  # the upload is gone
        other.delete(row["id"])
        assert other.runs() == []


def test_a_bundle_of_this_database_comes_in_only_when_a_copy_is_asked_for(store: Store, client: TestClient) -> None:
    run_id = recorded(store)
    made = done(client, client.post("/grpo/system/export", json={"run": run_id, "format": "bundle", "images": "none"}))
    content = client.get(f"/grpo/system/download/{made['token']}").content
    job = done(client, client.post("/grpo/system/import", content=content))
    assert job["state"] == "failed" and "recorded in this database" in job["message"]
    assert str(store.root) not in job["message"] and "--again" not in job["message"]
    job = done(client, client.post("/grpo/system/import", params={"again": True}, content=content))
    assert job["state"] == "done" and store.run(job["run"]).source == "imported"


@pytest.mark.parametrize("content", [b"no zip", b"PK\x05\x06" + bytes(18), bytes(100_000), b"SQLite format 3\x00"])
def test_what_is_no_bundle_fails_in_a_sentence_and_leaves_nothing(
    store: Store, client: TestClient, content: bytes
) -> None:
    job = done(client, client.post("/grpo/system/import", content=content, headers={"X-Name": "../../etc/passwd"}))
    assert job["state"] == "failed" and job["message"].startswith("passwd is not a bundle"), job["message"]
    assert store.runs() == [] and files_of(store) == []


def test_an_empty_or_oversized_upload_is_refused_and_leaves_nothing(
    store: Store, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = client.post("/grpo/system/import", content=b"")
    assert answer.status_code == 422 and "empty" in answer.json()["error"]
    monkeypatch.setattr(system, "MOST_BYTES", 10_000)
    answer = client.post("/grpo/system/import", content=bytes(20_000))
    assert answer.status_code == 413 and "larger than" in answer.json()["error"]
    assert ask(client, "state")["jobs"] == [] and not list((store.root / "exports").iterdir())


def test_a_disk_that_takes_no_folder_is_told_in_a_sentence_with_what_to_do(store: Store, client: TestClient) -> None:
    run_id = recorded(store)
    (store.root / "exports").write_bytes(b"a file where the folder should be")
    for answer in (
        client.post("/grpo/system/export", json={"run": run_id, "format": "bundle"}),
        client.post("/grpo/system/import", content=b"a bundle"),
    ):
        assert answer.status_code == 409, answer.text
        assert re.match("The disk refused: .* Free some space, or make the folder", answer.json()["error"])
    assert ask(client, "state")["jobs"] == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_an_upload_that_does_not_fit_on_the_disk_is_told_in_a_sentence_and_leaves_nothing(
    store: Store, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "upload_name", lambda header: "/dev/full")
    answer = client.post("/grpo/system/import", content=bytes(20_000))
    assert answer.status_code == 409, answer.text
    assert answer.json()["error"].startswith("The disk refused: No space left on device. Free some space")
    assert ask(client, "state")["jobs"] == [] and not list((store.root / "exports").iterdir())


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("run.zip", "run.zip"),
        ("..%2F..%2Fruns.db", "runs.db"),
        ("C:%5Ctemp%5Crun%201.zip", "run_1.zip"),
        ("%00%0a..", "bundle.zip"),
        ("", "bundle.zip"),
        ("x" * 5000, "x" * 80),
    ],
)
def test_an_upload_is_stored_under_a_plain_name(header: str, name: str) -> None:
    assert upload_name(header) == name


@pytest.mark.parametrize(("format", "member"), [("peft", "adapter_model.safetensors"), ("pth", "pure_grpo_policy.pth")])
def test_a_policy_is_exported_as_one_file(
    store: Store, client: TestClient, tmp_path: Path, format: str, member: str
) -> None:
    base = saved_policy.write_base(tmp_path / "base")
    run_id = recorded(store, models={"policy": {"path": str(base)}})
    policy = saved_policy.load_policy(base)
    saved_policy.save(store.run_dir(run_id), base, (policy, saved_policy.new_optimizer(policy)), 2)
    assert ask(client, "export", run=run_id)["checkpoints"] == [2]
    job = done(client, client.post("/grpo/system/export", json={"run": run_id, "format": format}))
    assert job["state"] == "done", job["message"]
    content = client.get(f"/grpo/system/download/{job['token']}").content
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert f"{run_id}-{format}/{member}" in archive.namelist() and archive.testzip() is None
        assert f"{run_id}-{format}/README.md" in archive.namelist()
    assert [path.name for path in files_of(store)] == [f"{run_id}-{format}.zip"]
    client.post("/grpo/system/discard", json={"token": job["token"]})
    assert files_of(store) == [] and client.get(f"/grpo/system/download/{job['token']}").status_code == 404


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_the_embedded_policy_is_downloaded_as_something_that_loads(
    store: Store, client: TestClient, tmp_path: Path, format: str
) -> None:
    settings = RunConfig.load("tiny")
    run_id, policy = recorded(store), load_policy(settings, torch.device("cpu"))
    optimizer = saved_policy.new_optimizer(policy)  # type: ignore[arg-type]
    folder = store.run_dir(run_id)
    save_checkpoint(folder, policy=policy, optimizer=optimizer, step=2, config=settings, metrics={})
    before = torch.random.get_rng_state()
    job = done(client, client.post("/grpo/system/export", json={"run": run_id, "format": format}))
    assert job["state"] == "done", job["message"]
    assert torch.equal(before, torch.random.get_rng_state()), "no model was made in the process that trains"
    content = client.get(f"/grpo/system/download/{job['token']}").content
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        archive.extractall(tmp_path)
    export = tmp_path / f"{run_id}-{format}"
    loaded: Any = AutoModelForImageTextToText.from_pretrained(export / "base" if format == "peft" else export)
    if format == "peft":
        loaded = PeftModel.from_pretrained(loaded, export)
    assert AutoTokenizer.from_pretrained(export / "base" if format == "peft" else export).chat_template
    assert sum(parameter.numel() for parameter in loaded.parameters()) > 1_000_000


def test_every_export_says_what_it_is_for(store: Store, client: TestClient) -> None:
    told = {row["format"]: row["text"] for row in ask(client, "export", run=recorded(store))["formats"]}
    words = {"bundle": "Opens in any database", "peft": "vLLM", "merged": "transformers", "pth": "pure_grpo_policy.pth"}
    assert told.keys() == words.keys() and all(word in told[format] for format, word in words.items())


def test_a_damaged_checkpoint_is_said_and_nothing_is_left(store: Store, client: TestClient, tmp_path: Path) -> None:
    base = saved_policy.write_base(tmp_path / "base")
    run_id = recorded(store, models={"policy": {"path": str(base)}})
    policy = saved_policy.load_policy(base)
    folder = saved_policy.save(store.run_dir(run_id), base, (policy, saved_policy.new_optimizer(policy)), 2)
    (folder / "adapter_model.safetensors").write_bytes(b"cut short")
    job = done(client, client.post("/grpo/system/export", json={"run": run_id, "format": "peft"}))
    assert job["state"] == "failed" and "checkpoint" in job["message"] and job["file"] is None
    assert files_of(store) == []


def test_what_can_not_be_exported_says_why_before_and_when_it_is_tried(store: Store, client: TestClient) -> None:
    bare, active = recorded(store), training_run(store)
    full = training_run(store, models={"policy": {"adapter": "full"}})
    (store.run_dir(full) / "checkpoints" / "step-000001").mkdir(parents=True)
    cases = [
        (bare, "peft", "no checkpoint yet"),
        (bare, "merged", "no checkpoint yet"),
        (active, "bundle", "The run is training"),
        (full, "peft", "All weights were trained"),
    ]
    for run_id, format, why in cases:
        told = {row["format"]: row["why"] for row in ask(client, "export", run=run_id)["formats"]}
        assert why in told[format]
        answer = client.post("/grpo/system/export", json={"run": run_id, "format": format})
        assert answer.status_code == 409 and why in answer.json()["error"]
    assert ask(client, "state")["jobs"] == [] and not (store.root / "exports").exists()


@pytest.mark.parametrize(
    "token", ["", "x", "..%2f..%2fruns.db", "../../runs.db", "%00", "runs.db", "a" * 3000, "{other}"]
)
def test_only_files_of_finished_exports_can_be_downloaded(store: Store, client: TestClient, token: str) -> None:
    other = client.post("/grpo/system/check").json()["job"]["token"]  # a job, but without a file
    answer = client.get(f"/grpo/system/download/{token.replace('{other}', other)}")
    assert answer.status_code == 404 and b"SQLite" not in answer.content


def test_folders_of_processes_that_are_gone_are_removed_and_no_others(store: Store) -> None:
    child = in_child(time.sleep, 0)
    child.join()
    home = store.root / "exports"
    for name in (f"{child.pid}-0123456789ab", f"{os.getppid()}-0123456789ab", f"{os.getpid()}-0123456789ab", "mine"):
        (home / name).mkdir(parents=True)
        (home / name / "file").write_bytes(b"1")
    (home / f"{child.pid}-0123456789ab.txt").write_bytes(b"1")
    ExportFolder(store)
    assert sorted(path.name for path in home.iterdir()) == sorted(
        [f"{os.getppid()}-0123456789ab", "mine", f"{child.pid}-0123456789ab.txt"]
    )


# Jobs


def test_large_jobs_take_turns_and_a_quick_check_does_not_wait_for_them() -> None:
    jobs, order, first_may_end = Jobs(), [], threading.Event()

    def work(name: str, wait: bool) -> Callable[[Job], None]:
        def go(job: Job) -> None:
            order.append(f"{name} begins")
            assert not wait or first_may_end.wait(30)
            order.append(f"{name} ends")

        return go

    large = jobs.start(Job("export", "large"), work("large", True))
    second = jobs.start(Job("export", "second"), work("second", False))
    quick = jobs.start(Job("check", "quick"), work("quick", False), alone=False)
    _wait(lambda: quick.over)
    assert not large.over and not second.over
    with pytest.raises(Refused, match="still being worked on"):
        jobs.discard(large.token)
    first_may_end.set()
    _wait(lambda: second.over)
    assert order.index("large ends") < order.index("second begins")


def test_too_many_waiting_jobs_are_refused_and_their_folders_removed(tmp_path: Path) -> None:
    jobs, end = Jobs(), threading.Event()
    for _ in range(MOST_WAITING):
        jobs.start(Job("export", "waits"), lambda job: assert_set(end))
    folder = tmp_path / "one-more"
    folder.mkdir()
    with pytest.raises(Refused, match="jobs wait already"):
        jobs.start(Job("export", "one more", folder=folder), lambda job: None)
    assert not folder.exists()
    end.set()


def assert_set(event: threading.Event) -> None:
    assert event.wait(30)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (JobFailed("No room."), "No room."),
        (
            OSError(28, "No space left on device"),
            "The disk refused: No space left on device. Free some space, or make the folder of the database writable, "
            "and try again.",
        ),
        (ZeroDivisionError("secret detail"), "Something went wrong inside the app; the details are in its log."),
    ],
)
def test_a_failed_job_says_so_in_a_sentence_and_leaves_no_file(tmp_path: Path, error: Exception, said: str) -> None:
    def work(job: Job) -> None:
        assert job.folder is not None
        (job.folder / "half").write_bytes(b"1")
        job.file = job.folder / "half"
        raise error

    (tmp_path / "made").mkdir()
    job = Jobs().start(Job("export", "fails", folder=tmp_path / "made"), work)
    _wait(lambda: job.over)
    row = job.row()
    assert (row["state"], row["message"], row["file"]) == ("failed", said, None)
    assert not (tmp_path / "made").exists()


def _wait(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


# Disk


def test_a_folder_is_measured_by_what_its_files_are(tmp_path: Path) -> None:
    for name, size in (("images/step-000001/a.png", 100), ("thumbs/a.webp", 20), ("checkpoints/step-1/x", 3000),
                       ("config.yaml", 7), ("odd/images/y", 1)):  # fmt: skip
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
    (tmp_path / "large").write_bytes(bytes(10_000))
    (tmp_path / "run" / "images" / "link.png").symlink_to(tmp_path / "large")
    sizes = folder_bytes(tmp_path / "run")
    link = len(str(tmp_path / "large"))
    assert sizes == {"pictures": 120 + link, "checkpoints": 3000, "other": 8}
    assert folder_bytes(tmp_path / "nothing") == {"pictures": 0, "checkpoints": 0, "other": 0}


def measured(disk: DiskUse) -> dict[str, Any]:
    _wait(lambda: not disk.look()["measuring"])
    return disk.look()


def test_disk_use_is_measured_again_only_when_a_run_has_changed(store: Store) -> None:
    done_run, active = to_state(store, "stopped"), training_run(store)
    disk = DiskUse(store)
    first = measured(disk)
    assert set(first["runs"]) == {done_run, active} and first["free"] > 0 and first["database"] > 0
    for run_id in (done_run, active):
        (store.run_dir(run_id) / "checkpoints").mkdir()
        (store.run_dir(run_id) / "checkpoints" / "new").write_bytes(bytes(5000))
    assert measured(disk)["runs"][done_run]["checkpoints"] == 0  # the run says that nothing happened
    fill(store, active, 1)
    assert measured(disk)["runs"][active]["checkpoints"] == 0  # goes on: not walked at every step
    store.set_state(active, "stopped")
    assert measured(disk)["runs"][active]["checkpoints"] == 5000
    store.delete(active)
    assert set(measured(disk)["runs"]) == {done_run}


# The queue


def test_waiting_runs_stand_in_their_order_and_can_be_taken_out(
    store: Store, worker: Worker, client: TestClient
) -> None:
    runs = [store.create_run(config()) for _ in range(3)]
    for run_id in runs:
        worker.manager().enqueue(run_id)
    assert [row["id"] for row in ask(client, "state")["queue"]["waiting"]] == runs
    assert client.post("/grpo/system/queue/remove", json={"run": runs[1]}).status_code == 200
    told = ask(client, "state")["queue"]
    assert [row["id"] for row in told["waiting"]] == [runs[0], runs[2]] and told["forgotten"] == []
    assert store.run(runs[1]).state == "stopped"


def test_a_run_that_just_begins_is_asked_to_stop_rather_than_called_stopped(store: Store) -> None:
    run_id = store.create_run(config())

    class Beginning(IdleManager):
        """It has taken the run out of its queue; the run's first state is not written yet."""

        current = run_id

    worker = ReadyWorker(store)
    worker._manager = Beginning(store)
    worker.command(run_id, "stop")
    assert store.run(run_id).state == "queued"
    assert [row.command for row in store.take_commands(run_id)] == ["stop"]


def test_a_queued_run_that_nobody_holds_can_be_put_back_or_dropped(
    store: Store, worker: Worker, client: TestClient
) -> None:
    runs = [store.create_run(config()) for _ in range(2)]
    assert queue(store, worker)["forgotten"] == []  # perhaps another program is about to take it up
    with store.write() as db:
        for run_id in runs:
            update_run(db, run_id, {"updated": time.time() - 60})
    assert [row["id"] for row in ask(client, "state")["queue"]["forgotten"]] == runs
    assert client.post("/grpo/system/queue/put-back", json={"run": runs[0]}).status_code == 200
    assert client.post("/grpo/system/queue/remove", json={"run": runs[1]}).status_code == 200
    told = ask(client, "state")["queue"]
    assert ([row["id"] for row in told["waiting"]], told["forgotten"]) == ([runs[0]], [])
    assert store.run(runs[1]).state == "stopped"
    again = client.post("/grpo/system/queue/put-back", json={"run": runs[0]})
    assert again.status_code == 409 and "already queued" in again.json()["error"]


@pytest.mark.parametrize("action", ["remove", "put-back"])
def test_a_run_that_does_not_wait_is_neither_taken_out_nor_put_back(
    store: Store, client: TestClient, action: str
) -> None:
    for state in ("training", "finished"):
        run_id = to_state(store, state)
        answer = client.post(f"/grpo/system/queue/{action}", json={"run": run_id})
        assert answer.status_code == 409 and f"is {state}" in answer.json()["error"]
        assert store.run(run_id).state == state


# The machine


def test_a_missing_step_is_found_by_the_check_of_the_database(store: Store, client: TestClient) -> None:
    run_id = training_run(store)
    fill(store, run_id, 5)
    job = done(client, client.post("/grpo/system/check"))
    assert (job["result"]["problems"], job["message"]) == ([], "Nothing is wrong with it.")
    with store.write() as db:
        db.execute("DELETE FROM steps WHERE step = 3")
    job = done(client, client.post("/grpo/system/check"))
    assert job["result"]["problems"] == [f"Run {run_id}: step 3 is missing."] and job["message"] == ""


def test_the_doctor_tells_versions_devices_and_what_is_wrong_with_the_database(
    store: Store, client: TestClient
) -> None:
    run_id = training_run(store)
    fill(store, run_id, 2)
    with store.write() as db:
        db.execute("DELETE FROM steps WHERE step = 1")
    result = done(client, client.post("/grpo/system/doctor"))["result"]
    assert result["packages"]["torch"] and "cpu" in result["devices"]
    assert f"Run {run_id}: step 1 is missing." in result["problems"]


def test_a_page_can_look_at_the_machine_before_the_engine_is_imported(store: Store) -> None:
    told = ask(client_of(store, Worker(store)), "machine")
    assert (told["engine"], told["versions"]) == ("loading", {})
    (cpu,) = told["devices"]
    assert cpu["name"] == "cpu" and 0 < cpu["free"] <= cpu["total"]
    assert told["database"]["path"] == str(store.path)
    ready = ask(client_of(store, ReadyWorker(store)), "machine")
    assert ready["versions"]["torch"] and ready["devices"][-1]["name"] == "cpu"


# Refusals


def test_unknown_runs_are_answered_in_a_sentence(store: Store, client: TestClient) -> None:
    for run_id in (UNKNOWN, "../../etc", "<b>"):
        answers = [client.get("/grpo/system/export", params={"run": run_id})]
        for action, body in (
            ("export", {"run": run_id, "format": "bundle"}),
            ("queue/remove", {"run": run_id}),
            ("queue/put-back", {"run": run_id}),
        ):
            answers.append(client.post(f"/grpo/system/{action}", json=body))
        for answer in answers:
            assert answer.status_code == 404 and "There is no run" in answer.json()["error"], answer.text
    assert client.post("/grpo/system/discard", json={"token": "x"}).status_code == 404


@pytest.mark.parametrize("action", ["export", "discard", "queue/remove", "queue/put-back"])
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"run": 5}', b'{"run": ""}', b"\xff\xfe"])
def test_malformed_bodies_are_answered_in_a_sentence(client: TestClient, action: str, body: bytes) -> None:
    answer = client.post(f"/grpo/system/{action}", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422 and "error" in answer.json()


@pytest.mark.parametrize(
    "change",
    [{"format": "exe"}, {"checkpoint": "../x"}, {"every": 0}, {"every": "x"}, {"images": "some"}, {"to": "/tmp/x"}],
)
def test_an_export_with_strange_choices_is_refused(store: Store, client: TestClient, change: dict[str, Any]) -> None:
    body = {"run": recorded(store), "format": "bundle"} | change
    answer = client.post("/grpo/system/export", json=body)
    assert answer.status_code == 422 and answer.json()["error"].endswith(".")
    assert not (store.root / "exports").exists()


def test_nothing_changes_by_looking(store: Store, client: TestClient) -> None:
    recorded(store)
    before = store.revision()
    for what in ("state", "disk", "machine"):
        ask(client, what)
    for action in ("export", "import", "discard", "check", "doctor", "queue/remove", "queue/put-back"):
        assert client.get(f"/grpo/system/{action}").status_code in (405, 422)
    assert store.revision() == before and not (store.root / "exports").exists()
