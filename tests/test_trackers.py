"""Trackers: what they hear, and that nothing that happens to them happens to the run.

A small tracker of accelerate's own kind stands in accelerate's register in the place of W&B's; TensorBoard is real.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from engine_runs import create, small
from store_samples import config, evaluation, group, metrics
from test_cli import call

from grpo_engine import trackers
from grpo_engine.config import RunConfig
from grpo_engine.control import RunControl
from grpo_engine.recorder import STEP_METRICS, Evaluation
from grpo_engine.session import Session
from grpo_engine.store import Store
from grpo_engine.trackers import TrackedRecorder

SUMMARY = {
    "arms": {"trained": {"reward": 31.5, "judge": None}},
    "gains": {"trained_vs_untrained": {"mean": 2.0, "low": 1.0, "high": 3.0}},
}


class ListTracker(GeneralTracker):
    """Keeps what it hears; fails or waits in the method named by the run's project."""

    name = "wandb"
    requires_logging_directory = False
    made: list[ListTracker] = []
    release = threading.Event()

    def __init__(self, run_name: str, **options: Any) -> None:
        super().__init__()
        self.run_name, self.options = run_name, options
        self.heard: list[tuple[str, Any]] = []
        self.made.append(self)

    @property
    def tracker(self) -> list[tuple[str, Any]]:
        return self.heard

    def _hear(self, what: str, values: Any = None) -> None:
        self.heard.append((what, values))
        if self.run_name == f"fails in {what}":
            raise ConnectionError("no\nnetwork")
        if self.run_name == f"hangs in {what}":
            self.release.wait(60)

    def start(self) -> None:
        self._hear("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._hear("settings", values)

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        self._hear("log", (step, values))

    def finish(self) -> None:
        self._hear("finish")


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ListTracker]]:
    """Trackers that were made, in their order."""
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, ListTracker)
        monkeypatch.setitem(trackers.AVAILABLE, name, lambda: True)
    monkeypatch.setattr(ListTracker, "made", [])
    monkeypatch.setattr(ListTracker, "release", threading.Event())
    yield ListTracker.made
    ListTracker.release.set()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "runs.db") as opened:
        yield opened


def tracked(project: str = "a project", *names: str) -> RunConfig:
    recording = {"trackers": names or ("wandb",), "project": project, "tags": ("a", "b"), "name": "the first"}
    return config(recording=recording)


def events(store: Store, run_id: str, kind: str) -> list[str]:
    return [event.message for event in store.events(run_id) if event.kind == kind]


def record(store: Store, settings: RunConfig, steps: int = 3) -> str:
    """A run of some steps and an evaluation, recorded to its end."""
    run_id = store.create_run(settings)
    with TrackedRecorder(store, run_id, settings) as recorder:
        recorder.state("loading")
        recorder.state("training")
        for step in range(1, steps + 1):
            recorder.step(step, metrics(step) | {"judge_mean": None, "entropy": float("nan")}, [group(step)])
        recorder.state("evaluating")
        recorder.evaluation(Evaluation("final", steps, "test", evaluation("final", steps).items, SUMMARY))
        recorder.state("finished")
    return run_id


def test_a_tracker_hears_the_settings_every_step_and_the_gains_and_is_closed(
    store: Store, listening: list[ListTracker]
) -> None:
    run_id = record(store, tracked())
    (tracker,) = listening
    assert tracker.run_name == "a project"
    assert tracker.options["name"] == "the first" and tracker.options["id"] == run_id
    assert tracker.options["tags"] == ["a", "b"]
    kinds = [kind for kind, _ in tracker.heard]
    assert kinds == ["start", "settings", "log", "log", "log", "log", "finish"]
    settings = tracker.heard[1][1]
    assert settings["training.steps"] == 40 and settings["recording.tags"] == "a, b"
    assert all(isinstance(value, bool | int | float | str | None) for value in settings.values())
    logged = [values for kind, values in tracker.heard if kind == "log"]
    for step, values in logged[:3]:
        wanted = {name: value for name, value in metrics(step).items() if name not in ("judge_mean", "entropy")}
        assert values == wanted and values.keys() <= STEP_METRICS.keys()
    gains = {"gain": 2.0, "gain_low": 1.0, "gain_high": 3.0}
    final = {f"final/trained_vs_untrained/{name}": value for name, value in gains.items()}
    assert logged[3] == (3, {"final/trained/reward": 31.5} | final)
    assert events(store, run_id, "warning") == []


