"""The data that flows through one optimiser step: completions, then pictures, then rewards, by group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .prompts import Prompt

Picture = NDArray[np.uint8]
"""An RGB picture, uint8 of shape (H, W, 3)."""


@dataclass(frozen=True)
class Completions:
    """G sampled completions of one prompt, with the distribution each token was really sampled from.

    Attributes:
        prompt_ids: int64 (P,), the rendered template.
        token_ids: int64 (G, T), right-padded; an end token, where one was sampled, is part of the completion.
        mask: bool (G, T), true on real tokens.
        logprobs: float32 (G, T), log-probability of each token under the sampling distribution
            (temperature, then top-k, then top-p, renormalised); 0 on padding.
        entropies: float32 (G, T), entropy in nats of that same distribution; 0 on padding.
        kept: int64 (G, T, K) or None. Ids of the tokens that survived truncation at each position, padded
            with -1; None when nothing was truncated. The ratio of a later policy is taken over the same set.
        texts: the G decoded completions, without special tokens.
        finished: bool (G,), whether the completion ended itself (as opposed to reaching the limit).
    """

    prompt_ids: Tensor
    token_ids: Tensor
    mask: Tensor
    logprobs: Tensor
    entropies: Tensor
    kept: Tensor | None
    texts: tuple[str, ...]
    finished: Tensor

    def __len__(self) -> int:
        return len(self.texts)

    def rows(self, index: slice) -> Completions:
        """The completions ``index`` selects, as a smaller set on the same prompt."""
        return Completions(
            self.prompt_ids,
            self.token_ids[index],
            self.mask[index],
            self.logprobs[index],
            self.entropies[index],
            None if self.kept is None else self.kept[index],
            self.texts[index],
            self.finished[index],
        )


@dataclass(frozen=True)
class RenderJob:
    """One picture to make. Equal jobs give equal pictures, so each distinct job is rendered once."""

    text: str
    latent_seed: int


@dataclass(frozen=True)
class Score:
    """The reward of one picture: named raw parts, and their weighted sum."""

    parts: dict[str, float]
    total: float


@dataclass
class Group:
    """All rollouts of one prompt at one step. Never split, never mixed with another prompt's.

    ``rewrites[k]`` is None where the completion could not be parsed; then ``pictures[k]`` is None too.
    ``rewards`` is float32 (G,); ``advantages`` float32 (G,), set once the group is whole.
    """

    prompt: Prompt
    completions: Completions
    rewrites: tuple[str | None, ...]
    latent_seed: int
    pictures: list[Picture | None] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    rewards: Tensor = field(default_factory=lambda: torch.empty(0))
    advantages: Tensor = field(default_factory=lambda: torch.empty(0))
    kl: Tensor | None = None  # float32 (G, T), per-token KL estimate at the update
    shift: Tensor | None = None  # float32 (G, T), log-probability when sampled minus the untrained policy's, nats
    seconds: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.completions)

    @property
    def failures(self) -> int:
        """How many completions could not be parsed."""
        return sum(rewrite is None for rewrite in self.rewrites)


def mean_length(groups: Sequence[Group]) -> float:
    """Mean completion length in tokens over all rollouts."""
    lengths = torch.cat([group.completions.mask.sum(dim=1) for group in groups])
    return float(lengths.double().mean())


def stacked(parts: Sequence[Tensor], padding: float = 0) -> Tensor:
    """Tensors (G, T, ...) of several groups as one, their rows one after the other, padded to the largest sizes."""
    sizes = [max(part.shape[axis] for part in parts) for axis in range(1, parts[0].dim())]
    out = parts[0].new_full((sum(len(part) for part in parts), *sizes), padding)
    for rows, part in zip(out.split([len(part) for part in parts]), parts, strict=True):
        rows[tuple(slice(size) for size in part.shape)] = part
    return out
