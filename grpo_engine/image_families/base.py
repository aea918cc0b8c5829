"""What all families of image pipelines share: batches, seeded noise, the cut tail of a text."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config import ConfigError, ImageModelConfig
from ..policy import Poll, no_poll
from ..rollout import Picture, RenderJob
from ..seeding import derive_seed, normals

AS_LOADED = ("path", "dtype", "use_t5", "t5_on_cpu", "compile")
"""Settings that decide how a pipeline is loaded; all others are followed while rendering."""


class PipelineModel(ABC):
    """A diffusers pipeline that renders a job the same way every time; see ``image_model.ImageModel``.

    Attributes:
        batch_size: most pictures rendered at once, 0 = all that are asked for; halved whenever memory runs out.
        told: hears (kind, message) of what a run should record.
    """

    EMBEDDING_CACHE: ClassVar[int] = 0  # prompts whose embeddings are remembered
    T5: ClassVar[str] = ""  # the part that is a T5 encoder beside CLIP
    UNUSED: ClassVar[tuple[str, ...]] = ("image_encoder", "feature_extractor")  # parts that are never loaded
    WIDE_DECODER: ClassVar[bool] = False  # the autoencoder runs in float32, whatever the rest does

    def __init__(self, pipeline: Any, config: ImageModelConfig) -> None:
        self.pipeline, self.config = pipeline, config
        self.batch_size = config.batch_size
        self.told: Callable[[str, str], object] = lambda kind, message: None
        self.pipeline.set_progress_bar_config(disable=True)
        if getattr(pipeline, "scheduler", None) is not None and pipeline.scheduler.config.get("stochastic_sampling"):
            raise ConfigError(
                "The scheduler of models.image.path has stochastic_sampling on, whose noise can't be seeded picture by "
                "picture; set it to false in the folder's scheduler/scheduler_config.json."
            )
        self._reading = threading.Lock()  # a tokenizer can't be used from two threads at once

    # -- what is known without loading -------------------------------------------------------------------

    @classmethod
    def check(cls, config: ImageModelConfig, class_name: str) -> None:
        """Refuse settings that pipelines of this family can't follow; raises ConfigError."""
        if cls.T5 and config.use_t5 and not config.max_sequence_length:
            raise ConfigError(
                "models.image.use_t5 is true, but models.image.max_sequence_length is 0, so T5 would read nothing; "
                "set it to 256, or models.image.use_t5 to false."
            )

    @classmethod
    def left_out(cls, config: ImageModelConfig) -> tuple[str, ...]:
        """Parts that are not loaded with these settings."""
        return cls.UNUSED if config.use_t5 or not cls.T5 else (*cls.UNUSED, cls.T5)

    @classmethod
    def text_tokens(cls, config: ImageModelConfig, clip: int) -> int:
        """Text tokens that the denoiser is given for one prompt, where CLIP reads ``clip``."""
        return clip

    @classmethod
    def passes(cls, config: ImageModelConfig) -> int:
        """Forward passes of a picture in one denoising step: with guidance also one without the text."""
        return 2 if config.guidance > 1.0 else 1

    def with_settings(self, config: ImageModelConfig) -> PipelineModel | None:
        """The same weights under other settings; None where those would be loaded in another way."""
        if any(getattr(config, name) != getattr(self.config, name) for name in AS_LOADED):
            return None
        return type(self)(self.pipeline, config)

    # -- rendering ---------------------------------------------------------------------------------------

    def render(self, jobs: Sequence[RenderJob], *, poll: Poll = no_poll) -> list[Picture]:
        """See ``image_model.ImageModel``.

        Raises:
            ConfigError: not even one picture fits into the device's memory.
        """
        distinct = list(dict.fromkeys(jobs))
        pictures: dict[RenderJob, Picture] = {}
        while len(pictures) < len(distinct):
            batch = distinct[len(pictures) :][: self.batch_size or None]
            try:
                pictures |= zip(batch, self._render_batch(batch, poll), strict=True)
            except torch.OutOfMemoryError as error:
                if len(batch) == 1:
                    raise ConfigError(self._too_large()) from error
                self.batch_size = len(batch) // 2
            else:
                continue
            torch.cuda.empty_cache()  # only here, past the handler, does nothing hold the tensors any more
            self.told(
                "warning",
                f"Rendering {len(batch)} pictures at once ran out of memory on {self.device}; from now on at most "
                f"{self.batch_size} at a time.",
            )
        return [pictures[job] for job in jobs]

    def cut_tokens(self, text: str) -> int:
        """See ``image_model.ImageModel``. Where several encoders read, what any of them reads is read."""
        with self._reading:
            cut = [len(tokenizer(text, truncation=False).input_ids) - limit for tokenizer, limit in self._readers()]
        return max(0, min(cut, default=0))

    @property
    def device(self) -> torch.device:
        """Where pictures are denoised."""
        device: torch.device = self.denoiser.device
        return device

    @property
    def denoiser(self) -> Any:
        """The transformer or U-Net; None where the pipeline has neither."""
        found = getattr(self.pipeline, "transformer", None)
        return getattr(self.pipeline, "unet", None) if found is None else found

    @abstractmethod
    def _render_batch(self, jobs: Sequence[RenderJob], poll: Poll) -> list[Picture]:
        """Distinct jobs rendered together."""

    @abstractmethod
    def _readers(self) -> list[tuple[Any, int]]:
        """(tokenizer, most tokens its encoder reads) of every text encoder that is loaded."""

    def _latents(self, seeds: Sequence[int]) -> Tensor:
        """Initial noise (B, C, h, w); the same for a seed on every device and in every batch."""
        side = self.config.resolution // self.pipeline.vae_scale_factor
        shape = (self.denoiser.config.in_channels, side, side)
        return torch.stack([normals(seed, shape) for seed in seeds]).to(self.denoiser.dtype)

    def _generators(self, jobs: Sequence[RenderJob]) -> list[torch.Generator]:
        """For schedulers that add noise in every step: a picture's own, the same in every batch."""
        return [torch.Generator().manual_seed(derive_seed(job.latent_seed, "denoising-noise")) for job in jobs]

    def _too_large(self) -> str:
        remedies = ["lower models.image.resolution", "move the image model to a larger device"]
        if not self.config.decode_tile:
            remedies.insert(0, "set models.image.decode_tile to 256")
        side = self.config.resolution
        return (
            f"Not even one picture of {side} x {side} fits into the memory of {self.device}: {', or '.join(remedies)}."
        )