@pytest.mark.parametrize("where", ["start", "settings", "log", "finish"])
def test_a_tracker_that_fails_is_warned_of_once_and_the_run_and_other_trackers_go_on(
    store: Store, listening: list[ListTracker], where: str
) -> None:
    run_id = record(store, tracked(f"fails in {where}", "wandb", "mlflow"), steps=6)
    run = store.run(run_id)
    assert (run.state, run.step) == ("finished", 6)
    (warning,) = events(store, run_id, "warning")
    assert warning == "The tracker wandb stopped (ConnectionError: no network); the run goes on without it."
    failing, other = sorted(listening, key=lambda tracker: "experiment_name" in tracker.options)
    assert failing.heard[-1][0] == "finish", "closed after a failure too"
    assert [kind for kind, _ in other.heard] == ["start", "settings", *["log"] * 7, "finish"]


def test_a_tracker_that_hangs_holds_up_neither_a_step_nor_the_end(
    store: Store, listening: list[ListTracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "CLOSE_S", 0.5)
    begun = time.monotonic()
    run_id = record(store, tracked("hangs in log"), steps=50)
    assert time.monotonic() - begun < 15
    assert store.run(run_id).step == 50
    (warning,) = events(store, run_id, "warning")
    assert "had not sent everything when the run ended" in warning


def test_a_failed_run_closes_its_trackers(store: Store, listening: list[ListTracker]) -> None:
    run_id = store.create_run(tracked())
    with pytest.raises(ZeroDivisionError), TrackedRecorder(store, run_id, tracked()) as recorder:
        recorder.state("loading")
        recorder.state("training")
        recorder.step(1, metrics(1), [group()])
        raise ZeroDivisionError
    assert [kind for kind, _ in listening[0].heard][-2:] == ["log", "finish"]


def test_without_trackers_nothing_is_made(store: Store, listening: list[ListTracker]) -> None:
    before = threading.active_count()
    record(store, config())
    assert listening == [] and threading.active_count() == before


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused_with_the_command_before_anything_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(trackers.AVAILABLE, name, lambda: False)
    outcome = call("train", "--check", "--db", tmp_path / "runs.db", "--set", f"recording.trackers=[{name}]")
    assert outcome.code == 2
    assert f"recording.trackers has {name}" in outcome.err and f"'pip install {name}'" in outcome.err


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Name -> step -> value of all event files in a folder, as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    read.Reload()
    return {tag: {event.step: event.value for event in read.Scalars(tag)} for tag in read.Tags()["scalars"]}


def test_tensorboard_reads_back_what_the_store_has_where_a_resumed_run_did_a_step_again_too(store: Store) -> None:
    pytest.importorskip("tensorboard", reason="in requirements-test.txt")
    settings = small("recording.trackers=[tensorboard]", "training.steps=4", "recording.checkpoint_every=2")
    run_id = create(store, settings)
    control = RunControl()

    class Stopping(Session):
        def _after_step(self, trainer: Any, recorder: Any, plan: Any, step: int, values: Any) -> None:
            super()._after_step(trainer, recorder, plan, step, values)
            if step == 3:
                control.command("stop")

    assert Stopping(store, run_id, control).run() == "stopped"
    folder = store.run_dir(run_id) / "tensorboard"
    assert set(scalars(folder)["reward_mean"]) == {1, 2, 3}
    shutil.rmtree(store.run_dir(run_id) / "checkpoints" / "step-000003")  # as if it had been killed
    assert Session(store, run_id, RunControl()).run() == "finished"
    recorded, found = store.steps(run_id), scalars(folder)
    for name in ("reward_mean", "kl_penalty", "grad_norm"):
        assert list(found[name]) == [1, 2, 3, 4]
        assert list(found[name].values()) == pytest.approx(recorded[name].tolist(), rel=1e-6)
    summary = store.run(run_id).summary
    assert summary is not None
    gain = summary["gains"]["trained_vs_untrained"]["mean"]
    assert found["final/trained_vs_untrained/gain"] == {4: pytest.approx(gain, rel=1e-6)}
    assert events(store, run_id, "warning") == []
