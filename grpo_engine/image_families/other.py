"""Any other text-to-image pipeline, by what its call takes: prompts, and a generator or latents."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from ..config import ConfigError, ImageModelConfig
from ..policy import Poll
from ..rollout import Picture, RenderJob
from .base import PipelineModel


class OtherPipeline(PipelineModel):
    """A pipeline of a class that has no adapter of its own. It encodes and decodes by itself."""

    UNUSED: ClassVar[tuple[str, ...]] = ("safety_checker",)

    @classmethod
    def check(cls, config: ImageModelConfig, class_name: str) -> None:
        """See the base class."""
        import diffusers

        found = getattr(diffusers, class_name, None)
        if found is None:
            raise ConfigError(
                f"models.image.path is a {class_name}, which this version of diffusers ({diffusers.__version__}) does "
                "not know; use another image model, or a newer diffusers."
            )
        takes = inspect.signature(found.__call__).parameters
        if "prompt" not in takes or not {"generator", "latents"} & set(takes):
            raise ConfigError(
                f"models.image.path is a {class_name}, which takes no prompts with a generator or latents, so its "
                "pictures could not be made from a text and a seed; use a text-to-image pipeline."
            )
        if "num_frames" in takes:
            raise ConfigError(f"models.image.path is a {class_name}, which makes videos; use a text-to-image pipeline.")

    @classmethod
    def text_tokens(cls, config: ImageModelConfig, clip: int) -> int:
        """See the base class."""
        return max(clip, config.max_sequence_length)

    def __init__(self, pipeline: Any, config: ImageModelConfig) -> None:
        super().__init__(pipeline, config)
        if not isinstance(self.denoiser, torch.nn.Module):
            raise ConfigError(
                f"models.image.path is a {type(pipeline).__name__}, which has neither a transformer nor a U-Net; use "
                "another image model."
            )
        self._takes: Mapping[str, inspect.Parameter] = inspect.signature(pipeline.__call__).parameters
        vae = getattr(pipeline, "vae", None)
        for setting, method in (("decode_batch_size", "enable_slicing"), ("decode_tile", "enable_tiling")):
            if getattr(config, setting) and not hasattr(vae, method):
                raise ConfigError(
                    f"models.image.{setting} is {getattr(config, setting)}, but the autoencoder of a "
                    f"{type(pipeline).__name__} can't do that; set it to 0."
                )

    def _render_batch(self, jobs: Sequence[RenderJob], poll: Poll) -> list[Picture]:
        """Texts are encoded together: how a pipeline pads them is its own affair."""
        poll()
        self._set_decoder()
        config = self.config

        wanted: dict[str, Any] = {
            "num_inference_steps": config.steps,
            "guidance_scale": config.guidance,
            "height": config.resolution,
            "width": config.resolution,
            "use_resolution_binning": False,
            "clean_caption": False,
        }
        if self.passes(config) > 1:
            wanted["negative_prompt"] = [config.negative_prompt] * len(jobs)
        if config.max_sequence_length:
            wanted["max_sequence_length"] = config.max_sequence_length
        if "generator" in self._takes:
            wanted["generator"] = self._generators(jobs)
        else:
            wanted["latents"] = self._latents([job.latent_seed for job in jobs]).to(self.device)
        arguments = {name: value for name, value in wanted.items() if name in self._takes}
        # Not all pipelines have a callback, and all of them call their denoiser once or twice a step.
        asking = self.denoiser.register_forward_hook(lambda _module, _inputs, _output: poll())
        try:
            with torch.no_grad():
                images = self.pipeline(prompt=[job.text for job in jobs], output_type="np", **arguments).images
        finally:
            asking.remove()
        return [np.ascontiguousarray((image * 255.0).round().astype(np.uint8)) for image in images]

    def _set_decoder(self) -> None:
        """Slices of one picture, and tiles, as set; held by the autoencoder, which other settings may share."""
        vae: Any = getattr(self.pipeline, "vae", None)
        tile = self.config.decode_tile
        if hasattr(vae, "enable_slicing"):
            vae.use_slicing = bool(self.config.decode_batch_size)
        if hasattr(vae, "enable_tiling"):
            vae.use_tiling = bool(tile)
        if hasattr(vae, "tile_latent_min_size"):
            vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // self.pipeline.vae_scale_factor

    def _readers(self) -> list[tuple[Any, int]]:
        readers = []
        for name in ("tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_4"):
            tokenizer = getattr(self.pipeline, name, None)
            if tokenizer is not None:
                clip = "CLIP" in type(tokenizer).__name__
                readers.append((tokenizer, tokenizer.model_max_length if clip else self._sequence_length(tokenizer)))
        return readers

    def _sequence_length(self, tokenizer: Any) -> int:
        """Tokens that an encoder other than CLIP reads."""
        limit = self._takes.get("max_sequence_length")
        if limit is None:
            return int(tokenizer.model_max_length)
        return self.config.max_sequence_length or int(limit.default)
