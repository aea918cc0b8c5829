"""Runs of several ranks, real processes over gloo, and what they are held to: the same run in one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from engine_runs import recorded
from safetensors.torch import load_file

from grpo_engine.config import ROOT
from grpo_engine.store import Store


@dataclass
class Outcome:
    """Of all ranks of a scenario: exit codes, and what the first one found."""

    codes: list[int]
    found: dict[str, Any]


def play(scenario: str, size: int = 2) -> Outcome:
    """One process a rank, started without any launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "tests/rank_scenarios.py", scenario],
            cwd=ROOT,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        answers = [rank.communicate(timeout=200) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    lines = answers[0][0].splitlines()
    assert lines, answers
    return Outcome([rank.returncode for rank in ranks], json.loads(lines[-1]))


# Rewards divided by the batch's spread, minibatches, replaced prompts, and validations: all of them need all groups.
STEPS = 3
SETTINGS = (
    "models.image.dtype=float32",
    "training.learning_rate=1e-4",  # so that the order of sums does not grow into other words
    "training.batch_size=4",
    "training.minibatches=2",
    f"training.steps={STEPS}",
    "sampling.num_rollouts=2",
    "objective.scale=batch",
    "objective.aggregation=token",
    "objective.dynamic_sampling=1",
    "objective.min_std=10",
    "evaluation.prompts=3",
    "evaluation.every=2",
    "evaluation.validation_prompts=3",
    "recording.checkpoint_every=1",
)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
ACCELERATE = (
    sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/two-cells.yaml",
    "--main_process_port", "0", "-m",
)  # fmt: skip


def start(launcher: Sequence[str], *arguments: object) -> subprocess.Popen[str]:
    """``arguments`` of the command line on two ranks."""
    return subprocess.Popen(
        [*launcher, "grpo_engine", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def carry(launcher: Sequence[str], *arguments: object) -> tuple[int, str]:
    """Exit code and output of it, once it has ended."""
    with start(launcher, *arguments) as process:
        try:
            output, _ = process.communicate(timeout=280)
        finally:
            process.kill()
    return process.returncode, output


@dataclass
class Done:
    """A run that has ended."""

    store: Store
    run: str


def learned(done: Done) -> torch.Tensor:
    """What training changed until the last checkpoint, as one vector: the adapter's matrices that began as zeros, or
    all weights since the checkpoint before.
    """
    last, before = (done.store.run_dir(done.run) / "checkpoints" / f"step-{step:06d}" for step in (STEPS, STEPS - 1))
    if (last / "trainable.safetensors").exists():
        weights, others = (load_file(folder / "trainable.safetensors") for folder in (last, before))
        return torch.cat([(weights[name] - others[name]).flatten() for name in sorted(weights)])
    weights = load_file(last / "adapter_model.safetensors")
    return torch.cat([weights[name].flatten() for name in sorted(weights) if "lora_B" in name])


def assert_alike(one: Done, other: Done) -> None:
    """The same run up to the order of sums: the same rewrites, pictures and prompts, all figures close."""
    assert other.store.check() == []
    assert other.store.run(other.run).state == "finished"
    mine, theirs = recorded(one.store, one.run), recorded(other.store, other.run)
    for name in mine:
        if name != "ratio_error":  # is nothing but the order of sums
            np.testing.assert_allclose(theirs[name], mine[name], rtol=2e-3, atol=2e-4, err_msg=name)
    for step in range(1, STEPS + 1):
        rows, others = one.store.rollouts(one.run, step), other.store.rollouts(other.run, step)
        assert [(row.g, row.k, row.prompt, row.rewrite, row.latent_seed) for row in others] == [
            (row.g, row.k, row.prompt, row.rewrite, row.latent_seed) for row in rows
        ]
        assert [row.reward for row in others] == pytest.approx([row.reward for row in rows], abs=1e-2)
        assert [row.advantage for row in others] == pytest.approx([row.advantage for row in rows], abs=1e-2)
        assert all(other.store.file(row.image).is_file() for row in others if row.image)
        assert all(row.image and row.token_kl is not None for row in others if row.rewrite is not None)
    for left, right in zip(one.store.evaluations(one.run), other.store.evaluations(other.run), strict=True):
        assert (right.kind, right.step, right.split) == (left.kind, left.step, left.split)
        items, others_items = one.store.evaluation_items(left.id), other.store.evaluation_items(right.id)
        assert [(i.arm, i.prompt_id, i.index, i.rewrite) for i in others_items] == [
            (i.arm, i.prompt_id, i.index, i.rewrite) for i in items
        ]
        assert [i.reward for i in others_items] == pytest.approx([i.reward for i in items], abs=1e-2)
    # AdamW's first steps turn the sign of even the smallest gradient into a full step.
    assert (learned(one) - learned(other)).norm() < 0.05 * learned(one).norm()
