"""A run's whole life on the real models: finishing, stopping, pausing, failing, dying, and going on."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_runs import (
    RankScorer,
    StopAtPoll,
    assert_same_steps,
    create,
    equal,
    flags,
    fresh_environment,
    recorded,
    saved,
    small,
    wait_until,
)
from PIL import Image
from torch import Tensor

from grpo_engine.checkpoint import find_checkpoint, verify_checkpoint
from grpo_engine.config import ROOT, ConfigError, RunConfig
from grpo_engine.control import RunControl
from grpo_engine.environment import PureGRPOPromptEnvironment
from grpo_engine.manager import RunManager, execute
from grpo_engine.plan import Plan
from grpo_engine.prompts import load_prompts
from grpo_engine.session import Session, evaluate_run
from grpo_engine.store import Store, StoreError
from grpo_engine.store.rows import RunRow
from grpo_engine.store.writes import update_run

STEPS = 5
LENGTH = f"training.steps={STEPS}"


@dataclass
class Reference:
    """A run that nobody disturbed."""

    store: Store
    run: RunRow
    polls: int


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    with Store(tmp_path_factory.mktemp("reference") / "runs.db") as store:
        control = StopAtPoll()
        run_id = create(store, small(LENGTH))
        assert execute(store, run_id, control) == "finished", store.run(run_id).error
        yield Reference(store, store.run(run_id), control.count)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "runs.db") as opened:
        yield opened


@pytest.fixture
def manager(store: Store) -> Iterator[RunManager]:
    made = RunManager(store)
    yield made
    made.close()


def assert_like(reference: Reference, store: Store, run_id: str) -> None:
    """The run ended as the undisturbed one did: no step missing or doubled, the same numbers, the same adapter."""
    assert store.check() == []
    assert store.run(run_id).state == "finished"
    assert store.steps(run_id, ["reward_mean"])["step"].tolist() == list(range(1, STEPS + 1))
    assert_same_steps(recorded(store, run_id), recorded(reference.store, reference.run.id))
    assert saved(store, run_id, STEPS) == saved(reference.store, reference.run.id, STEPS)
    assert store.run(run_id).summary == reference.run.summary
    for step in range(1, STEPS + 1):
        rows, others = store.rollouts(run_id, step), reference.store.rollouts(reference.run.id, step)
        assert [(row.g, row.k, row.rewrite, row.reward) for row in rows] == [
            (row.g, row.k, row.rewrite, row.reward) for row in others
        ]
        assert all(row.image and store.file(row.image).is_file() for row in rows if row.rewrite is not None)


# -- a run that is left alone --------------------------------------------------------------------------------


def test_a_run_goes_through_its_states_in_order_and_ends_finished(reference: Reference) -> None:
    events = reference.store.events(reference.run.id, limit=None)
    states = [event.data["state"] for event in events if event.kind == "state"]
    assert states == ["queued", "loading", "baseline", "training", "evaluating", "finished"]
    assert reference.run.state == "finished"
    assert reference.run.error is None
    assert (reference.run.step, reference.run.total_steps) == (STEPS, STEPS)


def test_a_run_is_measured_before_and_after_and_says_what_it_gained(reference: Reference) -> None:
    store, run_id = reference.store, reference.run.id
    baseline, final = store.evaluations(run_id)
    assert (baseline.kind, baseline.step, baseline.split) == ("baseline", 0, "test")
    assert (final.kind, final.step, final.split) == ("final", STEPS, "test")
    arms = ("original", "untrained", "untrained_greedy"), ("trained", "trained_greedy")
    for evaluation, names in zip((baseline, final), arms, strict=True):
        items = store.evaluation_items(evaluation.id)
        assert {item.arm for item in items} == set(names)
        assert len(items) == 2 * len(names)
        assert all(item.image and store.file(item.image).is_file() for item in items if item.rewrite is not None)
    assert set(final.summary["arms"]) == {*arms[0], *arms[1]}
    assert "trained_vs_untrained" in final.summary["gains"]
    assert reference.run.summary == final.summary
    reports = [event.message for event in store.events(run_id, limit=None) if event.kind == "report"]
    assert reports == [final.summary["sentence"]]


def test_a_run_leaves_its_files(reference: Reference) -> None:
    folder = reference.store.run_dir(reference.run.id)
    assert RunConfig.load(folder / "config.yaml") == small(LENGTH)
    log = (folder / "grpo_training.log").read_text(encoding="utf-8")
    assert all(f"step {step}/{STEPS}" in log for step in range(1, STEPS + 1))
    assert "finished" in log.splitlines()[-1]
    numbers = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert numbers["state"] == "finished"
    assert numbers["metrics"]["step"] == list(range(1, STEPS + 1))
    rewards = reference.store.steps(reference.run.id, ["reward_mean"])["reward_mean"]
    assert numbers["metrics"]["reward_mean"] == pytest.approx(rewards.tolist())
    assert [entry["kind"] for entry in numbers["evaluations"]] == ["baseline", "final"]
    pictures = list((folder / "images").rglob("*.png"))
    assert len(pictures) > STEPS
    with Image.open(pictures[0]) as picture:
        assert picture.size == (96, 96)


def test_a_run_keeps_its_checkpoints_every_so_many_steps_and_at_the_end(reference: Reference) -> None:
    folder = reference.store.run_dir(reference.run.id)
    last = verify_checkpoint(find_checkpoint(folder, "last").path)
    assert last.step == STEPS
    rewards = reference.store.steps(reference.run.id, ["reward_mean"])["reward_mean"]
    assert last.metrics["reward_mean"] == pytest.approx(rewards[-1])
    assert {path.name for path in (folder / "checkpoints").glob("step-*")} >= {"step-000004", "step-000005"}


def test_a_run_records_every_rollout_with_its_tokens(reference: Reference) -> None:
    rows = reference.store.rollouts(reference.run.id, 1)
    assert [(row.g, row.k) for row in rows] == [(g, k) for g in range(2) for k in range(3)]
    for row in rows:
        assert row.token_ids is not None
        assert row.tokens is not None
        assert row.logprobs is not None
        assert row.token_kl is not None
        assert len(row.token_ids) == len(row.tokens) == len(row.logprobs) == len(row.token_kl)
        assert (row.logprobs <= 0).all()
    for g in range(2):
        assert len({row.latent_seed for row in rows if row.g == g}) == 1, "a group shares its latent"


def test_the_same_settings_give_the_same_run_twice(reference: Reference, store: Store) -> None:
    run_id = create(store, small(LENGTH))
    assert execute(store, run_id) == "finished"
    assert_like(reference, store, run_id)


def test_another_seed_gives_another_run(reference: Reference, store: Store) -> None:
    run_id = create(store, small("training.steps=1", "seed=1"))
    assert execute(store, run_id) == "finished"
    mine, theirs = recorded(store, run_id), recorded(reference.store, reference.run.id)
    assert mine["total_loss"][0] != theirs["total_loss"][0]
    assert {row.prompt for row in store.rollouts(run_id, 1)} != {
        row.prompt for row in reference.store.rollouts(reference.run.id, 1)
    }


# -- stopping and going on -----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.03, 0.5, 0.7, 0.97])
def test_a_run_stopped_anywhere_and_resumed_ends_like_an_undisturbed_one(
    reference: Reference, store: Store, share: float
) -> None:
    run_id = create(store, small(LENGTH))
    assert execute(store, run_id, StopAtPoll(round(share * reference.polls))) == "stopped"
    stopped = store.run(run_id)
    assert stopped.error is None
    assert "resumed" in stopped.message
    assert execute(store, run_id) == "finished"
    assert store.run(run_id).resumed_count == 1
    assert_like(reference, store, run_id)


def stop_at_gradient(loaded: PureGRPOPromptEnvironment, control: RunControl, number: int) -> None:
    """Ask to stop while the ``number``-th backward pass is under way."""
    seen = [0]

    def count(gradient: Tensor) -> None:
        seen[0] += 1
        if seen[0] == number:
            control.command("stop")

    list(loaded.policy.trainable().values())[-1].register_hook(count)


@pytest.mark.parametrize("number", [5, 6, 7])
def test_a_stop_between_the_updates_of_one_step_leaves_no_trace(
    tmp_path_factory: pytest.TempPathFactory, number: int
) -> None:
    # Step 2 makes backward passes 5 to 8, each followed by an update of its own.
    config = small("training.inner_epochs=2", "training.minibatches=2", "training.learning_rate=1e-2")
    with Store(tmp_path_factory.mktemp("runs") / "runs.db") as store:
        undisturbed, disturbed = create(store, config), create(store, config)
        whole = fresh_environment(config, RankScorer())
        assert Session(store, undisturbed, RunControl(), loaded=whole).run() == "finished"
        control, loaded = RunControl(), fresh_environment(config, RankScorer())
        stop_at_gradient(loaded, control, number)
        assert Session(store, disturbed, control, loaded=loaded).run() == "stopped"
        assert store.run(disturbed).step in (1, 2)
        again = fresh_environment(config, RankScorer())
        assert Session(store, disturbed, RunControl(), loaded=again).run() == "finished"
        assert_same_steps(recorded(store, undisturbed), recorded(store, disturbed))
        assert saved(store, disturbed, 3) == saved(store, undisturbed, 3)


def test_a_stop_keeps_the_figures_of_the_checkpoint_it_writes(store: Store) -> None:
    config = small("recording.checkpoint_every=1", "recording.keep_checkpoints=9", "training.update_rows=0")
    control, loaded = RunControl(), fresh_environment(config, RankScorer())
    run_id = create(store, config)
    stop_at_gradient(loaded, control, 5)  # the first of step 3's two
    assert Session(store, run_id, control, loaded=loaded).run() == "stopped"
    rewards = store.steps(run_id, ["reward_mean"])["reward_mean"]
    assert len(rewards) == 2
    last = verify_checkpoint(find_checkpoint(store.run_dir(run_id), "last").path)
    assert last.step == 2
    assert last.score == pytest.approx(rewards[-1]), "without it the step can't be the best one any more"


def test_a_stop_during_a_validation_does_not_lose_it(store: Store) -> None:
    class StopInValidation(RunControl):
        def poll(self) -> None:
            run = store.run(run_id)
            if run.state == "evaluating" and run.step == 2:
                self.command("stop")
            super().poll()

    run_id = create(store, small("evaluation.every=2", "evaluation.validation_prompts=2"))
    assert execute(store, run_id, StopInValidation()) == "stopped"
    assert store.run(run_id).step == 2
    assert execute(store, run_id) == "finished"
    kinds = [(row.kind, row.step) for row in store.evaluations(run_id)]
    assert kinds == [("baseline", 0), ("validation", 2), ("final", 3)]
    assert store.check() == []


@pytest.mark.parametrize(("state", "prompts"), [("baseline", 100), ("training", 2)])
def test_a_stop_from_another_connection_takes_under_two_seconds_and_the_run_can_go_on(
    store: Store, manager: RunManager, state: str, prompts: int
) -> None:
    run_id = manager.submit(small("training.steps=500", f"evaluation.prompts={prompts}"))
    wait_until(lambda: store.run(run_id).state == state and (state == "baseline" or store.run(run_id).step >= 1))
    with Store(store.path) as elsewhere:
        asked = time.monotonic()
        elsewhere.post_command(run_id, "stop")
        wait_until(lambda: elsewhere.run(run_id).state == "stopped")
        assert time.monotonic() - asked < 2.0
    assert manager.wait(10)
    reached = store.run(run_id).step
    assert [command.outcome for command in store.commands(run_id)] == ["passed on"]

    manager.enqueue(run_id)
    wait_until(lambda: store.run(run_id).step > reached or store.run(run_id).state == "baseline")
    assert store.run(run_id).resumed_count == 1
    manager.command(run_id, "stop")
    assert manager.wait(30)
    assert store.run(run_id).state == "stopped"
    assert store.check() == []


def test_a_pause_holds_the_run_until_it_is_resumed(store: Store, manager: RunManager) -> None:
    run_id = manager.submit(small("training.steps=500"))
    wait_until(lambda: store.run(run_id).step >= 1)
    with Store(store.path) as elsewhere:
        elsewhere.post_command(run_id, "pause")
        wait_until(lambda: elsewhere.run(run_id).state == "paused", 5)
        held = elsewhere.run(run_id).step
        time.sleep(0.8)
        assert (elsewhere.run(run_id).state, elsewhere.run(run_id).step) == ("paused", held)
        elsewhere.post_command(run_id, "resume")
        wait_until(lambda: elsewhere.run(run_id).step > held)
        assert elsewhere.run(run_id).state == "training"

        elsewhere.post_command(run_id, "pause")
        wait_until(lambda: elsewhere.run(run_id).state == "paused", 5)
        elsewhere.post_command(run_id, "stop")
        assert wait_until(lambda: elsewhere.run(run_id).state == "stopped", 5) < 2.0
    steps = store.steps(run_id, ["reward_mean"])["step"]
    assert steps.tolist() == list(range(1, len(steps) + 1))


def test_a_paused_run_ends_like_an_undisturbed_one(reference: Reference, store: Store) -> None:
    class PauseOnce(RunControl):
        """Pauses at one poll; whoever hears of the hold lets it go on."""

        count = 0

        def poll(self) -> None:
            self.count += 1
            if self.count == reference.polls // 2:
                self.command("pause")
                self.resume_when_held()
            super().poll()

        def resume_when_held(self) -> None:
            told = self.on_hold

            def hold(held: bool) -> None:
                told(held)
                if held:
                    self.command("resume")

            self.on_hold = hold

    run_id = create(store, small(LENGTH))
    assert execute(store, run_id, PauseOnce()) == "finished"
    states = [event.data["state"] for event in store.events(run_id, limit=None) if event.kind == "state"]
    assert states[3:6] == ["training", "paused", "training"]
    assert_like(reference, store, run_id)


def test_a_checkpoint_and_an_evaluation_can_be_asked_for(store: Store) -> None:
    control = RunControl()
    control.command("save")
    control.command("evaluate")
    run_id = create(store, small("training.steps=2", "evaluation.validation_prompts=2", "recording.checkpoint_every=9"))
    assert execute(store, run_id, control) == "finished"
    assert verify_checkpoint(find_checkpoint(store.run_dir(run_id), 1).path).step == 1
    kinds = [(row.kind, row.step, row.split) for row in store.evaluations(run_id)]
    assert kinds == [("baseline", 0, "test"), ("validation", 1, "validation"), ("final", 2, "test")]
    assert set(store.evaluations(run_id)[1].summary["arms"]) >= {"original", "untrained", "trained"}


# -- dying ---------------------------------------------------------------------------------------------------


def start(db: Path, *overrides: str) -> subprocess.Popen[bytes]:
    """A run in a process of its own."""
    command = [sys.executable, "-m", "grpo_engine", "train", "--db", str(db), *flags(*overrides)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def opened(db: Path) -> Store:
    """The database that another process is about to make."""
    found: list[Store] = []

    def ready() -> bool:
        if not db.exists():
            return False
        try:
            found.append(Store(db, read_only=True))
        except StoreError:
            return False
        return bool(found[0].runs()) or bool(found.pop().close())

    wait_until(ready)
    return found[0]


def kill_and_resume(reference: Reference, db: Path, moment: float, *, after_step: int = 0) -> None:
    process = start(db, LENGTH)
    try:
        with opened(db) as watched:
            run_id = watched.runs()[0].id
            wait_until(lambda: watched.run(run_id).step >= after_step)
            time.sleep(moment)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with Store(db) as store:
        if store.run(run_id).state == "queued":  # it died before it began
            store.set_state(run_id, "interrupted")
        elif store.run(run_id).state != "finished":
            assert store.interrupt_stale() == [run_id]
        if store.run(run_id).state != "finished":
            assert store.run(run_id).state == "interrupted"
            assert execute(store, run_id) == "finished", store.run(run_id).error
        assert_like(reference, store, run_id)


def test_a_run_killed_at_a_random_moment_of_its_training_ends_like_an_undisturbed_one(
    reference: Reference, tmp_path: Path
) -> None:
    kill_and_resume(reference, tmp_path / "runs.db", random.Random(0).uniform(0.0, 0.3), after_step=3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_run_killed_at_any_moment_ends_like_an_undisturbed_one(
    reference: Reference, tmp_path: Path, seed: int
) -> None:
    kill_and_resume(reference, tmp_path / "runs.db", random.Random(seed).uniform(0.0, 6.0))


def test_a_run_whose_last_checkpoint_is_damaged_goes_on_from_the_one_before(reference: Reference, store: Store) -> None:
    run_id = create(store, small(LENGTH))
    assert execute(store, run_id, StopAtPoll(round(0.97 * reference.polls))) == "stopped"
    weights = store.run_dir(run_id) / "checkpoints" / f"step-{STEPS:06d}" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert execute(store, run_id) == "finished"
    warnings = [event.message for event in store.events(run_id, limit=None) if event.kind == "warning"]
    assert len(warnings) == 1
    assert "step 4" in warnings[0]
    assert_like(reference, store, run_id)


# -- failing -------------------------------------------------------------------------------------------------


def foreign_pipeline(folder: Path) -> str:
    """A setting that passes every check before loading: a pipeline without its parts."""
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}', encoding="utf-8")
    return f"models.image.path={folder}"


def test_a_run_that_fails_says_why_in_a_sentence_and_keeps_the_traceback_in_its_log(
    store: Store, tmp_path: Path
) -> None:
    run_id = create(store, small(foreign_pipeline(tmp_path / "flux")))
    assert execute(store, run_id) == "failed"
    error = store.run(run_id).error or ""
    assert "StableDiffusion3Pipeline" in error
    assert "grpo_training.log" in error
    assert "\n" not in error
    assert ".." not in error
    log = (store.run_dir(run_id) / "grpo_training.log").read_text(encoding="utf-8")
    assert "Traceback (most recent call last)" in log
    assert "StableDiffusion3Pipeline" in log
    assert store.check() == []


def test_a_run_without_finite_gradients_fails_and_keeps_what_was_good(store: Store) -> None:
    config = small(
        "training.steps=9", "recording.checkpoint_every=1", "recording.keep_checkpoints=9", "training.update_rows=0"
    )
    loaded = fresh_environment(config, RankScorer())
    backwards = [0]

    def overflow(gradient: Tensor) -> Tensor:
        backwards[0] += 1
        return gradient * float("nan") if backwards[0] > 4 else gradient  # from step 3 on: two a step

    list(loaded.policy.trainable().values())[-1].register_hook(overflow)
    run_id = create(store, config)
    assert Session(store, run_id, RunControl(), loaded=loaded).run() == "failed"
    run = store.run(run_id)
    assert run.step == 5
    assert "not a finite number in 3 steps in a row" in (run.error or "")
    assert store.steps(run_id, ["skipped"])["skipped"].tolist() == [0, 0, 1, 1, 1]
    assert np.isnan(store.steps(run_id, ["grad_norm"])["grad_norm"][2:]).all()
    assert saved(store, run_id, 5)[0] == saved(store, run_id, 2)[0], "the weights are those of the last good step"
    assert saved(store, run_id, 3)[0] != saved(store, run_id, 1)[0]
    skipped = [event for event in store.events(run_id, limit=None) if event.kind == "skipped_step"]
    assert len(skipped) == 3


def test_a_run_whose_settings_this_version_does_not_know_fails_and_the_queue_goes_on(
    store: Store, manager: RunManager, tmp_path: Path
) -> None:
    strange = create(store, small())
    settings = store.run(strange).config | {"future": {"setting": 1}}
    with store.write() as db:
        db.execute("UPDATE runs SET config = ? WHERE id = ?", [json.dumps(settings), strange])
    following = create(store, small(foreign_pipeline(tmp_path / "flux")))
    manager.enqueue(strange)
    manager.enqueue(following)
    assert manager.wait(15)
    assert store.run(strange).state == "failed"
    assert "future" in (store.run(strange).error or "")
    assert store.run(following).state == "failed"
    assert "StableDiffusion3Pipeline" in (store.run(following).error or "")


def test_a_stopped_run_whose_settings_this_version_does_not_know_says_so_when_resumed(store: Store) -> None:
    run_id = create(store, small())
    store.set_state(run_id, "stopped", "Taken out of the queue.")
    settings = store.run(run_id).config | {"future": {"setting": 1}}
    with store.write() as db:
        db.execute("UPDATE runs SET config = ? WHERE id = ?", [json.dumps(settings), run_id])
    assert execute(store, run_id) == "failed"
    assert "future" in (store.run(run_id).error or "")


def taken_elsewhere(store: Store) -> str:
    """A run that another machine is carrying."""
    run_id = create(store, small())
    store.set_state(run_id, "loading")
    with store.write() as db:
        update_run(db, run_id, {"host": "elsewhere", "pid": 7, "process_token": "theirs"})
    return run_id


def test_a_run_that_another_process_carries_is_left_alone(store: Store) -> None:
    run_id = taken_elsewhere(store)
    before = store.run(run_id)
    with pytest.raises(StoreError, match="is loading in process 7 on elsewhere; stop it first"):
        execute(store, run_id)
    assert store.run(run_id) == before


def test_of_two_that_take_up_one_run_the_second_leaves_it_to_the_first(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    queued = store.run(create(store, small()))
    run_id = taken_elsewhere(store)
    monkeypatch.setattr(store, "require_idle", lambda run_id: replace(queued, id=run_id))  # as it was a moment ago
    with pytest.raises(StoreError, match="is loading and can't become loading"):
        execute(store, run_id)
    assert store.run(run_id).state == "loading" and store.run(run_id).host == "elsewhere"


def test_a_run_is_not_resumed_with_other_prompts(store: Store, tmp_path: Path) -> None:
    setting = prompt_set(tmp_path, *rows(3, 3))
    run_id = create(store, small(setting, "training.steps=2"))
    file = tmp_path / "mine.jsonl"
    old = file.read_text(encoding="utf-8")
    assert execute(store, run_id, StopAtPoll(20)) == "stopped"
    file.write_text(old.replace("a red circle 4", "a green star"), encoding="utf-8")
    assert execute(store, run_id) == "failed"
    assert "have changed since the run began" in (store.run(run_id).error or "")
    file.write_text(old, encoding="utf-8")
    assert execute(store, run_id) == "finished"


def test_a_resumed_run_renders_as_many_pictures_at_once_as_before(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, undisturbed = small("models.image.batch_size=0", "training.steps=3"), StopAtPoll()
    assert execute(store, create(store, config), undisturbed) == "finished"
    run_id = create(store, config)
    assert execute(store, run_id, StopAtPoll(round(0.6 * undisturbed.count))) == "stopped"
    assert 0 < store.run(run_id).step < 3
    saved_with = RunConfig.load(find_checkpoint(store.run_dir(run_id)).path / "config.yaml").models.image.batch_size
    planned: list[int] = []

    class Watched(Plan):
        def __init__(self, config: RunConfig, *arguments: Any, **named: Any) -> None:
            planned.append(config.models.image.batch_size)
            super().__init__(config, *arguments, **named)

    monkeypatch.setattr("grpo_engine.session.Plan", Watched)
    assert execute(store, run_id) == "finished"
    assert planned == [saved_with] and saved_with > 0


def test_a_run_that_can_only_resume_from_a_damaged_checkpoint_fails_in_plain_words(
    reference: Reference, store: Store
) -> None:
    run_id = create(store, small(LENGTH, "recording.checkpoint_every=99"))
    assert execute(store, run_id, StopAtPoll(round(0.6 * reference.polls))) == "stopped"
    for path in (store.run_dir(run_id) / "checkpoints").glob("step-*/state.json"):
        path.write_text("{}", encoding="utf-8")
    assert execute(store, run_id) == "failed"
    error = store.run(run_id).error or ""
    assert "no intact checkpoint" in error
    assert "CheckpointError" not in error


# -- what is refused before any model loads ------------------------------------------------------------------


def prompt_set(folder: Path, *rows: dict[str, Any]) -> str:
    """A setting that names a prompt set of these rows."""
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"data.prompts={path}"


def rows(train: int, test: int, text: str = "a red circle") -> list[dict[str, Any]]:
    splits = ["train"] * train + ["test"] * test
    return [{"text": f"{text} {number}", "split": split} for number, split in enumerate(splits)]


def refusal(manager: RunManager, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        manager.submit(small(*overrides))
    assert manager.store.runs() == [], "nothing is recorded"
    assert not (manager.store.root / "runs").exists()
    return str(caught.value)


@pytest.fixture
def unloadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if any model is loaded."""

    def load(*args: object, **named: object) -> None:
        raise AssertionError("a model was loaded")

    for name in ("load_policy", "load_images", "load_reward"):
        monkeypatch.setattr(f"grpo_engine.loading.{name}", load)


