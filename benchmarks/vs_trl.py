"""The same GRPO job here and in TRL's ``GRPOTrainer``, step by step in turn: time by phase, and why.

Both train the embedded policy with the same LoRA and the same optimiser on the same prompts, sample groups of the
same size and length from the same distribution, and call the same image model and reward model on the same latents,
on the CPU. That they do equal work is shown first: on the same completions both have the same gradient. TRL knows no
suppressed tokens, so none are suppressed here either. Its reward function renders every completion; ours renders what
is the same once (``--distinct``: TRL's too). Goals on two CPU cores: sampling plus update at most half of TRL's, the
whole step at most 0.7 of it.

TRL is needed beside the program's own requirements (benchmarks/requirements.txt says how to install it).

    PYTHONPATH=. .venv-trl/bin/python benchmarks/vs_trl.py
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import Counter
from typing import Any

# The engine would set the process's allocator up for itself (grpo_engine/heap.py), which does not suit TRL's larger
# tensors: both are measured with the C library's own habits.
os.environ.setdefault("GLIBC_TUNABLES", "")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "0")

import torch
from common import bars, machine, median, table
from engine import Stepper, TokenCount
from trl_side import UNCLIPPED, TrlSide, flat, require_trl

from grpo_engine.config import RunConfig
from grpo_engine.loading import load_environment, read_prompts
from grpo_engine.placement import apply_threads
from grpo_engine.seeding import normals

PHASES = ("sample", "update", "render", "score")
TOLERANCE = 1e-4
WARM_UP = 2  # pairs of steps before the clock counts
SAME = (
    "placement.plan=cpu",
    "objective.unbiased=true",  # TRL divides by the sample's standard deviation plus 1e-4
    "objective.epsilon=1e-4",
    "objective.min_std=0",
    "training.schedule=constant",
    "training.warmup_steps=0",
)


class Race:
    """Both sides, in turn."""

    def __init__(self, config: RunConfig, pairs: int, folder: str, *, distinct: bool) -> None:
        torch.manual_seed(config.seed)
        self.environment = load_environment(config)
        self.policy = self.environment.policy
        self.policy.suppressed.zero_()
        prompts = read_prompts(config).split("train")
        unclipped = RunConfig.load("tiny", [*config.as_overrides(), f"training.max_grad_norm={UNCLIPPED}"])
        self.first = Stepper(unclipped, self.environment, prompts).trainer
        self.step = Stepper(config, self.environment, prompts)
        self.ours: list[dict[str, float]] = []
        self.count = TokenCount(self.policy._base)
        batches = [self.step.trainer.batch(step) for step in range(1, pairs + WARM_UP + 2)]
        self.trl = TrlSide(config, self.environment, batches, self._between, folder, distinct=distinct)
        self.begin = {name: p.detach().clone() for name, p in self.policy.trainable().items()}

    def run(self) -> float:
        """All steps of both; returns how far the gradients on the same completions are apart, relative."""
        trainer, own = self.first, self.policy.trainable()
        theirs = self.trl.adapter()
        if own.keys() != theirs.keys():
            raise SystemExit("TRL trains other weights than we do; nothing can be compared.")
        with torch.no_grad():  # a fresh adapter is zero: half of its gradient would be too
            for index, (name, parameter) in enumerate(own.items()):
                parameter.add_(0.02 * normals(index, parameter.shape))
                theirs[name].copy_(parameter)
        groups, _ = trainer.collect(1)
        trainer.assign_advantages(groups)
        trainer.update(groups, 1)
        gradient = flat([p.grad for p in own.values()])
        self._restore(own)
        self.trl.replayed = [group.completions for group in groups]
        self.trl.rewards = [float(reward) for group in groups for reward in group.rewards]
        with torch.no_grad():
            for index, (name, parameter) in enumerate(theirs.items()):
                parameter.copy_(self.begin[name] + 0.02 * normals(index, parameter.shape))
        self.step.trainer.step = 1
        self.trl.run()
        other = self.trl.gradient
        assert other is not None
        return float((other - gradient).norm() / gradient.norm())

    def _restore(self, parameters: Any) -> None:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.begin[name])

    def _between(self, step: int) -> None:
        """After TRL's step: ours, of the same prompts. TRL's first was the comparison of gradients."""
        if step == 1:
            self._restore(self.trl.adapter())
            self.trl.begin()
            return
        self.count.now = "update"
        sample = self.policy.sample

        def counted(*arguments: Any, **named: Any) -> Any:
            self.count.now = "sample"
            out = sample(*arguments, **named)
            self.count.now = "update"
            return out

        self.policy.sample = counted  # type: ignore[method-assign]
        metrics = self.step()
        self.policy.sample = sample  # type: ignore[method-assign]
        self.count.now = ""
        own = {phase: metrics[f"seconds_{phase}"] for phase in PHASES}
        self.ours.append(own | {"wall": metrics["wall"], "reward": metrics["reward_mean"]})


def compared(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> list[tuple[str, float, float, float]]:
    """(what, our ms, TRL's ms, median of the pairs' ratios) of each phase and of the whole step."""

    def row(what: str, *phases: str) -> tuple[str, float, float, float]:
        pairs = [(sum(a[p] for p in phases), sum(b[p] for p in phases)) for a, b in zip(ours, theirs, strict=True)]
        own, other = (1000 * median([pair[side] for pair in pairs]) for side in (0, 1))
        return what, own, other, median([a / b for a, b in pairs])

    return [
        row("sampling", "sample"),
        row("update (reference, policy, optimiser)", "update"),
        row("sampling + update", "sample", "update"),
        row("rendering", "render"),
        row("scoring", "score"),
        row("whole step", "wall"),
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=60, help="pairs of steps that are measured")
    parser.add_argument("--distinct", action="store_true", help="TRL's reward function too renders the same once")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="of the tiny preset")
    options = parser.parse_args()
    version = require_trl()
    steps = options.pairs + WARM_UP + 2
    config = RunConfig.load("tiny", [*SAME, f"training.steps={steps}", *options.set])
    apply_threads(config)
    with tempfile.TemporaryDirectory() as folder:
        race = Race(config, options.pairs, folder, distinct=options.distinct)
        apart = race.run()
    sampling, batch = config.sampling, config.training.batch_size
    print(f"{machine()}; torch {torch.__version__} with {torch.get_num_threads()} threads, TRL {version}")
    print(
        f"{batch} prompts x {sampling.num_rollouts} rollouts of at most {sampling.max_new_tokens} tokens, "
        f"{config.models.image.steps} denoising steps; medians of {options.pairs} pairs of steps\n"
    )
    rows = compared(race.ours[WARM_UP:], race.trl.steps[WARM_UP:])
    table(("phase", "ours ms", "TRL ms", "ours / TRL"), rows)
    print()
    counted: list[tuple[str, Counter[str]]] = [
        ("ours, tokens", race.count.tokens),
        ("TRL, tokens", race.trl.count.tokens),
        ("ours, forward passes", race.count.calls),
        ("TRL, forward passes", race.trl.count.calls),
    ]
    table(
        ("through the policy, a step", "sampling", "update"),
        [
            [what, *(round(number[phase] / len(race.ours)) for phase in ("sample", "update"))]
            for what, number in counted
        ],
    )
    print()
    bars([(what, ratio) for what, _, _, ratio in rows], "x TRL")
    verdict = "the same work" if apart < TOLERANCE else "NOT the same work"
    print(f"\nGradients on the same completions are {apart:.1e} apart, relative: {verdict}.")
    last = slice(-max(1, options.pairs // 4), None)
    rewards = [side[last] for side in ([step["reward"] for step in race.ours], race.trl.mean_rewards)]
    print(f"Mean reward of the last quarter: {median(rewards[0]):.1f} here, {median(rewards[1]):.1f} in TRL.")
    for what, ratio, goal in ((rows[2][0], rows[2][3], 0.5), (rows[5][0], rows[5][3], 0.7)):
        print(f"{what}: {ratio:.2f} of TRL's, goal {goal}: {'met' if ratio <= goal else 'missed'}")


if __name__ == "__main__":
    main()
