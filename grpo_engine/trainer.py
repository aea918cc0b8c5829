"""The GRPO loop (arXiv 2402.03300): sample groups, render, score, normalise inside the group, update.

There is no value network: a group's own mean is the baseline. The trainer is given an environment, a
recorder and a control; it knows no database, no file layout and no user interface.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from .config import RunConfig
from .control import RunControl
from .distributed import ALONE, World
from .environment import PureGRPOPromptEnvironment
from .figures import group_figures, judged
from .group_loss import pass_loss, passes
from .judge import Judge
from .objective import aggregate_size, group_advantages, zero_spread_groups
from .prompts import Prompt
from .recorder import Recorder
from .rollout import Completions, Group
from .seeding import derive_seed, numpy_generator, seeded_initialization
from .sharding import clip_gradients, shared_out
from .stream import GroupStream

RATIO_TOLERANCE = 1e-4


class TrainingFailed(RuntimeError):
    """Training can't go on; the message is one plain sentence."""


class PureGRPOTrainer:
    """Trains the environment's policy.

    Args:
        config: of the run.
        environment: policy, image model and reward.
        prompts: the training prompts.
        recorder: told about every step.
        control: polled for stop and pause.
        judge: looks at the pictures of every step, if it is a cheap one; never part of the reward.
        after_step: called with (step, metrics) after each recorded step, for checkpoints and evaluations.
        world: the ranks that train together: this trainer collects and learns from its share of the groups, and
            only on the first rank are the recorded step and its metrics those of all groups.

    Raises:
        ValueError: if there are fewer training prompts than a step needs.
    """

    def __init__(
        self,
        config: RunConfig,
        environment: PureGRPOPromptEnvironment,
        prompts: Sequence[Prompt],
        recorder: Recorder,
        control: RunControl,
        after_step: Callable[[int, dict[str, float | None]], None] = lambda step, metrics: None,
        judge: Judge | None = None,
        world: World = ALONE,
    ) -> None:
        if len(prompts) < config.training.batch_size:
            raise ValueError(
                f"A step needs training.batch_size = {config.training.batch_size} different prompts, but the prompt "
                f"set has only {len(prompts)} to train on; add prompts or lower training.batch_size."
            )
        self.config, self.environment, self.prompts = config, environment, list(prompts)
        self.policy = environment.policy
        self.recorder, self.control, self.after_step = recorder, control, after_step
        self.world = world
        self.judge = judge if judge is not None and judge.cheap else None
        self.stream = GroupStream(
            environment,
            len(world.share(range(config.training.batch_size))),
            poll=control.poll,
            held=lambda: control.paused,
            told=recorder.phase,
        )
        self.parameters = list(self.policy.trainable().values())
        training = config.training
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=training.learning_rate,
            betas=(training.beta1, training.beta2),
            weight_decay=training.weight_decay,
            fused=not shared_out(self.parameters),  # with weights in shares a fused step hung (torch 2.15, gloo)
        )
        self.step = 0
        self.ahead: list[Group] = []  # of the next step, if they were sampled before the last update
        self.bad_steps = 0
        self._ratio_reported = False
        self._seconds: dict[str, float] = defaultdict(float)
        self._recording = 0.0  # seconds it took to record the step before

    # -- the loop ----------------------------------------------------------------------------------------

    def train(self) -> None:
        """Run from the present step to the last.

        Raises:
            StopRequested: when asked to stop; the steps recorded so far stand.
            TrainingFailed: after too many steps in a row without a finite update.
        """
        with self.stream:
            while self.step < self.config.training.steps:
                self.control.poll()
                step = self.step + 1
                self._seconds = defaultdict(float)
                begun, idle = time.perf_counter(), self.stream.pipeline.idle_seconds

                staleness = len(self.ahead) > 0
                groups, resampled = (self.ahead, 0) if staleness else self.collect(step)
                following = self.collect(step + 1)[0] if self._goes_ahead else []
                # From here on the groups are sampled; they are rendered and scored beside this thread, or in it.
                if not self._streams:
                    self.assign_advantages(groups)
                update = self.update(groups, step) | {"staleness": float(staleness)}

                if not staleness:
                    self._report_ratio(update["ratio_error"])
                self._count_seconds(groups)
                self._seconds["wait"] = self.stream.pipeline.idle_seconds - idle
                groups = self.world.collect(groups)
                metrics = self._metrics(groups, update, resampled, time.perf_counter() - begun)
                with self._timed("record"):
                    self.recorder.step(step, metrics, groups)
                self._recording = self._seconds["record"]
                self.step, self.ahead = step, following
                self.after_step(step, metrics)
                if self.bad_steps >= self.config.training.max_bad_steps:
                    raise TrainingFailed(
                        f"The loss or its gradient was not a finite number in {self.bad_steps} steps in a row; the "
                        "last good checkpoint is kept. Lower training.learning_rate, or use "
                        "models.policy.dtype=float32."
                    )

    @property
    def _streams(self) -> bool:
        """Whether a group can be learned from before the others of its step have their rewards.

        Not where the policy itself scores them: it can't do that in the middle of an update.
        """
        alone = self.config.objective.scale != "batch" and not self.environment.reward.uses_policy
        return self.stream.beside and alone

    @property
    def _goes_ahead(self) -> bool:
        """Whether the step after the one under way is to be sampled before its update."""
        return self.config.training.async_steps > 0 and self.step + 1 < self.config.training.steps

    def go_on(self, step: int, bad_steps: int, ahead: Sequence[Completions]) -> None:
        """Continue after ``step``; ``ahead`` are the completions of :attr:`ahead` when it was left."""
        self.step, self.bad_steps = step, bad_steps
        self.ahead = self.environment.sampled_groups(self.batch(step + 1), ahead, step + 1) if ahead else []
        self.stream.add(self.ahead, step + 1)

    def batch(self, step: int) -> list[Prompt]:
        """The prompts of ``step``: a fresh seeded order each epoch, all prompts of a step different."""
        size = self.config.training.batch_size
        per_epoch = len(self.prompts) // size
        epoch, place = divmod(step - 1, per_epoch)
        order = numpy_generator(self.config.seed, "order", epoch).permutation(len(self.prompts))
        return [self.prompts[i] for i in order[place * size : (place + 1) * size]]

    def collect(self, step: int) -> tuple[list[Group], int]:
        """This rank's sampled groups of a step, and how many of all ranks' were thrown away for lack of spread
        (dynamic sampling).

        They are whole once :attr:`stream` has been waited for.
        """
        batch, size = self.batch(step), self.config.sampling.num_rollouts
        mine = self.world.share(range(len(batch)))  # places in the batch
        groups = self.stream.sample([batch[place] for place in mine], size, step)
        resampled = 0
        spare = self._spares(step, batch)
        for attempt in range(1, self.config.objective.dynamic_sampling + 1):
            self.stream.wait(groups)
            dead = [place for place, flat in enumerate(self._flat(self._all_rewards(groups))) if flat]
            chosen = dict(zip(dead, spare, strict=False))
            if not chosen:
                break
            own = {place: prompt for place, prompt in chosen.items() if place in mine}
            if own:
                self._count_seconds([groups[place - mine[0]] for place in own])
                others = self.stream.sample(list(own.values()), size, step, attempt)
                for place, group in zip(own, others, strict=True):
                    groups[place - mine[0]] = group
            resampled += len(chosen)
        return groups, resampled

    def _spares(self, step: int, batch: Sequence[Prompt]) -> Iterator[Prompt]:
        """Prompts that are not part of the step, in a seeded order."""
        used = {prompt.id for prompt in batch}
        order = numpy_generator(self.config.seed, "spare", step).permutation(len(self.prompts))
        return (self.prompts[i] for i in order if self.prompts[i].id not in used)

    def _count_seconds(self, groups: Sequence[Group]) -> None:
        for group in groups:
            for phase, seconds in group.seconds.items():
                self._seconds[phase] += seconds

    def _all_rewards(self, groups: Sequence[Group]) -> Tensor:
        """Rewards of all groups of the step, float32 (P, G), from every rank's ``groups``."""
        return torch.cat(self.world.gather(_rewards(groups)))

    def _flat(self, rewards: Tensor) -> list[bool]:
        objective = self.config.objective
        return zero_spread_groups(rewards, objective.min_std, unbiased=objective.unbiased).tolist()

    def assign_advantages(self, groups: Sequence[Group]) -> None:
        """Set every group's advantages from their rewards, which are waited for.

        With ``objective.scale=batch`` they depend on all groups of the step, those of the other ranks included;
        otherwise each group is its own, and ``groups`` may be any of them.
        """
        self.stream.wait(groups)
        objective = self.config.objective
        pooled = objective.scale == "batch"
        advantages = group_advantages(
            self._all_rewards(groups) if pooled else _rewards(groups),
            scale=objective.scale,
            baseline=objective.baseline,
            eps=objective.epsilon,
            unbiased=objective.unbiased,
            min_std=objective.min_std,
        )
        own = self.world.share(list(advantages)) if pooled else advantages
        for group, values in zip(groups, own, strict=True):
            group.advantages = values

    # -- the update --------------------------------------------------------------------------------------

    def update(self, groups: Sequence[Group], step: int) -> dict[str, float]:
        """Optimise on ``groups``: inner_epochs passes of minibatches of whole groups; returns mean figures."""
        self.recorder.phase("updating", 0, len(groups))
        totals: dict[str, float] = defaultdict(float)
        rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        count = 0
        with self._timed("update"):
            for epoch in range(self.config.training.inner_epochs):
                for number, part in enumerate(self._minibatches(groups, step, epoch)):
                    with seeded_initialization(derive_seed(self.config.seed, "dropout", step, epoch, number)):
                        sums = self._accumulate(part, first=count == 0)
                    if count == 0:  # a stop or an error after the first optimiser step would leave this one half done
                        self._arrive([group for group in groups if not len(group.advantages)])
                    for name, value in self._apply(sums).items():
                        totals[name] += value
                    count += 1
        self.bad_steps = self.bad_steps + 1 if totals["skipped"] else 0
        mean = {name: value / count for name, value in totals.items()}
        return mean | {
            "learning_rate": rate,
            "skipped": float(totals["skipped"] > 0),
            "ratio_error": totals["ratio_error"],
        }

    def _minibatches(self, groups: Sequence[Group], step: int, epoch: int) -> list[list[Group]]:
        """This rank's groups in each minibatch of the whole step; a minibatch may have none of them."""
        count, total = self.config.training.minibatches, len(groups) * self.world.size
        mine = self.world.share(range(total))
        order: Sequence[int] = range(total)
        if count > 1:
            order = numpy_generator(self.config.seed, "minibatch", step, epoch).permutation(total).tolist()
        parts = np.array_split(np.asarray(order), count)
        return [[groups[place - mine[0]] for place in part if place in mine] for part in parts]

    def learning_rate(self, step: int) -> float:
        """AdamW's rate at ``step`` (from 1): linear warm-up, then the schedule."""
        training = self.config.training
        if step <= training.warmup_steps:
            return training.learning_rate * step / training.warmup_steps
        if training.schedule == "constant":
            return training.learning_rate
        share = (step - training.warmup_steps) / (training.steps - training.warmup_steps + 1)
        left = 1.0 - share if training.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * share))
        return training.learning_rate * left

    def _arrive(self, groups: Sequence[Group]) -> None:
        """Wait for groups of this step that are still rendered or scored, and set their advantages."""
        if groups:
            begun = time.perf_counter()
            self.assign_advantages(groups)
            self._seconds["update"] -= time.perf_counter() - begun

    def _accumulate(self, groups: Sequence[Group], *, first: bool) -> dict[str, float]:
        """The gradient of one optimiser step, group by group in their order, each as soon as it is whole.

        Returns sums of figures over groups and tokens. Every loss is a sum over tokens or sequences divided by a size
        known once all are sampled, so how the groups are cut into forward passes never changes the gradient. A group
        without spread is left out of the backward pass, but counts in that size: a step that learns from fewer groups
        is a smaller step.
        """
        objective = self.config.objective
        how, longest = objective.aggregation, self.config.sampling.max_new_tokens
        own_size = sum(aggregate_size(g.completions.mask, how=how, max_tokens=longest) for g in groups)
        size = sum(self.world.gather(own_size))
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = defaultdict(float)
        with self.policy.training():
            for parts in passes(groups, self.config.training.update_rows):
                if first:  # later the step would be left half done
                    self.control.poll()
                    self._arrive([part.group for part in parts if not len(part.group.advantages)])
                flat = self._flat(_rewards([part.group for part in parts]))
                for learn in (True, False):
                    own = [part for part, without in zip(parts, flat, strict=True) if learn is not without]
                    if own:
                        loss = pass_loss(self.policy, self.config, own, size, sums, first=first, learn=learn)
                        if learn:
                            loss.backward()
        return sums

    def _apply(self, sums: dict[str, float]) -> dict[str, float]:
        """The optimiser step itself, unless loss or gradient is not finite; returns mean figures."""
        self.world.sum_gradients(self.parameters)
        sums = self.world.sum_figures(sums, largest=("ratio_error",))
        norm = clip_gradients(self.parameters, self.config.training.max_grad_norm, self.world)
        good = bool(torch.isfinite(norm)) and math.isfinite(sums["total_loss"])
        if good:
            self.optimizer.step()
        else:
            self.recorder.event("skipped_step", "The loss or its gradient was not finite; the update was skipped.")
        tokens = max(1.0, sums.pop("tokens"))
        for name in ("kl_penalty", "entropy", "clip_low_fraction", "clip_high_fraction"):
            sums[name] /= tokens
        return {**sums, "grad_norm": float(norm), "skipped": float(not good)}

    def _report_ratio(self, error: float) -> None:
        """Once a session: is the policy that is updated the one that sampled? The ratio must begin at 1."""
        if self._ratio_reported:
            return
        self._ratio_reported = True
        good = error <= RATIO_TOLERANCE
        verdict = "as it should be" if good else "more than rounding in float32 explains"
        found = "is not a number" if math.isnan(error) else f"is off 1 by at most {error:.1e}: {verdict}"
        self.recorder.event(
            "ratio_check",
            f"Before the first update the probability ratio {found}.",
            error=error,
            tolerance=RATIO_TOLERANCE,
        )

    # -- figures -----------------------------------------------------------------------------------------

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self._seconds[phase] += time.perf_counter() - begun

    def _metrics(
        self, groups: Sequence[Group], update: dict[str, float], resampled: int, seconds: float
    ) -> dict[str, float | None]:
        """The figures of one step, named and described in ``recorder.STEP_METRICS``."""
        return {
            **group_figures(groups, self.environment.images.cut_tokens),
            **update,
            "judge_mean": judged(self.judge, groups),
            "zero_spread_share": float(np.mean(self._flat(_rewards(groups)))),
            "resampled_groups": float(resampled),
            "seconds": seconds,
            "seconds_record": self._recording,
            **{f"seconds_{phase}": value for phase, value in self._seconds.items()},
        }


def _rewards(groups: Sequence[Group]) -> Tensor:
    """Float32 (P, G)."""
    return torch.stack([group.rewards for group in groups])
