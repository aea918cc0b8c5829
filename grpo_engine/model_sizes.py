"""How large a model is, before anything is loaded or downloaded.

In this order, the first that is there: the headers of its weight files; its configuration, built on the meta
device, which allocates nothing; for the documented full-scale models the published figures. Otherwise its size
is unknown, and said to be: never a guess. Only what is on this disk is read, the hub's cache included.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from .config import RunConfig
from .image_families import family_of
from .loading import model_folder, reward_name
from .policy_family import ADAPTER_LAYERS

Source = Literal["files", "configuration", "published"]
CHAT_TOKENS = 32  # markup of a chat template around one message
BYTES_PER_TOKEN = 3  # of UTF-8 text: English has 4 to 5, Chinese about 3; fewer means more tokens, the safe side
FORMATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
VISION = re.compile(r"(^|\.)(visual|vision\w*)\.")
TIMM_PATCH = re.compile(r"patch(\d+)")


class UnknownSize(Exception):
    """A model's size can't be known here; the message is one plain sentence."""


@dataclass(frozen=True)
class Weights:
    """Parameters and saved buffers of a model or of one part of a pipeline.

    Attributes:
        elements: how many numbers.
        source: where that is known from.
        wide: how many of them stay in float32 when the rest is float16 (T5 overflows otherwise).
        stored: number format of most of the files; None = not known.
    """

    elements: int
    source: Source
    wide: int = 0
    stored: torch.dtype | None = None

    def bytes(self, dtype: torch.dtype) -> int:
        """Size in memory when loaded as ``dtype``."""
        wide = self.wide if dtype == torch.float16 else 0
        return (self.elements - wide) * dtype.itemsize + wide * 4

    def converted(self, dtype: torch.dtype) -> int:
        """Bytes of the host's memory that loading as ``dtype`` takes.

        0 where the files hold that format, for the weights are then mapped from there; and where it is not known.
        """
        return 0 if self.stored in (None, dtype) else self.bytes(dtype)


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


# Tensors alive at once in one block, counted on the meta device at full size (attention in flash kernels).
JOINT_COPIES = 12.5  # SD3: 9.7 to 12.5
FLUX_COPIES = 18.0  # a joint and a single block side by side: 17.1 to 17.6
UNET_COPIES = 16.5  # SDXL: 15.75 of its widest resolution, the skip connections among them
ATTENTIVE_UNET_COPIES = 27.0  # SD 1 and 2, which attend at full resolution too: 26.0

CLIP_L = Weights(123_650_304, "published", stored=torch.float16)
CLIP_L_STATES = Weights(123_060_480, "published", stored=torch.float16)  # without the projection
CLIP_G = Weights(694_659_840, "published", stored=torch.float16)
CLIP_H = Weights(340_387_840, "published", stored=torch.float16)
T5_XXL = Weights(4_762_310_656, "published", wide=24 * 4096 * 10240, stored=torch.float16)
SD_VAE = Weights(83_653_863, "published", stored=torch.float16)
SD3_VAE = Weights(83_819_683, "published", stored=torch.float16)


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


# Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (2502.13923), Qwen3-VL (2511.21631) and Stable Diffusion 3 (2403.03206) as
# published; the position table of the SD3 denoiser is a buffer, and counted.
PUBLISHED_POLICIES = {
    "Qwen/Qwen2-VL-2B-Instruct": _qwen(2_208_985_600, 665_271_296, 1536, 28, 12, 2, 8960, 151936),
    "Qwen/Qwen2-VL-7B-Instruct": _qwen(8_291_375_616, 675_759_104, 3584, 28, 28, 4, 18944, 152064),
    "Qwen/Qwen2.5-VL-3B-Instruct": _qwen(3_754_622_976, 668_684_288, 2048, 36, 16, 2, 11008, 151936),
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen(8_292_166_656, 676_550_144, 3584, 28, 28, 4, 18944, 152064),
    "Qwen/Qwen3-VL-2B-Instruct": _qwen(2_127_532_032, 406_957_056, 2048, 28, 16, 8, 6144, 151936, 32 * 32, 1024),
    "Qwen/Qwen3-VL-4B-Instruct": _qwen(4_437_815_808, 415_347_712, 2560, 36, 32, 8, 9728, 151936, 32 * 32, 1024),
    "Qwen/Qwen3-VL-8B-Instruct": _qwen(8_767_123_696, 576_388_336, 4096, 36, 32, 8, 12288, 151936, 32 * 32, 1152),
}


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
    folder = _folder(settings.path, "policy")
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
    folder = _folder(path, "policy")
    if folder is None or not (folder / "config.json").is_file():
        if path in PUBLISHED_POLICIES:
            return PUBLISHED_POLICIES[path]
        raise _not_here("policy", path)
    settings = _json(folder / "config.json")
    text: dict[str, Any] = settings.get("text_config", settings)
    files = _stored(folder, "model")
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


def image_size(path: str) -> ImageSize:
    """Of ``models.image.path``; raises :class:`UnknownSize`."""
    folder = _folder(path, "image")
    if folder is None or not (folder / "model_index.json").is_file():
        if path in PUBLISHED_IMAGES:
            return PUBLISHED_IMAGES[path]
        raise _not_here("image", path)
    index = _json(folder / "model_index.json")
    pipeline = str(index.get("_class_name"))
    parts: dict[str, Weights] = {}
    for name, entry in index.items():
        loaded = isinstance(entry, list) and entry[0] and name not in family_of(pipeline).UNUSED
        if loaded and (folder / name / "config.json").is_file():
            parts[name] = _pipeline_part(folder / name, *entry)
    denoiser_name = "unet" if "unet" in parts else "transformer"
    try:
        denoiser = _json(folder / denoiser_name / "config.json")
        vae = _json(folder / "vae" / "config.json")
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
            text_tokens=_json(reader).get("max_position_embeddings", 0) if reader.is_file() else 0,
            copies=copies,
            pipeline=pipeline,
        )
    except (KeyError, OSError) as missing:
        raise UnknownSize(
            f"How much memory models.image.path {path!r} needs is unknown: its folder has no {missing}."
        ) from missing


def reward_size(config: RunConfig) -> RewardSize:
    """Of ``models.reward.path``; raises :class:`UnknownSize`, and ConfigError like ``loading.reward_name``."""
    path = config.models.reward.path
    folder = _folder(path, "reward") if path == "tiny" or Path(path).is_dir() else None
    name = path if folder else reward_name(config)
    if name.startswith("hf-hub:"):
        folder = _folder(name.removeprefix("hf-hub:"), "reward")
        if folder is None:
            raise _not_here("reward", path)
    if folder is None:
        import open_clip

        settings = open_clip.get_model_config(name)
        weights = Weights(_clip_on_meta(json.dumps(settings)), "configuration")
    else:
        settings = _json(folder / "open_clip_config.json")
        settings = settings.get("model_cfg", settings)
        if files := _stored(folder, "open_clip_model"):
            weights = Weights(sum(files[0].values()), "files", stored=files[1])
        else:
            weights = Weights(_clip_on_meta(json.dumps(settings)), "configuration")
    vision = settings["vision_cfg"]
    found = TIMM_PATCH.search(vision.get("timm_model_name", ""))
    patch = vision.get("patch_size") or (int(found[1]) if found else 16)
    side = vision.get("image_size", 224)
    return RewardSize(weights, side, vision.get("width", settings["embed_dim"]), (side // patch) ** 2 + 1)


# -- where it is read from -----------------------------------------------------------------------------------


def _folder(path: str, part: str) -> Path | None:
    """The model's folder on this disk (embedded, given, or in the hub's cache), or None. Nothing is downloaded."""
    local = Path(model_folder(path, part)).expanduser()
    if local.is_dir():
        return local
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _not_here(role: str, path: str) -> UnknownSize:
    return UnknownSize(
        f"How much memory models.{role}.path {path!r} needs is unknown until its configuration is on this machine."
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnknownSize(f"How much memory is needed is unknown: {path} could not be read as JSON.") from error
    return data


def _stored(folder: Path, stem: str) -> tuple[dict[str, int], torch.dtype | None] | None:
    """Name -> elements of every tensor in the weight files that would be loaded, sharded or not; their main format.

    None where they are not all there, or are no safetensors files.
    """
    from safetensors import SafetensorError, safe_open

    index = folder / f"{stem}.safetensors.index.json"
    if (folder / f"{stem}.safetensors").is_file():
        files = {f"{stem}.safetensors"}
    elif index.is_file():
        files = set(_json(index)["weight_map"].values())
    else:
        return None
    tensors: dict[str, int] = {}
    formats: Counter[str] = Counter()
    try:
        for file in sorted(files):
            with safe_open(folder / file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    tensor = opened.get_slice(name)
                    tensors[name] = math.prod(tensor.get_shape())
                    formats[tensor.get_dtype()] += tensors[name]
    except (OSError, SafetensorError):  # a download that has not ended
        return None
    return tensors, FORMATS.get(max(formats, key=lambda name: formats[name], default=""))


def _elements(model: torch.nn.Module) -> dict[str, int]:
    """Name -> elements of parameters (shared ones once) and of the buffers that are saved with them."""
    shared = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return found | {name: tensor.numel() for name, tensor in model.state_dict().items() if name not in shared}


def _policy_on_meta(folder: Path) -> dict[str, int]:
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            return _elements(AutoModelForImageTextToText.from_config(config))
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise UnknownSize(f"How much memory the policy in {folder} needs is unknown: {_first_line(error)}") from error


def _pipeline_part(folder: Path, library: str, kind: str) -> Weights:
    """Weights of one part of a diffusers pipeline, as ``model_index.json`` names it."""
    files = _stored(folder, "diffusion_pytorch_model" if library == "diffusers" else "model")
    tensors, stored = files or (_part_on_meta(folder, library, kind), None)
    wide = sum(elements for name, elements in tensors.items() if kind.startswith("T5") and ".wo." in name)
    return Weights(sum(tensors.values()), "files" if files else "configuration", wide, stored)


def _part_on_meta(folder: Path, library: str, kind: str) -> dict[str, int]:
    file = folder / "config.json"
    try:
        build = getattr(importlib.import_module(library), kind)
        with torch.device("meta"):
            if library == "diffusers":
                return _elements(build.from_config(_json(file)))
            return _elements(build(build.config_class.from_json_file(file)))
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise UnknownSize(
            f"How much memory the image model's {folder.name} needs is unknown: {_first_line(error)}"
        ) from error


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
        return sum(_elements(kind(**chosen)).values())


def _first_line(error: Exception) -> str:
    return f"{str(error).splitlines()[0] if str(error) else type(error).__name__}".rstrip(".") + "."
