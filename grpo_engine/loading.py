"""From settings to loaded models: paths, devices, number formats, and the checks that need no model."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .config import ROOT, ConfigError, RunConfig
from .environment import PureGRPOPromptEnvironment
from .image_model import ImageModel, load_image_model
from .placement import Placement, compute_dtype, resolve
from .policy import PureGRPOPolicy
from .policy_family import require_text_side
from .prompts import PromptError, PromptSet, TokenLimit, load_prompts
from .reward import RewardModel, load_clip_scorer
from .seeding import derive_seed
from .tiny import WEIGHTS

PROMPTS = ROOT / "configs" / "prompts"


def prompt_file(name: str) -> Path:
    """The file that a prompt set's name or path stands for."""
    shipped = PROMPTS / f"{name}.jsonl"
    return shipped if shipped.is_file() else Path(name).expanduser()


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
        return path
    folder = WEIGHTS / part
    if not folder.is_dir():
        raise ConfigError(f"The embedded models are missing in {folder}; run 'python -m grpo_engine.tiny.build' first.")
    return str(folder)


def prompt_token_limit(config: RunConfig) -> TokenLimit:
    """How many tokens of a prompt the reward reads: it would score pictures against a silently cut prompt.

    Reads the tokenizer only, no model.
    """
    import open_clip

    tokenizer = open_clip.get_tokenizer(reward_name(config))
    limit = int(tokenizer.context_length)

    def count(text: str) -> tuple[int, int]:
        if hasattr(tokenizer, "encode"):  # open_clip's own; the two end tokens are added later
            return len(tokenizer.encode(text)) + 2, limit
        return len(tokenizer.tokenizer(text).input_ids), limit

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


def load_policy(config: RunConfig, device: torch.device) -> PureGRPOPolicy:
    """Load the vision-language model with a fresh adapter."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    quiet_libraries()
    settings = config.models.policy
    folder = model_folder(settings.path, "policy")
    processor = AutoProcessor.from_pretrained(folder)
    dtype = compute_dtype(settings.dtype, device)
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
    model = model.to(device)
    if not getattr(processor, "chat_template", None):
        raise ConfigError(
            f"models.policy.path is {settings.path!r}, which has no chat template; use an instruct model."
        )
    require_text_side(model, getattr(processor, "tokenizer", processor), settings.path)
    seed = derive_seed(config.seed, "adapter")
    return PureGRPOPolicy(model, processor, settings, config.sampling, seed=seed, path=settings.path)


def load_images(config: RunConfig, device: torch.device) -> ImageModel:
    """Load the image pipeline."""
    quiet_libraries()
    settings = config.models.image
    return load_image_model(
        model_folder(settings.path, "image"), settings, device, compute_dtype(settings.dtype, device)
    )


def load_reward(config: RunConfig, device: torch.device) -> RewardModel:
    """Load the CLIP scorer with the reward's weights."""
    settings = config.models.reward
    return RewardModel(
        load_clip_scorer(reward_name(config), settings, device, compute_dtype(settings.dtype, device)), settings
    )


def load_environment(
    config: RunConfig, placement: Placement | None = None, told: Callable[[str, int, int], None] | None = None
) -> PureGRPOPromptEnvironment:
    """Load all three models onto their devices. ``told(name, done, total)`` hears of each."""
    say = told or (lambda name, done, total: None)
    placement = placement or resolve(config.placement)
    say("loading policy", 0, 3)
    policy = load_policy(config, placement.policy)
    say("loading image model", 1, 3)
    images = load_images(config, placement.image)
    say("loading reward", 2, 3)
    reward = load_reward(config, placement.reward)
    say("models loaded", 3, 3)
    return PureGRPOPromptEnvironment(policy, images, reward, config)


def release_memory() -> None:
    """Give the memory of models that nobody holds any more back to the devices."""
    gc.collect()  # modules and their hooks refer to each other in circles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
