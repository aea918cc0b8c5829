"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): two CLIP encoders, and T5 where it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..config import ImageModelConfig
from ..rollout import RenderJob
from .encoded import EncodedPipeline


class StableDiffusion3(EncodedPipeline):
    """A ``StableDiffusion3Pipeline``. Without T5 its place is held by ``max_sequence_length`` zeros."""

    T5: ClassVar[str] = "text_encoder_3"

    @classmethod
    def left_out(cls, config: ImageModelConfig) -> tuple[str, ...]:
        """See the base class."""
        return super().left_out(config) if config.use_t5 else (*super().left_out(config), "tokenizer_3")

    @classmethod
    def text_tokens(cls, config: ImageModelConfig, clip: int) -> int:
        """See the base class."""
        return clip + config.max_sequence_length

    def _arguments(self, jobs: Sequence[RenderJob]) -> dict[str, Any]:
        return super()._arguments(jobs) | {"max_sequence_length": self.config.max_sequence_length}

    def _encode(self, text: str) -> dict[str, Tensor]:
        states, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=text,
            prompt_2=text,
            prompt_3=text,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.config.max_sequence_length,
        )
        return {"prompt_embeds": states[0], "pooled_prompt_embeds": pooled[0]}

    def _readers(self) -> list[tuple[Any, int]]:
        # The second CLIP encoder reads as many tokens of the same vocabulary as the first.
        readers = [(self.pipeline.tokenizer, self.pipeline.tokenizer.model_max_length)]
        if self.pipeline.text_encoder_3 is not None:
            readers.append((self.pipeline.tokenizer_3, self.config.max_sequence_length))
        return readers
