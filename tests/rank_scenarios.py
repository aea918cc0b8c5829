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
from grpo_engine.turns import SharedTurns, Turn


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


def shares(world: Ranks) -> dict[str, Any]:
    """Each rank uses its share of a policy as it uses a whole one, but not as often as the other rank does."""
    import numpy as np
    from engine_runs import small

    from grpo_engine import small_decoder
    from grpo_engine.checkpoint import base_fingerprint
    from grpo_engine.loading import load_environment
    from grpo_engine.memory import changed_settings
    from grpo_engine.seeding import derive_seed, normals
    from grpo_engine.sharding import held

    torch.set_num_threads(1)
    small_decoder.COPIED_BYTES = 0  # a whole policy then samples as one in shares does, to the bit
    config = small("models.policy.gradient_checkpointing=true")
    whole = load_environment(config).policy
    own = load_environment(changed_settings(config, {"placement.shard_policy": True}), world=world).policy
    for index, (mine, other) in enumerate(zip(own.trainable().values(), whole.trainable().values(), strict=True)):
        with torch.no_grad():  # else the adapter does nothing
            change = 0.02 * normals(index, mine.shape)
            mine += change
            other += change
    for policy in (own, whole):  # the first rank's rewrites go on to the limit, the other's end at once
        bias = torch.zeros(len(policy.suppressed))
        bias[policy.end_tokens] = 1e4 if world.rank else -1e4
        policy.model.get_output_embeddings().register_forward_hook(
            lambda module, inputs, logits, bias=bias: logits + bias
        )
    prompts = ["a red ring", "two blue squares on green"] if world.first else ["a large star"]
    seeds = [[derive_seed(world.rank, prompt, k) for k in range(3)] for prompt in prompts]
    samples, others = own.sample(prompts, seeds), whole.sample(prompts, seeds)
    lengths = world.gather([group.mask.shape[1] for group in samples])
    black = np.zeros((96, 96, 3), dtype=np.uint8)
    answers = own.probability_of_yes([black], ["a red ring"]) if world.rank else []
    learned_from = 0
    for policy in (own, whole):
        policy.model.train()
        for group in samples:
            with torch.no_grad(), policy.reference():
                policy.token_logprobs(group)
            if world.rank:  # as a group without spread
                with torch.no_grad():
                    policy.token_logprobs(group)
                continue
            logprobs, entropies = policy.token_logprobs(group, logit_chunk=8)
            (logprobs.sum() + entropies.sum()).backward()
            learned_from += policy is own
        policy.model.eval()
    gradients = [[p.grad for p in policy.trainable().values()] for policy in (own, whole)]
    moved = [gradient for gradient in gradients[0] if gradient is not None]
    mine = {
        "bytes": held(own.model)[0],
        "whole_bytes": held(whole.model)[0],
        "lengths": lengths,
        "same_samples": all(
            torch.equal(a.token_ids, b.token_ids) and torch.equal(a.logprobs, b.logprobs)
            for a, b in zip(samples, others, strict=True)
        ),
        "same_gradients": all(
            a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(*gradients, strict=True)
        ),
        "same_fingerprint": base_fingerprint(own) == base_fingerprint(whole),
        "learned_from": learned_from,
        "gradient": float(torch.cat([gradient.flatten() for gradient in moved]).norm()) if moved else None,
        "answers": answers,
        "whole_answers": whole.probability_of_yes([black], ["a red ring"]),
    }
    return {"ranks": world.gather(mine)}


def trained_shares(world: Ranks) -> dict[str, Any]:
    """Two steps of a policy all of whose weights are trained, shared out and not; the second rank learns nothing."""
    from engine_runs import small

    from grpo_engine.loading import load_environment
    from grpo_engine.memory import changed_settings
    from grpo_engine.sharding import clip_gradients, collect, held, shared_out

    torch.set_num_threads(1)
    config = small("models.policy.adapter=full", "models.policy.gradient_checkpointing=true")
    whole = load_environment(config).policy
    own = load_environment(changed_settings(config, {"placement.shard_policy": True}), world=world).policy
    prompts = ["a red ring", "two blue squares on green"]
    groups = whole.sample(prompts, [[1, 2], [3, 4]])
    trained = [list(policy.trainable().values()) for policy in (own, whole)]
    optimizers = [torch.optim.AdamW(parameters, lr=1e-4) for parameters in trained]
    norms: list[float] = []
    for _ in range(2):
        for policy, parameters, optimizer in zip((own, whole), trained, optimizers, strict=True):
            optimizer.zero_grad()
            for group in world.share(groups):
                with torch.no_grad(), policy.reference():
                    before, _ = policy.token_logprobs(group)
                if world.first:
                    logprobs, entropies = policy.token_logprobs(group)
                    (logprobs.exp().sum() + entropies.sum() + (logprobs - before).square().sum()).backward()
            world.sum_gradients(parameters)
            norms.append(float(clip_gradients(parameters, 0.5, world)))
            optimizer.step()
    world.gather(None)
    there = collect(world, trained[0], optimizers[0], keep=True)
    far = {"weights": 0.0, "exp_avg": 0.0, "exp_avg_sq": 0.0}
    for mine, other in zip(*trained, strict=True):
        pairs = {"weights": (mine, other)}
        pairs |= {name: (optimizers[0].state[mine][name], optimizers[1].state[other][name]) for name in list(far)[1:]}
        for name, (share, expected) in pairs.items():
            difference = there.get(id(share), share.detach()) - expected.detach()
            far[name] = max(far[name], float(difference.abs().max()) / float(expected.detach().abs().max()))
    found = {
        "bytes": held(own.model)[0],
        "whole_bytes": held(whole.model)[0],
        "norms": norms,
        "far": far,
        "shared": len(shared_out(trained[0])),
    }
    return {"ranks": world.gather(found)}


def turns(world: Ranks) -> dict[str, Any]:
    """Ranks that want different passes, and then all want to exchange something."""
    passes: list[str] = []
    order = SharedTurns(world.agree, {turn: lambda turn=turn: passes.append(turn.name.lower()) for turn in Turn})
    world.before_exchange = lambda: order.take(Turn.MEET)
    own: list[str] = []
    for turn in ([Turn.LEARN, Turn.FORWARD, Turn.SETTLE], [Turn.FORWARD] * 3 + [Turn.SETTLE], [])[world.rank]:
        order.take(turn)
        if turn > Turn.SETTLE:
            passes.append(turn.name.lower())
            own.append(turn.name.lower())
    return {"ranks": world.gather({"passes": passes, "own": own})}


SCENARIOS: dict[str, Callable[[Ranks], dict[str, Any]]] = {
    action.__name__: action
    for action in (together, death, death_in_exchange, stuck, failure, stop, shares, trained_shares, turns)
}


if __name__ == "__main__":
    ranks = join(silence=10.0)
    found = SCENARIOS[sys.argv[1]](ranks)
    if ranks.first:
        print(json.dumps(found), flush=True)
    ranks.leave()