@pytest.mark.usefixtures("unloadable")
class TestRefusedBeforeLoading:
    def test_an_empty_prompt_set(self, manager: RunManager, tmp_path: Path) -> None:
        assert "mine.jsonl" in refusal(manager, prompt_set(tmp_path))

    def test_a_prompt_set_that_is_missing(self, manager: RunManager, tmp_path: Path) -> None:
        message = refusal(manager, f"data.prompts={tmp_path / 'none.jsonl'}")
        assert "data.prompts" in message
        assert "none.jsonl" in message
        assert "general, tiny" in message

    def test_fewer_prompts_than_a_step_needs(self, manager: RunManager, tmp_path: Path) -> None:
        message = refusal(manager, prompt_set(tmp_path, *rows(1, 3)))
        assert message.startswith("training.batch_size is 2, but data.prompts")
        assert "only 1" in message

    def test_no_prompts_of_the_chosen_tiers(self, manager: RunManager, tmp_path: Path) -> None:
        message = refusal(manager, prompt_set(tmp_path, *rows(4, 4)), "data.tiers=[complex]")
        assert "complex" in message

    def test_too_few_test_prompts_to_measure_a_gain(self, manager: RunManager, tmp_path: Path) -> None:
        message = refusal(manager, prompt_set(tmp_path, *rows(4, 1)))
        assert "1 test prompts" in message
        assert "at least 2" in message

    def test_no_validation_prompts_where_some_are_needed(self, manager: RunManager, tmp_path: Path) -> None:
        message = refusal(manager, prompt_set(tmp_path, *rows(4, 4)), "evaluation.every=1")
        assert message.startswith("evaluation.every is 1")

    def test_a_single_validation_prompt_where_a_gain_is_to_be_measured(
        self, manager: RunManager, tmp_path: Path
    ) -> None:
        setting = prompt_set(tmp_path, *rows(4, 4), {"text": "a blue star", "split": "validation"})
        assert "has 1 validation prompts" in refusal(manager, setting, "evaluation.every=1")
        assert Plan(small(setting)).watched_split == "test", "an evaluation that is asked for takes the others"

    def test_a_checker_for_pictures_of_another_size(self, manager: RunManager) -> None:
        message = refusal(manager, "evaluation.judge=checker", "models.image.resolution=64")
        assert message.startswith("evaluation.judge is 'checker'") and "models.image.resolution is 64" in message

    def test_a_prompt_longer_than_allowed(self, manager: RunManager, tmp_path: Path) -> None:
        message = refusal(manager, prompt_set(tmp_path, *rows(3, 3), {"text": "x" * 401, "split": "train"}))
        assert "mine.jsonl" in message
        assert "7" in message, "the line"
        assert "400" in message

    def test_a_prompt_longer_than_a_model_reads(self, manager: RunManager, tmp_path: Path) -> None:
        long = {"text": "a red circle " * 29, "split": "train"}  # 377 characters, 87 words; CLIP reads 32 tokens
        message = refusal(manager, prompt_set(tmp_path, *rows(3, 3), long))
        assert "mine.jsonl" in message
        assert "token" in message

    def test_a_device_that_does_not_exist(self, manager: RunManager) -> None:
        message = refusal(manager, "placement.image=cuda:99")
        assert message.startswith("placement.image is 'cuda:99', but this machine has ")
        assert "cpu" in message

    def test_a_model_folder_that_does_not_exist(self, manager: RunManager, tmp_path: Path) -> None:
        for part in ("policy", "image", "reward"):
            message = refusal(manager, f"models.{part}.path={tmp_path / 'nowhere'}")
            assert f"models.{part}.path" in message
            assert "nowhere" in message

    def test_a_judge_that_cannot_judge_the_prompts(self, manager: RunManager, tmp_path: Path) -> None:
        message = refusal(manager, prompt_set(tmp_path, *rows(4, 4)), "evaluation.judge=checker")
        assert message.startswith("evaluation.judge is 'checker'")


