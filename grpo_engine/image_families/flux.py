"""FLUX.1: T5 writes the text tokens, CLIP one pooled vector; latents go through the denoiser packed 2 x 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config import ConfigError, ImageModelConfig
from ..rollout import Picture, RenderJob
from ..seeding import normals
from .encoded import EncodedPipeline


class Flux(EncodedPipeline):
    """A ``FluxPipeline``. ``guidance`` is what the dev model is told (it was distilled); schnell ignores it."""

    T5: ClassVar[str] = "text_encoder_2"

    @classmethod
    def check(cls, config: ImageModelConfig, class_name: str) -> None:
        """See the base class."""
        if not config.use_t5:
            raise ConfigError(
                "FLUX reads prompts with T5, but models.image.use_t5 is false; set it to true and "
                "models.image.max_sequence_length to 256 or 512 (models.image.t5_on_cpu=true keeps T5 off the GPU)."
            )
        super().check(config, class_name)
        if config.negative_prompt:
            raise ConfigError(
                "FLUX takes no negative prompt, because its guidance is distilled; empty models.image.negative_prompt."
            )

    @classmethod
    def text_tokens(cls, config: ImageModelConfig, clip: int) -> int:
        """See the base class."""
        return config.max_sequence_length

    @classmethod
    def passes(cls, config: ImageModelConfig) -> int:
        """See the base class."""
        return 1

    def _arguments(self, jobs: Sequence[RenderJob]) -> dict[str, Any]:
        return super()._arguments(jobs) | {"max_sequence_length": self.config.max_sequence_length}

    def _latents(self, seeds: Sequence[int]) -> Tensor:
        side = self.config.resolution // self.pipeline.vae_scale_factor
        channels = self.denoiser.config.in_channels // 4
        noise = torch.stack([normals(seed, (channels, side, side)) for seed in seeds])
        packed: Tensor = self.pipeline._pack_latents(noise, len(seeds), channels, side, side)
        return packed.to(self.denoiser.dtype)

    def _decode(self, latents: Tensor) -> list[Picture]:
        side = self.config.resolution
        return super()._decode(self.pipeline._unpack_latents(latents, side, side, self.pipeline.vae_scale_factor))

    def _encode(self, text: str) -> dict[str, Tensor]:
        states, pooled, _ = self.pipeline.encode_prompt(
            prompt=text, prompt_2=text, device=self.device, max_sequence_length=self.config.max_sequence_length
        )
        return {"prompt_embeds": states[0], "pooled_prompt_embeds": pooled[0]}

    def _readers(self) -> list[tuple[Any, int]]:
        # CLIP's pooled vector is a summary: what T5 does not read is as good as unread.
        return [(self.pipeline.tokenizer_2, self.config.max_sequence_length)]
