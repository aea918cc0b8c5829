"""The tiny AutoencoderKL: 96 x 96 pictures to 16 channels of 12 x 12, and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from .corpus import Pool, rng_for
from .fitting import Recipe, autocast, fit
from .world import RESOLUTION

CHANNELS = (16, 32, 64, 96)
CROP = 64
RECIPE = Recipe(steps=4800, batch=24, learning_rate=2e-3, weight_decay=1e-3, ema=0.998)
FULL_SHARE = 0.3  # the last steps see whole pictures; before, crops: the same lesson for less than half


def new_autoencoder() -> AutoencoderKL:
    """An untrained autoencoder in the published SD3 layout (no quantisation convolutions, 16 channels)."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=RESOLUTION,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def to_model(pictures: NDArray[np.uint8], device: torch.device) -> Tensor:
    """uint8 (N, H, W, 3) to float (N, 3, H, W) in [-1, 1]."""
    tensor = torch.from_numpy(np.ascontiguousarray(pictures)).to(device)
    return tensor.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous(memory_format=torch.channels_last)


def train_autoencoder(
    pool: Pool, folder: Path, seed: int, device: torch.device, log: Callable[[str], None], *, compiled: bool
) -> AutoencoderKL:
    """Reconstruction by absolute and squared error, with a faint pull of the latents towards N(0, 1)."""
    torch.manual_seed(int(rng_for(seed, "autoencoder", "init").integers(2**31)))
    model: Any = new_autoencoder()
    model = model.to(device, memory_format=torch.channels_last)
    with torch.no_grad():  # start nearly noiseless: at variance 1 the decoder learns to ignore its input
        bias = model.encoder.conv_out.bias
        bias[len(bias) // 2 :] = -6.0
    encode, decode = model.encoder, model.decoder
    if compiled:
        encode.compile(dynamic=False)
        decode.compile(dynamic=False)

    def loss(step: int) -> dict[str, Tensor]:
        rng = rng_for(seed, "autoencoder", step)
        whole = step >= RECIPE.steps * (1 - FULL_SHARE)
        count = RECIPE.batch // 2 if whole else RECIPE.batch
        batch = pool.pictures[np.sort(rng.choice(len(pool), count, replace=False))]
        if not whole:
            rows, columns = rng.integers(0, RESOLUTION - CROP + 1, (2, len(batch)))
            pairs = zip(batch, rows, columns, strict=True)
            batch = np.stack([image[r : r + CROP, c : c + CROP] for image, r, c in pairs])
        target = to_model(batch, device)
        with autocast(device):
            mean, log_variance = encode(target).float().chunk(2, dim=1)
            log_variance = log_variance.clamp(-12.0, 8.0)
            noise = torch.from_numpy(rng.standard_normal(mean.shape, dtype=np.float32)).to(device)
            output = decode(mean + noise * torch.exp(0.5 * log_variance)).float()
        difference = output - target
        prior = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
        return {
            "absolute": difference.abs().mean(),
            "squared": 4.0 * difference.square().mean(),
            "prior": 2e-4 * prior,
        }

    fit("autoencoder", model, loss, RECIPE, folder, log=log)
    normalise_latents(model, pool, device)
    return model


def encode_pictures(model: Any, pictures: NDArray[np.uint8], device: torch.device) -> Tensor:
    """Mean latents of ``pictures`` by an AutoencoderKL, normalised as SD3 does: float32 (N, 16, 12, 12)."""
    out = []
    with torch.no_grad(), autocast(device):
        for start in range(0, len(pictures), 32):
            moments = model.encoder(to_model(pictures[start : start + 32], device)).float()
            out.append(moments.chunk(2, dim=1)[0].cpu())
    shift, scale = float(model.config.shift_factor), float(model.config.scaling_factor)
    return (torch.cat(out) - shift) * scale


def normalise_latents(model: Any, pool: Pool, device: torch.device) -> None:
    """Set an AutoencoderKL's ``shift_factor`` and ``scaling_factor`` so that latents have mean 0 and variance 1."""
    model.register_to_config(shift_factor=0.0, scaling_factor=1.0)
    latents = encode_pictures(model, pool.pictures[:512], device)
    model.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1.0 / latents.std()))


def reconstruction_psnr(model: Any, pool: Pool, device: torch.device, count: int = 512) -> float:
    """Mean peak signal-to-noise ratio in dB of encode-decode over ``count`` pictures (values 0..255)."""
    shift, scale = float(model.config.shift_factor), float(model.config.scaling_factor)
    values = []
    for start in range(0, min(count, len(pool)), 32):
        pictures = pool.pictures[start : start + 32]
        latents = encode_pictures(model, pictures, device).to(device)
        with torch.no_grad():
            output = model.decode(latents / scale + shift).sample
        error = (F.hardtanh(output) - to_model(pictures, device)).mul(127.5).square().mean(dim=(1, 2, 3))
        values.append(10 * torch.log10(255.0**2 / error))
    return float(torch.cat(values).mean())
