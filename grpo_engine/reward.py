"""The reward: how well a picture shows the *original* prompt, as named parts with weights.

A new part is a value in :meth:`RewardModel.score` and a weight of the same name in ``RewardWeights``; a
scorer with a model of its own is a :class:`PictureScorer`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .config import RewardModelConfig
from .rollout import Picture, Score


class PictureScorer(Protocol):
    """Scores pictures against texts; used by the reward and by the evaluation."""

    def score(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> list[float]:
        """100 x cosine similarity of each picture with its prompt."""


class ClipScorer:
    """An open_clip model as a :class:`PictureScorer`; text features are computed once a prompt."""

    def __init__(self, model: Any, tokenizer: Callable[..., Tensor], device: torch.device, batch_size: int) -> None:
        self.model, self.tokenizer, self.device, self.batch_size = model, tokenizer, device, batch_size
        self._texts: dict[str, Tensor] = {}
        size = model.visual.image_size
        self._size = size if isinstance(size, tuple) else (size, size)
        self._mean = torch.tensor(model.visual.image_mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(model.visual.image_std, device=device).view(1, 3, 1, 1)
        self._dtype = next(model.visual.parameters()).dtype

    @torch.no_grad()
    def score(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> list[float]:
        """See :class:`PictureScorer`. CLIPScore (arXiv 2104.08718) without its factor 2.5 and its floor at 0."""
        out: list[float] = []
        for start in range(0, len(pictures), self.batch_size):
            chosen = slice(start, start + self.batch_size)
            images = self.model.encode_image(self._pixels(pictures[chosen]))
            texts = self._text_features(prompts[chosen])
            cosine = (F.normalize(images.float(), dim=-1) * texts).sum(dim=-1)
            out.extend((100.0 * cosine).tolist())
        return out

    def _pixels(self, pictures: Sequence[Picture]) -> Tensor:
        """Normalised model input (B, 3, H, W)."""
        batch = torch.from_numpy(np.stack(pictures)).to(self.device).permute(0, 3, 1, 2).float() / 255.0
        if batch.shape[-2:] != self._size:
            batch = F.interpolate(batch, self._size, mode="bicubic", antialias=True).clamp(0.0, 1.0)
        return ((batch - self._mean) / self._std).to(self._dtype)

    def _text_features(self, prompts: Sequence[str]) -> Tensor:
        for text in dict.fromkeys(prompts):
            if text not in self._texts:  # one at a time, so that a text's features never depend on its neighbours
                features = self.model.encode_text(self.tokenizer([text]).to(self.device))
                self._texts[text] = F.normalize(features.float(), dim=-1)[0]
        return torch.stack([self._texts[text] for text in prompts])


@dataclass(frozen=True)
class RewardModel:
    """The weighted reward of a run."""

    scorer: PictureScorer
    config: RewardModelConfig

    def score(
        self, pictures: Sequence[Picture | None], prompts: Sequence[str], rewrites: Sequence[str | None]
    ) -> list[Score]:
        """A score for each rollout; one without a picture (unparsable) gets ``config.failure``, visibly.

        Raw parts are recorded whatever their weight.
        """
        drawn = [index for index, picture in enumerate(pictures) if picture is not None]
        clip = dict(
            zip(
                drawn,
                self.scorer.score([p for p in pictures if p is not None], [prompts[index] for index in drawn]),
                strict=True,
            )
        )
        scores = []
        for index, rewrite in enumerate(rewrites):
            if rewrite is None or index not in clip:
                scores.append(Score({"format": 0.0}, self.config.failure))
                continue
            over = len(rewrite.split()) - self.config.length_limit
            parts = {"clip": clip[index], "length": -float(max(0, over)), "format": 1.0}
            weights = self.config.weights
            total = sum(getattr(weights, name) * value for name, value in parts.items())
            scores.append(Score(parts, total))
        return scores


def load_clip_scorer(path: str, config: RewardModelConfig, device: torch.device, dtype: torch.dtype) -> ClipScorer:
    """Load an open_clip model: a built-in name with a pretrained tag, or ``local-dir:`` and a folder.

    OpenAI's weights were trained with QuickGELU; their plain configuration names would silently score
    differently, so the QuickGELU variant is taken for them.
    """
    import open_clip

    name = path
    if config.pretrained == "openai" and not name.endswith("-quickgelu") and not name.startswith("local-dir:"):
        quick = f"{name}-quickgelu"
        name = quick if quick in open_clip.list_models() else name
    model = open_clip.create_model(name, pretrained=config.pretrained or None, device=device, precision="fp32")
    model = model.to(dtype).eval().requires_grad_(False)
    return ClipScorer(model, open_clip.get_tokenizer(name), device, config.batch_size)
