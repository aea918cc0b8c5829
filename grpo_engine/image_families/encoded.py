"""Pipelines that take prompt embeddings: prompts are encoded once and remembered, latents decoded here.

A family says how it reads one text, what its noise looks like, and what its pipeline is called with.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..config import ImageModelConfig
from ..policy import Poll
from ..rollout import Picture, RenderJob
from .base import PipelineModel


class EncodedPipeline(PipelineModel):
    """A pipeline with cached prompt embeddings and seeded latents."""

    EMBEDDING_CACHE: ClassVar[int] = 512  # at full size one takes about 1 MB
    WIDE_DECODER: ClassVar[bool] = True  # a bfloat16 decoder loses the last bits of every colour

    def __init__(self, pipeline: Any, config: ImageModelConfig) -> None:
        super().__init__(pipeline, config)
        self._embeddings: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._negative: dict[str, Tensor] = {}

    @torch.no_grad()
    def _render_batch(self, jobs: Sequence[RenderJob], poll: Poll) -> list[Picture]:
        poll()
        return self._decode(self._denoise(jobs, poll))

    def _denoise(self, jobs: Sequence[RenderJob], poll: Poll) -> Tensor:
        """Latents of finished pictures, as the pipeline returns them."""

        def after_step(_pipe: Any, _step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            poll()
            return tensors

        latents: Tensor = self.pipeline(
            **self._arguments(jobs),
            latents=self._latents([job.latent_seed for job in jobs]),
            num_inference_steps=self.config.steps,
            guidance_scale=self.config.guidance,
            height=self.config.resolution,
            width=self.config.resolution,
            output_type="latent",
            callback_on_step_end=after_step,
        ).images
        return latents

    def _arguments(self, jobs: Sequence[RenderJob]) -> dict[str, Any]:
        """What the pipeline is called with for these jobs, besides what every family has in common."""
        arguments: dict[str, Any] = self._embed([job.text for job in jobs])
        if self.passes(self.config) > 1:
            if not self._negative:
                with self._reading:
                    self._negative = self._encode_negative()
            arguments |= {
                f"negative_{name}": torch.stack([tensor] * len(jobs)) for name, tensor in self._negative.items()
            }
        return arguments

    def _decode(self, latents: Tensor) -> list[Picture]:
        vae, tile = self.pipeline.vae, self.config.decode_tile
        if hasattr(vae, "tile_latent_min_size"):  # held by the autoencoder, which other settings may share
            vae.use_tiling = bool(tile)
            vae.tile_sample_min_size = tile
            vae.tile_latent_min_size = tile // self.pipeline.vae_scale_factor
        scaled = self._unscaled(latents.to(vae.dtype))
        pictures: list[Picture] = []
        for part in scaled.split(self.config.decode_batch_size or len(scaled)):
            images = vae.decode(part, return_dict=False)[0].float()
            array = images.add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
            pictures += [np.ascontiguousarray(image) for image in array]
        return pictures

    def _unscaled(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) as the autoencoder made them, undoing how they were normalised for the denoiser."""
        config = self.pipeline.vae.config
        mean, std = (config.get(name) for name in ("latents_mean", "latents_std"))
        if mean is None or std is None:
            unscaled: Tensor = latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
            return unscaled
        center, spread = (torch.tensor(values).to(latents).view(1, -1, 1, 1) for values in (mean, std))
        return latents * spread / config.scaling_factor + center

    # -- reading -----------------------------------------------------------------------------------------

    def _embed(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The pipeline's arguments that hold ``texts``, (B, ...) each; each distinct text is encoded once."""
        for text in dict.fromkeys(texts):
            if text not in self._embeddings:
                # One at a time: in a batch the rounding of a row depends on the batch's size, so what the cache
                # holds would depend on what else was asked for, and a resumed run would not be the same run.
                with self._reading:
                    self._embeddings[text] = self._encode(text)
        found = [self._embeddings[text] for text in texts]
        for text in texts:
            self._embeddings.move_to_end(text)
        while len(self._embeddings) > self.EMBEDDING_CACHE:
            self._embeddings.popitem(last=False)
        return {name: torch.stack([tensors[name] for tensors in found]) for name in found[0]}

    @abstractmethod
    def _encode(self, text: str) -> dict[str, Tensor]:
        """One text's embeddings without a batch dimension, by the name of the pipeline's argument."""

    def _encode_negative(self) -> dict[str, Tensor]:
        """The same of what guidance steers away from."""
        return self._encode(self.config.negative_prompt)
