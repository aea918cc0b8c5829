"""The mathematics of group-relative policy optimization, as pure tensor functions.

Nothing here knows a model, a device or a configuration. Shapes: ``P`` prompts, ``G`` rollouts in a group,
``B`` sequences (completions) and ``T`` tokens, padded. Log-probabilities are natural logarithms. Every
``mask`` is ``(B, T)``, bool or 0/1, true where a token belongs to the completion.

One optimiser step reads: rewards -> :func:`group_advantages` -> :func:`policy_loss` and
:func:`kl_estimate` per token -> ``policy + kl_coef * kl - entropy_coef * entropy`` -> :func:`aggregate`.

Two rules hold throughout. Padding may contain anything, NaN and infinities included, and touches neither a
value nor a gradient: it is taken out with ``torch.where`` *before* any nonlinearity, because a zero gradient
multiplied by an infinite derivative is NaN. A non-finite number at a real token is never hidden: it comes
out as a non-finite value, for the caller to see.

Sources: GRPO arXiv 2402.03300; RLOO 2402.14740; Dr. GRPO 2503.20783; DAPO 2503.14476; GSPO 2507.18071;
CISPO (MiniMax-M1) 2506.13585; KL estimators: J. Schulman, "Approximating KL Divergence", 2020.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]
Baseline = Literal["mean", "leave_one_out"]
LossKind = Literal["grpo", "gspo", "cispo"]
KLKind = Literal["k1", "k2", "k3"]
Aggregation = Literal["token", "sequence", "constant"]

# --------------------------------------------------------------------------------------------------------
# Rewards -> advantages
# --------------------------------------------------------------------------------------------------------


def group_advantages(
    rewards: Tensor,
    *,
    scale: Scale = "group",
    baseline: Baseline = "mean",
    eps: float = 1e-8,
    unbiased: bool = False,
    min_std: float = 1e-6,
) -> Tensor:
    """How much better each rollout did than the other rollouts of its own prompt.

    ``advantage = (reward - baseline) / (spread + eps)``, GRPO (arXiv 2402.03300, section 4.1.2).

    Args:
        rewards: ``(P, G)``, ``G >= 2``. NaN means "no reward": left out of every mean and spread, and given
            advantage 0.
        scale: what the centred reward is divided by. ``group``: the standard deviation of its group (GRPO).
            ``batch``: the standard deviation of all raw rewards in the tensor, NaN left out, zero-spread
            groups included. ``none``: nothing, and ``eps`` plays no part (Dr. GRPO, arXiv 2503.20783).
        baseline: ``mean``: the group's mean. ``leave_one_out``: the mean of the *other* rewards of the group
            (RLOO, arXiv 2402.14740), which is ``n / (n - 1)`` times the centred reward for ``n`` rewards.
        eps: added to the standard deviation, in units of the reward.
        unbiased: standard deviations divide by ``n - 1`` instead of ``n``, for ``group`` and ``batch``.
        min_std: a group whose standard deviation (population, or ``n - 1`` with ``unbiased``) is at or below
            this gets exactly 0 under every scale, and so does everything if the batch's own is, under
            ``batch``. In units of the reward: keep it above the rounding noise of the scorer, because
            noise divided by its own spread is an advantage of full size.

    Returns:
        ``(P, G)``, without a graph, on the device and in the floating dtype of ``rewards`` (integers: torch's
        default dtype). A group with fewer than two rewards is all 0.

    Raises:
        ValueError: not ``(P >= 1, G >= 2)``, an infinite reward, an unknown ``scale`` or ``baseline``, or a
            negative ``eps`` or ``min_std``.
    """
    _require_choice("scale", scale, get_args(Scale))
    _require_choice("baseline", baseline, get_args(Baseline))
    _require_at_least_zero("eps", eps)
    degenerate = zero_spread_groups(rewards, min_std, unbiased=unbiased).cpu()[:, None]

    values = _checked_rewards(rewards)
    centered, spread, count = _center_rows(values, unbiased)
    if scale == "batch":
        spread = _center_rows(values.reshape(1, -1), unbiased)[1]
        degenerate = degenerate | _at_or_below(spread, min_std, rewards.dtype)

    advantages = centered
    if baseline == "leave_one_out":
        advantages = advantages * count / (count - 1).clamp(min=1)
    if scale != "none":
        advantages = advantages / (spread + eps)
    advantages = torch.where(degenerate, 0.0, advantages)

    dtype = rewards.dtype if rewards.is_floating_point() else torch.get_default_dtype()
    return advantages.to(device=rewards.device, dtype=dtype)


def zero_spread_groups(rewards: Tensor, min_std: float = 1e-6, *, unbiased: bool = False) -> Tensor:
    """Which groups teach nothing: fewer than two rewards, or a spread at or below ``min_std``.

    The one definition of a degenerate group: :func:`group_advantages` gives these groups 0 (and, under
    ``scale="batch"``, every group when the batch as a whole has no spread).

    Args:
        rewards: ``(P, G)``; NaN means "no reward".
        min_std: the floor, in units of the reward.
        unbiased: as in :func:`group_advantages`.

    Returns:
        ``(P,)`` bool, on the device of ``rewards``.

    Raises:
        ValueError: as :func:`group_advantages`.
    """
    _require_at_least_zero("min_std", min_std)
    spread = _center_rows(_checked_rewards(rewards), unbiased)[1]
    return _at_or_below(spread, min_std, rewards.dtype)[:, 0].to(rewards.device)


def _checked_rewards(rewards: Tensor) -> Tensor:
    """Rewards as float64 on the CPU: a handful of numbers, and not every accelerator has float64."""
    if rewards.ndim != 2 or rewards.shape[0] < 1 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards has shape {tuple(rewards.shape)}; it must be (prompts, rollouts) with at least 1 "
            "prompt and 2 rollouts, because an advantage compares a rollout with others of the same prompt."
        )
    values = rewards.detach().to(device="cpu", dtype=torch.float64)
    if torch.isinf(values).any():
        row, column = (int(i) for i in torch.isinf(values).nonzero()[0])
        raise ValueError(
            f"rewards[{row}, {column}] is {float(values[row, column])}; a reward must be finite, "
            "or NaN where there is none."
        )
    return values


def _center_rows(values: Tensor, unbiased: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rows minus their mean (0 where NaN), standard deviations and counts, over what is not NaN.

    The standard deviation of fewer than two numbers is 0, so that they are at or below every floor.
    Each row is first shifted by its own minimum: a constant row then becomes exact zeros whatever its value,
    and a large offset costs no digits.
    """
    present = ~torch.isnan(values)
    count = present.sum(dim=1, keepdim=True)
    lowest = torch.where(present, values, math.inf).amin(dim=1, keepdim=True)
    shifted = torch.where(present, values - lowest, 0.0)
    centered = torch.where(present, shifted - shifted.sum(dim=1, keepdim=True) / count.clamp(min=1), 0.0)
    degrees = (count - int(unbiased)).clamp(min=1)
    spread = (centered.square().sum(dim=1, keepdim=True) / degrees).sqrt()
    return centered, spread, count


