"""One pass of an update through the policy: which rewrites go together, their loss, and what is told of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .config import RunConfig
from .objective import aggregate_sum, clipped_tokens, kl_estimate, policy_loss
from .policy import PureGRPOPolicy
from .rollout import Completions, Group, stacked
from .sampler import Entropies


@dataclass(frozen=True)
class Part:
    """Some rows of a group, or all, as they go through the policy in an update."""

    group: Group
    rows: slice

    @property
    def completions(self) -> Completions:
        """Those of the rows."""
        return self.group.completions.rows(self.rows)

    def told(self, kl: Tensor, shift: Tensor) -> None:
        """Note the rows' figures, each float32 (rows, at least T)."""
        for whole, own in ((self.group.kl, kl), (self.group.shift, shift)):
            assert whole is not None
            whole[self.rows] = own[:, : whole.shape[1]]


def passes(groups: Sequence[Group], rows: int) -> Iterator[list[Part]]:
    """What goes through the policy together: ``rows`` rollouts, of one group or of several whole ones.

    Args:
        groups: equally large; their figures begin at 0.
        rows: ``training.update_rows``; 0 = one group.
    """
    for group in groups:
        group.kl, group.shift = (torch.zeros(group.completions.mask.shape) for _ in range(2))
    size = max((len(group) for group in groups), default=1)
    rows = rows or size
    together = max(1, rows // size)
    for first in range(0, len(groups), together):
        own = groups[first : first + together]
        for start in range(0, size, rows):
            yield [Part(group, slice(start, start + rows)) for group in own]


def pass_loss(
    policy: PureGRPOPolicy,
    config: RunConfig,
    parts: Sequence[Part],
    size: int,
    sums: dict[str, float],
    *,
    first: bool,
    learn: bool,
) -> Tensor:
    """Loss of one pass through the policy: its share of the whole step's, policy + kl_coef KL - entropy_coef entropy.

    Its groups are told, per token: their KL, and how far training had moved their log-probabilities by the time
    they were sampled (nats); both 0 on padding.

    Args:
        parts: of groups that have their advantages.
        size: tokens or sequences of the whole step, which the sum is divided by.
        sums: figures over tokens and passes, added to.
        first: nothing was learned from these rewrites yet, so their probability ratio must be 1.
        learn: with a gradient.
    """
    objective, device, chunk = config.objective, policy.device, config.training.logit_chunk
    rows = [part.completions for part in parts]
    mask, old = (stacked([getattr(one, name) for one in rows]).to(device) for name in ("mask", "logprobs"))
    advantages = torch.cat([part.group.advantages[part.rows] for part in parts]).to(device)
    with torch.no_grad(), policy.reference():
        reference, _ = policy.token_logprobs(*rows, logit_chunk=chunk, entropies="none")
    with torch.set_grad_enabled(learn):
        wanted: Entropies = "learned" if objective.entropy_coef else "measured"
        logprobs, entropies = policy.token_logprobs(*rows, logit_chunk=chunk, entropies=wanted)
        low, high = objective.clips
        surrogate = policy_loss(logprobs, old, advantages, mask, kind=objective.kind, clip_low=low, clip_high=high)
        kl = kl_estimate(logprobs, reference, kind=objective.kl_estimator)
        combined = surrogate + objective.kl_coef * kl - objective.entropy_coef * entropies
        how = objective.aggregation
        loss = aggregate_sum(combined, mask, how=how) / size
    with torch.no_grad():
        clipped_low, clipped_high = clipped_tokens(
            logprobs, old, advantages, mask, kind=objective.kind, clip_low=low, clip_high=high
        )
        if first:
            error = float(((logprobs - old).exp() - 1.0)[mask].abs().max())
            sums["ratio_error"] = float(np.maximum(sums["ratio_error"], error))  # unlike max() it keeps a NaN
        sums["total_loss"] += float(loss)
        sums["policy_loss"] += float(aggregate_sum(surrogate, mask, how=how) / size)
        sums["tokens"] += float(mask.sum())
        sums["kl_penalty"] += float(kl[mask].sum())
        sums["entropy"] += float(entropies[mask].sum())
        sums["clip_low_fraction"] += float(clipped_low.sum())
        sums["clip_high_fraction"] += float(clipped_high.sum())
        shift = torch.where(mask, old - reference, 0.0).cpu()  # over the same kept sets, so never infinite
        penalty = torch.where(mask, kl, 0.0).cpu()
    sizes = [len(completions) for completions in rows]
    for part, own_kl, own_shift in zip(parts, penalty.split(sizes), shift.split(sizes), strict=True):
        part.told(own_kl, own_shift)
    return loss
