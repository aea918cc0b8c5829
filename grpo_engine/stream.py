"""The streamed step: groups flow from the policy to the image replicas, to the reward, and back to the update.

The policy's device belongs to the trainer's thread: it samples, then takes the backward pass of one group after the
other, in the order of the prompts. Every other device has a thread of its own and works beside it. Models that share
the policy's device work while the trainer waits, so with one device for all this is the plain order.

Nothing in here changes a number. Which pictures are rendered in one batch follows from the rewrites, the number of
replicas and ``models.image.batch_size`` alone, never from who was faster; so the same run has the same pictures, bit
for bit, on replicas of one kind, and with or without threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .image_model import RenderJob
from .pipeline import Pipeline, Stage, Work
from .policy import Poll, no_poll
from .prompts import Prompt
from .rendering import batch_limit, last_round, tapered
from .rollout import Group, Picture

if TYPE_CHECKING:
    from .environment import PureGRPOPromptEnvironment

Told = Callable[[str, int, int], None]


def _jobs(group: Group) -> list[RenderJob | None]:
    """What each rollout shows; None where there is no rewrite."""
    return [None if text is None else RenderJob(text, group.latent_seed) for text in group.rewrites]


@dataclass
class _Progress:
    """How many of the groups that were asked for together are cut into batches, and how many scored."""

    total: int
    cut: int = 0
    done: int = 0


@dataclass
class _Sheet:
    """Groups that are rendered together, and the pictures they have so far."""

    groups: list[Group]
    step: int
    progress: _Progress
    pictures: dict[RenderJob, Picture] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def jobs(self) -> list[RenderJob]:
        """Each distinct picture once, in the order of the groups."""
        return list(dict.fromkeys(job for group in self.groups for job in _jobs(group) if job is not None))

    def take(self, made: dict[RenderJob, Picture], seconds: float) -> list[Group]:
        """Add pictures that took ``seconds``; returns the groups that now have all theirs."""
        with self.lock:
            self.pictures |= made
            ready = []
            for group in self.groups:
                group.seconds["render"] = group.seconds.get("render", 0.0) + seconds / len(self.groups)
                jobs = _jobs(group)
                if not group.pictures and all(job is None or job in self.pictures for job in jobs):
                    group.pictures = [None if job is None else self.pictures[job] for job in jobs]
                    ready.append(group)
            return ready


class GroupStream:
    """Groups on their way through an environment. Inside ``with``, its other devices work beside the caller.

    Args:
        environment: the models, and who shares a device with whom.
        prompts: groups a step.
        poll: called often while sampling, rendering and waiting; raises to stop everything.
        held: whether a pause is on.
        told: hears ``(phase, groups done, groups)``, from the threads that do the work.
    """

    def __init__(
        self,
        environment: PureGRPOPromptEnvironment,
        prompts: int,
        *,
        poll: Poll = no_poll,
        held: Callable[[], bool] = lambda: False,
        told: Told | None = None,
    ) -> None:
        self.environment = environment
        self._told: Told = told or (lambda name, done, total: None)
        config = environment.config
        self._replicas = replicas = len(environment.replicas)
        pictures = max(1, prompts) * config.sampling.num_rollouts
        self._limit = batch_limit(pictures, replicas, environment.batch_size)
        # A step's batches have room: no backward pass can begin before the policy has sampled all of it.
        batches = prompts + pictures
        renderers = [(lane, self._renderer(index)) for index, lane in enumerate(environment.image_lanes)]
        stages = [
            Stage("render", renderers, capacity=batches * (1 + config.training.async_steps)),
            Stage("score", [(environment.reward_lane, self._score)], capacity=2 * replicas),
        ]
        self.pipeline = Pipeline(stages, poll=poll, held=held)

    @property
    def beside(self) -> bool:
        """Whether anything can work while the policy does."""
        return bool(self.pipeline.lanes)

    def __enter__(self) -> GroupStream:
        self.pipeline.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pipeline.__exit__(kind, error, trace)

    def sample(self, prompts: Sequence[Prompt], group_size: int, step: int, attempt: int = 0) -> list[Group]:
        """Sample ``group_size`` rewrites of each prompt and send the groups on, pass by pass.

        Returns when all are sampled: the groups, in the order of the prompts, whole once :meth:`wait` says so.
        """
        width = self.environment.config.sampling.prompts_per_pass or len(prompts)
        progress = _Progress(len(prompts))
        groups: list[Group] = []
        waiting: list[Group] = []  # for enough others to fill a batch
        for start in range(0, len(prompts), width):
            self._told("sampling", start, len(prompts))
            chosen = prompts[start : start + width]
            new = self.environment.sample_groups(chosen, group_size, step, attempt, poll=self.pipeline.poll)
            groups += new
            waiting = self._send(waiting + new, step, progress, last=start + width >= len(prompts))
        return groups

    def add(self, groups: Sequence[Group], step: int) -> None:
        """Send groups that are sampled already."""
        self._send(groups, step, _Progress(len(groups)), last=True)

    def wait(self, groups: Sequence[Group]) -> None:
        """Return once all of ``groups`` have their pictures and rewards; raises what their making ran into."""
        self.pipeline.until(lambda: all(len(group.rewards) for group in groups))

    def _send(self, groups: Sequence[Group], step: int, progress: _Progress, *, last: bool) -> list[Group]:
        """Cut groups into sheets and sheets into batches; returns the groups that wait for others unless ``last``."""
        sheet: list[Group] = []
        for index, group in enumerate(groups):
            sheet.append(group)
            left = (progress.total - progress.cut) * len(group)
            full = sum(len(set(one.rewrites)) for one in sheet) >= self._limit
            if full or last_round(left, self._replicas, self._limit) or (last and index + 1 == len(groups)):
                made = _Sheet(sheet, step, progress)
                # A sheet without any rewrite passes as it is.
                for batch in tapered(made.jobs(), left, self._replicas, self._limit) or [[]]:
                    self.pipeline.put((made, batch))
                progress.cut += len(sheet)
                sheet = []
        return sheet

    def _renderer(self, replica: int) -> Work:
        def render(item: tuple[_Sheet, list[RenderJob]], poll: Poll) -> Iterable[Any]:
            sheet, jobs = item
            self._told("rendering", sheet.progress.done, sheet.progress.total)
            begun = time.perf_counter()
            pictures = self.environment.replicas[replica].render(jobs, poll=poll)
            made = dict(zip(jobs, pictures, strict=True))
            return [(group, sheet) for group in sheet.take(made, time.perf_counter() - begun)]

        return render

    def _score(self, item: tuple[Group, _Sheet], poll: Poll) -> Iterable[Any]:
        group, sheet = item
        self._told("scoring", sheet.progress.done, sheet.progress.total)
        begun = time.perf_counter()
        rewards = self.environment.score(group, sheet.step)
        sheet.progress.done += 1
        group.seconds["score"] = time.perf_counter() - begun
        group.rewards = rewards  # last: with its rewards a group is whole
        return ()
