"""What a run tells the world while it goes on: the only way out of the trainer.

The trainer and the evaluation know this protocol and nothing of databases or files; ``store/recorder.py``
implements it for ``runs.db``. Every call returns at once or raises what a background writer ran into earlier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # readers of the database need these names, not torch
    from .rollout import Group, Picture, Score

RUN_STATES = (
    "queued",
    "loading",
    "baseline",
    "training",
    "paused",
    "evaluating",
    "finished",
    "stopped",
    "failed",
    "interrupted",
)
FINAL_STATES = frozenset({"finished", "stopped", "failed", "interrupted"})

# Columns of a recorded step, with units. One name, one meaning, everywhere (database, charts, CSV, trackers).
STEP_METRICS: dict[str, str] = {
    "total_loss": "policy loss + kl_coef x KL - entropy_coef x entropy",
    "policy_loss": "aggregated policy loss; about 0 with one inner epoch, by construction",
    "kl_penalty": "KL estimate towards the untrained policy, nats a token (not yet times kl_coef)",
    "entropy": "mean entropy of the sampling distribution, nats a token",
    "avg_advantage": "mean advantage; 0 by construction",
    "advantage_p10": "10th percentile of the advantages",
    "advantage_p90": "90th percentile of the advantages",
    "learning_rate": "AdamW step size used",
    "reward_mean": "mean reward of the step's rollouts",
    "reward_std": "mean standard deviation of the reward inside a group",
    "reward_p10": "10th percentile of the reward",
    "reward_p90": "90th percentile of the reward",
    "reward_clip": "mean raw clip part: 100 x cosine",
    "reward_length": "mean raw length part",
    "reward_format": "mean raw format part",
    "reward_aesthetic": "mean raw aesthetic part, where its head is loaded",
    "reward_vqa": "mean raw vqa part: probability of Yes (0..1), where its weight is not 0",
    "judge_mean": "mean judge score of the step's pictures, where the judge is cheap enough to run (0..1)",
    "zero_spread_share": "share of groups whose rewards do not differ",
    "resampled_groups": "groups thrown away and resampled for lack of spread",
    "clip_low_fraction": "share of tokens clipped from below",
    "clip_high_fraction": "share of tokens clipped from above",
    "ratio_error": "largest |ratio - 1| before the step's first update",
    "staleness": "updates made between sampling the step's rewrites and learning from them",
    "grad_norm": "gradient norm before clipping",
    "completion_tokens": "mean completion length, tokens",
    "rewrite_words": "mean rewrite length, words",
    "cut_tokens": "mean tokens at the end of a rewrite that the image model cannot read",
    "cut_share": "share of rewrites that are longer than what the image model reads",
    "truncated_share": "share of completions that reached the token limit",
    "distinct_share": "distinct rewrites / rewrites, mean over groups",
    "parse_failures": "completions without a usable rewrite",
    "skipped": "1 if the update was skipped for a non-finite loss or gradient",
    "seconds": "wall time of the step",
    "seconds_sample": "time in sampling",
    "seconds_render": "time in rendering, summed over image models; with streaming beside the others",
    "seconds_score": "time in scoring; with streaming beside the others",
    "seconds_update": "time in log-probabilities, backward pass and optimiser",
    "seconds_wait": "time the policy's device had nothing to do",
    "seconds_record": "time in recording the step before",
    "images_rendered": "pictures really rendered (after removing duplicates)",
}


@dataclass(frozen=True)
class EvaluationItem:
    """One picture of an evaluation: which arm, prompt and latents, and how it scored."""

    arm: str  # "original", "untrained", "untrained_greedy", "trained", "trained_greedy"
    prompt_id: str
    prompt: str
    tier: str
    index: int  # which of the prompt's latents
    latent_seed: int
    rewrite: str | None
    score: Score
    judge: float | None  # 0..1
    judge_parts: Mapping[str, Sequence[int]]  # kind of attribute -> (right, asked)
    picture: Picture | None
    cut_tokens: int | None = None  # at the end of the rewrite that the image model can't read; None = not known
    read_chars: int | None = None  # characters of the rewrite that it does read


@dataclass(frozen=True)
class Evaluation:
    """A finished measurement: its pictures, and its summary (see ``evaluation.summarise``)."""

    kind: str  # "baseline", "validation", "final"
    step: int
    split: str
    items: Sequence[EvaluationItem]
    summary: Mapping[str, Any]


class Recorder(Protocol):
    """Takes what happened, in the order it happened."""

    def state(self, state: str, message: str = "") -> None:
        """The run moved to ``state`` (one of RUN_STATES)."""

    def phase(self, name: str, done: int = 0, total: int = 0) -> None:
        """Progress inside a state: "sampling", "rendering", ... ``total`` 0 = unknown."""

    def step(self, step: int, metrics: Mapping[str, float | None], groups: Sequence[Group]) -> None:
        """Step ``step`` (from 1) is complete; both parts become visible together."""

    def evaluation(self, evaluation: Evaluation) -> None:
        """An evaluation is complete."""

    def event(self, kind: str, message: str, **data: Any) -> None:
        """Something worth a line in the log: "ratio_check", "checkpoint", "skipped_step", "warning", ..."""

    def flush(self) -> None:
        """Return once everything recorded so far is safely stored."""


class Unrecorded:
    """A :class:`Recorder` that keeps nothing, for a rank whose work another one records."""

    def state(self, state: str, message: str = "") -> None:
        """See :class:`Recorder`; so all below."""

    def phase(self, name: str, done: int = 0, total: int = 0) -> None:
        """Nothing."""

    def step(self, step: int, metrics: Mapping[str, float | None], groups: Sequence[Group]) -> None:
        """Nothing."""

    def evaluation(self, evaluation: Evaluation) -> None:
        """Nothing."""

    def event(self, kind: str, message: str, **data: Any) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""
