"""What a run needs, checked before any model loads: devices, models, prompts and memory."""

from __future__ import annotations

from .config import ConfigError, RunConfig
from .distributed import ALONE, World
from .judge import check_judge, checkable
from .loading import check_models, read_prompts
from .memory import changed_settings, plan_memory
from .placement import Placement, resolve, resolve_cell
from .prompt_choice import choose_prompts
from .prompts import PromptSet
from .trackers import check_trackers


class Plan:
    """What a run needs, checked before any model loads.

    Args:
        whole: a single rank may hold the whole policy, whatever ``placement.shard_policy`` says: it goes on with, or
            looks at, what several began.
        training: whether anything is to be learned, or only measured, for which training prompts are not needed.

    Raises:
        ConfigError: prompts, devices or sizes that can't work, or models that don't fit there; one sentence.

    ``config`` is the one given, with numbers in the place of what the machine decides.
    """

    def __init__(self, config: RunConfig, world: World = ALONE, *, whole: bool = False, training: bool = True) -> None:
        self.config = config
        if config.placement.shard_policy and world.size == 1 and not whole:
            raise ConfigError(
                "placement.shard_policy is true, but a single rank has nobody to share its policy with; start several "
                "with 'torchrun --nproc-per-node 2 -m grpo_engine train', or set it to false."
            )
        check_trackers(config.recording.trackers)
        if config.training.batch_size % world.size:
            raise ConfigError(
                f"training.batch_size is {config.training.batch_size}, but {world.size} ranks share a step in whole "
                f"groups; set it to a multiple of {world.size}, or start another number of ranks."
            )
        if config.training.async_steps and world.size > 1:
            raise ConfigError(
                f"training.async_steps is 1, but of {world.size} ranks only the first could save what it has sampled "
                "ahead; set it to 0, or start one rank."
            )
        self.placement: Placement = (
            resolve(config.placement)
            if world.local_size == 1
            else resolve_cell(config.placement, world.local_rank, world.local_size)
        )
        self.downloads = check_models(config, self.placement)
        self.prompts: PromptSet = read_prompts(config)
        tiers = set(config.data.tiers)
        chosen = [prompt for prompt in self.prompts.prompts if prompt.tier in tiers]
        by_split = {name: [p for p in chosen if p.split == name] for name in ("train", "validation", "test")}
        train, evaluation = by_split["train"], config.evaluation
        self.train = choose_prompts(train, config.data.max_train_prompts or len(train))
        self.test = choose_prompts(by_split["test"], evaluation.prompts)
        self.validation = choose_prompts(by_split["validation"], evaluation.validation_prompts)
        needed = config.training.batch_size
        if training and len(self.train) < needed:
            raise ConfigError(
                f"training.batch_size is {needed}, but data.prompts {config.data.prompts!r} has only {len(self.train)} "
                f"training prompts in the tiers {', '.join(config.data.tiers)}; add prompts or lower it."
            )
        if len(self.test) < 2:
            raise ConfigError(
                f"data.prompts {config.data.prompts!r} has {len(self.test)} test prompts in the tiers "
                f"{', '.join(config.data.tiers)}, but measuring a gain needs at least 2; mark some with split 'test'."
            )
        if config.evaluation.every and len(self.validation) < 2:
            raise ConfigError(
                f"evaluation.every is {config.evaluation.every}, but data.prompts {config.data.prompts!r} has "
                f"{len(self.validation)} validation prompts in the tiers {', '.join(config.data.tiers)}, but measuring "
                "a gain needs at least 2; add some or set evaluation.every to 0."
            )
        self.watched, self.watched_split = (
            (self.validation, "validation") if len(self.validation) >= 2 else (self.test, "test")
        )
        measured = (*self.test, *self.watched)
        check_judge(config, measured)
        if config.models.reward.weights.vqa and config.evaluation.judge == "auto" and not checkable(config, measured):
            raise ConfigError(
                "evaluation.judge is 'auto', which for these prompts is 'vqa', but models.reward.weights.vqa trains on "
                "the same question, so it would judge nothing; set evaluation.judge to 'none', or that weight to 0."
            )
        texts = [prompt.text for prompt in (*self.train, *self.test, *self.validation)]
        own = config
        if world.size > 1:  # a rank holds its share of each step
            share = config.training.batch_size // world.size
            own = changed_settings(config, {"training.batch_size": share, "training.minibatches": 1})
        self.memory = plan_memory(own, self.placement, prompts=texts, ranks=world.local_size, sharers=world.size)
        self.memory.require()
        if not config.models.image.batch_size:
            self.config = changed_settings(config, {"models.image.batch_size": self.memory.image_batch})
