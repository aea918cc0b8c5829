"""How large a model is, before anything is loaded or downloaded.

In this order, the first that is there: the headers of its weight files; its configuration, built on the meta
device, which allocates nothing; for the documented full-scale models the published figures. Otherwise its size
is unknown, and said to be: never a guess. Only what is on this disk is read, the hub's cache included.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from .config import RunConfig
from .image_sizes import ImageSize, image_size
from .loading import reward_name
from .policy_family import ADAPTER_LAYERS
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

CHAT_TOKENS = 32  # markup of a chat template around one message
BYTES_PER_TOKEN = 3  # of UTF-8 text: English has 4 to 5, Chinese about 3; fewer means more tokens, the safe side
VISION = re.compile(r"(^|\.)(visual|vision\w*)\.")
TIMM_PATCH = re.compile(r"patch(\d+)")


@dataclass(frozen=True)
class PolicySize:
    """A vision-language model: its weights and the dimensions of its language model."""

    weights: Weights
    vision: int  # elements of the vision tower, which is never trained
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    pixels_per_token: int  # one image token stands for this many pixels; 0 = no vision tower known
    vision_width: int

    def adapter(self, rank: int, targets: str) -> int:
        """Elements of a low-rank adapter: rank x (in + out) for each adapted layer (LoRA, arXiv 2106.09685)."""
        sizes = self._linear_sizes()
        return rank * self.layers * sum(sum(sizes[name]) for name in ADAPTER_LAYERS[targets])

    @property
    def packable(self) -> int:
        """Elements of the language model's linear layers, which a 4-bit policy packs."""
        return self.layers * sum(wide * high for wide, high in self._linear_sizes().values())

    def _linear_sizes(self) -> dict[str, tuple[int, int]]:
        """In and out of each linear layer of a block."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, query),
            "k_proj": (self.hidden, key),
            "v_proj": (self.hidden, key),
            "o_proj": (query, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }


@dataclass(frozen=True)
class RewardSize:
    """An open_clip model."""

    weights: Weights
    image_size: int  # pixels along one side
    width: int
    tokens: int  # of a picture


@dataclass(frozen=True)
class ModelSizes:
    """The three models; None and a note where a size is not known."""

    policy: PolicySize | None
    image: ImageSize | None
    reward: RewardSize | None
    notes: tuple[str, ...] = ()


def _qwen(
    elements: int,
    vision: int,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    vocabulary: int,
    pixels: int = 28 * 28,
    width: int = 1280,
) -> PolicySize:
    weights = Weights(elements, "published", stored=torch.bfloat16)
    return PolicySize(weights, vision, hidden, layers, heads, kv_heads, 128, intermediate, vocabulary, pixels, width)


# Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (2502.13923) and Qwen3-VL (2511.21631) as published.
PUBLISHED_POLICIES = {
    "Qwen/Qwen2-VL-2B-Instruct": _qwen(2_208_985_600, 665_271_296, 1536, 28, 12, 2, 8960, 151936),
    "Qwen/Qwen2-VL-7B-Instruct": _qwen(8_291_375_616, 675_759_104, 3584, 28, 28, 4, 18944, 152064),
    "Qwen/Qwen2.5-VL-3B-Instruct": _qwen(3_754_622_976, 668_684_288, 2048, 36, 16, 2, 11008, 151936),
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen(8_292_166_656, 676_550_144, 3584, 28, 28, 4, 18944, 152064),
    "Qwen/Qwen3-VL-2B-Instruct": _qwen(2_127_532_032, 406_957_056, 2048, 28, 16, 8, 6144, 151936, 32 * 32, 1024),
    "Qwen/Qwen3-VL-4B-Instruct": _qwen(4_437_815_808, 415_347_712, 2560, 36, 32, 8, 9728, 151936, 32 * 32, 1024),
    "Qwen/Qwen3-VL-8B-Instruct": _qwen(8_767_123_696, 576_388_336, 4096, 36, 32, 8, 12288, 151936, 32 * 32, 1152),
}


def read_sizes(config: RunConfig) -> ModelSizes:
    """The sizes of a run's models.

    Raises:
        ConfigError: embedded weights are missing, or ``models.reward.path`` names nothing.
    """
    notes: list[str] = []
    return ModelSizes(
        _or_note(lambda: policy_size(config.models.policy.path), notes),
        _or_note(lambda: image_size(config.models.image.path), notes),
        _or_note(lambda: reward_size(config), notes),
        tuple(notes),
    )


Size = TypeVar("Size", PolicySize, ImageSize, RewardSize)


def _or_note(read: Callable[[], Size], notes: list[str]) -> Size | None:
    try:
        return read()
    except UnknownSize as unknown:
        notes.append(str(unknown))
        return None


def prompt_tokens(config: RunConfig, prompts: Sequence[str]) -> int:
    """Tokens of the longest of ``prompts`` in the policy's template.

    From its length in bytes, on the safe side, where the tokenizer is not here; without prompts, of one as long
    as ``data.max_prompt_chars`` allows.
    """
    settings = config.models.policy
    longest = sorted(prompts, key=lambda text: len(text.encode()))[-8:]  # the most bytes need not be the most tokens
    folder = local_folder(settings.path, "policy")
    if longest and folder is not None:
        from jinja2 import TemplateError
        from transformers import AutoTokenizer

        system = [{"role": "system", "content": [{"type": "text", "text": settings.system}]}] if settings.system else []
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            counts = []
            for prompt in longest:
                content = [{"type": "text", "text": settings.template.replace("{prompt}", prompt)}]
                messages: list[Any] = [*system, {"role": "user", "content": content}]
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                counts.append(len(tokenizer(text, add_special_tokens=False).input_ids))
            return max(counts)
        except (OSError, ValueError, KeyError, TemplateError):
            pass  # what a policy can't be loaded with is said when it is loaded; here its bytes do
    size = len(longest[-1].encode()) if longest else config.data.max_prompt_chars
    return CHAT_TOKENS + math.ceil((len((settings.template + settings.system).encode()) + size) / BYTES_PER_TOKEN)


# -- the three kinds -----------------------------------------------------------------------------------------


def policy_size(path: str) -> PolicySize:
    """Of ``models.policy.path``; raises :class:`UnknownSize`."""
    folder = local_folder(path, "policy")
    if folder is None or not (folder / "config.json").is_file():
        if path in PUBLISHED_POLICIES:
            return PUBLISHED_POLICIES[path]
        raise not_here("policy", path)
    settings = read_json(folder / "config.json")
    text: dict[str, Any] = settings.get("text_config", settings)
    files = stored_tensors(folder, "model")
    tensors, stored = files or (_policy_on_meta(folder), None)
    if settings.get("tie_word_embeddings", text.get("tie_word_embeddings")):
        tensors.pop("lm_head.weight", None)
    vision: dict[str, Any] = settings.get("vision_config", {})
    side = vision.get("patch_size", 0) * vision.get("spatial_merge_size", 1)
    try:
        return PolicySize(
            weights=Weights(sum(tensors.values()), "files" if files else "configuration", stored=stored),
            vision=sum(elements for name, elements in tensors.items() if VISION.search(name)),
            hidden=text["hidden_size"],
            layers=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            kv_heads=text.get("num_key_value_heads") or text["num_attention_heads"],
            head_dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
            intermediate=text["intermediate_size"],
            vocabulary=text.get("vocab_size") or settings["vocab_size"],
            pixels_per_token=side * side,
            vision_width=vision.get("embed_dim") or vision.get("hidden_size", 0),
        )
    except KeyError as missing:
        raise UnknownSize(
            f"How much memory models.policy.path {path!r} needs is unknown: its config.json has no {missing}."
        ) from missing


def reward_size(config: RunConfig) -> RewardSize:
    """Of ``models.reward.path``; raises :class:`UnknownSize`, and ConfigError like ``loading.reward_name``."""
    path = config.models.reward.path
    folder = local_folder(path, "reward") if path == "tiny" or Path(path).is_dir() else None
    name = path if folder else reward_name(config)
    if name.startswith("hf-hub:"):
        folder = local_folder(name.removeprefix("hf-hub:"), "reward")
        if folder is None:
            raise not_here("reward", path)
    if folder is None:
        import open_clip

        settings = open_clip.get_model_config(name)
        weights = Weights(_clip_on_meta(json.dumps(settings)), "configuration")
    else:
        settings = read_json(folder / "open_clip_config.json")
        settings = settings.get("model_cfg", settings)
        if files := stored_tensors(folder, "open_clip_model"):
            weights = Weights(sum(files[0].values()), "files", stored=files[1])
        else:
            weights = Weights(_clip_on_meta(json.dumps(settings)), "configuration")
    vision = settings["vision_cfg"]
    found = TIMM_PATCH.search(vision.get("timm_model_name", ""))
    patch = vision.get("patch_size") or (int(found[1]) if found else 16)
    side = vision.get("image_size", 224)
    return RewardSize(weights, side, vision.get("width", settings["embed_dim"]), (side // patch) ** 2 + 1)


def _policy_on_meta(folder: Path) -> dict[str, int]:
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            return elements_of(AutoModelForImageTextToText.from_config(config))
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise UnknownSize(f"How much memory the policy in {folder} needs is unknown: {first_line(error)}") from error


@lru_cache(maxsize=8)
def _clip_on_meta(settings: str) -> int:
    """Elements of the open_clip model with these settings (JSON, so that they can be a key of the cache)."""
    from open_clip.model import CLIP, CustomTextCLIP

    chosen = json.loads(settings)
    if "hf_model_name" in chosen["text_cfg"] or "multimodal_cfg" in chosen:
        raise UnknownSize(
            "How much memory the reward model needs is unknown: its text tower's configuration is not part of it."
        )
    kind = CustomTextCLIP if chosen.pop("custom_text", False) else CLIP
    with torch.device("meta"):
        return sum(elements_of(kind(**chosen)).values())
