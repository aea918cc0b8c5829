"""How far a policy drifts on rewards that say nothing, which a gain must be held against; and whether up or down.

Every seed trains twice on rewards from a normal distribution, into which no picture enters: once as drawn, once with
all signs turned. To first order the second run goes the other way (over all noise a step's mean gradient is zero, see
``test_rewards_dealt_out_at_random_teach_nothing_on_average``), so the mean of the two is what is left of a direction,
and the spread of single runs is the drift itself. Nothing is rendered while training; both policies are measured as
any run measures its own, against the untrained one on the same prompts and latents.

    PYTHONPATH=. python benchmarks/drift.py
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence

import numpy as np
import torch
from common import bars, machine, table

from grpo_engine.config import RunConfig
from grpo_engine.control import RunControl
from grpo_engine.environment import PureGRPOPromptEnvironment
from grpo_engine.evaluation import Evaluator, by_prompt
from grpo_engine.image_model import ImageModel, RenderJob
from grpo_engine.loading import load_environment
from grpo_engine.placement import apply_threads
from grpo_engine.plan import Plan
from grpo_engine.policy import Poll, no_poll
from grpo_engine.recorder import Unrecorded
from grpo_engine.rollout import Group, Picture, Score
from grpo_engine.seeding import numpy_generator
from grpo_engine.trainer import PureGRPOTrainer

ARMS = ("sampled", "greedy")
SIGNS = (1.0, -1.0)


class Blank:
    """An image model that draws nothing: here no reward depends on a picture."""

    def __init__(self, real: ImageModel) -> None:
        self.told = real.told
        self.picture: Picture = np.zeros((1, 1, 3), np.uint8)

    def render(self, jobs: Sequence[RenderJob], *, poll: Poll = no_poll) -> list[Picture]:
        """See :class:`ImageModel`."""
        return [self.picture] * len(jobs)

    def cut_tokens(self, text: str) -> int:
        """See :class:`ImageModel`."""
        return 0


class NoiseEnvironment(PureGRPOPromptEnvironment):
    """Rewards are drawn from N(0, 1) and multiplied by ``sign``."""

    def __init__(self, real: PureGRPOPromptEnvironment, sign: float) -> None:
        super().__init__(real.policy, Blank(real.images), real.reward, real.config)
        self.sign = sign

    def score(self, group: Group, step: int) -> torch.Tensor:
        """The same noise for the same step and prompt, whatever was written; float32 (G,)."""
        noise = self.sign * numpy_generator(self.config.seed, "drift", step, group.prompt.id).normal(size=len(group))
        group.scores = [Score({}, float(value)) for value in noise]
        return torch.tensor(noise, dtype=torch.float32)


def drifts(config: RunConfig) -> list[list[float]]:
    """For each sign, by how much a policy trained on noise is above the untrained one: sampled, and greedy."""
    plan = Plan(config)
    config = plan.config
    apply_threads(config)
    untrained: list[float] = []
    found = []
    for sign in SIGNS:
        real = load_environment(config, plan.placement)
        PureGRPOTrainer(config, NoiseEnvironment(real, sign), plan.train, Unrecorded(), RunControl()).train()
        evaluator = Evaluator(real, None, plan.test, config)
        untrained = untrained or rewards(evaluator, "untrained")  # the adapter is off: the same after either training
        trained = rewards(evaluator, "trained")
        found.append([after - before for after, before in zip(trained, untrained, strict=True)])
    return found


def rewards(evaluator: Evaluator, policy: str) -> list[float]:
    """Mean reward of ``policy``, "untrained" or "trained": sampled, and greedy."""
    return [
        statistics.mean(by_prompt(evaluator.measure(policy + arm), lambda item: item.score.total).values())
        for arm in ("", "_greedy")
    ]


def mean_and_error(values: Sequence[float]) -> str:
    """Mean and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):+.2f} on average (standard error {error:.2f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=12, help="pairs of runs, at least 2 (12)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="of the tiny preset")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds must be 2 or more: of a single pair nothing can be said")
    runs: list[list[list[float]]] = []  # seed, sign, arm
    for seed in range(options.seeds):
        config = RunConfig.load("tiny", [*options.set, f"seed={seed}"])
        runs.append(drifts(config))
        print(f"seed {seed}: {len(runs)} of {options.seeds} pairs", file=sys.stderr)
    print(f"{machine()}; torch {torch.__version__}")
    print(f"{config.training.steps} steps on noise, and on the same noise turned; drift of the reward\n")
    rows = [
        [seed, *(f"{both[sign][arm]:+.2f}" for arm in range(2) for sign in range(2))] for seed, both in enumerate(runs)
    ]
    table(("seed", *(f"{arm}{turned}" for arm in ARMS for turned in ("", ", turned"))), rows)
    print()
    for arm, name in enumerate(ARMS):
        single = [drift[arm] for both in runs for drift in both]
        pairs = [statistics.mean(drift[arm] for drift in both) for both in runs]
        size = math.sqrt(statistics.mean(drift**2 for drift in single))
        print(f"{name}: a single run drifts by {size:.2f} (root mean square), the pairs by {mean_and_error(pairs)}")
    print()
    bars([(f"seed {seed}{turned}", abs(both[sign][0])) for seed, both in enumerate(runs)
          for sign, turned in enumerate(("", ", turned"))], "sampled, up or down")  # fmt: skip


if __name__ == "__main__":
    main()
