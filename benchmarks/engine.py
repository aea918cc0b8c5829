"""What the benchmarks of the engine share: a trainer run step by step that records nothing, and a count of tokens."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from grpo_engine.config import RunConfig
from grpo_engine.control import RunControl
from grpo_engine.environment import PureGRPOPromptEnvironment
from grpo_engine.loading import read_prompts
from grpo_engine.policy import PureGRPOPolicy
from grpo_engine.prompts import Prompt
from grpo_engine.recorder import Unrecorded
from grpo_engine.rollout import Group
from grpo_engine.seeding import derive_seed
from grpo_engine.trainer import PureGRPOTrainer


class _StepDone(Exception):
    """Leaves the training loop after a step; the next call goes on from there."""


class Stepper:
    """The real trainer, one whole step at a time."""

    def __init__(
        self, config: RunConfig, environment: PureGRPOPromptEnvironment, prompts: Sequence[Prompt], judge: Any = None
    ) -> None:
        self._metrics: dict[str, float | None] = {}
        self.trainer = PureGRPOTrainer(config, environment, prompts, Unrecorded(), RunControl(), self._after, judge)

    def _after(self, step: int, metrics: dict[str, float | None]) -> None:
        self._metrics = metrics
        raise _StepDone

    def __call__(self) -> dict[str, float]:
        """Run one step; its metrics, with its wall time as ``wall``, in seconds."""
        begun = time.perf_counter()
        with contextlib.suppress(_StepDone):
            self.trainer.train()
        wall = time.perf_counter() - begun
        return {name: float(value) for name, value in self._metrics.items() if value is not None} | {"wall": wall}


def scored_groups(environment: PureGRPOPromptEnvironment, config: RunConfig) -> list[Group]:
    """One step's groups as ``config`` samples them, with made-up rewards that differ; nothing is rendered."""
    prompts = read_prompts(config).split("train")[: config.training.batch_size]
    rollouts = config.sampling.num_rollouts
    seeds = [[derive_seed(0, "benchmark", prompt.id, k) for k in range(rollouts)] for prompt in prompts]
    written = environment.policy.sample([prompt.text for prompt in prompts], seeds)
    groups = [environment.new_group(prompt, own, 0) for prompt, own in zip(prompts, written, strict=True)]
    for group in groups:
        group.rewards = torch.arange(rollouts, dtype=torch.float32)
        group.advantages = (group.rewards - group.rewards.mean()) / group.rewards.std(correction=0)
    return groups


@contextlib.contextmanager
def endless(policy: PureGRPOPolicy) -> Iterator[None]:
    """Inside, completions are as long as they may be, whatever the policy has learned."""
    before = policy.suppressed
    policy.suppressed = before.clone()
    policy.suppressed[policy.end_tokens] = True
    try:
        yield
    finally:
        policy.suppressed = before


class TokenCount:
    """Counts what goes through a model's embedding: by a name that the caller sets, in tokens and in calls."""

    def __init__(self, model: Any) -> None:
        self.tokens: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.now = ""
        self._handle = model.get_input_embeddings().register_forward_pre_hook(self._count)

    def _count(self, _module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if self.now:
            self.tokens[self.now] += inputs[0].numel()
            self.calls[self.now] += 1

    def close(self) -> None:
        """Stop counting."""
        self._handle.remove()
