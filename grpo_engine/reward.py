"""The reward: how well a picture shows the *original* prompt, as named parts with weights.

A new part is a value in :meth:`RewardModel.score` and a weight of the same name in ``RewardWeights``; a
scorer with a model of its own is a :class:`PictureScorer` among the ``others``.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .config import ConfigError, RewardModelConfig, expanded
from .policy import PureGRPOPolicy
from .rollout import Picture, Score


class PictureScorer(Protocol):
    """Scores pictures against texts; used by the reward and by the evaluation."""

    def score(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> list[float]:
        """One number for each picture and its prompt; of CLIP and SigLIP 100 x cosine similarity."""


class ClipScorer:
    """An open_clip model as a :class:`PictureScorer`; text features are computed once a prompt."""

    def __init__(self, model: Any, tokenizer: Callable[..., Tensor], device: torch.device, batch_size: int) -> None:
        self.model, self.tokenizer, self.device, self.batch_size = model, tokenizer, device, batch_size
        self._texts: dict[str, Tensor] = {}
        size = model.visual.image_size
        self.size: tuple[int, int] = size if isinstance(size, tuple) else (size, size)
        self._mean = torch.tensor(model.visual.image_mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(model.visual.image_std, device=device).view(1, 3, 1, 1)
        self._dtype = next(model.visual.parameters()).dtype

    @torch.no_grad()
    def score(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> list[float]:
        """See :class:`PictureScorer`. CLIPScore (arXiv 2104.08718) without its factor 2.5 and its floor at 0."""
        out: list[float] = []
        for start in range(0, len(pictures), self.batch_size):
            chosen = slice(start, start + self.batch_size)
            images = self.embed(pictures[chosen])
            texts = self._text_features(prompts[chosen])
            cosine = (images * texts).sum(dim=-1)
            out.extend((100.0 * cosine).tolist())
        return out

    @torch.no_grad()
    def embed(self, pictures: Sequence[Picture]) -> Tensor:
        """Embeddings of at most ``batch_size`` pictures, float32 (B, D) of length 1."""
        return F.normalize(self.model.encode_image(self._pixels(pictures)).float(), dim=-1)

    def _pixels(self, pictures: Sequence[Picture]) -> Tensor:
        """Normalised model input (B, 3, H, W)."""
        batch = torch.from_numpy(np.stack(pictures)).to(self.device).permute(0, 3, 1, 2).float() / 255.0
        if batch.shape[-2:] != self.size:
            batch = F.interpolate(batch, self.size, mode="bicubic", antialias=True).clamp(0.0, 1.0)
        return ((batch - self._mean) / self._std).to(self._dtype)

    def _text_features(self, prompts: Sequence[str]) -> Tensor:
        for text in dict.fromkeys(prompts):
            if text not in self._texts:  # one at a time, so that a text's features never depend on its neighbours
                features = self.model.encode_text(self.tokenizer([text]).to(self.device))
                self._texts[text] = F.normalize(features.float(), dim=-1)[0]
        return torch.stack([self._texts[text] for text in prompts])


class AestheticScorer:
    """A linear head on the picture embeddings of a :class:`ClipScorer`; the prompt does not matter.

    Raises:
        ConfigError: the head was made for embeddings of another length.
    """

    def __init__(self, clip: ClipScorer, weight: Tensor, bias: float, path: str) -> None:
        side = max(clip.size)
        length = clip.embed([np.zeros((side, side, 3), dtype=np.uint8)]).shape[-1]
        if len(weight) != length:
            raise ConfigError(
                f"models.reward.aesthetic {path!r} reads embeddings of length {len(weight)}, but those of "
                f"models.reward.path have length {length}; name the head that was made for this model."
            )
        self.clip, self.weight, self.bias = clip, weight.to(clip.device), bias

    def score(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> list[float]:
        """See :class:`PictureScorer`. CLIP reads the pictures once more for it."""
        out: list[float] = []
        for start in range(0, len(pictures), self.clip.batch_size):
            embedded = self.clip.embed(pictures[start : start + self.clip.batch_size])
            out.extend((embedded @ self.weight + self.bias).tolist())
        return out


class VqaScorer:
    """The untrained policy asked about each picture: the probability that it says Yes.

    It uses the policy, with its adapter off: nothing else may use the policy meanwhile.
    """

    def __init__(self, policy: PureGRPOPolicy) -> None:
        self.policy = policy

    def score(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> list[float]:
        """See :class:`PictureScorer`."""
        with self.policy.reference():
            return self.policy.probability_of_yes(pictures, prompts)


@dataclass(frozen=True)
class RewardModel:
    """The weighted reward of a run.

    Attributes:
        scorer: of the part "clip".
        others: of further parts, by name; only parts that a run computes.
    """

    scorer: PictureScorer
    config: RewardModelConfig
    others: Mapping[str, PictureScorer] = field(default_factory=dict)

    @property
    def uses_policy(self) -> bool:
        """Whether scoring runs the policy itself, so that neither may happen beside the other."""
        return any(isinstance(other, VqaScorer) for other in self.others.values())

    def score(
        self, pictures: Sequence[Picture | None], prompts: Sequence[str], rewrites: Sequence[str | None]
    ) -> list[Score]:
        """A score for each rollout; one without a picture (unparsable) gets ``config.failure``, visibly.

        Raw parts are recorded whatever their weight, but only those that are computed. Rollouts that share one
        picture, because they are the same rewrite, share its parts too: it is looked at once.
        """
        looks = {(id(p), prompt): (p, prompt) for p, prompt in zip(pictures, prompts, strict=True) if p is not None}
        shown, asked = [picture for picture, _ in looks.values()], [prompt for _, prompt in looks.values()]
        clip = dict(zip(looks, self.scorer.score(shown, asked), strict=True))
        others = {name: dict(zip(looks, other.score(shown, asked), strict=True)) for name, other in self.others.items()}
        scores = []
        for picture, prompt, rewrite in zip(pictures, prompts, rewrites, strict=True):
            look = id(picture), prompt
            if rewrite is None or look not in clip:
                scores.append(Score({"format": 0.0}, self.config.failure))
                continue
            over = len(rewrite.split()) - self.config.length_limit
            parts = {"clip": clip[look], "length": -float(max(0, over)), "format": 1.0}
            parts |= {name: values[look] for name, values in others.items()}
            weights = self.config.weights
            total = sum(getattr(weights, name) * value for name, value in parts.items())
            scores.append(Score(parts, total))
        return scores


def load_clip_scorer(path: str, config: RewardModelConfig, device: torch.device, dtype: torch.dtype) -> ClipScorer:
    """Load an open_clip model: a built-in name with a tag or file of weights, ``hf-hub:``, or ``local-dir:``."""
    import open_clip

    name = with_its_gelu(path, config.pretrained)
    file = expanded(config.pretrained)
    weights = str(file) if file.is_file() else config.pretrained or None
    model = open_clip.create_model(name, pretrained=weights, device=device, precision="fp32")
    model = model.to(dtype).eval().requires_grad_(False)
    return ClipScorer(model, open_clip.get_tokenizer(name), device, config.batch_size)


def with_its_gelu(name: str, tag: str) -> str:
    """The open_clip model that the weights called ``tag`` were trained as.

    Some, OpenAI's among them, were trained with QuickGELU. The plain configuration would take them and silently
    score differently, so its QuickGELU variant is returned for them.
    """
    import open_clip

    found = open_clip.get_pretrained_cfg(name, tag) or {}
    quick = f"{name}-quickgelu"
    if found.get("quick_gelu") and quick in open_clip.list_models() and "quickgelu" not in name:
        return quick
    return name


def load_head(file: Path, path: str) -> tuple[Tensor, float]:
    """Weight (D,) and bias of a linear head that gives one number, from a safetensors or PyTorch file.

    Several linear layers are taken as one after the other with nothing between them, which is what LAION's second
    aesthetic predictor is; its first is a single layer.

    Args:
        path: the file as the user named it.

    Raises:
        ConfigError: the file can't be read or holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(
            f"models.reward.aesthetic {path!r} can't be read as a file of weights (safetensors, or a PyTorch state "
            "dictionary); name another."
        ) from error
    tensors = {name: value for name, value in stored.items() if isinstance(value, Tensor)} if stored else {}
    layers = sorted((name.removesuffix("weight") for name in tensors if name.endswith("weight")), key=_by_number)
    whole, shift = torch.empty(0), torch.zeros(1)
    for layer in layers:
        weight, bias = tensors[f"{layer}weight"].float(), tensors.get(f"{layer}bias", torch.zeros(1)).float()
        if weight.dim() != 2 or (whole.numel() and weight.shape[1] != whole.shape[0]):
            whole = torch.empty(0)
            break
        whole, shift = (weight @ whole, weight @ shift + bias) if whole.numel() else (weight, bias)
    if whole.shape[:1] != (1,) or whole.dim() != 2:
        raise ConfigError(
            f"models.reward.aesthetic {path!r} holds no linear head with one output (layers 'weight' and 'bias'); name "
            "another file."
        )
    return whole[0], float(shift.reshape(-1)[0])


def _by_number(name: str) -> tuple[int, ...]:
    """Sorts layers.10 behind layers.2."""
    return tuple(int(digits) for digits in re.findall(r"\d+", name))