def _at_or_below(spread: Tensor, min_std: float, dtype: torch.dtype) -> Tensor:
    """``spread <= min_std``, where "at" allows for the rounding of the dtype the rewards came in."""
    rounding = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    return spread <= min_std * (1 + 4 * rounding)


# --------------------------------------------------------------------------------------------------------
# Log-probabilities -> loss per token
# --------------------------------------------------------------------------------------------------------


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    kind: LossKind = "grpo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Tensor:
    """The policy-gradient loss of each token, to be minimised; not aggregated.

    ``grpo`` (arXiv 2402.03300, eq. 3; ``clip_low`` and ``clip_high`` apart as in DAPO, arXiv 2503.14476):
        ``-min(w * A, clip(w, 1 - clip_low, 1 + clip_high) * A)`` with the token's ratio
        ``w = exp(logp - logp_old)``.
    ``gspo`` (arXiv 2507.18071, eq. 5-7):
        the same formula with one ratio a sequence, ``w = exp(mean of the log-ratio over its tokens)``. With
        one advantage a sequence, every token holds the same value, the sequence's loss, and the gradient of
        their mean is the sequence's gradient, ``-A * w / n`` at each of its ``n`` tokens.
    ``cispo`` (arXiv 2506.13585, eq. 4-5):
        ``-stop_gradient(min(w, clip_high)) * A * logp`` with the token's ratio. ``clip_high`` is the cap
        itself, not a distance from 1, and ``clip_low`` is not used. No token loses its gradient to the cap.

    Args:
        logprobs: ``(B, T)``, of the policy being trained; the only input that receives a gradient.
        old_logprobs: ``(B, T)``, of the policy that sampled; detached.
        advantages: ``(B,)``, or ``(B, T)`` for one a token; detached.
        mask: ``(B, T)``.
        kind: see above.
        clip_low: at least 0.
        clip_high: at least 0.

    Returns:
        ``(B, T)``; exactly 0, with gradient exactly 0, at masked-out tokens and wherever the advantage is 0.
        A sequence without tokens is all 0.

    Raises:
        ValueError: shapes that do not fit, a mask with values other than 0 and 1, an unknown ``kind``, a
            negative clip.
    """
    mask, advantages = _checked_tokens(logprobs, old_logprobs, advantages, mask, kind, clip_low, clip_high)
    log_ratio = _log_ratio(logprobs, old_logprobs, mask, kind)
    # A token without advantage contributes nothing, even where its ratio overflows (0 * inf is NaN).
    live = mask & (advantages != 0)
    if kind == "cispo":
        weight = log_ratio.detach().exp().clamp(max=clip_high)
        loss = -weight * advantages * torch.where(live, logprobs, 0.0)
    else:
        low, high = _clipped(log_ratio, advantages, mask, kind, clip_low, clip_high)
        # Where the minimum picks the clipped branch, exp must not be in the graph at all: the ratio may have
        # overflowed there, and a zero gradient through it would still be NaN.
        ratio = torch.where(live & ~low & ~high, log_ratio, 0.0).exp()
        ratio = torch.where(low, 1.0 - clip_low, torch.where(high, 1.0 + clip_high, ratio))
        loss = -advantages * ratio
    return torch.where(live, loss, 0.0)


