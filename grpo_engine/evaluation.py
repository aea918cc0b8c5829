"""Three arms on held-out prompts: the original prompt, the untrained rewrite, the trained rewrite.

Two arms would hide that untrained rewriting often scores *below* no rewriting. All arms of a prompt are
rendered on the same latents, gains are paired by prompt, and the interval is a bootstrap over prompts:
pictures of one prompt are not independent evidence.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .config import RunConfig
from .environment import PureGRPOPromptEnvironment, parse_rewrite
from .image_model import RenderJob, read_length
from .judge import Judge, Judgement
from .policy import Poll, no_poll
from .prompts import Prompt
from .recorder import EvaluationItem
from .seeding import derive_seed, numpy_generator

BASELINE_ARMS = ("original", "untrained", "untrained_greedy")
TRAINED_ARMS = ("trained", "trained_greedy")
COMPARISONS = (
    ("trained", "untrained"),
    ("trained_greedy", "untrained_greedy"),
    ("trained", "original"),
    ("trained_greedy", "original"),
    ("untrained", "original"),
)

Told = Callable[[str, int, int], None]


class Evaluator:
    """Measures arms on fixed prompts and latents."""

    def __init__(
        self,
        environment: PureGRPOPromptEnvironment,
        judge: Judge | None,
        prompts: Sequence[Prompt],
        config: RunConfig,
    ) -> None:
        self.environment, self.judge, self.prompts, self.config = environment, judge, prompts, config

    def arms(self, trained: bool) -> list[str]:
        """The arms that the settings ask for, of the baseline or of the trained policy."""
        wanted = TRAINED_ARMS if trained else BASELINE_ARMS
        return [
            arm
            for arm in wanted
            if arm == "original"
            or (self.config.evaluation.greedy if arm.endswith("_greedy") else self.config.evaluation.samples > 0)
        ]

    def measure(self, arm: str, *, poll: Poll = no_poll, told: Told | None = None) -> list[EvaluationItem]:
        """Rewrite, render, score and judge every prompt under ``arm``: ``images_per_prompt`` items a prompt.

        The untrained arms run with the adapter off, so they can be measured at any time.
        """
        say = told or (lambda name, done, total: None)
        policy = self.environment.policy
        items: list[EvaluationItem] = []
        chunk = max(1, self.config.models.image.batch_size // self.config.evaluation.images_per_prompt)
        for start in range(0, len(self.prompts), chunk):
            say(arm, start, len(self.prompts))
            poll()
            prompts = self.prompts[start : start + chunk]
            if arm.startswith("untrained"):
                with policy.reference():
                    rewrites = self._rewrites(arm, prompts, poll)
            else:
                rewrites = self._rewrites(arm, prompts, poll)
            items.extend(self._score(arm, prompts, rewrites, poll))
        say(arm, len(self.prompts), len(self.prompts))
        return items

    def latent_seed(self, prompt: Prompt, index: int) -> int:
        """Seed of the prompt's ``index``-th latent: the same for every arm, step and run with this seed."""
        return derive_seed(self.config.seed, "evaluation-latent", prompt.id, index)

    def _rewrites(self, arm: str, prompts: Sequence[Prompt], poll: Poll) -> list[list[str | None]]:
        """For each prompt, the text of each of its pictures."""
        count = self.config.evaluation.images_per_prompt
        if arm == "original":
            return [[prompt.text] * count for prompt in prompts]
        greedy = arm.endswith("_greedy")
        samples = 1 if greedy else self.config.evaluation.samples
        # Trained and untrained arms draw from the same uniforms: less noise in their difference.
        seeds = [
            [derive_seed(self.config.seed, "evaluation-sample", prompt.id, k) for k in range(samples)]
            for prompt in prompts
        ]
        policy = self.environment.policy
        written = policy.sample([prompt.text for prompt in prompts], seeds, greedy=greedy, poll=poll)
        parsed = [[parse_rewrite(text) for text in group.texts] for group in written]
        return [[texts[index % samples] for index in range(count)] for texts in parsed]

    def _score(
        self, arm: str, prompts: Sequence[Prompt], rewrites: Sequence[Sequence[str | None]], poll: Poll
    ) -> Iterable[EvaluationItem]:
        rows = [
            (prompt, index, self.latent_seed(prompt, index), text)
            for prompt, texts in zip(prompts, rewrites, strict=True)
            for index, text in enumerate(texts)
        ]
        jobs = [RenderJob(text, seed) for _, _, seed, text in rows if text is not None]
        drawn = dict(zip(jobs, self.environment.render(jobs, poll=poll), strict=True))
        pictures = [None if text is None else drawn[RenderJob(text, seed)] for _, _, seed, text in rows]
        scores = self.environment.reward.score(pictures, [row[0].text for row in rows], [row[3] for row in rows])
        judgements: list[Judgement | None] = [None] * len(rows)
        if self.judge is not None:
            seen = [index for index, picture in enumerate(pictures) if picture is not None]
            verdicts = self.judge.judge([pictures[i] for i in seen], [rows[i][0] for i in seen])  # type: ignore[misc]
            for index, verdict in zip(seen, verdicts, strict=True):
                judgements[index] = verdict
        cut_tokens = self.environment.images.cut_tokens
        read = {text: (cut_tokens(text), read_length(text, cut_tokens)) for text in {job.text for job in jobs}}
        for (prompt, index, seed, text), picture, score, judgement in zip(
            rows, pictures, scores, judgements, strict=True
        ):
            failed = self.judge is not None and picture is None
            cut, length = (None, None) if text is None else read[text]
            yield EvaluationItem(
                arm=arm,
                prompt_id=prompt.id,
                prompt=prompt.text,
                tier=prompt.tier,
                index=index,
                latent_seed=seed,
                rewrite=text,
                score=score,
                judge=judgement.score if judgement else (0.0 if failed else None),
                judge_parts=judgement.parts if judgement else {},
                picture=picture,
                cut_tokens=cut,
                read_chars=length,
            )


