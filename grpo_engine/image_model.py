"""The image model: text and a latent seed in, a picture out.

:class:`ImageModel` is all the rest of the program knows. A new family of pipelines gets a file in ``image_families/``
and a line in its ``FAMILIES``.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .config import ImageModelConfig
from .image_families import FAMILIES, StableDiffusion3, family_of
from .image_families.base import PipelineModel
from .policy import Poll, no_poll
from .rollout import Picture, RenderJob

__all__ = ["FAMILIES", "ImageModel", "RenderJob", "StableDiffusion3", "load_image_model", "read_length"]


class ImageModel(Protocol):
    """Anything that can render text."""

    told: Callable[[str, str], object]
    """Hears (kind, message) of what a run should record."""

    def render(self, jobs: Sequence[RenderJob], *, poll: Poll = no_poll) -> list[Picture]:
        """One picture for each job, in order. ``poll`` is called between denoising steps; it may raise to stop."""

    def cut_tokens(self, text: str) -> int:
        """How many tokens at the end of ``text`` the model cannot read."""


def read_length(text: str, cut_tokens: Callable[[str], int]) -> int:
    """How many characters of ``text`` an image model reads; what follows are the tokens that it cuts off.

    Asks the model's own ``cut_tokens``, so whatever reads there, and however: first for whole words, which no tokenizer
    joins, then for a part of the next one.
    """
    if not cut_tokens(text):
        return len(text)
    ends = [0, *(word.end() for word in re.finditer(r"\s*\S+", text))]
    words = _most(len(ends) - 1, lambda count: not cut_tokens(text[: ends[count]]))
    begun = ends[words]
    rest = ends[min(words + 1, len(ends) - 1)] - begun
    read = begun + _most(rest, lambda count: not cut_tokens(text[: begun + count]))
    return len(text[:read].rstrip())


def _most(limit: int, holds: Callable[[int], bool]) -> int:
    """The largest of 0..limit for which ``holds``, where it does up to some number (0 is not tried) and then never."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def load_image_model(path: str, config: ImageModelConfig, device: torch.device, dtype: torch.dtype) -> PipelineModel:
    """Load a diffusers pipeline from a folder or hub id, as its family wants it.

    Raises:
        ConfigError: the pipeline can't be used, or not with these settings; before any weights are read.
    """
    from diffusers import DiffusionPipeline

    index = DiffusionPipeline.load_config(path)
    name = index["_class_name"]
    family = family_of(name)
    family.check(config, name)
    left_out: dict[str, Any] = {part: None for part in family.left_out(config) if part in index}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = DiffusionPipeline.from_pretrained(path, torch_dtype=dtype, **left_out)
    if family.WIDE_DECODER:
        pipeline.vae.to(torch.float32)
    for part_name, part in pipeline.components.items():
        if not isinstance(part, torch.nn.Module):
            continue
        if part_name == family.T5 and config.t5_on_cpu:
            part.register_forward_pre_hook(_to_cpu)
        else:
            part.to(device)
    model = family(pipeline, config)
    if config.compile:
        model.denoiser.compile()
    return model


def _to_cpu(_module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Token ids to where the encoder is; the pipeline itself takes the states to where it denoises."""
    return tuple(value.cpu() if isinstance(value, Tensor) else value for value in inputs)
