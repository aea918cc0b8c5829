"""Stable Diffusion 1 and 2 (arXiv 2112.10752) and SD Turbo: one CLIP encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..rollout import RenderJob
from .encoded import EncodedPipeline


class StableDiffusion(EncodedPipeline):
    """A ``StableDiffusionPipeline``. Turbo is guidance-free: ``guidance=1``, 1 to 4 steps.

    The safety checker is not loaded: a blackened picture would be scored as if the rewrite had asked for it.
    """

    UNUSED: ClassVar[tuple[str, ...]] = (*EncodedPipeline.UNUSED, "safety_checker")

    def _arguments(self, jobs: Sequence[RenderJob]) -> dict[str, Any]:
        return super()._arguments(jobs) | {"generator": self._generators(jobs)}

    def _encode(self, text: str) -> dict[str, Tensor]:
        states, _ = self.pipeline.encode_prompt(text, self.device, 1, do_classifier_free_guidance=False)
        return {"prompt_embeds": states[0]}

    def _readers(self) -> list[tuple[Any, int]]:
        return [(self.pipeline.tokenizer, self.pipeline.tokenizer.model_max_length)]
