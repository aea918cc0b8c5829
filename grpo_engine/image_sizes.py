"""How large a text-to-image pipeline is, and what its memory while rendering depends on; see ``model_sizes.py``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .image_families import family_of
from .weight_sizes import (
    UnknownSize,
    Weights,
    elements_of,
    first_line,
    local_folder,
    not_here,
    read_json,
    stored_tensors,
)


@dataclass(frozen=True)
class ImageSize:
    """A text-to-image pipeline: the weights of its parts, and what its memory while rendering depends on."""

    parts: Mapping[str, Weights]
    width: int  # of the denoiser's tokens
    patch_area: int  # latent positions a token stands for
    latent_channels: int
    vae_factor: int  # pixels a latent position stands for, along one side
    decoder_width: int  # channels of the autoencoder at full resolution
    text_width: int
    text_tokens: int  # that its CLIP encoders read
    copies: float  # tensors (tokens, width) of the denoiser that are alive at once
    pipeline: str  # class name


# Tensors alive at once in one block, counted on the meta device at full size (attention in flash kernels).
JOINT_COPIES = 12.5  # SD3: 9.7 to 12.5
FLUX_COPIES = 18.0  # a joint and a single block side by side: 17.1 to 17.6
UNET_COPIES = 16.5  # SDXL: 15.75 of its widest resolution, the skip connections among them
ATTENTIVE_UNET_COPIES = 27.0  # SD 1 and 2, which attend at full resolution too: 26.0

# As published; the position table of the SD3 denoiser is a buffer, and counted.
CLIP_L = Weights(123_650_304, "published", stored=torch.float16)
CLIP_L_STATES = Weights(123_060_480, "published", stored=torch.float16)  # without the projection
CLIP_G = Weights(694_659_840, "published", stored=torch.float16)
CLIP_H = Weights(340_387_840, "published", stored=torch.float16)
T5_XXL = Weights(4_762_310_656, "published", wide=24 * 4096 * 10240, stored=torch.float16)
SD_VAE = Weights(83_653_863, "published", stored=torch.float16)
SD3_VAE = Weights(83_819_683, "published", stored=torch.float16)


def _sd3(elements: int, width: int) -> ImageSize:
    denoiser = Weights(elements, "published", stored=torch.float16)
    parts = {"transformer": denoiser, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": T5_XXL}
    name = "StableDiffusion3Pipeline"
    return ImageSize(parts | {"vae": SD3_VAE}, width, 4, 16, 8, 256, 4096, 77, JOINT_COPIES, name)


def _sdxl() -> ImageSize:
    denoiser = Weights(2_567_463_684, "published")
    parts = {"unet": denoiser, "text_encoder": CLIP_L_STATES, "text_encoder_2": CLIP_G, "vae": SD_VAE}
    name = "StableDiffusionXLPipeline"
    return ImageSize(parts, 320, 1, 4, 8, 256, 2048, 77, UNET_COPIES, name)


def _sd(elements: int, reader: Weights, text_width: int) -> ImageSize:
    parts = {"unet": Weights(elements, "published"), "text_encoder": reader, "vae": SD_VAE}
    name = "StableDiffusionPipeline"
    return ImageSize(parts, 320, 1, 4, 8, 256, text_width, 77, ATTENTIVE_UNET_COPIES, name)


def _flux(elements: int) -> ImageSize:
    denoiser = Weights(elements, "published", stored=torch.bfloat16)
    parts = {"transformer": denoiser, "text_encoder": CLIP_L_STATES, "text_encoder_2": T5_XXL, "vae": SD3_VAE}
    return ImageSize(parts, 3072, 4, 16, 8, 256, 4096, 77, FLUX_COPIES, "FluxPipeline")


PUBLISHED_IMAGES = {
    "stabilityai/stable-diffusion-3-medium-diffusers": _sd3(2_084_951_104, 1536),
    "stabilityai/stable-diffusion-3.5-medium": _sd3(2_469_663_936, 1536),
    "stabilityai/stable-diffusion-3.5-large": _sd3(8_146_280_768, 2432),
    "stabilityai/stable-diffusion-xl-base-1.0": _sdxl(),
    "stabilityai/sdxl-turbo": _sdxl(),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": _sd(859_520_964, CLIP_L_STATES, 768),
    "stabilityai/sd-turbo": _sd(865_910_724, CLIP_H, 1024),
    "black-forest-labs/FLUX.1-dev": _flux(11_901_408_320),
    "black-forest-labs/FLUX.1-schnell": _flux(11_891_178_560),
}


def image_size(path: str) -> ImageSize:
    """Of ``models.image.path``; raises :class:`UnknownSize`."""
    folder = local_folder(path, "image")
    if folder is None or not (folder / "model_index.json").is_file():
        if path in PUBLISHED_IMAGES:
            return PUBLISHED_IMAGES[path]
        raise not_here("image", path)
    index = read_json(folder / "model_index.json")
    pipeline = str(index.get("_class_name"))
    parts: dict[str, Weights] = {}
    for name, entry in index.items():
        loaded = isinstance(entry, list) and entry[0] and name not in family_of(pipeline).UNUSED
        if loaded and (folder / name / "config.json").is_file():
            parts[name] = _pipeline_part(folder / name, *entry)
    denoiser_name = "unet" if "unet" in parts else "transformer"
    try:
        denoiser = read_json(folder / denoiser_name / "config.json")
        vae = read_json(folder / "vae" / "config.json")
        reader = folder / "text_encoder" / "config.json"
        channels, blocks = vae["latent_channels"], vae["block_out_channels"]
        if denoiser_name == "unet":
            width, area = denoiser["block_out_channels"][0], 1
            attentive = "Attn" in denoiser["down_block_types"][0]
            copies = ATTENTIVE_UNET_COPIES if attentive else UNET_COPIES
        else:
            copies = JOINT_COPIES if pipeline == "StableDiffusion3Pipeline" else FLUX_COPIES
            width = denoiser["num_attention_heads"] * denoiser["attention_head_dim"]
            area = denoiser["patch_size"] ** 2 * max(1, denoiser["in_channels"] // channels)  # FLUX packs 2 x 2
        text_width = denoiser.get("joint_attention_dim") or denoiser.get("cross_attention_dim") or width
        return ImageSize(
            parts=parts,
            width=width,
            patch_area=area,
            latent_channels=channels,
            vae_factor=2 ** (len(blocks) - 1),
            decoder_width=max(blocks[:2]),  # the last stage begins with the channels of the one before it
            text_width=max(text_width) if isinstance(text_width, list) else text_width,
            text_tokens=read_json(reader).get("max_position_embeddings", 0) if reader.is_file() else 0,
            copies=copies,
            pipeline=pipeline,
        )
    except (KeyError, OSError) as missing:
        raise UnknownSize(
            f"How much memory models.image.path {path!r} needs is unknown: its folder has no {missing}."
        ) from missing


def _pipeline_part(folder: Path, library: str, kind: str) -> Weights:
    """Weights of one part of a diffusers pipeline, as ``model_index.json`` names it."""
    files = stored_tensors(folder, "diffusion_pytorch_model" if library == "diffusers" else "model")
    tensors, stored = files or (_part_on_meta(folder, library, kind), None)
    wide = sum(elements for name, elements in tensors.items() if kind.startswith("T5") and ".wo." in name)
    return Weights(sum(tensors.values()), "files" if files else "configuration", wide, stored)


def _part_on_meta(folder: Path, library: str, kind: str) -> dict[str, int]:
    file = folder / "config.json"
    try:
        build = getattr(importlib.import_module(library), kind)
        with torch.device("meta"):
            if library == "diffusers":
                return elements_of(build.from_config(read_json(file)))
            return elements_of(build(build.config_class.from_json_file(file)))
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise UnknownSize(
            f"How much memory the image model's {folder.name} needs is unknown: {first_line(error)}"
        ) from error
