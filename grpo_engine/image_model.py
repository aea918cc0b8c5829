"""The image model: text and a latent seed in, a picture out.

:class:`ImageModel` is all the rest of the program knows. A new family of pipelines gets a class beside
:class:`StableDiffusion3` and a line in :data:`FAMILIES`.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .config import ImageModelConfig
from .policy import Poll, no_poll
from .rollout import Picture
from .seeding import normals


@dataclass(frozen=True)
class RenderJob:
    """One picture to make. Equal jobs give equal pictures, so each distinct job is rendered once."""

    text: str
    latent_seed: int


class ImageModel(Protocol):
    """Anything that can render text."""

    def render(self, jobs: Sequence[RenderJob], *, poll: Poll = no_poll) -> list[Picture]:
        """One picture for each job, in order. ``poll`` is called between denoising steps; it may raise to stop."""

    def cut_words(self, text: str) -> int:
        """How many tokens at the end of ``text`` the model cannot read."""


class StableDiffusion3:
    """A ``StableDiffusion3Pipeline`` with cached prompt embeddings and seeded latents."""

    EMBEDDING_CACHE = 512  # prompts; at full size one takes about 1 MB

    def __init__(self, pipeline: Any, config: ImageModelConfig) -> None:
        self.pipeline, self.config = pipeline, config
        self.pipeline.set_progress_bar_config(disable=True)
        self._embeddings: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()

    def render(self, jobs: Sequence[RenderJob], *, poll: Poll = no_poll) -> list[Picture]:
        """See :class:`ImageModel`."""
        distinct = list(dict.fromkeys(jobs))
        pictures: dict[RenderJob, Picture] = {}
        for start in range(0, len(distinct), self.config.batch_size):
            batch = distinct[start : start + self.config.batch_size]
            pictures |= zip(batch, self._render_batch(batch, poll), strict=True)
        return [pictures[job] for job in jobs]

    def cut_words(self, text: str) -> int:
        """See :class:`ImageModel`. Where CLIP and T5 both read, what either of them reads is read."""
        readers = [(self.pipeline.tokenizer, self.pipeline.tokenizer.model_max_length)]
        if self.pipeline.text_encoder_3 is not None:
            readers.append((self.pipeline.tokenizer_3, self.config.max_sequence_length))
        return min(max(0, len(read(text, truncation=False).input_ids) - limit) for read, limit in readers)

    @torch.no_grad()
    def _render_batch(self, jobs: Sequence[RenderJob], poll: Poll) -> list[Picture]:
        poll()
        guided = self.config.guidance > 1.0
        states, pooled = self._embed([job.text for job in jobs])
        arguments: dict[str, Tensor] = {"prompt_embeds": states, "pooled_prompt_embeds": pooled}
        if guided:
            negative, negative_pooled = self._embed([self.config.negative_prompt] * len(jobs))
            arguments |= {
                "negative_prompt_embeds": negative,
                "negative_pooled_prompt_embeds": negative_pooled,
            }

        def after_step(_pipe: Any, _step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            poll()
            return tensors

        latents = self.pipeline(
            **arguments,
            latents=self._latents([job.latent_seed for job in jobs]),
            num_inference_steps=self.config.steps,
            guidance_scale=self.config.guidance,
            height=self.config.resolution,
            width=self.config.resolution,
            max_sequence_length=self.config.max_sequence_length,
            output_type="latent",
            callback_on_step_end=after_step,
        ).images
        return self._decode(latents)

    def _latents(self, seeds: Sequence[int]) -> Tensor:
        """Initial noise, float32 (B, C, h, w); the same for a seed on every device and in every batch."""
        side = self.config.resolution // self.pipeline.vae_scale_factor
        shape = (self.pipeline.transformer.config.in_channels, side, side)
        return torch.stack([normals(seed, shape) for seed in seeds])

    def _decode(self, latents: Tensor) -> list[Picture]:
        vae = self.pipeline.vae
        scaled = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        images = vae.decode(scaled, return_dict=False)[0].float()
        array = images.add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [np.ascontiguousarray(image) for image in array]

    def _embed(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token states (B, L, D) and pooled vectors (B, D) of ``texts``, each distinct text encoded once."""
        for text in dict.fromkeys(texts):
            if text not in self._embeddings:
                # One at a time: in a batch the rounding of a row depends on the batch's size, so what the cache
                # holds would depend on what else was asked for, and a resumed run would not be the same run.
                states, _, pooled, _ = self.pipeline.encode_prompt(
                    prompt=text,
                    prompt_2=text,
                    prompt_3=text,
                    device=self.pipeline.transformer.device,
                    do_classifier_free_guidance=False,
                    max_sequence_length=self.config.max_sequence_length,
                )
                self._embeddings[text] = (states[0], pooled[0])
        found = [self._embeddings[text] for text in texts]
        for text in texts:
            self._embeddings.move_to_end(text)
        while len(self._embeddings) > self.EMBEDDING_CACHE:
            self._embeddings.popitem(last=False)
        return torch.stack([states for states, _ in found]), torch.stack([pooled for _, pooled in found])


FAMILIES = {"StableDiffusion3Pipeline": StableDiffusion3}


def load_image_model(path: str, config: ImageModelConfig, device: torch.device, dtype: torch.dtype) -> ImageModel:
    """Load a diffusers pipeline from a folder or hub id; the autoencoder stays in float32.

    Raises:
        ValueError: if the pipeline's class is not supported.
    """
    from diffusers import DiffusionPipeline

    name = DiffusionPipeline.load_config(path)["_class_name"]
    if name not in FAMILIES:
        raise ValueError(f"{path} is a {name}; supported image pipelines are {', '.join(FAMILIES)}.")
    parts: dict[str, Any] = {} if config.use_t5 else {"text_encoder_3": None, "tokenizer_3": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = DiffusionPipeline.from_pretrained(path, torch_dtype=dtype, **parts)
    pipeline.vae.to(torch.float32)  # a bfloat16 decoder loses the last bits of every colour
    pipeline.to(device)
    return FAMILIES[name](pipeline, config)
