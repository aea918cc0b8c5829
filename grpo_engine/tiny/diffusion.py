"""The tiny Stable Diffusion 3: an MMDiT over 12 x 12 latents, with two CLIP text encoders and no T5.

Trained as the paper does (rectified flow, logit-normal times), on canonical captions only: words it has
never met stay random vectors, which is exactly why a rewriter has something to do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from .autoencoder import encode_pictures
from .captions import canonical
from .corpus import Pool, rng_for
from .fitting import Recipe, autocast, fit
from .vocabulary import CLIP_CONTEXT
from .world import OPPOSITE, RESOLUTION, Scene

RECIPE = Recipe(steps=3500, batch=128, learning_rate=1.5e-3, weight_decay=0.01, warmup=200, ema=0.998)
TEXT_WIDTH = 96
UNCONDITIONAL = 0.1  # share of captions replaced by the empty one, for classifier-free guidance


class Denoiser(nn.Module):
    """The two text encoders and the transformer, trained together; what the pipeline later takes apart."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=CLIP_CONTEXT,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        self.text = CLIPTextModelWithProjection(config)
        self.text_2 = CLIPTextModelWithProjection(config)
        side = RESOLUTION // 8
        self.transformer: Any = SD3Transformer2DModel(
            sample_size=side,
            patch_size=2,
            in_channels=16,
            num_layers=6,
            attention_head_dim=32,
            num_attention_heads=6,
            joint_attention_dim=2 * TEXT_WIDTH,
            caption_projection_dim=192,
            pooled_projection_dim=2 * TEXT_WIDTH,
            out_channels=16,
            pos_embed_max_size=side // 2,
            qk_norm="rms_norm",
        )
        _zero_modulation(self.transformer)

    def forward(self, tokens: Tensor, noisy: Tensor, sigma: Tensor) -> Tensor:
        """Predicted velocity (noise - latents) for token ids (B, L), latents (B, 16, h, w), sigma (B,) in 0..1."""
        first, second = (encoder(tokens, output_hidden_states=True) for encoder in (self.text, self.text_2))
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        pooled = torch.cat([first.text_embeds, second.text_embeds], dim=-1)
        return self.transformer(
            hidden_states=noisy,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            timestep=sigma * 1000.0,
            return_dict=False,
        )[0]


def _zero_modulation(transformer: Any) -> None:
    """adaLN-zero (Peebles and Xie 2022): every block starts as the identity. diffusers leaves this to the trainer."""
    for name, module in transformer.named_modules():
        is_modulation = name.endswith((".norm1.linear", ".norm1_context.linear", "norm_out.linear"))
        if (is_modulation or name == "proj_out") and isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids padded and cut as the SD3 pipeline does: int64 (N, CLIP_CONTEXT)."""
    return tokenizer(
        texts, padding="max_length", max_length=CLIP_CONTEXT, truncation=True, return_tensors="pt"
    ).input_ids


def either_order(scene: Scene, rng: np.random.Generator) -> Scene:
    """For a pair: the same picture described from the other object's side, half of the time."""
    if len(scene.things) == 2 and rng.random() < 0.5:
        return replace(scene, things=scene.things[::-1], layout=OPPOSITE[scene.layout])
    return scene


def cached_latents(pool: Pool, autoencoder: AutoencoderKL, folder: Path, device: torch.device) -> Tensor:
    """Latents of the whole pool, float16 (N, 16, 12, 12), computed once."""
    path = folder / "latents.npy"
    if not path.exists():
        latents = encode_pictures(autoencoder, pool.pictures, device).half().numpy()
        np.save(path.with_suffix(".partial.npy"), latents)
        path.with_suffix(".partial.npy").rename(path)
    return torch.from_numpy(np.load(path))


def train_denoiser(
    pool: Pool,
    latents: Tensor,
    tokenizer: CLIPTokenizer,
    folder: Path,
    seed: int,
    device: torch.device,
    log: Callable[[str], None],
    *,
    compiled: bool,
) -> Denoiser:
    """Rectified flow: regress noise - latents at logit-normal times (SD3, arXiv 2403.03206, section 3.1)."""
    torch.manual_seed(int(rng_for(seed, "denoiser", "init").integers(2**31)))
    model = Denoiser(tokenizer).to(device)
    if compiled:
        for block in model.transformer.transformer_blocks:
            block.compile(dynamic=False)
    empty = tokenize(tokenizer, [""])

    def loss(step: int) -> Tensor:
        rng = rng_for(seed, "denoiser", step)
        index = rng.choice(len(pool), RECIPE.batch, replace=False)
        tokens = tokenize(tokenizer, [canonical(either_order(pool.scenes[i], rng)) for i in index])
        dropped = torch.from_numpy(rng.random(len(index)) < UNCONDITIONAL)
        tokens = torch.where(dropped[:, None], empty, tokens).to(device)
        clean = latents[torch.from_numpy(index)].float().to(device)
        noise = torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32)).to(device)
        sigma = torch.from_numpy(rng.standard_normal(len(index), dtype=np.float32)).sigmoid().to(device)
        mix = sigma.view(-1, 1, 1, 1)
        with autocast(device):
            velocity = model(tokens, (1 - mix) * clean + mix * noise, sigma)
        return (velocity.float() - (noise - clean)).square().mean()

    fit("denoiser", model, loss, RECIPE, folder, log=log)
    return model


def pipeline(model: Denoiser, autoencoder: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusion3Pipeline:
    """The trained parts as a StableDiffusion3Pipeline without T5."""
    return StableDiffusion3Pipeline(
        transformer=model.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0),
        vae=autoencoder,
        text_encoder=model.text,
        tokenizer=tokenizer,
        text_encoder_2=model.text_2,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
