"""One run from loading to report: the composition of engine, store and checkpoints.

The state machine of a run is walked here, in order: loading, baseline, training, evaluating, finished. A
resumed run enters where its checkpoint left it. Whoever starts a session (the command line, the app's
thread) gets the same run.

With several ranks, the first one is the :class:`Session`, which has the store; on the others a
:class:`Companion` walks the same way and is told what the store says.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from .checkpoint import (
    CheckpointError,
    Snapshot,
    find_checkpoint,
    has_checkpoint,
    load_checkpoint,
    prune,
    read_rollouts,
    take_snapshot,
    write_checkpoint,
)
from .config import ConfigError, RunConfig
from .control import RunControl, StopRequested
from .distributed import ALONE, RankLost, Ranks, World
from .environment import PureGRPOPromptEnvironment
from .evaluation import Evaluator, summarise
from .judge import checkable, make_judge
from .loading import load_environment
from .memory import changed_settings
from .placement import apply_threads
from .plan import Plan
from .recorder import Evaluation, EvaluationItem, Unrecorded
from .rollout import Score
from .sharding import collect, held, shared_out, spread
from .store import Store, StoreError
from .store.owner import carried_here
from .store.recorder import StoreRecorder
from .store.rows import ENDINGS
from .trackers import TrackedRecorder
from .trainer import PureGRPOTrainer, TrainingFailed
from .turns import SharedTurns, Turn

log = logging.getLogger(__name__)

AnyRecorder = StoreRecorder | Unrecorded


class Session:
    """Carries one run of the store through its states.

    Args:
        store: open for writing.
        run_id: a run in a state that may go to "loading".
        control: how others stop or pause it.
        loaded: an environment to use instead of loading one (tests, or models kept warm).
        world: the ranks that carry the run together, of which this is the first.
    """

    def __init__(
        self,
        store: Store,
        run_id: str,
        control: RunControl,
        *,
        loaded: PureGRPOPromptEnvironment | None = None,
        world: World = ALONE,
    ) -> None:
        self.store, self.run_id, self.control, self.loaded = store, run_id, control, loaded
        self.world = world
        self.folder: Path = store.run_dir(run_id)
        self._metrics: dict[str, float | None] = {}  # of the last step
        self._saving: Future[None] | None = None
        self._loaded: dict[int, Tensor] = {}  # weights of a checkpoint that wait to be shared out

    def run(self) -> str:
        """Execute the run to its end; returns the final state.

        Every exception becomes the state "failed" with one sentence; the traceback goes to the run's log.

        Raises:
            StoreError: the run is another process's, or was ended or taken over by one; nothing of it was changed.
        """
        before = self.store.require_idle(self.run_id)
        resuming = before.resumed_count > 0 or before.state in ENDINGS
        try:
            self.config = RunConfig.parse(before.config)
        except ConfigError as error:  # recorded by another version
            self.store.set_state(self.run_id, "loading")  # the one way from every state to "failed"
            self.store.set_state(self.run_id, "failed", str(error))
            return "failed"
        self.world.obey(self.control, lambda sentence: self.store.set_state(self.run_id, "failed", sentence))
        try:
            with TrackedRecorder(self.store, self.run_id, self.config) as recorder:
                recorder.state("loading")
                recorder.flush()
                self.control.on_hold = lambda held: self._hold(recorder, held)
                state, message = self._guarded(recorder, resuming)
                recorder.state(state, message)
                recorder.flush()
        except StoreError as error:  # the recorder itself failed, a full disk perhaps: say so past it
            if not self._own():
                raise
            log.exception("run %s could not be recorded", self.run_id)
            state = "failed"
            self.store.set_state(self.run_id, state, str(error))
        return state

    def _own(self) -> bool:
        """Whether the run is this process's to end: nobody has ended it, and nobody else has taken it."""
        run = self.store.run(self.run_id)
        return run.state == "queued" or carried_here(run)

    def _guarded(self, recorder: StoreRecorder, resuming: bool) -> tuple[str, str]:
        """Run; returns the final state and a sentence on why."""
        try:
            if resuming:
                self.config = self._as_begun()
            self.world.decide(lambda: (self.config.model_dump(mode="json"), resuming))  # what a companion waits for
            with ThreadPoolExecutor(1, "checkpoint") as self._saver:
                self._run(recorder, resuming)
                self._saved()
        except StopRequested:
            return "stopped", "Stopped on request; it can be resumed."
        except (ConfigError, CheckpointError, TrainingFailed, RankLost) as error:
            log.exception("run %s failed", self.run_id)
            return "failed", str(error)
        except StoreError:
            raise
        except Exception as error:  # the last line of defence: a run must never end without a state
            log.exception("run %s failed", self.run_id)
            reason = f"{type(error).__name__}: {error}".rstrip(".")
            return "failed", f"{reason}. The full traceback is in grpo_training.log."
        return "finished", ""

    def _as_begun(self) -> RunConfig:
        """The settings with the number of pictures at once that the run began with, where the machine decides it.

        Pictures in other company are rounded otherwise, so with another number this would be another run.
        """
        if self.config.models.image.batch_size or not has_checkpoint(self.folder):
            return self.config
        begun = RunConfig.load(find_checkpoint(self.folder).path / "config.yaml")
        return changed_settings(self.config, {"models.image.batch_size": begun.models.image.batch_size})

    def _heard(self, recorder: AnyRecorder) -> Callable[[str, int, int], None]:
        """Records the progress of loading, and lets a stop end a download."""

        def told(name: str, done: int, total: int) -> None:
            recorder.phase(name, done, total)
            if name.startswith("downloading "):
                self.control.poll()

        return told

    def _hold(self, recorder: StoreRecorder, held: bool) -> None:
        """Show a pause for as long as it lasts; called by the trainer's own thread, so states stay in order."""
        if held:
            recorder.flush()
            self._state_before_hold = self.store.run(self.run_id).state
            if self._state_before_hold != "loading":
                recorder.state("paused")
        elif self._state_before_hold != "loading":
            recorder.state(self._state_before_hold)

    # -- the states --------------------------------------------------------------------------------------

    def _run(self, recorder: AnyRecorder, resuming: bool) -> None:
        plan = self.world.together(lambda: Plan(self.config, self.world, whole=resuming))
        if resuming:
            self.world.decide(lambda: self._require_same_prompts(plan))
        chosen, self.config = self.config, plan.config
        apply_threads(self.config)
        environment = self.loaded or load_environment(self.config, plan.placement, self._heard(recorder), self.world)
        self.control.poll()
        for rank, devices in enumerate(self.world.gather(plan.placement.describe())):
            recorder.event("placement", devices if self.world.size == 1 else f"rank {rank}: {devices}")
        if chosen != self.config:
            recorder.event("image_batch", f"At most {self.config.models.image.batch_size} pictures at once fit.")
        for model in environment.replicas:
            model.told = recorder.event
        if self.config.training.async_steps:
            recorder.event("async", "Steps learn from rewrites of the policy before its last update (staleness 1).")
        policy = environment.policy
        if isinstance(recorder, StoreRecorder):
            recorder.token_text = policy.token_text
        if policy.adapted_layers:
            count = sum(p.numel() for p in policy.trainable().values())
            recorder.event(
                "adapter", f"LoRA on {len(policy.adapted_layers)} layers of the language model, {count:,} parameters."
            )
        if self.config.placement.shard_policy and self.world.size > 1:
            here, everything = (size / 1e6 for size in held(policy.model))
            recorder.event("sharding", f"This rank holds {here:,.1f} of the policy's {everything:,.1f} MB of weights.")
        judge = make_judge(self.config, plan.test, policy)
        evaluator = Evaluator(environment, judge, self.world.share(plan.test), self.config)
        trainer = PureGRPOTrainer(
            self.config, environment, plan.train, recorder, self.control,
            after_step=lambda step, metrics: self._after_step(trainer, recorder, plan, step, metrics),
            judge=judge if checkable(self.config, plan.train) else None,
            world=self.world,
        )  # fmt: skip
        if isinstance(policy.turns, SharedTurns):
            policy.turns.go_along[Turn.COLLECT] = lambda: collect(
                self.world, trainer.parameters, trainer.optimizer, keep=False
            )
        if resuming:
            self.world.decide(lambda: self._restore(trainer, recorder))
        self._align(trainer)
        baseline = self._recorded("baseline")
        if baseline is None:
            recorder.state("baseline")
            baseline = self._measure("baseline", 0, evaluator, recorder, trained=False)
        if trainer.step < self.config.training.steps:
            recorder.state("training")
            try:
                if self._validation_due(trainer.step) and not self._validated(trainer.step):
                    self._validate(trainer, recorder, plan, trainer.step)  # a stop had cut it off
                trainer.train()
            except StopRequested:
                recorder.flush()
                if trainer.step:  # on the first rank, which alone is told to stop
                    self._save(trainer, recorder, self._metrics)
                    self._saved()
                raise
        recorder.state("evaluating")
        items = self._measure("final", trainer.step, evaluator, recorder, trained=True, beside=baseline)
        summary = self.world.decide(lambda: summarise(items, self.config))
        if "sentence" in summary:
            recorder.event("report", summary["sentence"])

    def _align(self, trainer: PureGRPOTrainer) -> None:
        """Every rank begins where the first one stands."""
        trainer.step, trainer.bad_steps = self.world.decide(lambda: (trainer.step, trainer.bad_steps))
        self.world.align(trainer.parameters, trainer.optimizer)
        if isinstance(self.world, Ranks):
            spread(self.world, trainer.parameters, trainer.optimizer, self._loaded)
        self._loaded = {}

    def _require_same_prompts(self, plan: Plan) -> None:
        """Refuse to go on with other prompts: a gain would compare pictures of different ones.

        Raises:
            ConfigError: the prompt set is not the one the run began with.
        """
        begun = self.store.run(self.run_id)
        if begun.prompt_fingerprint and begun.prompt_fingerprint != plan.prompts.fingerprint():
            raise ConfigError(
                f"The prompts in data.prompts {self.config.data.prompts!r} have changed since the run began, so it "
                "can't go on as the same run; put the old file back, or start a new run."
            )

    def _restore(self, trainer: PureGRPOTrainer, recorder: AnyRecorder) -> None:
        """Put the trainer where the last checkpoint was, and the store too; without one, begin anew."""
        recorder.flush()
        if has_checkpoint(self.folder):
            found = find_checkpoint(self.folder, up_to=self.store.run(self.run_id).step)
            if found.note:
                recorder.event("warning", found.note)
            state = load_checkpoint(found.path, trainer.policy, trainer.optimizer, self._put)
            self._metrics = state.metrics
            trainer.go_on(state.step, int(state.extra.get("bad_steps", 0)), read_rollouts(state))
        recorder.flush()
        self.store.truncate_after(self.run_id, trainer.step)
        recorder.event("resumed", f"Continuing after step {trainer.step}.")

    def _put(self, parameter: Parameter, saved: Tensor) -> None:
        """Set a weight to what was saved of it; one that is shared out is set on all ranks, by :meth:`_align`."""
        if isinstance(parameter, DTensor):
            self._loaded[id(parameter)] = saved
        else:
            parameter.copy_(saved)

    def _after_step(
        self,
        trainer: PureGRPOTrainer,
        recorder: AnyRecorder,
        plan: Plan,
        step: int,
        metrics: dict[str, float | None],
    ) -> None:
        self._metrics = metrics
        if self._validation_due(step) or self.world.decide(lambda: self.control.take("evaluate")):
            self._validate(trainer, recorder, plan, step)
        due = step % self.config.recording.checkpoint_every == 0 or step == self.config.training.steps
        if self.world.first and (due or self.control.take("save")):
            self._save(trainer, recorder, metrics)

    def _validation_due(self, step: int) -> bool:
        every = self.config.evaluation.every
        return bool(every) and step > 0 and step % every == 0 and step < self.config.training.steps

    def _validate(self, trainer: PureGRPOTrainer, recorder: AnyRecorder, plan: Plan, step: int) -> None:
        prompts, split = plan.watched, plan.watched_split
        judge = make_judge(self.config, prompts, trainer.policy)
        evaluator = Evaluator(trainer.environment, judge, self.world.share(prompts), self.config)
        recorder.state("evaluating")
        trainer.stream.pipeline.settle()  # what is rendered ahead: a model works for one caller at a time
        remembered = trainer.environment.cache.hits
        items = self._measured(evaluator.arms(trained=False) + evaluator.arms(trained=True), evaluator, recorder)
        summary = self.world.decide(lambda: summarise(items, self.config))
        recorder.evaluation(Evaluation("validation", step, split, items, summary))
        if remembered := trainer.environment.cache.hits - remembered:
            recorder.event("cache", f"{remembered} pictures of this evaluation were remembered, not rendered again.")
        recorder.state("training")

    def _save(self, trainer: PureGRPOTrainer, recorder: AnyRecorder, metrics: dict[str, float | None]) -> None:
        """A checkpoint of this moment, written while training goes on; at most one is being written at a time."""
        self._saved()
        together: dict[int, Tensor] = {}
        if shared_out(trainer.parameters):  # the other ranks go along as soon as they come to their next turn
            trainer.policy.turns.take(Turn.COLLECT)
            together = collect(self.world, trainer.parameters, trainer.optimizer, keep=True)
        snapshot = take_snapshot(
            policy=trainer.policy,
            optimizer=trainer.optimizer,
            step=trainer.step,
            config=self.config,
            metrics=metrics,
            extra={"bad_steps": trainer.bad_steps},
            rollouts=[group.completions for group in trainer.ahead],
            together=together,
        )
        self._saving = self._saver.submit(self._write, snapshot, recorder)

    def _write(self, snapshot: Snapshot, recorder: AnyRecorder) -> None:
        """In a thread of its own: the recording first, so that no checkpoint is newer than what is recorded."""
        recorder.flush()
        write_checkpoint(self.folder, snapshot)
        prune(self.folder, self.config.recording.keep_checkpoints)
        recorder.event("checkpoint", f"Saved the policy after step {snapshot.step}.")

    def _saved(self) -> None:
        """Wait for the checkpoint that is being written, if one is; raises what that ran into."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def _measure(
        self,
        kind: str,
        step: int,
        evaluator: Evaluator,
        recorder: AnyRecorder,
        *,
        trained: bool,
        beside: list[EvaluationItem] | None = None,
    ) -> list[EvaluationItem]:
        """Measure the baseline's or the trained arms and record them; ``beside`` joins the summary."""
        items = self._measured(evaluator.arms(trained), evaluator, recorder)
        everything = [*(beside or []), *items]
        summary = self.world.decide(lambda: summarise(everything, self.config))
        recorder.evaluation(Evaluation(kind, step, "test", items, summary))
        return [replace(item, picture=None) for item in everything]

    def _measured(self, arms: Sequence[str], evaluator: Evaluator, recorder: AnyRecorder) -> list[EvaluationItem]:
        """All items of ``arms`` on the first rank, on another those of its share of the prompts."""
        return [
            item
            for arm in arms
            for item in self.world.collect(evaluator.measure(arm, poll=self.control.poll, told=recorder.phase))
        ]

    def _validated(self, step: int) -> bool:
        rows = self.world.decide(lambda: self.store.evaluations(self.run_id))
        return any(row.kind == "validation" and row.step == step for row in rows)

    def _recorded(self, kind: str) -> list[EvaluationItem] | None:
        """Items of an evaluation that an earlier session of this run already made, without pictures."""
        return self.world.decide(lambda: self._stored(kind))

    def _stored(self, kind: str) -> list[EvaluationItem] | None:
        for row in self.store.evaluations(self.run_id):
            if row.kind == kind:
                return [_as_item(item) for item in self.store.evaluation_items(row.id)]
        return None


