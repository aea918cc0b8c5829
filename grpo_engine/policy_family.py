"""What differs between families of vision-language models, seen from the outside of a policy.

Qwen2-VL, Qwen2.5-VL and Qwen3-VL (dense) are tested; any other image-text-to-text model of ``transformers`` is
taken if its text side answers as they do, which :func:`require_text_side` tries out before training begins.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import ConfigError

ADAPTER_LAYERS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "all-linear": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
TESTED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
VISION_PATH = re.compile(r"(^|\.)(visual|vision\w*|image_\w+|video_\w+|audio_\w+|\w*projector|connector)(\.|$)")
PLACEHOLDER = re.compile(r"(image|video|vision|audio)\w*_token_(id|index)$")
PROBE_TOLERANCE = 0.05  # relative; with and without a cache, bfloat16 differs by about 0.01


def position_rows(model: Any) -> int:
    """How many rows of positions the model takes: 3 (time, height, width; Qwen's multimodal RoPE), else 1."""
    return 3 if hasattr(getattr(model, "model", None), "get_rope_index") else 1


def shaped(positions: Tensor, rows: int) -> Tensor:
    """``positions`` (B, L) of text as the model takes them: (3, B, L), all rows equal, or (B, L)."""
    return positions.expand(rows, -1, -1) if rows > 1 else positions


def forget_pictures(model: Any) -> None:
    """Drop the position offset that a model with three rows remembers of the last picture it saw."""
    if hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = None


def language_model(model: Any) -> nn.Module:
    """The text part of a vision-language model (everything but the vision tower), or the model itself."""
    inner = getattr(model, "model", model)
    for name in ("language_model", "text_model"):
        if isinstance(found := getattr(inner, name, None), nn.Module):
            return found
    return inner


def adapter_layers(model: nn.Module, targets: str) -> list[str]:
    """Full names of the linear layers that get an adapter: the language model's, never the vision tower's.

    Raises:
        ValueError: if the model has no layer of those names.
    """
    pattern = re.compile(rf"(.*\.)?({'|'.join(ADAPTER_LAYERS[targets])})")
    inside = {id(module) for module in language_model(model).modules()}
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and pattern.fullmatch(name)
        and id(module) in inside
        and not VISION_PATH.search(name)
    ]
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no layers named {', '.join(ADAPTER_LAYERS[targets])} outside its vision "
            "tower; train it with models.policy.adapter=full."
        )
    return names


def unquantized_layers(model: nn.Module) -> list[str]:
    """Full names of the linear layers that keep their format in a 4-bit policy: all but the language model's."""
    inside = {id(module) for module in language_model(model).modules()}
    return [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) not in inside
    ]


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end a completion, by the model's generation settings and by the tokenizer."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


def suppressed_tokens(model: Any, tokenizer: Any, ends: Sequence[int]) -> Tensor:
    """bool (V,): every special token except the end tokens, and rows of the table beyond the vocabulary.

    A sampled vision placeholder would make the model look for a picture that is not there.
    """
    size = model.get_output_embeddings().weight.shape[0]
    suppressed = torch.zeros(size, dtype=torch.bool)
    suppressed[len(tokenizer) :] = True
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    special |= {value for name, value in vars(model.config).items() if PLACEHOLDER.search(name)}
    suppressed[[i for i in special if isinstance(i, int) and 0 <= i < size]] = True
    suppressed[list(ends)] = False
    return suppressed


@torch.no_grad()
def require_text_side(model: Any, tokenizer: Any, path: str) -> None:
    """Try whether the parts that the policy uses of an untested family give what the whole model gives.

    The policy runs ``model.model`` with explicit positions and a cache, and ``model.lm_head`` on chosen positions.
    A family that scales or caps its logits, or counts positions in another way, would train on wrong numbers.

    Raises:
        ConfigError: they do not; one sentence.
    """
    if model.config.model_type in TESTED:
        return
    refusal = (
        f"models.policy.path is {path!r}, a {type(model).__name__}, whose text side does not work as this program "
        f"needs it; use a model of the families {', '.join(TESTED)}."
    )
    if not isinstance(getattr(model, "model", None), nn.Module) or not hasattr(model, "lm_head"):
        raise ConfigError(refusal)
    device = next(model.parameters()).device
    usable = (~suppressed_tokens(model, tokenizer, [])).nonzero().squeeze(1)
    ids = usable[torch.linspace(0, len(usable) - 1, 8).long()].unsqueeze(0).to(device)
    positions, rows = torch.arange(8, device=device).unsqueeze(0), position_rows(model)
    try:
        whole = model(input_ids=ids).logits[:, 4:].float()
        start = model.model(input_ids=ids[:, :4], position_ids=shaped(positions[:, :4], rows), use_cache=True)
        rest = model.model(
            input_ids=ids[:, 4:],
            attention_mask=torch.ones_like(ids),
            position_ids=shaped(positions[:, 4:], rows),
            past_key_values=start.past_key_values,
            use_cache=True,
        )
        parts = model.lm_head(rest.last_hidden_state).float()
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        raise ConfigError(refusal) from error
    if not float((parts - whole).norm()) <= PROBE_TOLERANCE * float((whole - whole.mean()).norm()):
        raise ConfigError(refusal)
