"""From settings to loaded models: paths, devices, number formats, and the checks that need no model."""

from __future__ import annotations

import gc
import importlib.util
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import hub, model_files
from .config import ROOT, ConfigError, RunConfig, expanded
from .distributed import ALONE, Ranks, World
from .environment import PureGRPOPromptEnvironment
from .image_families import family_of
from .image_model import ImageModel, load_image_model
from .placement import Placement, compute_dtype, resolve
from .policy import PureGRPOPolicy
from .policy_family import require_text_side, unquantized_layers
from .prompts import PromptError, PromptSet, TokenLimit, load_prompts
from .reward import AestheticScorer, PictureScorer, RewardModel, VqaScorer, load_clip_scorer, load_head
from .seeding import derive_seed
from .tiny import WEIGHTS

PROMPTS = ROOT / "configs" / "prompts"


def prompt_file(name: str) -> Path:
    """The file that a prompt set's name or path stands for."""
    shipped = PROMPTS / f"{name}.jsonl"
    return shipped if shipped.is_file() else expanded(name)


def read_prompts(config: RunConfig) -> PromptSet:
    """The run's prompt set.

    Raises:
        ConfigError: the set can't be used with these settings; one sentence.
    """
    path = prompt_file(config.data.prompts)
    if not path.exists():
        shipped = ", ".join(sorted(file.stem for file in PROMPTS.glob("*.jsonl")))
        raise ConfigError(
            f"data.prompts is {config.data.prompts!r}, but there is no such file, and no shipped set has that name; "
            f"shipped are {shipped}."
        )
    try:
        prompts = load_prompts(path, max_chars=config.data.max_prompt_chars, token_limit=prompt_token_limit(config))
    except PromptError as error:
        raise ConfigError(f"data.prompts: {error}") from error
    return prompts


def model_folder(path: str, part: str) -> str:
    """Where a model is loaded from: the embedded folder for "tiny", else ``path`` itself.

    Raises:
        ConfigError: the embedded weights are missing.
    """
    if path != "tiny":
        folder = expanded(path)
        return str(folder) if folder.is_dir() else path
    folder = WEIGHTS / part
    if not folder.is_dir():
        raise ConfigError(f"The embedded models are missing in {folder}; run 'python -m grpo_engine.tiny.build' first.")
    return str(folder)


def check_models(config: RunConfig, placement: Placement) -> list[hub.Download]:
    """Check, before anything is loaded, that every model is here or can be had; returns what must be downloaded.

    Raises:
        ConfigError: a folder lacks a file, or a model can't be fetched or used as configured; one sentence.
    """
    models = config.models
    for setting, path in (
        ("models.policy.path", models.policy.path),
        ("models.image.path", models.image.path),
        ("models.reward.path", models.reward.path),
    ):
        folder = expanded(path)
        if path.startswith(("/", ".", "~")) and not folder.is_dir():
            raise ConfigError(f"{setting} is {path!r}, but there is no such folder; give another.")
        if path == "tiny" or not folder.is_dir():
            continue
        if setting == "models.policy.path":
            lacks = model_files.missing_of_policy(folder)
        elif setting == "models.image.path":
            lacks = model_files.missing_of_pipeline(folder, models.image)
        else:
            lacks = model_files.missing_of_reward(folder)
        hub.require_folder(setting, path, lacks)
    _check_reward(config)
    _check_pipeline(config)
    if models.policy.quantize != "none":
        _check_quantized(placement.policy)
    return hub.check(config)


