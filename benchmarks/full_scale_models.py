"""The three full-scale models, built from their published configurations with random weights: no download.

Speed and memory depend on shapes, not on what was learned. The tokenizers are the embedded models' (their ids
are valid in the larger tables), so a prompt has about as many tokens as words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, Qwen2VLConfig
from transformers import Qwen2VLForConditionalGeneration as Qwen2VL

from grpo_engine.config import RunConfig
from grpo_engine.image_model import ImageModel, StableDiffusion3
from grpo_engine.policy import PureGRPOPolicy
from grpo_engine.reward import ClipScorer, RewardModel
from grpo_engine.tiny import WEIGHTS


@dataclass(frozen=True)
class Sizes:
    """What differs between the published models and the small stand-ins that try this file out on a CPU."""

    policy: dict[str, Any]
    vision: dict[str, Any]
    tied: bool
    denoiser: dict[str, Any]
    readers: tuple[dict[str, Any], dict[str, Any]]
    autoencoder: tuple[int, ...]
    t5: dict[str, Any]
    reward: str


PUBLISHED = {
    "7B": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
        "num_hidden_layers": 28, "vocab_size": 152064,
    },
    "2B": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2,
        "num_hidden_layers": 28, "vocab_size": 151936,
    },
}  # fmt: skip


def published(policy: str) -> Sizes:
    """Qwen2-VL 7B or 2B, Stable Diffusion 3 Medium, CLIP ViT-B/32."""
    return Sizes(
        PUBLISHED[policy],
        {"hidden_size": PUBLISHED[policy]["hidden_size"]},
        policy == "2B",
        {
            "sample_size": 128, "num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64,
            "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
        },
        ({"hidden_size": 768, "num_hidden_layers": 12}, {"hidden_size": 1280, "num_hidden_layers": 32}),
        (128, 256, 512, 512),
        {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64},
        "ViT-B-32-quickgelu",
    )  # fmt: skip


def small() -> Sizes:
    """The same classes, small enough for a test on a CPU."""
    return Sizes(
        {
            "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
            "num_hidden_layers": 2, "vocab_size": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        },
        {"hidden_size": 64, "embed_dim": 32, "depth": 1, "num_heads": 2},
        True,
        {
            "sample_size": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16,
            "joint_attention_dim": 64, "caption_projection_dim": 32, "pooled_projection_dim": 64,
            "pos_embed_max_size": 32,
        },
        ({"hidden_size": 32, "num_hidden_layers": 2}, {"hidden_size": 32, "num_hidden_layers": 2}),
        (16, 32, 32, 32),
        {"d_model": 64, "d_ff": 64, "d_kv": 16, "num_layers": 2, "num_heads": 4},
        "ViT-B-32-quickgelu",
    )  # fmt: skip


def build_policy(sizes: Sizes, config: RunConfig, device: torch.device, dtype: torch.dtype) -> PureGRPOPolicy:
    """Qwen2-VL with its adapter."""
    from transformers import AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(WEIGHTS / "policy")
    settings = Qwen2VLConfig(
        text_config={**sizes.policy, "bos_token_id": None, "eos_token_id": processor.tokenizer.eos_token_id},
        vision_config=sizes.vision,
        tie_word_embeddings=sizes.tied,
    )
    model = _random(lambda: Qwen2VL(settings), device, dtype)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    return PureGRPOPolicy(model, processor, config.models.policy, config.sampling, seed=0, path="random weights")


def build_images(sizes: Sizes, config: RunConfig, device: torch.device, dtype: torch.dtype) -> ImageModel:
    """A Stable Diffusion 3 pipeline, with T5 where the configuration says so; the autoencoder in float32."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import T5Config, T5EncoderModel

    denoiser = {"patch_size": 2, "in_channels": 16, "out_channels": 16, **sizes.denoiser}
    readers = [
        CLIPTextConfig(
            **own, intermediate_size=4 * own["hidden_size"], num_attention_heads=max(1, own["hidden_size"] // 64),
            projection_dim=own["hidden_size"],
        )
        for own in sizes.readers
    ]  # fmt: skip
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "image" / "tokenizer", model_max_length=77)
    t5 = T5Config(**sizes.t5, feed_forward_proj="gated-gelu")
    first, second = (_random(lambda c=c: CLIPTextModelWithProjection(c), device, dtype) for c in readers)
    pipeline: Any = StableDiffusion3Pipeline(
        transformer=_random(lambda: SD3Transformer2DModel(**denoiser), device, dtype),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_random(
            lambda: AutoencoderKL(
                block_out_channels=sizes.autoencoder, layers_per_block=2, latent_channels=16,
                norm_num_groups=min(32, sizes.autoencoder[0]), scaling_factor=1.5305, shift_factor=0.0609,
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                use_quant_conv=False, use_post_quant_conv=False,
            ),
            device,
            torch.float32,
        ),
        text_encoder=first, tokenizer=tokenizer, text_encoder_2=second, tokenizer_2=tokenizer,
        text_encoder_3=_random(lambda: T5EncoderModel(t5), device, dtype) if config.models.image.use_t5 else None,
        tokenizer_3=tokenizer if config.models.image.use_t5 else None,
    )  # fmt: skip
    return StableDiffusion3(pipeline, config.models.image)


def build_reward(sizes: Sizes, config: RunConfig, device: torch.device, dtype: torch.dtype) -> RewardModel:
    """An open_clip model of the published shape."""
    import open_clip

    model = open_clip.create_model(sizes.reward, device=device, precision="fp32").to(dtype).eval()
    tokenizer = open_clip.get_tokenizer(sizes.reward)
    settings = config.models.reward
    return RewardModel(ClipScorer(model.requires_grad_(False), tokenizer, device, settings.batch_size), settings)


def _random(build: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """``build()`` straight on ``device`` in ``dtype``: 16 GB of float32 copies would take minutes on the host."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return build().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