# ---------------------------------------------------------------------------------------------
# Statistics


@dataclass(frozen=True)
class Gain:
    """A paired difference over prompts, with a bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int
    win_rate: float  # share of prompts that gained; ties count half

    @property
    def distinguishable(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0.0 or self.high < 0.0


def paired_gain(
    after: NDArray[np.float64], before: NDArray[np.float64], *, resamples: int, confidence: float, seed: int
) -> Gain:
    """Mean of ``after - before``, each float64 (n,) with one value a prompt, and its percentile interval.

    The bootstrap is over prompts.

    Raises:
        ValueError: if there are fewer than two prompts or the lengths differ.
    """
    if after.shape != before.shape or after.ndim != 1 or len(after) < 2:
        raise ValueError(f"A paired gain needs two equally long lists of 2 or more, not {after.shape}, {before.shape}.")
    difference = after - before
    low, high = bootstrap_mean(difference, resamples=resamples, confidence=confidence, seed=seed)
    wins = float((difference > 0).mean() + 0.5 * (difference == 0).mean())
    return Gain(float(difference.mean()), low, high, len(difference), wins)


def bootstrap_mean(values: NDArray[np.float64], *, resamples: int, confidence: float, seed: int) -> tuple[float, float]:
    """Percentile bootstrap interval (Efron 1979) of the mean of ``values``, float64 (n,)."""
    generator = numpy_generator(seed, "bootstrap", len(values))
    means = np.empty(resamples)
    for start in range(0, resamples, 1000):  # bounded memory for large sets
        stop = min(start + 1000, resamples)
        index = generator.integers(0, len(values), (stop - start, len(values)))
        means[start:stop] = values[index].mean(axis=1)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return float(low), float(high)


def by_prompt(items: Iterable[EvaluationItem], value: Callable[[EvaluationItem], float]) -> dict[str, float]:
    """Mean of ``value`` over each prompt's pictures, by prompt id, in order of appearance."""
    values: dict[str, list[float]] = defaultdict(list)
    for item in items:
        values[item.prompt_id].append(value(item))
    return {prompt_id: float(np.mean(row)) for prompt_id, row in values.items()}


