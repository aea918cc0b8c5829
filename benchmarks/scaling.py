"""How a step's time and the update's memory grow with rollouts, prompts and length, doubling each.

Time: real steps of the trainer on the embedded models, of all sizes in turn, medians; "growth" is the time against
that of half the size, at most 2 where growth is no worse than linear. Completions are held at their longest allowed
length, or doubling it would change nothing. Memory: the peak that an update of one group adds, in a process of its
own, with and without logits in chunks, for a vocabulary as large as Qwen2-VL's (the embedded policy's widened by rows
that are never sampled).

    PYTHONPATH=. python benchmarks/scaling.py
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from common import ROOT, bars, machine, median, table
from engine import Stepper, endless, scored_groups

from grpo_engine.config import RunConfig
from grpo_engine.control import RunControl
from grpo_engine.environment import PureGRPOPromptEnvironment
from grpo_engine.loading import load_environment, read_prompts
from grpo_engine.placement import apply_threads
from grpo_engine.recorder import Unrecorded
from grpo_engine.trainer import PureGRPOTrainer

SIZES = {
    "rollouts": ("sampling.num_rollouts", (4, 8, 16, 32)),
    "prompts": ("training.batch_size", (2, 4, 8, 16)),
    "tokens": ("sampling.max_new_tokens", (16, 32, 64, 128)),
}
CHUNK = 32
VOCABULARY = 152_064


def step_times(base: list[str], rounds: int, most: int) -> dict[str, list[tuple[int, float]]]:
    """Seconds of a step for each size of each kind; ``most`` sizes a kind."""
    environment = load_environment(RunConfig.load("tiny", base))
    prompts = read_prompts(environment.config).split("train")
    found: dict[str, list[tuple[int, float]]] = {}
    for kind, (name, sizes) in SIZES.items():
        steppers = []
        for size in sizes[:most]:
            config = RunConfig.load("tiny", [*base, f"{name}={size}"])
            steppers.append((size, Stepper(config, _with(environment, config), prompts)))
        seconds: dict[int, list[float]] = {size: [] for size in sizes[:most]}
        for _ in range(rounds + 1):
            for size, step in steppers:
                with endless(step.trainer.policy):
                    seconds[size].append(step()["wall"])
        found[kind] = [(size, median(times[1:])) for size, times in seconds.items()]
    return found


def _with(environment: PureGRPOPromptEnvironment, config: RunConfig) -> PureGRPOPromptEnvironment:
    """The same loaded models in an environment with other settings."""
    policy = copy.copy(environment.policy)
    policy.sampling = config.sampling
    return PureGRPOPromptEnvironment(policy, environment.images, environment.reward, config)


def peak_of_update(rollouts: int, chunk: int, vocabulary: int) -> float:
    """MiB that an update of one group adds at its peak to what the process held before; in a process of its own."""
    command = [sys.executable, str(Path(__file__)), "--child", json.dumps([rollouts, chunk, vocabulary])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(out.stdout)


def child(rollouts: int, chunk: int, vocabulary: int) -> None:
    """Print the MiB of :func:`peak_of_update`."""
    names = [f"sampling.num_rollouts={rollouts}", f"training.logit_chunk={chunk}", "training.batch_size=1"]
    config = RunConfig.load("tiny", ["placement.plan=cpu", "sampling.max_new_tokens=16", *names])
    apply_threads(config)
    environment = load_environment(config)
    policy: Any = environment.policy
    with endless(policy):
        groups = scored_groups(environment, config)
    extra = vocabulary - policy.suppressed.shape[0]
    head = policy._base.lm_head
    wide = torch.zeros(extra, head.weight.shape[1])
    head.weight = torch.nn.Parameter(torch.cat([head.weight.detach(), wide]), requires_grad=False)
    policy.suppressed = torch.cat([policy.suppressed, torch.ones(extra, dtype=torch.bool)])
    trainer = PureGRPOTrainer(config, environment, read_prompts(config).split("train"), Unrecorded(), RunControl())
    trainer.update(groups, 1)  # once before, so that what every process allocates once is not counted
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = _resident("VmRSS")
    trainer.update(groups, 1)
    print(_resident("VmHWM") - before)


def _resident(name: str) -> float:
    """A figure of this process in MiB, as Linux tells it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, default=4, help="how many sizes of each kind, of up to 4")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="of the tiny preset")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(*options.child)
    base = ["placement.plan=cpu", "sampling.num_rollouts=4", "training.batch_size=2", "sampling.max_new_tokens=16"]
    base += ["models.image.steps=2", "objective.min_std=0"]
    base += ["training.learning_rate=1e-9", *options.set]
    apply_threads(RunConfig.load("tiny", base))
    print(f"{machine()}; torch {torch.__version__} with {torch.get_num_threads()} threads")
    rows: list[list[object]] = []
    for kind, times in step_times(base, options.rounds, options.sizes).items():
        for index, (size, seconds) in enumerate(times):
            growth = round(seconds / times[index - 1][1], 2) if index else ""
            rows.append([f"{size} {kind}", 1000 * seconds, growth])
    print(f"4 rollouts of 2 prompts, 16 tokens, 2 denoising steps, one of them doubled; medians of {options.rounds}\n")
    table(("step with", "ms", "growth"), rows)
    print()
    bars([(str(row[0]), float(str(row[1]))) for row in rows], "ms")
    memory: list[list[object]] = []
    for rollouts in SIZES["rollouts"][1][: options.sizes]:
        whole, parts = (peak_of_update(rollouts, chunk, VOCABULARY) for chunk in (0, CHUNK))
        memory.append([rollouts, 16 * rollouts, whole, parts])
    print(f"\nOne group's update, 16 tokens a rollout, {VOCABULARY} words:")
    table(("G", "tokens", "MiB, all logits at once", f"MiB, {CHUNK} tokens at a time"), memory)
    return None


if __name__ == "__main__":
    main()
