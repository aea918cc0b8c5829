"""The streamed step against its bound: the real environment and scheduler, with models that only take time.

One policy, 1, 2 and 4 image replicas and one reward, each on a device of its own, sleep for set times where real ones
would compute. No step can be shorter than its busiest device: max(policy path, rendering / replicas, scoring). Goal: at
most 1.10 times that. Beside it the sequential order: sample all, render all, score all, update.

    PYTHONPATH=. python benchmarks/pipeline.py --rounds 5
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from common import bars, machine, median, table

from grpo_engine.config import ImageModelConfig, RunConfig
from grpo_engine.environment import PureGRPOPromptEnvironment
from grpo_engine.image_model import RenderJob
from grpo_engine.placement import Placement
from grpo_engine.policy import Poll, no_poll
from grpo_engine.prompts import Prompt
from grpo_engine.reward import RewardModel
from grpo_engine.rollout import Completions, Picture
from grpo_engine.stream import GroupStream

PROMPTS, ROLLOUTS = 24, 4
BATCH = 2  # pictures: at full scale larger batches take as much longer, and groups come less evenly
# Seconds. As at full scale, rendering is most of the work; with four replicas it is no longer.
SAMPLE, RENDER, SCORE, UPDATE = 0.05, 0.20, 0.02, 0.15  # a group, a picture, a picture, a group
REPLICAS = (1, 2, 4)


class SleepingPolicy:
    """Writes numbered rewrites."""

    device = torch.device("cuda:0")  # a name: nothing is put there

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[Sequence[int]], *, poll: Poll = no_poll
    ) -> list[Completions]:
        time.sleep(SAMPLE * len(prompts))
        ids, mask, zeros = torch.zeros(1, 1).long(), torch.ones(ROLLOUTS, 1).bool(), torch.zeros(ROLLOUTS, 1)
        ended = torch.ones(ROLLOUTS).bool()
        return [
            Completions(ids[0], ids.expand(ROLLOUTS, 1), mask, zeros, zeros, None, tuple(map(str, own)), ended)
            for own in seeds
        ]


class SleepingImages:
    """Renders black."""

    def __init__(self, config: ImageModelConfig) -> None:
        self.config = config
        self.told: Callable[[str, str], object] = print

    def render(self, jobs: Sequence[RenderJob], *, poll: Poll = no_poll) -> list[Picture]:
        poll()
        time.sleep(RENDER * len(jobs))
        return [np.zeros((8, 8, 3), np.uint8) for _ in jobs]

    def cut_tokens(self, text: str) -> int:
        return 0


class SleepingScorer:
    """Scores by place."""

    def score(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> list[float]:
        time.sleep(SCORE * len(pictures))
        return [float(index) for index in range(len(pictures))]


@dataclass
class Step:
    """Seconds that a step took, and those that its stages were at work: a sleeper wakes late on a busy machine."""

    policy: float = 0.0
    rendering: float = 0.0
    scoring: float = 0.0
    whole: float = 0.0

    def bound(self, replicas: int) -> float:
        """What no step with these stages can be shorter than."""
        return max(self.policy, self.rendering / replicas, self.scoring)


def one_step(replicas: int, streaming: str) -> Step:
    """Sampling pass by pass, rendering, scoring, and the update in the order of the prompts."""
    config = RunConfig.load("tiny", [
        f"training.batch_size={PROMPTS}", f"sampling.num_rollouts={ROLLOUTS}", "sampling.prompts_per_pass=1",
        f"models.image.batch_size={BATCH}", f"training.streaming={streaming}",
    ])  # fmt: skip
    images = [SleepingImages(config.models.image) for _ in range(replicas)]
    devices = [torch.device("cuda", index) for index in range(replicas + 2)]
    policy: Any = SleepingPolicy()
    environment = PureGRPOPromptEnvironment(
        policy, images[0], RewardModel(SleepingScorer(), config.models.reward), config, further=images[1:],
        placement=Placement(devices[0], tuple(devices[1:-1]), devices[-1]),
    )  # fmt: skip
    prompts = [Prompt(f"p{index}", f"prompt {index}", "basic", "train") for index in range(PROMPTS)]
    with GroupStream(environment, PROMPTS) as stream:
        begun = time.perf_counter()
        groups = stream.sample(prompts, ROLLOUTS, 1)
        updating = 0.0
        for group in groups:
            stream.wait([group] if stream.beside else groups)
            since = time.perf_counter()
            time.sleep(UPDATE)
            updating += time.perf_counter() - since
        whole = time.perf_counter() - begun
    busy = {name: sum(group.seconds[name] for group in groups) for name in ("sample", "render", "score")}
    return Step(busy["sample"] + updating, busy["render"], busy["score"], whole)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="pairs of a streamed and a sequential step")
    options = parser.parse_args()
    print(machine())
    rows: list[list[object]] = []
    figure: list[tuple[str, float]] = []
    for replicas in REPLICAS:
        pairs = [(one_step(replicas, "auto"), one_step(replicas, "never")) for _ in range(max(1, options.rounds))]
        streamed = [pair[0] for pair in pairs]
        whole, plain = median([step.whole for step in streamed]), median([pair[1].whole for pair in pairs])
        bound = median([step.bound(replicas) for step in streamed])
        rows.append([
            replicas, median([step.policy for step in streamed]),
            median([step.rendering / replicas for step in streamed]), median([step.scoring for step in streamed]),
            bound, whole, median([step.whole / step.bound(replicas) for step in streamed]), plain,
            median([pair[1].whole / pair[0].whole for pair in pairs]),
        ])  # fmt: skip
        figure += [(f"{replicas} replicas: bound", bound), ("streamed", whole), ("sequential", plain)]
    table(
        ("replicas", "policy path s", "rendering / replicas s", "scoring s", "bound s", "streamed s", "over the bound",
         "sequential s", "times faster"),
        rows,
    )  # fmt: skip
    bars(figure, "s")


if __name__ == "__main__":
    main()
