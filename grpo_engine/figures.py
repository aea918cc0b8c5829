"""The figures of a step that follow from its groups alone, named and described in ``recorder.STEP_METRICS``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch

from .judge import Judge
from .rollout import Group, mean_length


def group_figures(groups: Sequence[Group], cut_tokens: Callable[[str], int]) -> dict[str, float | None]:
    """Rewards, advantages and texts of whole groups; ``cut_tokens`` says how much of a rewrite is not read."""
    rewards = torch.stack([group.rewards for group in groups]).double()
    advantages = torch.stack([group.advantages for group in groups]).double()
    rewrites = [rewrite for group in groups for rewrite in group.rewrites if rewrite is not None]
    cut = [cut_tokens(rewrite) for rewrite in rewrites]
    parts: dict[str, list[float]] = defaultdict(list)
    for group in groups:
        for score in group.scores:
            for name, value in score.parts.items():
                parts[name].append(value)
    finished = torch.cat([group.completions.finished for group in groups])
    return {
        **{f"reward_{name}": float(np.mean(values)) for name, values in parts.items()},
        "reward_mean": float(rewards.nanmean()),
        "reward_std": float(rewards.std(dim=1, correction=0).mean()),
        "reward_p10": float(rewards.quantile(0.1)),
        "reward_p90": float(rewards.quantile(0.9)),
        "avg_advantage": float(advantages.mean()),
        "advantage_p10": float(advantages.quantile(0.1)),
        "advantage_p90": float(advantages.quantile(0.9)),
        "completion_tokens": mean_length(groups),
        "rewrite_words": float(np.mean([len(text.split()) for text in rewrites])) if rewrites else None,
        "cut_tokens": float(np.mean(cut)) if cut else None,
        "cut_share": float(np.mean([count > 0 for count in cut])) if cut else None,
        "truncated_share": float((~finished).double().mean()),
        "distinct_share": float(np.mean([len(set(group.rewrites)) / len(group) for group in groups])),
        "parse_failures": float(sum(group.failures for group in groups)),
        "images_rendered": float(sum(len(set(group.rewrites) - {None}) for group in groups)),
    }


def judged(judge: Judge | None, groups: Sequence[Group]) -> float | None:
    """Mean judgement of the step's pictures; one that could not be drawn counts 0. None without a judge."""
    if judge is None:
        return None
    drawn = [(p, g.prompt) for g in groups for p in g.pictures if p is not None]
    judgements = judge.judge([picture for picture, _ in drawn], [prompt for _, prompt in drawn])
    return sum(judgement.score for judgement in judgements) / sum(len(group) for group in groups)
