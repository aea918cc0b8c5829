"""Tokens through the policy in an update, with the prompt shared by its group and without, against P + G x R.

The real update of the trainer on sampled groups (reference pass, policy, backward pass); rewards are made up, so no
picture is rendered. P: the prompt's tokens, R: those of a rewrite (mean); a last token is never read, hence R - 1.
"Apart": every rewrite behind a prompt of its own, padded to the longest.
Medians of paired updates, in turn; the gradients of both ways are compared.

    PYTHONPATH=. python benchmarks/policy_tokens.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from common import bars, machine, median, table
from engine import TokenCount, scored_groups

from grpo_engine.config import RunConfig
from grpo_engine.control import RunControl
from grpo_engine.environment import PureGRPOPromptEnvironment
from grpo_engine.loading import load_environment, read_prompts
from grpo_engine.placement import apply_threads
from grpo_engine.recorder import Unrecorded
from grpo_engine.rollout import Group
from grpo_engine.trainer import PureGRPOTrainer


class Update:
    """One way to do the trainer's update: tokens, seconds and the gradient."""

    def __init__(self, trainer: PureGRPOTrainer, shared: bool) -> None:
        self.trainer, self.shared = trainer, shared
        self.seconds: list[float] = []
        self.tokens = 0
        self.gradient = torch.zeros(0)

    def __call__(self, groups: Sequence[Group]) -> None:
        policy = self.trainer.policy
        could, policy.shares_prefix = policy.shares_prefix, self.shared
        count = TokenCount(policy._base)
        count.now = "update"
        begun = time.perf_counter()
        self.trainer.update(groups, 1)
        self.seconds.append(time.perf_counter() - begun)
        policy.shares_prefix = could
        count.close()
        self.tokens = count.tokens["update"] // 2  # the reference reads them all once more
        self.gradient = torch.cat([p.grad.flatten() for p in self.trainer.parameters if p.grad is not None])


def measured(environment: PureGRPOPromptEnvironment, config: RunConfig, rounds: int) -> list[object]:
    """A row of the table but for its first cell."""
    groups = scored_groups(environment, config)
    frozen = RunConfig.load("tiny", [*config.as_overrides(), "training.learning_rate=1e-12"])
    prompts = read_prompts(config).split("train")
    shared, plain = (
        Update(PureGRPOTrainer(frozen, environment, prompts, Unrecorded(), RunControl()), way) for way in (True, False)
    )
    for _ in range(rounds + 1):  # the first warms up
        shared(groups)
        plain(groups)
    read = sum(len(group.completions.prompt_ids) for group in groups)
    written = sum(int(group.completions.mask.sum()) - len(group) for group in groups)
    apart = float((shared.gradient - plain.gradient).norm() / plain.gradient.norm())
    ratios = [a / b for a, b in zip(shared.seconds[1:], plain.seconds[1:], strict=True)]
    milliseconds = [1000 * median(way.seconds[1:]) for way in (shared, plain)]
    return [read + written, shared.tokens, plain.tokens, *milliseconds, median(ratios), f"{apart:.0e}"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rollouts", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="of the tiny preset")
    options = parser.parse_args()
    base = RunConfig.load("tiny", ["placement.plan=cpu", *options.set])
    apply_threads(base)
    environment = load_environment(base)
    rows = []
    for rollouts in options.rollouts:
        config = RunConfig.load("tiny", [*base.as_overrides(), f"sampling.num_rollouts={rollouts}"])
        rows.append([rollouts, *measured(environment, config, options.rounds)])
    print(f"{machine()}; torch {torch.__version__} with {torch.get_num_threads()} threads")
    print(f"{base.training.batch_size} prompts a step; tokens of one pass; medians of {options.rounds} pairs\n")
    table(("G", "P + G(R-1)", "shared", "apart", "shared ms", "apart ms", "time ratio", "gradients differ by"), rows)
    print()
    ways = [(row, what, place) for row in rows for what, place in (("shared", 2), ("apart", 3))]
    bars([(f"G={row[0]} {what}", float(str(row[place]))) for row, what, place in ways], "tokens")


if __name__ == "__main__":
    main()
