"""From settings to loaded models: paths, devices, number formats, and the checks that need no model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from .config import ROOT, ConfigError, RunConfig
from .environment import PureGRPOPromptEnvironment
from .image_model import ImageModel, load_image_model
from .placement import Placement, compute_dtype, resolve
from .policy import PureGRPOPolicy
from .prompts import PromptError, PromptSet, load_prompts
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
        prompts = load_prompts(path, max_chars=config.data.max_prompt_chars)
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
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=compute_dtype(settings.dtype, device)).to(device)
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
    path = model_folder(settings.path, "reward")
    if Path(path).is_dir():
        path = f"local-dir:{path}"
    return RewardModel(load_clip_scorer(path, settings, device, compute_dtype(settings.dtype, device)), settings)


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
