"""Tiny text-to-image pipelines with random weights, saved in the layout of the published repositories."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from grpo_engine.tiny import WEIGHTS

CLIP_WIDTH, T5_WIDTH = 16, 32
NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def clip_tokenizer() -> CLIPTokenizer:
    """The embedded image model's: it reads 24 tokens, two of them the ends."""
    return CLIPTokenizer.from_pretrained(WEIGHTS / "image" / "tokenizer")


def clip(projected: bool = True) -> Any:
    tokenizer = clip_tokenizer()
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=CLIP_WIDTH, intermediate_size=32, projection_dim=CLIP_WIDTH,
            num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip


def t5_tokenizer() -> T5TokenizerFast:
    """Words of the world's captions as single tokens, anything else letter by letter."""
    words = ("a", "red", "blue", "circle", "square", "star", "two", "large", "small", "on", "black")
    pieces = [*(f"\u2581{word}" for word in words), *(f"\u2581{letter}" for letter in LETTERS[1:]), *LETTERS]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -2.0) for piece in pieces)]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512)


def t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=128, d_model=T5_WIDTH, d_ff=48, d_kv=8, num_layers=1, num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip


def autoencoder(channels: int, **settings: Any) -> AutoencoderKL:
    """Pictures an eighth as large, as all published ones do."""
    return AutoencoderKL(
        block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, sample_size=64,
        **settings,
    )  # fmt: skip


def _sd3(folder: Path, *, with_t5: bool = True, **denoiser: Any) -> None:
    """``with_t5`` false: the files of T5 were not downloaded, but the index still names them."""
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=12, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=T5_WIDTH, caption_projection_dim=32,
            pooled_projection_dim=2 * CLIP_WIDTH, pos_embed_max_size=12, **denoiser,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(16, scaling_factor=1.5305, shift_factor=0.0609, **NO_QUANT),
        text_encoder=clip(), tokenizer=clip_tokenizer(), text_encoder_2=clip(), tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(), tokenizer_3=t5_tokenizer(),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    _shard(folder / "text_encoder_3", pipeline.text_encoder_3)
    if not with_t5:
        for part in ("text_encoder_3", "tokenizer_3"):
            shutil.rmtree(folder / part)


def _sd35(folder: Path) -> None:
    _sd3(folder, qk_norm="rms_norm", dual_attention_layers=(0,))


def _sdxl(folder: Path) -> None:
    StableDiffusionXLPipeline(
        unet=UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
            attention_head_dim=(2, 4), cross_attention_dim=2 * CLIP_WIDTH, use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + CLIP_WIDTH,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
            timestep_spacing="leading",
        ),
        vae=autoencoder(4, scaling_factor=0.13025, force_upcast=True),
        text_encoder=clip(projected=False), tokenizer=clip_tokenizer(), text_encoder_2=clip(),
        tokenizer_2=clip_tokenizer(), force_zeros_for_empty_prompt=True,
    ).save_pretrained(folder)  # fmt: skip


def _sd15(folder: Path, scheduler: Any = None) -> None:
    """With a safety checker in the index, whose weights are not there: it must never be loaded."""
    StableDiffusionPipeline(
        unet=UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=2, cross_attention_dim=CLIP_WIDTH,
        ),
        scheduler=scheduler or PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, skip_prk_steps=True,
        ),
        vae=autoencoder(4, scaling_factor=0.18215), text_encoder=clip(projected=False), tokenizer=clip_tokenizer(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": True,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text("{}")


def _turbo(folder: Path) -> None:
    """Noise is added in every step."""
    _sd15(
        folder,
        EulerAncestralDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing"
        ),
    )


def _flux(folder: Path) -> None:
    pipeline = FluxPipeline(
        transformer=FluxTransformer2DModel(
            patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=T5_WIDTH, pooled_projection_dim=CLIP_WIDTH, guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(16, scaling_factor=0.3611, shift_factor=0.1159, **NO_QUANT),
        text_encoder=clip(projected=False), tokenizer=clip_tokenizer(), text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    _shard(folder / "transformer", pipeline.transformer)
    _shard(folder / "text_encoder_2", pipeline.text_encoder_2)


def _pixart(folder: Path) -> None:
    """A pipeline without an adapter of its own; T5 is its only encoder."""
    PixArtSigmaPipeline(
        transformer=PixArtTransformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=1, attention_head_dim=16,
            num_attention_heads=2, cross_attention_dim=32, caption_channels=T5_WIDTH, norm_type="ada_norm_single",
        ),
        scheduler=DPMSolverMultistepScheduler(), vae=autoencoder(4, scaling_factor=0.13025), text_encoder=t5(),
        tokenizer=t5_tokenizer(),
    ).save_pretrained(folder)  # fmt: skip


def _shard(folder: Path, model: Any) -> None:
    """Weights in several files, as large ones are published."""
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    model.save_pretrained(folder, max_shard_size="12KB")
    assert len(list(folder.glob("*-of-*.safetensors"))) > 1


FOLDERS: dict[str, Callable[[Path], None]] = {
    "sd3": _sd3,
    "sd3-without-t5": lambda folder: _sd3(folder, with_t5=False),
    "sd35": _sd35,
    "sdxl": _sdxl,
    "sd15": _sd15,
    "turbo": _turbo,
    "flux": _flux,
    "pixart": _pixart,
}

SETTINGS: dict[str, dict[str, Any]] = {
    "sd3": {"use_t5": True, "max_sequence_length": 16},
    "sd3-without-t5": {"max_sequence_length": 16},
    "sd35": {"use_t5": True, "max_sequence_length": 16},
    "sdxl": {"negative_prompt": "two small stars"},
    "turbo": {"guidance": 1.0},
    "flux": {"use_t5": True, "max_sequence_length": 16},
    "pixart": {"max_sequence_length": 16},
}


def write_image_model(name: str, folder: Path) -> Path:
    """Save the pipeline ``name`` of :data:`FOLDERS`; its weights are the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        FOLDERS[name](folder)
    return folder