def _check_pipeline(config: RunConfig) -> None:
    """Refuse settings that the image model's family can't follow, where its class is known without a network."""
    try:
        index = json.loads((Path(_source(config, "image")) / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not here yet, or refused for that by itself
        return
    name = str(index.get("_class_name", ""))
    family_of(name).check(config.models.image, name)


def _check_reward(config: RunConfig) -> None:
    """Refuse a reward model that would score with random weights, and a head that is not there."""
    import open_clip

    settings = config.models.reward
    name, tag = reward_name(config), settings.pretrained
    known = ":" in name or expanded(tag).is_file() or (tag and open_clip.get_pretrained_cfg(name, tag))
    if not known:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        wrong = f"{tag!r}, which is no file and no tag of {name}" if tag else f"empty, but {name} needs weights"
        way = f"use one of its tags ({tags}) or a file of weights" if tags else "name a file of weights"
        raise ConfigError(f"models.reward.pretrained is {wrong}; {way}.")
    head = settings.aesthetic
    if head and not hub.is_hub_file(head) and not expanded(head).is_file():
        raise ConfigError(
            f"models.reward.aesthetic is {head!r}, but there is no such file; name a file, or owner/name/file on "
            "the hub."
        )


def _check_quantized(device: torch.device) -> None:
    """Refuse a 4-bit policy where it can't be loaded."""
    if device.type != "cuda":
        raise ConfigError(
            f"models.policy.quantize is '4bit', which works on a GPU only, but the policy is placed on {device}; "
            "set it to 'none'."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "models.policy.quantize is '4bit', which needs the package bitsandbytes; run 'pip install bitsandbytes', "
            "or set it to 'none'."
        )


def prompt_token_limit(config: RunConfig) -> TokenLimit:
    """How many tokens of a prompt the reward reads: it would score pictures against a silently cut prompt.

    Reads the tokenizer only, no model.
    """
    import open_clip

    hub.fetch_tokenizer(config)
    name = reward_name(config)
    with hub.explained(hub.Repository("models.reward.path", name.removeprefix("hf-hub:"), "tokenizer")):
        tokenizer = open_clip.get_tokenizer(name)
    limit = int(tokenizer.context_length)

    def count(text: str) -> tuple[int, int]:
        if hasattr(tokenizer, "encode"):  # open_clip's own; the two end tokens are added later
            return len(tokenizer.encode(text)) + 2, limit
        return len(tokenizer.tokenizer(tokenizer.clean_fn(text)).input_ids), limit

    return count


def reward_name(config: RunConfig) -> str:
    """What open_clip calls the reward model: a built-in name, ``hf-hub:`` and a repository, or a folder.

    Raises:
        ConfigError: it is none of them.
    """
    import difflib

    import open_clip

    path = model_folder(config.models.reward.path, "reward")
    if Path(path).is_dir():
        return f"local-dir:{path}"
    known = open_clip.list_models()
    if path not in known and not path.startswith("hf-hub:"):
        close = difflib.get_close_matches(path, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "open_clip.list_models() lists them."
        raise ConfigError(f"models.reward.path is {path!r}, which is no folder and no open_clip model; {hint}")
    return path


def quiet_libraries() -> None:
    """Keep the libraries' progress bars and notices out of the terminal; what matters is said by the program."""
    import diffusers
    import transformers

    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"peft|transformers|diffusers|open_clip|torch")


def load_policy(config: RunConfig, device: torch.device, dtype: torch.dtype | None = None) -> PureGRPOPolicy:
    """Load the vision-language model with a fresh adapter, in another number format than ``device``'s where given."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    quiet_libraries()
    settings = config.models.policy
    folder = _source(config, "policy")
    processor = AutoProcessor.from_pretrained(folder)
    dtype = dtype or compute_dtype(settings.dtype, device)
    model: Any
    if settings.quantize == "none":
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
        model = model.to(device)
    else:
        _check_quantized(device)
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.bfloat16, device_map={"": device}, quantization_config=nf4(folder)
        )
    if not getattr(processor, "chat_template", None):
        raise ConfigError(
            f"models.policy.path is {settings.path!r}, which has no chat template; use an instruct model."
        )
    require_text_side(model, getattr(processor, "tokenizer", processor), settings.path)
    seed = derive_seed(config.seed, "adapter")
    return PureGRPOPolicy(model, processor, settings, config.sampling, seed=seed, path=settings.path)


def nf4(folder: str) -> Any:
    """4-bit NormalFloat weights, computed with in bfloat16 (QLoRA, arXiv 2305.14314).

    Only the language model's layers: the vision tower, which the judge sees through, and the output layer stay as
    they are.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=unquantized_layers(model),
    )


def load_images(config: RunConfig, device: torch.device) -> ImageModel:
    """Load the image pipeline."""
    quiet_libraries()
    settings = config.models.image
    return load_image_model(_source(config, "image"), settings, device, compute_dtype(settings.dtype, device))


def load_reward(config: RunConfig, device: torch.device) -> RewardModel:
    """Load the CLIP scorer with the reward's weights, and the aesthetic head where one is named."""
    settings = config.models.reward
    clip = load_clip_scorer(reward_name(config), settings, device, compute_dtype(settings.dtype, device))
    others: dict[str, PictureScorer] = {}
    if settings.aesthetic:
        named = settings.aesthetic
        file = hub.hub_file(named) if hub.is_hub_file(named) else expanded(named)
        others["aesthetic"] = AestheticScorer(clip, *load_head(file, named), named)
    return RewardModel(clip, settings, others)


def with_policy(reward: RewardModel, policy: PureGRPOPolicy) -> RewardModel:
    """The reward with the part that asks the policy, where its weight is not 0."""
    if not reward.config.weights.vqa:
        return reward
    return replace(reward, others={**reward.others, "vqa": VqaScorer(policy)})


def _source(config: RunConfig, part: str) -> str:
    """Where a model is read from: its folder, the hub's cache if that has all of it, else its hub id."""
    for repository in hub.repositories(config):
        if repository.kind == part and not repository.missing:
            return str(repository.folder)
    path: str = getattr(config.models, part).path
    return model_folder(path, part)


def load_environment(
    config: RunConfig,
    placement: Placement | None = None,
    told: Callable[[str, int, int], None] | None = None,
    world: World = ALONE,
) -> PureGRPOPromptEnvironment:
    """Load the models onto their devices, an image model on each of its, after all that the cache lacks is downloaded.

    Of the policy with ``placement.shard_policy``, only this rank's share goes onto its device.

    ``told(name, done, total)`` hears of each, and of downloads in MB; what it raises ends a download.
    """
    say = told or (lambda name, done, total: None)
    placement = placement or resolve(config.placement)
    hub.fetch(config, say)
    say("loading policy", 0, 3)
    if config.placement.shard_policy and isinstance(world, Ranks):
        policy = load_policy(config, torch.device("cpu"), compute_dtype(config.models.policy.dtype, placement.policy))
        policy.shard(world, placement.policy)
    else:
        policy = load_policy(config, placement.policy)
    say("loading image model", 1, 3)
    images, *further = [load_images(config, device) for device in placement.images]
    say("loading reward", 2, 3)
    reward = with_policy(load_reward(config, placement.reward), policy)
    say("models loaded", 3, 3)
    return PureGRPOPromptEnvironment(policy, images, reward, config, further=further, placement=placement)


def release_memory() -> None:
    """Give the memory of models that nobody holds any more back to the devices."""
    gc.collect()  # modules and their hooks refer to each other in circles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
