"""The playground's models, in the process that holds them: rewrites, pictures and scores for one try at a time.

Every picture is drawn and scored by itself, not in a batch with others, so what it looks like never depends on
which columns stand beside it, and a rewrite drawn again is the same picture again.
"""

from __future__ import annotations

import gc
import io
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from PIL import Image
from safetensors import SafetensorError

from . import hub
from .checkpoint import CheckpointError, find_checkpoint, load_checkpoint
from .config import ConfigError, RunConfig
from .environment import parse_rewrite
from .image_model import ImageModel, RenderJob, read_length
from .judge import CheckerJudge, Judge, VqaJudge, checkable
from .loading import load_images, load_policy, load_reward, prompt_token_limit
from .memory import plan_memory
from .placement import Placement, apply_threads, intended, resolve
from .playground_try import Column, PlaygroundCrowded, PlaygroundError, Try
from .policy import Poll, PureGRPOPolicy, no_poll
from .prompts import Prompt
from .reward import RewardModel
from .rollout import Picture
from .seeding import derive_seed

log = logging.getLogger(__name__)

Model = TypeVar("Model")


class Told(Protocol):
    """Hears of everything as it comes: "phase" (name, done, total), "facts" (of the whole try), "column" (index
    and what is new of it), "picture" (index, k, png, clip, judge), "devices" (names)."""

    def __call__(self, kind: str, **data: Any) -> None: ...


def latent_seeds(asked: Try) -> list[int]:
    """The seed of each of a column's pictures. The first is the one asked for, so that a recorded picture can be
    made again from its seed."""
    return [
        asked.latent_seed if k == 0 else derive_seed(asked.latent_seed, "playground-latent", k)
        for k in range(asked.pictures)
    ]


class PlaygroundModels:
    """One policy, one image model and one reward model, kept from try to try and loaded when others are asked for."""

    def __init__(self) -> None:
        self._policy: tuple[Any, PureGRPOPolicy] | None = None
        self._painter: tuple[Any, ImageModel, RewardModel] | None = None

    def carry_out(self, asked: Try, told: Told, poll: Poll = no_poll) -> None:
        """Make a try. What one column alone can't do is said in that column.

        Raises:
            PlaygroundError, ConfigError: nothing can be made of it; one sentence.
            StopRequested: by ``poll``.
        """
        config = RunConfig.parse(asked.settings)
        _refuse_long(asked.prompt, config)
        placement = resolve(config.placement)
        apply_threads(config)
        seeds = latent_seeds(asked)
        judge_name = _judge_name(asked, config)
        told("facts", latents=[str(seed) for seed in seeds], judge=judge_name, question=config.models.policy.question)
        told("devices", names=[str(device) for device in placement.devices])  # before anything is put there
        self._load_painter(config, placement, asked, told)
        poll()
        texts = self._rewrites(asked, config, placement, told, poll)
        judge: Judge | None = None
        if judge_name == "checker":
            judge = CheckerJudge()
        elif judge_name == "vqa" and any(texts):
            judge = VqaJudge(self._use_policy(config, config, placement, asked, told))
        self._draw(asked, texts, seeds, judge, told, poll)

    # -- models ------------------------------------------------------------------------------------------

    def _load_painter(self, config: RunConfig, placement: Placement, asked: Try, told: Told) -> None:
        models = config.models
        key = (models.image, models.reward, placement.image, placement.reward)
        if self._painter is not None and self._painter[0] == key:
            return
        self._policy = self._painter = None
        _free()
        hub.fetch(config, lambda name, done, total: told("phase", name=name, done=done, total=total))
        _refuse_crowding(config, placement, asked)
        told("phase", name="loading the image model", done=0, total=0)
        images = _loaded("image model", lambda: load_images(config, placement.image))
        told("phase", name="loading the reward model", done=0, total=0)
        reward = _loaded("reward model", lambda: load_reward(config, placement.reward))
        self._painter = key, images, reward

    def _use_policy(
        self, own: RunConfig, config: RunConfig, placement: Placement, asked: Try, told: Told
    ) -> PureGRPOPolicy:
        """The base policy with an adapter of the shape that ``own`` has, speaking by its template.

        Its weights are those of whoever used it last: load a checkpoint, or take ``reference()``.
        """
        models = own.models.policy
        if (models.path, models.dtype) != (config.models.policy.path, config.models.policy.dtype):
            raise PlaygroundError(
                f"This run rewrites with {models.path} in {models.dtype}, but the models chosen are "
                f"{config.models.policy.path} in {config.models.policy.dtype}; choose this run's models to use it."
            )
        key = (
            models.path,
            models.dtype,
            models.quantize,
            models.adapter,
            models.lora,
            models.gradient_checkpointing,
            placement.policy,
        )
        if self._policy is None or self._policy[0] != key:
            self._policy = None
            _free()
            _refuse_crowding(own, placement, asked)
            told("phase", name="loading the policy", done=0, total=0)
            self._policy = key, _loaded("policy", lambda: load_policy(own, placement.policy))
        policy = self._policy[1]
        policy.config, policy.sampling = models, own.sampling
        if asked.temperature is not None:
            policy.sampling = own.sampling.model_copy(update={"temperature": asked.temperature})
        return policy

    # -- the work ----------------------------------------------------------------------------------------

    def _rewrites(
        self, asked: Try, config: RunConfig, placement: Placement, told: Told, poll: Poll
    ) -> list[str | None]:
        """The text each column draws; None where there is none."""
        texts: list[str | None] = []
        for index, column in enumerate(asked.columns):
            told("phase", name="rewriting", done=index, total=len(asked.columns))
            facts: dict[str, Any] = {}
            try:
                text = self._rewrite(column, asked, config, placement, facts, told, poll)
                if self._painter and text and (cut := self._painter[1].cut_tokens(text)):
                    facts["cut"], facts["unread"] = cut, text[read_length(text, self._painter[1].cut_tokens) :]
            except PlaygroundCrowded:
                raise
            except (PlaygroundError, CheckpointError, ConfigError) as problem:
                text = None
                facts["error"] = _shortened(str(problem), column)
            except (OSError, SafetensorError):  # a run that goes on deletes its old checkpoints
                log.exception("a checkpoint could not be read")
                text = None
                facts["error"] = "This checkpoint went away while it was read; choose another."
            told("column", index=index, text=text, **facts)
            texts.append(text)
        return texts

    def _rewrite(
        self,
        column: Column,
        asked: Try,
        config: RunConfig,
        placement: Placement,
        facts: dict[str, Any],
        told: Told,
        poll: Poll,
    ) -> str | None:
        """One column's text; notes in ``facts`` what else is to be said about it."""
        if column.kind == "original":
            return asked.prompt
        if column.kind == "edited":
            return column.text
        if column.kind == "untrained":
            policy = self._use_policy(config, config, placement, asked, told)
            with policy.reference():
                return _written(policy, asked, facts, poll)
        own = RunConfig.parse(column.settings)
        found = find_checkpoint(column.folder, column.which)
        policy = self._use_policy(own, config, placement, asked, told)
        poll()
        facts["step"] = load_checkpoint(found.path, policy).step
        facts["note"] = _shortened(found.note, column)
        return _written(policy, asked, facts, poll)

    def _draw(
        self,
        asked: Try,
        texts: Sequence[str | None],
        seeds: Sequence[int],
        judge: Judge | None,
        told: Told,
        poll: Poll,
    ) -> None:
        """Draw and score every text on every latent, the columns side by side."""
        assert self._painter is not None
        _, images, reward = self._painter
        prompt = _prompt(asked)
        wanted = [
            (index, k, RenderJob(text, seed))
            for k, seed in enumerate(seeds)
            for index, text in enumerate(texts)
            if text is not None
        ]
        made: dict[RenderJob, dict[str, Any]] = {}
        for count, (index, k, job) in enumerate(wanted):
            told("phase", name="rendering", done=count, total=len(wanted))
            if job not in made:
                (picture,) = images.render([job], poll=poll)
                (score,) = reward.score([picture], [asked.prompt], [job.text])
                verdict = judge.judge([picture], [prompt])[0].score if judge is not None else None
                made[job] = {"png": png(picture), "clip": score.parts["clip"], "judge": verdict}
            told("picture", index=index, k=k, **made[job])