def test_a_plan_takes_prompts_by_split_and_tier_in_file_order(tmp_path: Path) -> None:
    chosen = [
        {"id": f"{split}-{tier}-{number}", "text": f"{split} {tier} {number}", "tier": tier, "split": split}
        for number in range(3)
        for split in ("train", "test", "validation")
        for tier in ("basic", "complex")
    ]
    plan = Plan(
        small(
            prompt_set(tmp_path, *chosen),
            "data.tiers=[complex]",
            "data.max_train_prompts=2",
            "evaluation.validation_prompts=2",
        )
    )
    complete = [[f"{split}-complex-{number}" for number in range(3)] for split in ("train", "test", "validation")]
    found = [[prompt.id for prompt in split] for split in (plan.train, plan.test, plan.validation)]
    for own, all_of_them in zip(found, complete, strict=True):
        assert len(own) == 2 and own == [one for one in all_of_them if one in own]
    assert len(load_prompts(tmp_path / "mine.jsonl")) == len(chosen)


# -- the queue -----------------------------------------------------------------------------------------------


def test_runs_wait_for_each_other_and_a_waiting_one_can_be_taken_out(store: Store, manager: RunManager) -> None:
    first = manager.submit(small("training.steps=500"))
    second, third = (manager.submit(small("training.steps=1", f"seed={seed}")) for seed in (1, 2))
    wait_until(lambda: store.run(first).step >= 1)
    assert manager.current == first
    assert [store.run(run_id).state for run_id in (second, third)] == ["queued", "queued"]
    manager.command(second, "stop")
    assert store.run(second).state == "stopped"
    assert "queue" in store.run(second).message
    manager.command(first, "stop")
    assert manager.wait(60)
    assert [store.run(run_id).state for run_id in (first, second, third)] == ["stopped", "stopped", "finished"]
    began, ended = store.run(third).started, store.run(first).finished
    assert began is not None
    assert ended is not None
    assert ended <= began
    assert manager.current is None


