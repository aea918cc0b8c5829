"""A real, tiny Qwen2-VL with random weights behind the interface that checkpoints and exports ask for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from torch.nn import Parameter
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from grpo_engine.checkpoint import save_checkpoint
from grpo_engine.config import RunConfig

VOCABULARY = 64
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}{{ part['text'] }} {% endfor %}{% endfor %}<eos>"
)


@dataclass
class Policy:
    """What ``checkpoint.SavedPolicy`` describes."""

    model: Any
    processor: Any
    processor_path: Path

    def trainable(self) -> dict[str, Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


Trained = tuple[Policy, torch.optim.AdamW]


def write_base(folder: Path, seed: int = 0) -> Path:
    """Save an untrained model and its tokenizer."""
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]},
            "bos_token_id": 1,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=2,
        video_token_id=3,
        vision_start_token_id=4,
        vision_end_token_id=5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(config)
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<eos>": 1} | {f"w{index}": index for index in range(2, VOCABULARY)}
    words |= {"a": 10, "red": 11, "cube": 12}
    words = {word: index for index, word in {index: word for word, index in words.items()}.items()}
    inner = Tokenizer(WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


def load_policy(base: Path, *, seed: int = 1, adapter: str = "lora", rank: int = 4, alpha: int = 8) -> Policy:
    """Load the base as a user would and make it trainable; ``seed`` draws the adapter's initial weights."""
    model: Any = AutoModelForImageTextToText.from_pretrained(base)
    model.requires_grad_(False)
    if adapter == "lora":
        targets = rf".*language_model\.layers\..*\.({'|'.join(LAYERS)})"
        settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = get_peft_model(model, settings)
    else:
        model.model.language_model.requires_grad_(True)
    return Policy(model.eval(), AutoTokenizer.from_pretrained(base), base)


def new_optimizer(policy: Policy, learning_rate: float = 1e-2) -> torch.optim.AdamW:
    return torch.optim.AdamW(policy.trainable().values(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)


def batch(seed: int) -> Tensor:
    """Token ids, int64 (2, 8), without special tokens."""
    return torch.randint(10, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(seed))


def train(policy: Policy, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """One optimizer step for each number in ``steps``; what a step does depends on its number alone."""
    for step in steps:
        ids = batch(step)
        policy.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(policy: Policy) -> dict[str, Tensor]:
    """Copies of all weights, frozen ones too."""
    return {name: tensor.detach().clone() for name, tensor in policy.model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Equal names and equal bits."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def logits(model: Any) -> Tensor:
    """float32 (2, 8, V) on a fixed batch."""
    with torch.no_grad():
        return model(input_ids=batch(99)).logits


def run_config(base: Path, **policy: Any) -> RunConfig:
    """Settings whose base model is the folder ``base``."""
    return RunConfig.parse({"models": {"policy": {"path": str(base), **policy}}})


def save(run: Path, base: Path, trained: Trained, step: int, reward: float | None = None, extra: Any = None) -> Path:
    """A checkpoint of ``trained`` whose score is ``reward``."""
    policy, optimizer = trained
    config, metrics = run_config(base), {"reward_mean": reward}
    return save_checkpoint(
        run, policy=policy, optimizer=optimizer, step=step, config=config, metrics=metrics, extra=extra
    )