def png(picture: Picture) -> bytes:
    """A picture as PNG, every pixel kept."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def _written(policy: PureGRPOPolicy, asked: Try, facts: dict[str, Any], poll: Poll) -> str | None:
    """What the policy writes for the prompt; the completion as it came goes into ``facts``."""
    try:
        (completions,) = policy.sample([asked.prompt], [[asked.sample_seed]], greedy=asked.greedy, poll=poll)
    except ValueError as error:  # markup of this policy's chat in the prompt
        raise PlaygroundError(str(error)) from error
    facts["completion"], facts["finished"] = completions.texts[0], bool(completions.finished[0])
    return parse_rewrite(completions.texts[0])


def _shortened(sentence: str, column: Column) -> str:
    """Without the run's folder: the column already says which run it is."""
    if not column.folder:
        return sentence
    return sentence.replace(f"{column.folder}/checkpoints/", "").replace(column.folder, "This run")


def _prompt(asked: Try) -> Prompt:
    meta = {} if asked.request is None else {"request": asked.request}
    return Prompt("playground", asked.prompt, "basic", "test", meta)


def _judge_name(asked: Try, config: RunConfig) -> str:
    """The checker where the prompt says what to check, else the untrained policy; "none" where the run has none."""
    choice = config.evaluation.judge
    if choice == "none":
        return choice
    return "checker" if choice != "vqa" and checkable(config, [_prompt(asked)]) else "vqa"


def _refuse_long(prompt: str, config: RunConfig) -> None:
    """The reward would score pictures against a silently cut prompt."""
    tokens, limit = prompt_token_limit(config)(prompt)
    if tokens > limit:
        raise PlaygroundError(
            f"The prompt has {tokens} tokens, but the reward reads only {limit}; shorten it.", "prompt"
        )


def _refuse_crowding(config: RunConfig, placement: Placement, asked: Try) -> None:
    """The rule for GPUs that runs work on: only where a whole second run of these models would fit beside them.

    Raises:
        PlaygroundCrowded: it would not, or that can't be known.
    """
    for name, settings in asked.beside:
        theirs = intended(RunConfig.parse(settings).placement).devices
        shared = {str(device) for device in placement.devices if device.type == "cuda" and device in theirs}
        if not shared:
            continue
        for device in plan_memory(config, placement).devices:
            if device.device in shared and device.fits is not True:
                raise PlaygroundCrowded(
                    f"{name} on {device.device}, which the playground needs too, and it can't be sure that a second "
                    "set of models fits there; wait until the run ends, or stop it."
                )


def _loaded(what: str, load: Callable[[], Model]) -> Model:
    try:
        return load()
    except ConfigError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        log.exception("the %s could not be loaded", what)
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise PlaygroundError(f"The {what} could not be loaded ({type(error).__name__}: {reason}).") from error


def _free() -> None:
    """Give back the memory of models just dropped."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
