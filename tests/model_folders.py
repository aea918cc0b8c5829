"""Policies of the real classes, very small and with random weights, in folders laid out as published ones are.

The configurations are those of the published repositories (flat for Qwen2-VL and Qwen2.5-VL, nested for
Qwen3-VL) with small numbers in them; the weights carry the published names; the tokenizer is the embedded one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPImageProcessor,
    LlavaProcessor,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from grpo_engine.tiny import WEIGHTS

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava")
LAYERS = 3
PLACEHOLDERS = {"image_token_id": 1008, "video_token_id": 1009}
MARKS = {"vision_start_token_id": 1005, "vision_end_token_id": 1006}
TEXT: dict[str, Any] = {
    "vocab_size": 1010,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_theta": 10_000.0,
    "eos_token_id": 1004,
}
MROPE = {"type": "mrope", "mrope_section": [2, 2, 2]}
PATCHES = {"patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        **TEXT,
        **PLACEHOLDERS,
        **MARKS,
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "rope_scaling": MROPE,
        "sliding_window": 128,
        "use_sliding_window": False,
        "max_window_layers": LAYERS,
        "tie_word_embeddings": False,
        "vision_config": {
            "depth": 2, "embed_dim": 32, "mlp_ratio": 2, "num_heads": 2, "in_chans": 3, "hidden_size": 48,
            "spatial_patch_size": 8, **PATCHES,
        },
    },
    "qwen2_5_vl": {
        **TEXT,
        **PLACEHOLDERS,
        **MARKS,
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "rope_scaling": MROPE,
        "tie_word_embeddings": False,
        "vision_config": {
            "depth": 2, "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 40, "num_heads": 2,
            "in_chans": 3, "out_hidden_size": 48, "spatial_patch_size": 8, "window_size": 32,
            "fullatt_block_indexes": [1], "tokens_per_second": 2, **PATCHES,
        },
    },
    "qwen3_vl": {
        **PLACEHOLDERS,
        **MARKS,
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "tie_word_embeddings": True,
        "text_config": {
            **TEXT,
            "model_type": "qwen3_vl_text",
            "head_dim": 16,
            "tie_word_embeddings": True,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"},
        },
        "vision_config": {
            "model_type": "qwen3_vl", "depth": 2, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2,
            "in_channels": 3, "out_hidden_size": 48, "num_position_embeddings": 144,
            "deepstack_visual_indexes": [0, 1], "hidden_act": "gelu_pytorch_tanh", **PATCHES,
        },
    },
    "llava": {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": 1008,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 2,
            "num_hidden_layers": 2, "image_size": 32, "patch_size": 8, "projection_dim": 32,
        },
    },
}  # fmt: skip


def write_policy(folder: Path, family: str, *, shard: str = "5GB", seed: int = 0) -> Path:
    """Write a policy of ``family``, one of :data:`FAMILIES`; ``shard``: the largest size of one weights file."""
    folder.mkdir(parents=True)
    settings = json.dumps(CONFIGS[family], indent=2)
    (folder / "config.json").write_text(settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
        with torch.no_grad():  # at their usual 0.02 the logits of so small a model hardly depend on its input
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(6.0)
    model.generation_config.eos_token_id = [1004, 1002]
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "config.json").write_text(settings)  # as published, not as the present version writes it
    _processor(family).save_pretrained(folder)
    if family != "llava":
        _as_published(folder, family)
    return folder


def _as_published(folder: Path, family: str) -> None:
    """Settings of pictures, of videos and of the chat in files of their own, as Qwen's repositories have them."""
    saved = json.loads((folder / "processor_config.json").read_text())
    pictures, videos = saved["image_processor"], saved["video_processor"]
    kind = {"processor_class": saved["processor_class"]}
    if family != "qwen3_vl":  # the earlier families say it in pixels
        size = pictures.pop("size")
        pictures |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures | kind))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(videos | kind))
    chat = folder / "chat_template.jinja"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": chat.read_text()}))
    chat.unlink()
    (folder / "processor_config.json").unlink()


def _processor(family: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "policy")
    template = (WEIGHTS / "policy" / "chat_template.jinja").read_text()
    if family == "llava":
        pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        return LlavaProcessor(
            pictures, tokenizer, patch_size=8, vision_feature_select_strategy="default", chat_template=template,
            image_token="<|image_pad|>", num_additional_image_tokens=1,
        )  # fmt: skip
    size = {"shortest_edge": 48 * 48, "longest_edge": 48 * 48}
    patches = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2, "size": size}
    kind, videos = {
        "qwen2_vl": (Qwen2VLProcessor, Qwen2VLVideoProcessor),
        "qwen2_5_vl": (Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
        "qwen3_vl": (Qwen3VLProcessor, Qwen3VLVideoProcessor),
    }[family]
    return kind(Qwen2VLImageProcessor(**patches), tokenizer, videos(**patches), chat_template=template)