def summarise(items: Sequence[EvaluationItem], config: RunConfig) -> dict[str, Any]:
    """Everything the report says, as plain data: means by arm, paired gains, kinds of attributes, a sentence.

    Gains are given for the reward and, as ``judge_gain``, for the judge.
    """
    arms: dict[str, list[EvaluationItem]] = defaultdict(list)
    for item in items:
        arms[item.arm].append(item)
    judged = bool(items) and all(item.judge is not None for item in items)
    summary: dict[str, Any] = {
        "arms": {arm: _arm_summary(rows, judged) for arm, rows in arms.items()},
        "gains": {},
        "confidence": config.evaluation.confidence,
    }
    for after, before in COMPARISONS:
        if after in arms and before in arms:
            summary["gains"][f"{after}_vs_{before}"] = _compare(arms[after], arms[before], judged, config)
    headline = next((name for name in ("trained_vs_untrained", "trained_greedy_vs_untrained_greedy")
                     if name in summary["gains"]), None)  # fmt: skip
    if headline:
        summary["headline"] = headline
        summary["sentence"] = sentence(summary["gains"][headline], config.evaluation.confidence)
    return summary


def _arm_summary(items: Sequence[EvaluationItem], judged: bool) -> dict[str, Any]:
    parts: dict[str, list[float]] = defaultdict(list)
    right: dict[str, int] = defaultdict(int)
    asked: dict[str, int] = defaultdict(int)
    for item in items:
        for name, value in item.score.parts.items():
            parts[name].append(value)
        for kind, (good, all_of) in item.judge_parts.items():
            right[kind] += good
            asked[kind] += all_of
    tiers = sorted({item.tier for item in items})
    return {
        "reward": float(np.mean([item.score.total for item in items])),
        "parts": {name: float(np.mean(values)) for name, values in parts.items()},
        "judge": float(np.mean([item.judge for item in items])) if judged else None,
        "kinds": {kind: right[kind] / asked[kind] for kind in asked},
        "tiers": {tier: float(np.mean([item.score.total for item in items if item.tier == tier])) for tier in tiers},
        "failures": sum(item.rewrite is None for item in items),
        "cut_share": _cut_share(items),
        "pictures": len(items),
    }


def _cut_share(items: Sequence[EvaluationItem]) -> float | None:
    """Of the texts that were drawn, those with a tail that the image model can't read; None where that is not known."""
    cut = [item.cut_tokens for item in items if item.rewrite is not None]
    return float(np.mean([count > 0 for count in cut if count is not None])) if cut and None not in cut else None


def _compare(
    after: Sequence[EvaluationItem], before: Sequence[EvaluationItem], judged: bool, config: RunConfig
) -> dict[str, Any]:
    def gain(value: Callable[[EvaluationItem], float]) -> dict[str, Any]:
        new, old = by_prompt(after, value), by_prompt(before, value)
        shared = sorted(
            prompt_id for prompt_id in new if prompt_id in old
        )  # resampled alike in whatever order they come
        found = paired_gain(
            np.array([new[i] for i in shared]),
            np.array([old[i] for i in shared]),
            resamples=config.evaluation.bootstrap,
            confidence=config.evaluation.confidence,
            seed=config.seed,
        )
        base = float(np.mean([old[i] for i in shared]))
        return {
            **vars(found),
            "before": base,
            "after": base + found.mean,
            "percent": 100.0 * found.mean / abs(base) if base else None,
            "distinguishable": found.distinguishable,
        }

    out = gain(lambda item: item.score.total)
    if judged:
        out["judge_gain"] = gain(lambda item: float(item.judge or 0.0))
    return out


def sentence(gain: Mapping[str, Any], confidence: float) -> str:
    """One honest sentence on a gain of the reward."""
    percent = "" if gain["percent"] is None else f" ({gain['percent']:+.0f} %)"
    interval = f"{confidence:.0%} interval {gain['low']:+.2f} to {gain['high']:+.2f} over {gain['n']} prompts"
    if not gain["distinguishable"]:
        return (
            f"The reward moved from {gain['before']:.2f} to {gain['after']:.2f}, {gain['mean']:+.2f}{percent}, "
            f"which is not distinguishable from zero ({interval})."
        )
    word = "rose" if gain["mean"] > 0 else "fell"
    return (
        f"The reward {word} from {gain['before']:.2f} to {gain['after']:.2f}, {gain['mean']:+.2f}{percent} "
        f"({interval}); {gain['win_rate']:.0%} of the prompts gained."
    )
