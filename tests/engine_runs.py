"""Small runs of the real embedded models, for the tests of trainer, evaluation, session and command line.

Nothing here depends on how good the embedded models are: where a test needs rewards that differ, it scores
with :class:`RankScorer`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grpo_engine.config import RunConfig
from grpo_engine.control import RunControl
from grpo_engine.environment import PureGRPOPromptEnvironment
from grpo_engine.loading import load_environment, prompt_file
from grpo_engine.plan import Plan
from grpo_engine.prompts import Prompt, load_prompts
from grpo_engine.recorder import STEP_METRICS, Evaluation
from grpo_engine.reward import RewardModel
from grpo_engine.rollout import Group, Picture
from grpo_engine.seeding import normals
from grpo_engine.store import Store
from grpo_engine.trainer import PureGRPOTrainer

SMALL = (
    "placement.threads=1",
    "placement.policy=cpu",
    "placement.image=cpu",
    "placement.reward=cpu",
    "models.image.steps=1",
    "models.image.resolution=96",
    "sampling.num_rollouts=3",
    "sampling.max_new_tokens=10",
    "training.batch_size=2",
    "training.steps=3",
    "training.warmup_steps=0",
    "training.schedule=constant",
    "evaluation.prompts=2",
    "evaluation.images_per_prompt=1",
    "evaluation.samples=1",
    "evaluation.bootstrap=200",
    "recording.checkpoint_every=2",
)


def small(*overrides: str) -> RunConfig:
    """The default preset at the size of a test; ``overrides`` are further ``section.field=value``."""
    return RunConfig.load("tiny", [*SMALL, *overrides])


def flags(*overrides: str) -> list[str]:
    """The same as arguments of the command line."""
    return [part for setting in (*SMALL, *overrides) for part in ("--set", setting)]


class RankScorer:
    """Scores the pictures of a call 0, 1, 2...: every group has spread. Prompts in ``flat`` score 7, always."""

    def __init__(self, flat: Sequence[str] = ()) -> None:
        self.flat = set(flat)

    def score(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> list[float]:
        return [7.0 if prompt in self.flat else float(rank) for rank, prompt in enumerate(prompts)]


def fresh_environment(config: RunConfig, scorer: RankScorer | None = None) -> PureGRPOPromptEnvironment:
    """The three models with a fresh adapter; with ``scorer`` in the place of the reward model's."""
    torch.set_num_threads(1)
    loaded = load_environment(config)
    if scorer is not None:
        loaded.reward = RewardModel(scorer, config.models.reward)
    return loaded


class ListRecorder:
    """A ``Recorder`` that keeps everything in lists."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float | None]] = []
        self.groups: list[list[Group]] = []
        self.events: list[tuple[str, str]] = []
        self.states: list[str] = []
        self.phases: list[str] = []

    def state(self, state: str, message: str = "") -> None:
        self.states.append(state)

    def phase(self, name: str, done: int = 0, total: int = 0) -> None:
        self.phases.append(name)

    def step(self, step: int, metrics: Mapping[str, float | None], groups: Sequence[Group]) -> None:
        assert step == len(self.metrics) + 1
        self.metrics.append(dict(metrics))
        self.groups.append(list(groups))

    def evaluation(self, evaluation: Evaluation) -> None:
        raise AssertionError("the trainer evaluates nothing by itself")

    def event(self, kind: str, message: str, **data: Any) -> None:
        self.events.append((kind, message))

    def flush(self) -> None:
        pass


def trainer(
    config: RunConfig,
    *,
    loaded: PureGRPOPromptEnvironment | None = None,
    prompts: Sequence[Prompt] | None = None,
) -> tuple[PureGRPOTrainer, ListRecorder]:
    """A trainer of the real policy, and what it recorded."""
    recorder = ListRecorder()
    made = PureGRPOTrainer(
        config,
        loaded or fresh_environment(config, RankScorer()),
        Plan(config).train if prompts is None else prompts,
        recorder,
        RunControl(),
    )
    return made, recorder


def perturb(trained: PureGRPOTrainer, scale: float = 0.03) -> None:
    """Move the adapter away from zero, so that ratios leave 1 and every weight gets a gradient."""
    with torch.no_grad():
        for index, parameter in enumerate(trained.parameters):
            parameter += scale * normals(index, parameter.shape)


def weights(trained: PureGRPOTrainer) -> list[Tensor]:
    """Copies of the trained weights."""
    return [parameter.detach().clone() for parameter in trained.parameters]


def equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether all tensors are equal bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def gradients(trained: PureGRPOTrainer) -> Tensor:
    """All gradients as one vector."""
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in trained.parameters])


class StopAtPoll(RunControl):
    """Asks to stop at the ``n``-th poll, wherever that is; ``count`` says how many there were."""

    def __init__(self, n: int = 0) -> None:
        super().__init__()
        self.n, self.count = n, 0

    def poll(self) -> None:
        self.count += 1
        if self.count == self.n:
            self.command("stop")
        super().poll()


def create(store: Store, config: RunConfig) -> str:
    """A queued run."""
    prompts = load_prompts(prompt_file(config.data.prompts))
    return store.create_run(config, prompt_set=prompts.name, prompt_fingerprint=prompts.fingerprint())


def recorded(store: Store, run_id: str) -> dict[str, NDArray[Any]]:
    """Every metric of every step but the times, NaN = none."""
    names = [name for name in STEP_METRICS if not name.startswith("seconds")]
    return store.steps(run_id, names)


def assert_same_steps(first: Mapping[str, NDArray[Any]], second: Mapping[str, NDArray[Any]]) -> None:
    """Equal bit for bit, NaN included."""
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def saved(store: Store, run_id: str, step: int) -> tuple[bytes, bytes]:
    """Adapter and optimiser of a checkpoint, as the bytes of their files."""
    folder: Path = store.run_dir(run_id) / "checkpoints" / f"step-{step:06d}"
    return (folder / "adapter_model.safetensors").read_bytes(), (folder / "optimizer.safetensors").read_bytes()


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> float:
    """Seconds until ``condition`` holds; fails after ``seconds``."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds, "waited in vain"
        time.sleep(0.01)
    return time.monotonic() - begun
