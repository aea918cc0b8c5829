"""Exported adapters keep to what vLLM's LoRA option reads, for each family of policies.

vLLM itself is not run. The tables below hold what its sources say (``config/lora.py``, ``lora/peft_helper.py``,
``lora/utils.py``, ``models/qwen2_vl.py`` and its successors): which fields of ``adapter_config.json`` it refuses,
which ranks it reserves room for, how the names of a checkpoint written by transformers 4.52 or later map to its own
modules, and which of those take an adapter.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from saved_policy import VOCABULARY, new_optimizer, write_base
from transformers import (
    AutoTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from grpo_engine.checkpoint import save_checkpoint
from grpo_engine.config import RunConfig
from grpo_engine.export import export
from grpo_engine.policy import PureGRPOPolicy

MAX_LORA_RANKS = {8, 16, 32, 64, 128, 256, 320, 512}
REQUIRED = {"r", "lora_alpha", "target_modules"}
# The first prefix that fits is replaced; "model." is the layout of checkpoints before 4.52.
PREFIXES = {
    "model.language_model.": "language_model.model.",
    "model.visual.": "visual.",
    "lm_head.": "language_model.lm_head.",
    "model.": "language_model.model.",
}
PACKED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
PACKED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
LAYERS = 4  # 28 adapted modules: from 20 on peft writes the shortest endings that tell them apart

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
TOKENS = {"image_token_id": 2, "video_token_id": 3, "vision_start_token_id": 4, "vision_end_token_id": 5}


def qwen2() -> Any:
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=TEXT | {"rope_parameters": ROPE}, vision_config=vision, **TOKENS)
    return Qwen2VLForConditionalGeneration(config)


def qwen2_5() -> Any:
    vision = {"depth": 5, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen2_5_VLConfig(text_config=TEXT | {"rope_parameters": ROPE}, vision_config=vision, **TOKENS)
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen3() -> Any:
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    text = TEXT | {"rope_parameters": ROPE, "head_dim": 8}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **TOKENS))


@pytest.mark.parametrize("rank", [4, 16, 48])
@pytest.mark.parametrize("build", [qwen2, qwen2_5, qwen3])
def test_an_exported_adapter_is_what_vllm_reads(build: Any, rank: int, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    settings = {"path": "Qwen/Some-VL-Instruct", "lora": {"rank": rank}}
    config = RunConfig.parse({"models": {"policy": settings}})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
    policy = PureGRPOPolicy(
        model, AutoTokenizer.from_pretrained(base), config.models.policy, config.sampling, seed=1, path=str(base)
    )
    optimizer = new_optimizer(policy)  # type: ignore[arg-type]
    save_checkpoint(tmp_path, policy=policy, optimizer=optimizer, step=1, config=config, metrics={})
    target = export(tmp_path, tmp_path / "out", format="peft")

    adapter = json.loads((target / "adapter_config.json").read_text())
    assert adapter.keys() >= REQUIRED and adapter["peft_type"] == "LORA"
    assert adapter["r"] == rank and isinstance(adapter["target_modules"], str | list)
    assert not adapter["modules_to_save"] and not adapter["use_dora"] and adapter["bias"] == "none"
    assert not adapter["rank_pattern"] and not adapter["alpha_pattern"], "vLLM has one rank and scale an adapter"
    assert adapter["base_model_name_or_path"] == "Qwen/Some-VL-Instruct"

    served = re.search(
        r"`vllm serve (\S+) --enable-lora --max-lora-rank (\d+) --lora-modules rewriter=\.`",
        (target / "README.md").read_text(),
    )
    assert served is not None and served[1] == "Qwen/Some-VL-Instruct"
    assert int(served[2]) == min(size for size in MAX_LORA_RANKS if size >= rank)

    halves: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in load_file(target / "adapter_model.safetensors").items():
        parts = re.fullmatch(r"base_model\.model\.(.+)\.(lora_[AB])\.weight", name)
        assert parts is not None, name
        old, new = next((old, new) for old, new in PREFIXES.items() if parts[1].startswith(old))
        halves.setdefault(new + parts[1].removeprefix(old), {})[parts[2]] = tuple(tensor.shape)
    there = {
        f"language_model.model.layers.{layer}.{block}.{module}"
        for layer in range(LAYERS)
        for block, modules in (("self_attn", ("qkv_proj", "o_proj")), ("mlp", ("gate_up_proj", "down_proj")))
        for module in modules
    }
    packed = {f"{stem}.{PACKED.get(leaf, leaf)}" for stem, _, leaf in (name.rpartition(".") for name in halves)}
    assert packed == there, "every linear layer of the language model, and nothing of the vision tower"
    assert len(halves) == 7 * LAYERS
    for shapes in halves.values():
        assert shapes["lora_A"][0] == shapes["lora_B"][1] == rank