def test_closing_stops_the_run_and_saves_it(store: Store) -> None:
    manager = RunManager(store)
    run_id = manager.submit(small("training.steps=500"))
    waiting = manager.submit(small("training.steps=500"))
    wait_until(lambda: store.run(run_id).step >= 1)
    manager.close()
    run = store.run(run_id)
    assert run.state == "stopped"
    assert verify_checkpoint(find_checkpoint(store.run_dir(run_id), "last").path).step == run.step
    assert store.run(waiting).state == "queued"


def test_a_run_that_has_ended_takes_no_commands(reference: Reference) -> None:
    manager = RunManager(reference.store)
    with pytest.raises(StoreError, match="is finished, so it can't be asked to stop"):
        manager.command(reference.run.id, "stop")


# -- measuring again -----------------------------------------------------------------------------------------


def test_a_saved_policy_measured_again_gives_the_report_of_its_run(reference: Reference) -> None:
    before = reference.store.revision()
    summary = evaluate_run(reference.store, reference.run.id)
    assert json.loads(json.dumps(summary)) == reference.run.summary
    assert reference.store.revision() == before, "the run itself is not changed"


def test_a_saved_policy_can_be_measured_on_other_prompts(reference: Reference, tmp_path: Path) -> None:
    setting = prompt_set(tmp_path, *rows(0, 3, "a blue square"))  # nothing is learned, so nothing to train on
    said: list[str] = []
    summary = evaluate_run(reference.store, reference.run.id, STEPS, setting.partition("=")[2], said.append)
    assert said == [f"Measuring the policy after step {STEPS} on 2 prompts."]
    assert summary["gains"]["trained_vs_untrained"]["n"] == 2
    assert summary["gains"] != (reference.run.summary or {})["gains"]


def test_a_loaded_environment_can_be_handed_in(store: Store) -> None:
    config = small("training.steps=1")
    loaded = fresh_environment(config, RankScorer())
    before = [parameter.detach().clone() for parameter in loaded.policy.trainable().values()]
    run_id = create(store, config)
    assert Session(store, run_id, RunControl(), loaded=loaded).run() == "finished"
    assert not equal([parameter.detach() for parameter in loaded.policy.trainable().values()], before)
    assert store.steps(run_id, ["reward_mean"])["reward_mean"][0] == pytest.approx(1.0, abs=0.7)
