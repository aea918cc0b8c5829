"""Truncated sampling, and the exact log-probabilities that belong to it.

Tokens are sampled from logits / temperature, cut to the top-k, then to the nucleus (top-p), renormalised.
The importance ratio of GRPO compares the *sampled-from* distribution with the same one under new weights,
so the kept set of every position is recorded and used again. Then the ratio is exactly 1 before the first
update. Taking log-probabilities of the untruncated distribution instead, as is common, biases every ratio.

Pure tensor functions; float32 throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Entropies = Literal["learned", "measured", "none"]
"""What is wanted of entropies beside log-probabilities: with gradient, without, or zeros, which cost nothing."""


def truncate(
    logits: Tensor, *, temperature: float, top_k: int, top_p: float, suppressed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The distribution that is sampled from.

    Args:
        logits: float (N, V).
        temperature: divides the logits, > 0.
        top_k: how many of the likeliest tokens are kept; 0 = all.
        top_p: the likeliest tokens that together reach this probability are kept (at least one); 1 = all.
        suppressed: bool (V,), tokens that are never sampled.

    Returns:
        ``kept`` int64 (N, K), token ids by falling probability, padded with -1; ``logprobs`` float32 (N, K),
        renormalised, -inf on the padding. K is the largest number of tokens kept in any row.

    Raises:
        ValueError: a row has no finite logit.
    """
    scaled = _scaled(logits, temperature, suppressed)
    width = scaled.shape[-1] if top_k == 0 else min(top_k, scaled.shape[-1])
    values, kept = scaled.topk(width, dim=-1, sorted=True)
    alive = torch.isfinite(values)
    if top_p < 1.0:
        probabilities = values.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities  # mass of the likelier tokens
        alive &= before < top_p
        alive[:, 0] = torch.isfinite(values[:, 0])
    _require_alive(alive.any(dim=-1))
    width = int(alive.sum(dim=-1).max())
    values, kept, alive = values[:, :width], kept[:, :width], alive[:, :width]
    logprobs = values.masked_fill(~alive, -torch.inf).log_softmax(dim=-1)
    return kept.masked_fill(~alive, -1), logprobs


def whole_logprobs(logits: Tensor, *, temperature: float, suppressed: Tensor | None = None) -> Tensor:
    """The distribution that is sampled from when nothing is truncated: float32 (N, V), -inf where suppressed.

    Raises:
        ValueError: a row has no finite logit.
    """
    logprobs = _scaled(logits, temperature, suppressed).log_softmax(dim=-1)
    _require_alive(torch.isfinite(logprobs.amax(dim=-1)))  # NaN in a row, or nothing but -inf, makes all of it NaN
    return logprobs


def _scaled(logits: Tensor, temperature: float, suppressed: Tensor | None) -> Tensor:
    scaled = logits.float() / temperature
    return scaled if suppressed is None else scaled.masked_fill(suppressed, -torch.inf)


def _require_alive(rows: Tensor) -> None:
    if not rows.all():
        raise ValueError("The policy gave logits that are not numbers; use models.policy.dtype=float32 or bfloat16.")


def draw(logprobs: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF sampling: the index (N,) whose cumulative probability first exceeds ``uniform`` (N,) in [0, 1)."""
    cumulative = logprobs.exp().cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    below = torch.nextafter(total, torch.zeros_like(total))  # rounding must not leave the last bin that holds anything
    wanted = torch.minimum(uniform.to(total).unsqueeze(-1) * total, below)
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(-1)


def entropy_of(logprobs: Tensor) -> Tensor:
    """Entropy in nats over the last dimension; -inf entries count nothing."""
    finite = logprobs.clamp(min=torch.finfo(logprobs.dtype).min)  # of -inf: 0 times a number, and no gradient
    return -(finite.exp() * finite).sum(dim=-1)


def truncated_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    kept: Tensor | None,
    *,
    temperature: float,
    suppressed: Tensor | None,
    entropies: Entropies = "learned",
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of given tokens under ``logits``, over the recorded kept sets.

    Args:
        logits: float (N, V), with gradient where wanted.
        token_ids: int64 (N,).
        kept: int64 (N, K) padded with -1, or None when nothing was truncated.

    Returns:
        float32 (N,) and (N,). A token outside its kept set has log-probability -inf.
    """
    scaled = _scaled(logits, temperature, suppressed)
    if kept is None:
        logprobs = scaled.log_softmax(dim=-1)
        return logprobs.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1), _entropy(logprobs, entropies)
    values = scaled.gather(-1, kept.clamp(min=0)).masked_fill(kept < 0, -torch.inf)
    logprobs = values.log_softmax(dim=-1)
    is_token = kept == token_ids.unsqueeze(-1)
    chosen = torch.where(is_token, logprobs, torch.zeros_like(logprobs)).sum(dim=-1)
    return chosen.masked_fill(~is_token.any(dim=-1), -torch.inf), _entropy(logprobs, entropies)


def _entropy(logprobs: Tensor, wanted: Entropies) -> Tensor:
    if wanted == "none":
        return logprobs.new_zeros(logprobs.shape[:-1])
    return entropy_of(logprobs if wanted == "learned" else logprobs.detach())


def chunked_logprobs(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    token_ids: Tensor,
    kept: Tensor | None,
    *,
    chunk: int,
    temperature: float,
    suppressed: Tensor | None,
    entropies: Entropies = "learned",
) -> tuple[Tensor, Tensor]:
    """:func:`truncated_logprobs` of ``head(hidden)``, with the logits of at most ``chunk`` tokens there at a time.

    The backward pass computes each chunk's logits again, one chunk after the other: the largest tensor is
    (chunk, V) and not (N, V). Values and gradients are the same up to rounding.

    Args:
        head: hidden states (n, D) to logits (n, V).
        hidden: float (N, D), with gradient where wanted.
        token_ids: int64 (N,).
        kept: as in :func:`truncated_logprobs`.
        chunk: tokens; 0 = all at once, and nothing is computed twice.

    Returns:
        float32 (N,) and (N,).
    """

    def measure(states: Tensor, ids: Tensor, sets: Tensor | None) -> tuple[Tensor, Tensor]:
        return truncated_logprobs(
            head(states), ids, sets, temperature=temperature, suppressed=suppressed, entropies=entropies
        )

    if chunk == 0 or len(hidden) <= chunk:
        return measure(hidden, token_ids, kept)
    parts = []
    for start in range(0, len(hidden), chunk):
        own = slice(start, start + chunk)
        arguments = hidden[own], token_ids[own], None if kept is None else kept[own]
        if torch.is_grad_enabled():
            parts.append(checkpoint(measure, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(measure(*arguments))
    of_tokens, of_distributions = zip(*parts, strict=True)
    return torch.cat(of_tokens), torch.cat(of_distributions)


def pad_kept(steps: list[Tensor]) -> Tensor:
    """Kept sets of successive positions, each (N, K_t), as one (N, T, K) padded with -1."""
    width = max(step.shape[-1] for step in steps)
    padded = [torch.nn.functional.pad(step, (0, width - step.shape[-1]), value=-1) for step in steps]
    return torch.stack(padded, dim=1)
