"""One adapter a family of diffusers pipelines, chosen by the pipeline's class name."""

from __future__ import annotations

from .base import PipelineModel
from .flux import Flux
from .other import OtherPipeline
from .stable_diffusion import StableDiffusion
from .stable_diffusion_3 import StableDiffusion3
from .stable_diffusion_xl import StableDiffusionXL

__all__ = ["FAMILIES", "StableDiffusion3", "family_of"]

FAMILIES: dict[str, type[PipelineModel]] = {
    "StableDiffusion3Pipeline": StableDiffusion3,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusionPipeline": StableDiffusion,
    "FluxPipeline": Flux,
}


def family_of(class_name: str) -> type[PipelineModel]:
    """The adapter for a pipeline class; any that is not in :data:`FAMILIES` is taken by its call signature."""
    return FAMILIES.get(class_name, OtherPipeline)
