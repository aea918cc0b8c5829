"""What the ranks of ``tests/test_distributed.py`` do, one process each: ``python tests/rank_scenarios.py NAME``.

The launcher's variables say which rank this is. The first rank prints what it found as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from grpo_engine.config import ConfigError
from grpo_engine.control import RunControl, StopRequested
from grpo_engine.distributed import RankLost, Ranks, join


def together(world: Ranks) -> dict[str, Any]:
    """Everything that ranks do at once; the third rank has no gradient of the first weight, nobody of the last."""
    weights = [torch.nn.Parameter(torch.tensor([1.0 + world.rank, 2.0], dtype=kind)) for kind in DTYPES]
    optimizer = torch.optim.AdamW(weights[:2], lr=0.1)
    weights[1].grad = torch.tensor([10.0 * (world.rank + 1), 1.0])
    optimizer.step()
    world.align(weights, optimizer)
    begun = [weight.tolist() for weight in weights]
    moment = optimizer.state[weights[1]]["exp_avg"].tolist()
    optimizer.zero_grad()
    for index, weight in enumerate(weights[:2]):
        if world.rank < 2 or index == 1:
            weight.grad = torch.full((2,), float(world.rank + 1))
    world.sum_gradients(weights)
    refused = ""
    try:
        world.together(lambda: refuse(world.rank))
    except ConfigError as error:
        refused = str(error)
    mine = {
        "weights": begun,
        "moment": moment,
        "gradients": [None if weight.grad is None else weight.grad.tolist() for weight in weights],
        "shares": [list(world.share(range(count))) for count in (6, 7, 2)],
        "decided": world.decide(lambda: f"by rank {world.rank}"),
        "collected": world.collect([world.rank] * (world.rank + 1)),
        "figures": dict(world.sum_figures({"loss": 1.0, "error": float(world.rank)}, largest=("error",))),
        "refused": refused,
    }
    return {"ranks": world.gather(mine)}


DTYPES = (torch.float32, torch.float32, torch.bfloat16)


def refuse(rank: int) -> None:
    """Only the second rank finds fault."""
    if rank == 1:
        raise ConfigError("this machine has no such folder.")


def until_raised(world: Ranks) -> dict[str, Any]:
    """Poll like a trainer until something is raised."""
    control = RunControl()
    world.obey(control)
    begun = time.monotonic()
    try:
        while time.monotonic() - begun < 60:
            control.poll()
            time.sleep(0.05)
    except (RankLost, StopRequested) as error:
        return {"raised": type(error).__name__, "said": str(error), "seconds": time.monotonic() - begun}
    return {"raised": None}


def death(world: Ranks) -> dict[str, Any]:
    """The second rank dies while the first one works."""
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return until_raised(world)


def death_in_exchange(world: Ranks) -> dict[str, Any]:
    """The second rank dies while the first one waits for it."""
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begun = time.monotonic()
    try:
        world.gather(1)
    except RankLost as error:
        return {"raised": "RankLost", "said": str(error), "seconds": time.monotonic() - begun}
    return {"raised": None}


def stuck(world: Ranks) -> dict[str, Any]:
    """The second rank dies while the first one is where it can't hear of it."""
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    world.obey(RunControl(), lambda sentence: print(json.dumps({"stuck": sentence}), flush=True))
    time.sleep(60)
    return {"stuck": None}


def failure(world: Ranks) -> dict[str, Any]:
    """The second rank says why it can't go on."""
    if world.rank == 1:
        world.watch.fail("OutOfMemoryError: no room left.")
        world.leave()
        sys.exit(1)
    return until_raised(world)


def stop(world: Ranks) -> dict[str, Any]:
    """The second rank is told to end, as by a scheduler, and waits in an exchange that the first one never joins."""
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
        world.decide(lambda: None)
    return until_raised(world)


SCENARIOS: dict[str, Callable[[Ranks], dict[str, Any]]] = {
    action.__name__: action for action in (together, death, death_in_exchange, stuck, failure, stop)
}


if __name__ == "__main__":
    ranks = join(silence=10.0)
    found = SCENARIOS[sys.argv[1]](ranks)
    if ranks.first:
        print(json.dumps(found), flush=True)
    ranks.leave()
