"""Does a cheap rendering rank the rewrites of a prompt as a full one does?

GRPO learns from the order of a group's rewards, so a cheap setting (few steps, small pictures, no T5) costs nothing
as long as it keeps that order. Here groups are sampled, rendered both ways from the same latent seeds, scored, and
ranked; the answer is the mean rank correlation inside a group (Spearman 1904) with a bootstrap interval over groups.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from .checkpoint import load_checkpoint
from .config import ConfigError, RunConfig
from .environment import PureGRPOPromptEnvironment
from .evaluation import bootstrap_mean
from .image_families.base import PipelineModel
from .image_model import ImageModel, RenderJob
from .loading import load_environment, load_images, release_memory
from .placement import apply_threads
from .plan import Plan
from .prompts import Prompt
from .seeding import numpy_generator

LEAST_REWRITES = 3  # different ones in a group: two are either right or wrong

Told = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Scores:
    """One group: its different rewrites' rewards, float64 (n,) each, rendered cheaply and fully."""

    cheap: NDArray[np.float64]
    full: NDArray[np.float64]

    @property
    def ranked(self) -> bool:
        """Whether there is an order to agree on."""
        return len(self.cheap) >= LEAST_REWRITES and bool(np.ptp(self.cheap) > 0 and np.ptp(self.full) > 0)


@dataclass(frozen=True)
class Fidelity:
    """How far a cheap setting ranks as the full one.

    Attributes:
        correlation: mean over groups of Spearman's rank correlation, with its interval ``low`` to ``high``.
        groups: that it is the mean of.
        left_out: further groups, with fewer than three different rewrites or without spread.
        same_best: share of groups whose best rewrite is the same.
        cheap_seconds, full_seconds: rendering time a picture.
        settings: what differs: name -> (cheap, full).
    """

    correlation: float
    low: float
    high: float
    confidence: float
    groups: int
    left_out: int
    same_best: float
    cheap_seconds: float
    full_seconds: float
    settings: Mapping[str, tuple[Any, Any]]

    @property
    def sentence(self) -> str:
        """The answer for people."""
        cheap, full = (
            " ".join(f"{name.rpartition('.')[2]}={pair[side]}" for name, pair in self.settings.items())
            for side in (0, 1)
        )
        return (
            f"With {cheap} the rewrites of a prompt are ranked as with {full} at a mean rank correlation of "
            f"{self.correlation:.2f} ({self.confidence:.0%} interval {self.low:.2f} to {self.high:.2f} over "
            f"{self.groups} groups); the best rewrite is the same in {self.same_best:.0%}, and a picture takes "
            f"{self.cheap_seconds / self.full_seconds:.2f} of the time."
        )

    def as_data(self) -> dict[str, Any]:
        """Everything as plain data."""
        return asdict(self) | {"settings": {name: list(pair) for name, pair in self.settings.items()}}


def agreement(groups: Sequence[Scores]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Of each group that is ranked: the rank correlation, float64 (n,), and whether the best rewrite is the same."""
    ranked = [group for group in groups if group.ranked]
    correlations = [float(spearmanr(group.cheap, group.full).statistic) for group in ranked]
    same_best = [bool(group.cheap.argmax() == group.full.argmax()) for group in ranked]
    return np.array(correlations, dtype=np.float64), np.array(same_best, dtype=np.bool_)


def measure_fidelity(
    config: RunConfig, full: RunConfig, count: int, *, checkpoint: Path | None = None, told: Told | None = None
) -> Fidelity:
    """Compare ``config``'s rendering with ``full``'s, which differs from it in ``models.image`` alone.

    Args:
        count: groups that are sampled; fewer where the set has fewer training prompts.
        checkpoint: folder of the policy that writes; None = the untrained one.
        told: hears (phase, done, total).

    Raises:
        ConfigError: one of the two settings can't work here, they don't differ, or fewer than two groups are ranked.
    """
    settings = config.differences(full)
    if not settings:
        raise ConfigError("The full setting is the run's own; name one that differs, such as --steps 28.")
    say = told or (lambda name, done, total: None)
    plan, full_plan = Plan(config, whole=True), Plan(full, whole=True)
    config, full = plan.config, full_plan.config
    apply_threads(config)
    environment = load_environment(config, plan.placement, say)
    if checkpoint is not None:
        load_checkpoint(checkpoint, environment.policy)
    order = numpy_generator(config.seed, "fidelity").permutation(len(plan.train))[:count]
    work = _Work([plan.train[i] for i in order], say)
    cheap_seconds = work.sample(environment, config)
    images, reward = environment.images, environment.reward
    other: ImageModel | None = None
    if isinstance(images, PipelineModel):
        other = images.with_settings(full.models.image)
    if other is None:
        del environment, images  # both image models at once need not fit
        release_memory()
        other = load_images(full, full_plan.placement.image)
    full_seconds = work.render_fully(other, reward.score)
    correlations, same_best = agreement(work.scores)
    if len(correlations) < 2:
        raise ConfigError(
            f"Of {len(work.scores)} groups only {len(correlations)} had {LEAST_REWRITES} rewrites and rewards "
            "that differ, too few to rank; sample more groups, or raise sampling.num_rollouts or sampling.temperature."
        )
    low, high = bootstrap_mean(
        correlations, resamples=config.evaluation.bootstrap, confidence=config.evaluation.confidence, seed=config.seed
    )
    return Fidelity(
        correlation=float(correlations.mean()),
        low=low,
        high=high,
        confidence=config.evaluation.confidence,
        groups=len(correlations),
        left_out=len(work.scores) - len(correlations),
        same_best=float(same_best.mean()),
        cheap_seconds=cheap_seconds,
        full_seconds=full_seconds,
        settings=settings,
    )


class _Work:
    """The groups on their way: prompts, then their different rewrites with one reward, then with both."""

    def __init__(self, prompts: Sequence[Prompt], say: Told) -> None:
        self.prompts, self.say = prompts, say
        self.scores: list[Scores] = []
        self._cheap: list[tuple[str, int, dict[str, float]]] = []  # prompt, latent seed, rewrite -> reward

    def sample(self, environment: PureGRPOPromptEnvironment, config: RunConfig) -> float:
        """Rewrite, render and score as a step of training does; returns seconds a picture."""
        seconds, width = 0.0, config.training.batch_size
        for start in range(0, len(self.prompts), width):
            self.say("cheap setting", start, len(self.prompts))
            chosen = self.prompts[start : start + width]
            for group in environment.rollout(chosen, config.sampling.num_rollouts, step=0):  # training begins at 1
                scored = zip(group.rewrites, group.scores, strict=True)
                rewards = {rewrite: score.total for rewrite, score in scored if rewrite is not None}
                self._cheap.append((group.prompt.text, group.latent_seed, rewards))
                seconds += group.seconds["render"]
        return seconds / max(1, sum(len(rewards) for _, _, rewards in self._cheap))

    def render_fully(self, images: ImageModel, score: Callable[..., Any]) -> float:
        """Render and score the same rewrites from the same latent seeds; returns seconds a picture."""
        seconds = 0.0
        for done, (prompt, latent_seed, rewards) in enumerate(self._cheap):
            self.say("full setting", done, len(self._cheap))
            rewrites = list(rewards)
            begun = time.perf_counter()
            pictures = images.render([RenderJob(text, latent_seed) for text in rewrites])
            seconds += time.perf_counter() - begun
            full = [one.total for one in score(pictures, [prompt] * len(rewrites), rewrites)]
            self.scores.append(Scores(np.array(list(rewards.values())), np.array(full)))
        return seconds / max(1, sum(len(rewards) for _, _, rewards in self._cheap))
