"""The environment: prompts -> rewrites -> pictures -> rewards.

It speaks two languages about the same thing. Token by token, as in Gymnasium's vector environments: a state
is the prompt and the tokens so far, an action is one token, the reward comes at the end
(:meth:`~PureGRPOPromptEnvironment.reset` and :meth:`~PureGRPOPromptEnvironment.step`). And by whole groups,
which is how training uses it (:meth:`~PureGRPOPromptEnvironment.rollout`). Both send their groups through the same
:class:`~grpo_engine.stream.GroupStream`, so equal tokens have equal rewards.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .config import RunConfig
from .image_model import ImageModel, RenderJob
from .pipeline import HERE
from .placement import Placement
from .policy import Poll, PureGRPOPolicy, no_poll
from .prompts import Prompt
from .rendering import RenderCache, render_all
from .reward import RewardModel
from .rollout import Completions, Group, Picture, Score
from .seeding import derive_seed, numpy_generator
from .stream import GroupStream, Told

QUOTES = "\"'`\u201c\u201d\u2018\u2019\u00ab\u00bb"


def parse_rewrite(completion: str) -> str | None:
    """The rewrite in a completion: its first line with text, without surrounding quotes.

    None where there is no letter or digit in it. A failure is counted and shown, never replaced by something else.
    """
    for line in completion.splitlines():
        text = " ".join(line.split()).strip(QUOTES + " ")
        if any(character.isalnum() for character in text):
            return text
    return None


@dataclass
class _Episode:
    """One row of the token-level environment."""

    prompt: Prompt
    prompt_ids: Tensor
    latent_seed: int
    tokens: list[int] = field(default_factory=list)
    done: bool = False


class PureGRPOPromptEnvironment:
    """Turns what the policy writes into rewards.

    Args:
        policy: writes completions, and knows the template and the end tokens.
        images: renders rewrites.
        reward: scores pictures against original prompts.
        config: of the run; ``sampling``, ``seed`` and ``training.streaming`` are used here.
        further: image models beside ``images``, of the same weights on other devices; all render the same pictures.
        placement: the models' devices; None = all on the policy's.
    """

    def __init__(
        self,
        policy: PureGRPOPolicy,
        images: ImageModel,
        reward: RewardModel,
        config: RunConfig,
        *,
        further: Sequence[ImageModel] = (),
        placement: Placement | None = None,
    ) -> None:
        self.policy, self.images, self.reward, self.config = policy, images, reward, config
        self.further, self.placement = tuple(further), placement
        self.cache = RenderCache(config.models.image.cache_mb * 1_000_000)
        self._episodes: list[_Episode] = []

    # -- models and devices ------------------------------------------------------------------------------

    @property
    def replicas(self) -> tuple[ImageModel, ...]:
        """All image models, the primary one first."""
        return (self.images, *self.further)

    @property
    def batch_size(self) -> int:
        """Most pictures that an image model renders at once."""
        found: int = getattr(getattr(self.images, "config", None), "batch_size", 32)
        return found or self.config.training.batch_size * self.config.sampling.num_rollouts

    @property
    def image_lanes(self) -> list[Hashable]:
        """For each image model, who works it: HERE is the policy's own thread."""
        devices = self.placement.images if self.placement else [None] * len(self.replicas)
        return [self._lane(f"image {index}", device) for index, device in enumerate(devices)]

    @property
    def reward_lane(self) -> Hashable:
        """Who works the reward model; where it asks the policy, the policy's own thread."""
        if self.reward.uses_policy:
            return HERE
        return self._lane("reward", self.placement.reward if self.placement else None)

    def _lane(self, name: str, device: torch.device | None) -> Hashable:
        """Models on one device take turns; those on the policy's device work while it waits, unless told otherwise."""
        apart = device is not None and self.placement is not None and device != self.placement.policy
        if self.config.training.streaming == "never" or (self.config.training.streaming == "auto" and not apart):
            return HERE
        return str(device) if apart else name

    def render(self, jobs: Sequence[RenderJob], *, poll: Poll = no_poll) -> list[Picture]:
        """One picture for each job, in order, made by all image models or remembered from an earlier call.

        For evaluations, which come back to their prompts and latents; those of a step never come again.
        """
        models = list(zip(self.image_lanes, self.replicas, strict=True))
        return render_all(jobs, models, self.batch_size, self.cache, poll=poll)

    # -- whole groups ------------------------------------------------------------------------------------

    def rollout(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        step: int,
        *,
        attempt: int = 0,
        poll: Poll = no_poll,
        on_phase: Told | None = None,
    ) -> Iterator[Group]:
        """Sample, render and score ``group_size`` rewrites of each prompt; yields whole groups as they complete.

        Every random number comes from (seed, step, prompt id, k, attempt): all rollouts of a group share one
        initial latent (common random numbers), which is fresh at each step.
        """
        with GroupStream(self, len(prompts), poll=poll, told=on_phase) as stream:
            for group in stream.sample(prompts, group_size, step, attempt):
                stream.wait([group])
                yield group

    def sample_groups(
        self, prompts: Sequence[Prompt], group_size: int, step: int, attempt: int = 0, *, poll: Poll = no_poll
    ) -> list[Group]:
        """Groups before rendering: ``group_size`` rewrites of each prompt, sampled side by side."""
        begun = time.perf_counter()
        seeds = [[self._seed("sample", step, prompt.id, k, attempt) for k in range(group_size)] for prompt in prompts]
        completions = self.policy.sample([prompt.text for prompt in prompts], seeds, poll=poll)
        share = (time.perf_counter() - begun) / len(prompts)
        groups = self.sampled_groups(prompts, completions, step, attempt)
        for group in groups:
            group.seconds["sample"] = share
        return groups

    def sampled_groups(
        self, prompts: Sequence[Prompt], completions: Sequence[Completions], step: int, attempt: int = 0
    ) -> list[Group]:
        """Groups before rendering, of completions that were sampled for ``step``."""
        return [
            self.new_group(prompt, written, self._seed("latent", step, prompt.id, attempt))
            for prompt, written in zip(prompts, completions, strict=True)
        ]

    def new_group(self, prompt: Prompt, completions: Completions, latent_seed: int) -> Group:
        """A group before rendering: its completions parsed."""
        return Group(prompt, completions, tuple(parse_rewrite(text) for text in completions.texts), latent_seed)

    def score_groups(
        self, groups: Sequence[Group], step: int, *, poll: Poll = no_poll, on_phase: Told | None = None
    ) -> Iterator[Group]:
        """Render and score ``groups`` in place, and yield each as soon as it is whole."""
        stream = GroupStream(self, len(groups), poll=poll, told=on_phase)
        stream.add(groups, step)
        for group in groups:
            stream.wait([group])
            yield group

    def score(self, group: Group, step: int) -> Tensor:
        """Set the scores of a group that has its pictures; returns its rewards, float32 (G,)."""
        prompts = [group.prompt.text] * len(group)
        group.scores = self.reward.score(group.pictures, prompts, group.rewrites)
        rewards = [score.total for score in group.scores]
        if self.config.models.reward.debug == "shuffle":
            generator = numpy_generator(self.config.seed, "shuffle", step, group.prompt.id)
            rewards = [rewards[i] for i in generator.permutation(len(rewards))]
        return torch.tensor(rewards, dtype=torch.float32)

    def _seed(self, purpose: str, *parts: str | int) -> int:
        return derive_seed(self.config.seed, purpose, *parts)

    # -- token by token ----------------------------------------------------------------------------------

    def reset(self, prompts: Sequence[Prompt], *, step: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin one episode a prompt; returns (observation, info) as Gymnasium does.

        The observation holds ``prompt_ids`` (list of int64 (P,)), ``token_ids`` (list of the tokens so far) and
        ``mask`` (bool (B,), true where the episode still runs). ``step`` only chooses the latents.
        """
        self._episodes = [
            _Episode(prompt, self.policy.prompt_ids(prompt.text), self._seed("latent", step, prompt.id, 0))
            for prompt in prompts
        ]
        return self._observation(), {"prompts": [prompt.text for prompt in prompts]}

    def step(self, token_ids: Tensor) -> tuple[dict[str, Any], Tensor, Tensor, Tensor, dict[str, Any]]:
        """Append one token, int64 (B,), to every running episode; finished rows ignore theirs.

        Returns (observation, reward, terminated, truncated, info): reward float32 (B,), 0 until an episode's
        last token; ``terminated`` where an end token was chosen, ``truncated`` where the limit was reached.
        ``info`` holds, for rows that ended now, ``rewrite``, ``score`` and ``picture`` (None elsewhere).

        Raises:
            RuntimeError: before :meth:`reset`, or after all episodes ended.
            ValueError: on the wrong number of tokens.
        """
        if not self._episodes or all(episode.done for episode in self._episodes):
            raise RuntimeError("No episode is running; call reset(prompts) first.")
        if token_ids.shape != (len(self._episodes),):
            raise ValueError(f"step takes one token an episode ({len(self._episodes)}), not {tuple(token_ids.shape)}.")
        count = len(self._episodes)
        reward = torch.zeros(count)
        terminated, truncated = torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool)
        info: dict[str, list[str | Score | Picture | None]] = {
            name: [None] * count for name in ("rewrite", "score", "picture")
        }
        for row, (episode, token) in enumerate(zip(self._episodes, token_ids.tolist(), strict=True)):
            if episode.done:
                continue
            episode.tokens.append(token)
            ended = token in self.policy.end_tokens
            if not ended and len(episode.tokens) < self.config.sampling.max_new_tokens:
                continue
            episode.done = True
            terminated[row], truncated[row] = ended, not ended
            group = self.new_group(episode.prompt, self._as_completions(episode, ended), episode.latent_seed)
            (whole,) = self.score_groups([group], step=0)
            reward[row] = whole.scores[0].total
            info["rewrite"][row], info["score"][row] = whole.rewrites[0], whole.scores[0]
            info["picture"][row] = whole.pictures[0]
        return self._observation(), reward, terminated, truncated, info

    def _observation(self) -> dict[str, Any]:
        return {
            "prompt_ids": [episode.prompt_ids for episode in self._episodes],
            "token_ids": [torch.tensor(episode.tokens, dtype=torch.long) for episode in self._episodes],
            "mask": torch.tensor([not episode.done for episode in self._episodes]),
        }

    def _as_completions(self, episode: _Episode, ended: bool) -> Completions:
        """A finished episode as a group of one; the environment does not know its log-probabilities."""
        tokens = torch.tensor([episode.tokens])
        text = self.policy.tokenizer.decode(episode.tokens, skip_special_tokens=True)
        unknown = torch.full(tokens.shape, torch.nan)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        return Completions(episode.prompt_ids, tokens, mask, unknown, unknown, None, (text,), torch.tensor([ended]))
