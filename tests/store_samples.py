"""Runs, groups and evaluations for the tests of the database; all of it follows from the arguments."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from grpo_engine.config import RunConfig
from grpo_engine.prompts import Prompt
from grpo_engine.recorder import FINAL_STATES, RUN_STATES, STEP_METRICS, Evaluation, EvaluationItem
from grpo_engine.rollout import Completions, Group, Picture, Score
from grpo_engine.store import Store
from grpo_engine.store.rows import TRANSITIONS

ACTIVE = [state for state in RUN_STATES if state not in FINAL_STATES]
forked = multiprocessing.get_context("fork")  # children share the imported torch, so they start at once


def config(**changes: Any) -> RunConfig:
    return RunConfig.parse({"training": {"steps": 40, "batch_size": 2}, **changes})


def training_run(store: Store, **changes: Any) -> str:
    """A run that has got as far as its first step."""
    run_id = store.create_run(config(**changes))
    for state in ("loading", "training"):
        store.set_state(run_id, state)
    return run_id


def picture(seed: int, side: int = 8) -> Picture:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def group(step: int = 1, g: int = 0, size: int = 4, *, pictures: list[Picture | None] | None = None) -> Group:
    """A scored group with completions of 1 to ``size`` tokens; all of it follows from the arguments."""
    generator = torch.Generator().manual_seed(1000 * step + g)
    shape = (size, size)
    mask = torch.arange(size)[None, :] <= torch.arange(size)[:, None]
    completions = Completions(
        prompt_ids=torch.arange(3),
        token_ids=torch.randint(5, 500, shape, generator=generator) * mask,
        mask=mask,
        logprobs=-torch.rand(shape, generator=generator) * mask,
        entropies=torch.rand(shape, generator=generator) * mask,
        kept=None,
        texts=tuple(f"rewrite {step} {g} {k}" for k in range(size)),
        finished=torch.arange(size) % 2 == 0,
    )
    rewards = torch.rand(size, generator=generator)
    return Group(
        prompt=Prompt(id=f"p-{g}", text=f"a prompt número {g}", tier="basic", split="train"),
        completions=completions,
        rewrites=completions.texts,
        latent_seed=2**64 - 1 - g,
        pictures=[picture(100 * step + 10 * g + k) for k in range(size)] if pictures is None else pictures,
        scores=[Score({"clip": float(reward), "length": 0.0}, float(reward)) for reward in rewards],
        rewards=rewards,
        advantages=rewards - rewards.mean(),
        kl=torch.rand(shape, generator=generator) * mask,
        shift=torch.randn(shape, generator=generator) * mask,
    )


def metrics(step: int) -> dict[str, float | None]:
    return {name: step + index / 100 for index, name in enumerate(STEP_METRICS)}


def fill(store: Store, run_id: str, steps: int) -> None:
    for step in range(store.run(run_id).step + 1, steps + 1):
        store.add_step(run_id, step, metrics(step), [])


def item(prompt_id: str, arm: str = "trained", index: int = 0, shown: Picture | None = None) -> EvaluationItem:
    score = Score({"clip": 31.5, "length": math.nan}, 31.5)
    parts = {"color": (1, 2)}
    return EvaluationItem(
        arm,
        prompt_id,
        "a cat",
        "basic",
        index,
        2**63 + 5,
        "a big cat",
        score,
        0.5,
        parts,
        shown,
        cut_tokens=1,
        read_chars=6,
    )


def evaluation(kind: str, step: int, *items: EvaluationItem) -> Evaluation:
    return Evaluation(kind, step, "test", items, {"gain": 0.25 + step, "interval": (0.1, 0.4), "odd": math.inf})


def in_child(action: Callable[..., None], *args: Any) -> Any:
    """Start ``action`` in a process of its own, which owns no connection of this one."""
    child = forked.Process(target=action, args=args)
    child.start()
    return child


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def to_state(store: Store, state: str) -> str:
    """A new run brought to ``state`` the shortest way."""
    ways: dict[str, list[str]] = {"queued": []}
    while state not in ways:
        for known in list(ways):
            for following in TRANSITIONS[known]:
                ways.setdefault(following, [*ways[known], following])
    run_id = store.create_run(config())
    for step in ways[state]:
        store.set_state(run_id, step)
    return run_id
