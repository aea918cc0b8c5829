"""The judge: a second metric that is never optimised, on the same pictures as the reward.

A rewriter trained on CLIP will find what CLIP overrates. The judge sees the same pictures with other eyes:
in the tiny world a checker that reads shapes and colours off the pixels, elsewhere the policy itself with
its adapter off, asked whether the picture shows the original prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from .config import ConfigError, RunConfig
from .policy import PureGRPOPolicy
from .prompts import Prompt
from .rollout import Picture
from .tiny.world import RESOLUTION


@dataclass(frozen=True)
class Judgement:
    """``score`` in 0..1; ``parts`` maps a kind of attribute to (right, asked) where the judge knows kinds."""

    score: float
    parts: Mapping[str, tuple[int, int]] = field(default_factory=dict)


class Judge(Protocol):
    """Looks at pictures; knows the original prompts, never the rewrites."""

    name: str
    cheap: bool  # quick enough to look at every picture of every training step

    def judge(self, pictures: Sequence[Picture], prompts: Sequence[Prompt]) -> list[Judgement]:
        """One judgement a picture."""


class CheckerJudge:
    """The tiny world's checker, for prompts that carry a machine-readable ``request``."""

    name = "checker"
    cheap = True

    def judge(self, pictures: Sequence[Picture], prompts: Sequence[Prompt]) -> list[Judgement]:
        """See :class:`Judge`."""
        from .tiny.captions import Request
        from .tiny.checker import check

        out = []
        for picture, prompt in zip(pictures, prompts, strict=True):
            verdict = check(picture, Request.from_json(prompt.meta["request"]))
            parts = {kind: (verdict.right[kind], asked) for kind, asked in verdict.asked.items() if asked}
            out.append(Judgement(verdict.score, parts))
        return out


class VqaJudge:
    """The untrained policy as a visual question answerer: the probability of Yes."""

    name = "vqa"
    cheap = False

    def __init__(self, policy: PureGRPOPolicy) -> None:
        self.policy = policy

    def judge(self, pictures: Sequence[Picture], prompts: Sequence[Prompt]) -> list[Judgement]:
        """See :class:`Judge`."""
        with self.policy.reference():
            answers = self.policy.probability_of_yes(pictures, [prompt.text for prompt in prompts])
        return [Judgement(answer) for answer in answers]


def checkable(config: RunConfig, prompts: Sequence[Prompt]) -> bool:
    """Whether the checker can read the pictures of ``prompts``: each carries a request, and their size is its own."""
    return config.models.image.resolution == RESOLUTION and all("request" in prompt.meta for prompt in prompts)


def check_judge(config: RunConfig, prompts: Sequence[Prompt]) -> None:
    """Refuse a judge that could not judge ``prompts``.

    Raises:
        ConfigError: the checker is asked for, but can't read the pictures or doesn't know what a prompt asks for.
    """
    if config.evaluation.judge != "checker" or checkable(config, prompts):
        return
    if config.models.image.resolution != RESOLUTION:
        raise ConfigError(
            f"evaluation.judge is 'checker', which reads pictures of {RESOLUTION} pixels only, but "
            f"models.image.resolution is {config.models.image.resolution}; use 'auto' or 'vqa'."
        )
    raise ConfigError(
        "evaluation.judge is 'checker', but the prompt set has prompts without a 'request' for it to check; "
        "use 'auto' or 'vqa'."
    )


def make_judge(config: RunConfig, prompts: Sequence[Prompt], policy: PureGRPOPolicy) -> Judge | None:
    """The judge that ``evaluation.judge`` names; "auto" takes the checker where every prompt can be checked.

    Raises:
        ConfigError: see :func:`check_judge`.
    """
    check_judge(config, prompts)
    choice = config.evaluation.judge
    if choice == "none":
        return None
    return CheckerJudge() if choice != "vqa" and checkable(config, prompts) else VqaJudge(policy)
