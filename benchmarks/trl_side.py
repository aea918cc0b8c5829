"""The other side of ``vs_trl.py``: the same job as a run of TRL's ``GRPOTrainer``, stopped after every step.

What TRL leaves to its user is written here as a user would: a reward function that renders every completion with
the same image model, on the same latents a group, and scores it with the same reward model. Everything else is TRL's,
with its defaults but for what makes the two jobs the same.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from engine import TokenCount
from torch import Tensor

from grpo_engine.config import RunConfig
from grpo_engine.environment import PureGRPOPromptEnvironment, parse_rewrite
from grpo_engine.image_families.base import PipelineModel
from grpo_engine.image_model import RenderJob
from grpo_engine.loading import model_folder
from grpo_engine.policy import no_poll
from grpo_engine.prompts import Prompt
from grpo_engine.rollout import Completions, Picture
from grpo_engine.seeding import derive_seed

UNCLIPPED = 1e6
MISSING = (
    "This benchmark compares with TRL, which is not installed here; install it into an environment of its own: "
    "python -m venv .venv-trl && .venv-trl/bin/python -m pip install -r benchmarks/requirements.txt"
)


def require_trl() -> str:
    """TRL's version; ends the program with one sentence where it is missing."""
    try:
        import trl
    except ImportError:
        raise SystemExit(MISSING) from None
    return str(trl.__version__)