class Companion(Session):
    """The same run on a rank that is not the first: it works its share and has no store."""

    def __init__(self, world: World, control: RunControl) -> None:
        self.world, self.control, self.loaded = world, control, None
        self._metrics, self._loaded = {}, {}

    def run(self) -> str:
        """Learn from the first rank which run it is and go along to its end. What goes wrong here is raised."""
        orders: tuple[dict[str, Any], bool] = self.world.decide(lambda: ({}, False))
        self.config = RunConfig.parse(orders[0])
        self._run(Unrecorded(), resuming=orders[1])
        return "finished"


def _as_item(row: Any) -> EvaluationItem:
    return EvaluationItem(
        arm=row.arm,
        prompt_id=row.prompt_id,
        prompt=row.prompt,
        tier=row.tier,
        index=row.index,
        latent_seed=row.latent_seed,
        rewrite=row.rewrite,
        score=Score(dict(row.parts), row.reward),
        judge=row.judge,
        judge_parts=row.judge_parts,
        picture=None,
        cut_tokens=row.cut_tokens,
        read_chars=row.read_chars,
    )


def evaluate_run(
    store: Store, run_id: str, which: Any = "last", prompts: str = "", told: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Measure all arms of a run's saved policy again and return the summary; the run itself is not changed.

    Args:
        prompts: another prompt set, whose test prompts are then measured.
        told: is called with which policy is measured, before that begins.
    """
    config = RunConfig.parse(store.run(run_id).config)
    if prompts:
        config = RunConfig.parse(config.model_dump() | {"data": config.data.model_dump() | {"prompts": prompts}})
    plan = Plan(config, whole=True, training=False)
    config = plan.config
    found = find_checkpoint(store.run_dir(run_id), which)
    if found.note:
        told(found.note)
    apply_threads(config)
    environment = load_environment(config, plan.placement)
    step = load_checkpoint(found.path, environment.policy).step
    told(f"Measuring the policy after step {step} on {len(plan.test)} prompts.")
    judge = make_judge(config, plan.test, environment.policy)
    evaluator = Evaluator(environment, judge, plan.test, config)
    arms = [*evaluator.arms(trained=False), *evaluator.arms(trained=True)]
    return summarise([item for arm in arms for item in evaluator.measure(arm)], config)
