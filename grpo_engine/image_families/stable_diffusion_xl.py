"""Stable Diffusion XL (arXiv 2307.01952) and its Turbo: two CLIP encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..rollout import RenderJob
from .encoded import EncodedPipeline


class StableDiffusionXL(EncodedPipeline):
    """A ``StableDiffusionXLPipeline``. Turbo is guidance-free: ``guidance=1``, 1 to 4 steps."""

    def _arguments(self, jobs: Sequence[RenderJob]) -> dict[str, Any]:
        return super()._arguments(jobs) | {"generator": self._generators(jobs)}

    def _encode(self, text: str) -> dict[str, Tensor]:
        states, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=text, device=self.device, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": states[0], "pooled_prompt_embeds": pooled[0]}

    def _encode_negative(self) -> dict[str, Tensor]:
        encoded = self._encode(self.config.negative_prompt)
        if not self.config.negative_prompt and self.pipeline.config.force_zeros_for_empty_prompt:
            return {name: torch.zeros_like(tensor) for name, tensor in encoded.items()}  # as it was trained
        return encoded

    def _readers(self) -> list[tuple[Any, int]]:
        tokenizers = (self.pipeline.tokenizer, self.pipeline.tokenizer_2)
        return [(tokenizer, tokenizer.model_max_length) for tokenizer in tokenizers if tokenizer is not None]