class TrlSide:
    """One TRL run.

    Args:
        config: of our run; TRL's arguments follow from it.
        environment: whose image model and reward its reward function calls.
        batches: the prompts of each step.
        between: called after each of TRL's steps, with the step's number from 1; its time is not TRL's.
        folder: for whatever TRL writes.
        distinct: the reward function renders identical rewrites of a group once.
    """

    def __init__(
        self,
        config: RunConfig,
        environment: PureGRPOPromptEnvironment,
        batches: Sequence[Sequence[Prompt]],
        between: Callable[[int], None],
        folder: str,
        *,
        distinct: bool,
    ) -> None:
        from datasets import Dataset, disable_progress_bars
        from peft import LoraConfig
        from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer

        disable_progress_bars()
        logging.getLogger("transformers").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore")
        self.config, self.environment, self.policy = config, environment, environment.policy
        self.distinct = distinct
        self.seconds: dict[str, float] = defaultdict(float)
        self.steps: list[dict[str, float]] = []
        self.gradient: Tensor | None = None
        self.replayed: list[Completions] = []
        self.rewards: list[float] = []
        self.mean_rewards: list[float] = []
        self._begun = 0.0
        settings, sampling, training = config.models.policy, config.sampling, config.training
        path = model_folder(settings.path, "policy")
        model: Any = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
        alpha: Any = settings.lora.alpha
        adapter = LoraConfig(
            r=settings.lora.rank,
            lora_alpha=alpha,
            lora_dropout=settings.lora.dropout,
            target_modules=self.policy.adapted_layers,
            task_type="CAUSAL_LM",
        )
        low, high = config.objective.clips
        arguments = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=training.batch_size * sampling.num_rollouts,
            num_generations=sampling.num_rollouts,
            max_completion_length=sampling.max_new_tokens,
            temperature=sampling.temperature,
            beta=config.objective.kl_coef,
            use_bias_correction_kl=False,
            epsilon=low,
            epsilon_high=high,
            loss_type="grpo",
            scale_rewards="group",
            learning_rate=training.learning_rate,
            lr_scheduler_type=training.schedule,
            weight_decay=training.weight_decay,
            adam_beta1=training.beta1,
            adam_beta2=training.beta2,
            max_grad_norm=UNCLIPPED,  # in the comparison of gradients; then as ours
            max_steps=len(batches),
            shuffle_dataset=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            seed=config.seed,
        )
        rows = [
            {"prompt": self.policy._chat_text(settings.template.replace("{prompt}", prompt.text)), "text": prompt.text,
             "name": prompt.id}
            for batch in batches
            for prompt in batch
        ]  # fmt: skip
        side = self

        class Watch(TrainerCallback):
            """Where TRL's own loop tells of its steps."""

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                if not side._begun:
                    side._begun = time.perf_counter()

            def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
                if side.gradient is None:
                    side.gradient = flat([p.grad for p in side.adapter().values()])

            def on_step_end(self, args: Any, state: Any, control: Any, **__: Any) -> None:
                side._end_step()
                between(state.global_step)
                side._begun = time.perf_counter()

        self.trainer = GRPOTrainer(
            model=model,
            reward_funcs=self._reward,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoProcessor.from_pretrained(path),
            peft_config=adapter,
            callbacks=[Watch()],
        )
        self.count = TokenCount(self.trainer.model.get_base_model())
        self.count.now = "update"
        self._own_generate = self.trainer._generate
        self.trainer._generate = self._generate

    def adapter(self) -> dict[str, torch.nn.Parameter]:
        """What TRL trains, by name."""
        return {name: p for name, p in self.trainer.model.named_parameters() if p.requires_grad}

    def run(self) -> None:
        """All steps."""
        self.trainer.train()

    def begin(self) -> None:
        """After the comparison of gradients: from here on it is a run like any other."""
        self.replayed = []
        self.trainer.args.max_grad_norm = self.config.training.max_grad_norm
        self.trainer.optimizer.state.clear()
        self.steps.clear()
        self.count.tokens.clear()
        self.count.calls.clear()

    # -- in the place of TRL's phases ----------------------------------------------------------------------

    def _generate(self, prompts: list[Any]) -> Any:
        """TRL's own sampling, timed; or, while there are completions to replay, those."""
        if self.replayed:
            completions = self.replayed
            per_row = [(group, row) for group in completions for row in range(len(group))]
            ids = [group.token_ids[row][group.mask[row]].tolist() for group, row in per_row]
            heads = [group.prompt_ids.tolist() for group, _ in per_row]
            own = [ids for ids in self.trainer.processing_class(text=prompts)["input_ids"]]
            if own != heads:
                raise SystemExit("TRL reads the prompts as other tokens than we do; nothing can be compared.")
            texts = [group.texts[row] for group, row in per_row]
            return heads, ids, None, texts, None, {}, None, []
        self.count.now = "sample"
        begun = time.perf_counter()
        out = self._own_generate(prompts)
        self.seconds["sample"] += time.perf_counter() - begun
        self.count.now = "update"
        return out

    def _reward(self, prompts: list[Any], completions: list[str], text: list[str], name: list[str], **more: Any) -> Any:
        """What a user of TRL writes: completions to rewrites, pictures on the group's latents, and their reward."""
        if self.replayed:
            return self.rewards
        begun = time.perf_counter()
        step = more["trainer_state"].global_step
        rewrites = [parse_rewrite(completion) for completion in completions]
        jobs = [
            None if rewrite is None else RenderJob(rewrite, derive_seed(self.config.seed, "latent", step, prompt, 0))
            for rewrite, prompt in zip(rewrites, name, strict=True)
        ]
        drawn = iter(self._render([job for job in jobs if job is not None]))
        pictures = [None if job is None else next(drawn) for job in jobs]
        self.seconds["render"] += time.perf_counter() - begun
        begun = time.perf_counter()
        scores = self.environment.reward.score(pictures, text, rewrites)
        self.seconds["score"] += time.perf_counter() - begun
        self.mean_rewards.append(float(np.mean([score.total for score in scores])))
        return [score.total for score in scores]

    def _render(self, jobs: list[RenderJob]) -> list[Picture]:
        """Every picture, in batches; with ``distinct`` only one of those that are the same, as our environment does."""
        images = self.environment.images
        if self.distinct:
            return images.render(jobs)
        assert isinstance(images, PipelineModel)
        size = images.batch_size or len(jobs)
        batches = [jobs[start : start + size] for start in range(0, len(jobs), size)]
        return [picture for batch in batches for picture in images._render_batch(batch, no_poll)]

    def _end_step(self) -> None:
        wall = time.perf_counter() - self._begun
        own = dict(self.seconds)
        self.steps.append({**own, "wall": wall, "update": wall - sum(own.values())})
        self.seconds.clear()


def flat(tensors: Sequence[Tensor | None]) -> Tensor:
    """Tensors as one vector."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors if tensor is not None])