def clipped_tokens(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    kind: LossKind = "grpo",
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """Which tokens :func:`policy_loss` clips at the low and at the high side.

    ``grpo`` and ``gspo``: low where the ratio is below ``1 - clip_low`` and the advantage negative, high
    where it is above ``1 + clip_high`` and the advantage positive. These tokens have no gradient; with the
    other sign of the advantage a ratio out of range is not clipped. ``cispo``: high where the ratio is above
    the cap ``clip_high``, where the gradient is capped but not lost; low never.

    Args and raises: as :func:`policy_loss`.

    Returns:
        Two ``(B, T)`` bool tensors, false at masked-out tokens. Sums over them add up over micro-batches.
    """
    mask, advantages = _checked_tokens(logprobs, old_logprobs, advantages, mask, kind, clip_low, clip_high)
    log_ratio = _log_ratio(logprobs, old_logprobs, mask, kind)
    return _clipped(log_ratio, advantages, mask, kind, clip_low, clip_high)


def clip_fractions(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """Shares of the completion tokens that the token ratio's clip leaves without gradient: (low, high).

    See :func:`clipped_tokens`, with ``kind="grpo"``; that function also answers for the other kinds.

    Returns:
        Two scalars in [0, 1], over all tokens of the mask; 0 if it has none.
    """
    low, high = clipped_tokens(
        logprobs, old_logprobs, advantages, mask, kind="grpo", clip_low=clip_low, clip_high=clip_high
    )
    tokens = _checked_mask(mask, logprobs).sum().clamp(min=1)
    return low.sum() / tokens, high.sum() / tokens


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, *, kind: KLKind = "k3") -> Tensor:
    """Estimates of KL(policy || reference) from single tokens sampled from the policy.

    With ``r = logp_ref - logp`` (J. Schulman, "Approximating KL Divergence", 2020; GRPO eq. 4 is ``k3``):

    - ``k1 = -r``: unbiased, either sign. As a loss it teaches nothing: its gradient has mean 0.
    - ``k2 = r^2 / 2``: biased and never negative; its gradient is, in the mean, that of
      KL(policy || reference).
    - ``k3 = exp(r) - r - 1``: unbiased and never negative; its gradient is, in the mean, that of
      KL(reference || policy).

    There is no mask here. So that :func:`aggregate` can take padding out afterwards, a token whose estimate
    is not finite keeps that value (NaN or infinity) but has gradient 0.

    Args:
        logprobs: ``(B, T)``, of the policy; receives the gradient.
        ref_logprobs: ``(B, T)``, of the reference policy; detached.
        kind: see above.

    Returns:
        ``(B, T)``, in nats.

    Raises:
        ValueError: shapes that differ, an unknown ``kind``.
    """
    _require_choice("kind", kind, get_args(KLKind))
    _require_shape("ref_logprobs", ref_logprobs, logprobs)
    r = ref_logprobs.detach() - logprobs
    value = _kl(r.detach(), kind)
    finite = torch.isfinite(value)
    return torch.where(finite, _kl(torch.where(finite, r, 0.0), kind), value)


def _kl(r: Tensor, kind: KLKind) -> Tensor:
    if kind == "k1":
        return -r
    if kind == "k2":
        return r.square() / 2
    # expm1 keeps the digits that exp(r) - 1 loses near 0, where training lives.
    return torch.expm1(r) - r


def _log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, kind: LossKind) -> Tensor:
    """``log w`` of each token, ``(B, T)``; for ``gspo`` the sequence's, repeated. ``mask`` is bool."""
    log_ratio = torch.where(mask, logprobs - old_logprobs.detach(), 0.0)
    if kind == "gspo":
        length = mask.sum(dim=1, keepdim=True).clamp(min=1)
        log_ratio = (log_ratio.sum(dim=1, keepdim=True) / length).expand_as(mask)
    return log_ratio


def _clipped(
    log_ratio: Tensor, advantages: Tensor, mask: Tensor, kind: LossKind, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    ratio = log_ratio.detach().exp()
    if kind == "cispo":
        return torch.zeros_like(mask), mask & (ratio > clip_high)
    low = mask & (ratio < 1.0 - clip_low) & (advantages < 0)
    high = mask & (ratio > 1.0 + clip_high) & (advantages > 0)
    return low, high


# --------------------------------------------------------------------------------------------------------
# Loss per token -> scalar
# --------------------------------------------------------------------------------------------------------


def aggregate(values: Tensor, mask: Tensor, *, how: Aggregation = "token", max_tokens: int | None = None) -> Tensor:
    """One number out of one number a token.

    - ``token``: the mean over all tokens of the batch (DAPO, arXiv 2503.14476); long sequences weigh more.
    - ``sequence``: the mean over sequences of their token means (GRPO); every sequence weighs the same. A
      sequence without tokens has no mean and is left out.
    - ``constant``: the sum divided by ``B * max_tokens`` (Dr. GRPO, arXiv 2503.20783); every token weighs the
      same in every batch. A sequence without tokens still counts in ``B``.

    Always ``aggregate_sum(...) / aggregate_size(...)``, and both of these add up over any split of the batch
    into sequences. That is how gradients are accumulated without changing the result::

        size = sum(aggregate_size(part.mask, how=how, max_tokens=max_tokens) for part in parts)
        for part in parts:
            (aggregate_sum(loss_per_token(part), part.mask, how=how) / size).backward()

    Args:
        values: ``(B, T)``; anything at masked-out tokens.
        mask: ``(B, T)``.
        how: see above.
        max_tokens: the longest completion that sampling allows; required by ``constant``, unused otherwise.

    Returns:
        A scalar. Without any token it is 0 and still has a graph, so that ``backward`` works.

    Raises:
        ValueError: shapes that do not fit, a mask with values other than 0 and 1, an unknown ``how``,
            ``constant`` without a positive ``max_tokens``.
    """
    size = aggregate_size(mask, how=how, max_tokens=max_tokens)
    return aggregate_sum(values, mask, how=how) / max(size, 1)


def aggregate_sum(values: Tensor, mask: Tensor, *, how: Aggregation) -> Tensor:
    """The numerator of :func:`aggregate`, a scalar with a graph: the sum of tokens, or of token means."""
    _require_choice("how", how, get_args(Aggregation))
    mask = _checked_mask(mask, values)
    kept = torch.where(mask, values, 0.0)
    if how == "sequence":
        return (kept.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum()
    return kept.sum()


def aggregate_size(mask: Tensor, *, how: Aggregation, max_tokens: int | None = None) -> int:
    """The denominator of :func:`aggregate`: tokens, sequences that have tokens, or ``B * max_tokens``."""
    _require_choice("how", how, get_args(Aggregation))
    mask = _checked_mask(mask, mask)
    if how == "constant":
        if max_tokens is None or max_tokens < 1:
            raise ValueError(
                f"max_tokens is {max_tokens}; how='constant' needs the longest completion allowed, 1 or more."
            )
        return mask.shape[0] * max_tokens
    return int(mask.sum()) if how == "token" else int(mask.any(dim=1).sum())


# --------------------------------------------------------------------------------------------------------
# Checks
# --------------------------------------------------------------------------------------------------------


def _checked_tokens(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    kind: LossKind,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """The mask as bool and the advantages as ``(B, T)``, detached, in the dtype of ``logprobs``."""
    _require_choice("kind", kind, get_args(LossKind))
    _require_at_least_zero("clip_low", clip_low)
    _require_at_least_zero("clip_high", clip_high)
    mask = _checked_mask(mask, logprobs)
    _require_shape("old_logprobs", old_logprobs, logprobs)
    if advantages.shape not in (logprobs.shape, logprobs.shape[:1]):
        raise ValueError(
            f"advantages has shape {tuple(advantages.shape)}; it must be ({logprobs.shape[0]},), one a "
            f"sequence, or {tuple(logprobs.shape)}, one a token."
        )
    if advantages.ndim == 1:
        advantages = advantages[:, None]
    return mask, advantages.detach().to(logprobs).expand_as(logprobs)


def _checked_mask(mask: Tensor, like: Tensor) -> Tensor:
    """The mask as bool. A fractional mask would be a weight, which no function here takes: it is refused."""
    if mask.ndim != 2:
        raise ValueError(f"mask has shape {tuple(mask.shape)}; it must be (sequences, tokens).")
    _require_shape("mask", mask, like)
    if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        raise ValueError("mask has values other than 0 and 1; it must be 1 (or true) exactly at completion tokens.")
    return mask.bool()


def _require_shape(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.shape != like.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {tuple(like.shape)}, like its values.")


def _require_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}.")


def _require_at_least_zero(name: str, value: float) -> None:
    if not value >= 0:  # also refuses NaN
        raise ValueError(f"{name} is {value}; it must be a number of at least 0.")
