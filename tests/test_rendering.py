"""What is rendered together, what is remembered, and that neither changes a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_engine.environment import PureGRPOPromptEnvironment
from grpo_engine.evaluation import Evaluator
from grpo_engine.image_model import ImageModel, RenderJob
from grpo_engine.pipeline import HERE
from grpo_engine.policy import Poll, no_poll
from grpo_engine.prompts import Prompt
from grpo_engine.rendering import RenderCache, batch_limit, evenly, render_all, tapered
from grpo_engine.rollout import Picture


@given(st.integers(1, 300), st.integers(1, 8), st.integers(1, 40))
def test_replicas_get_equal_shares_and_no_batch_is_too_large(total: int, replicas: int, most: int) -> None:
    limit = batch_limit(total, replicas, most)
    assert 1 <= limit <= most
    batches = evenly([RenderJob(str(index), 0) for index in range(total)], limit)
    assert [job.text for batch in batches for job in batch] == list(map(str, range(total)))
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= limit
    assert max(sizes) - min(sizes) <= 1
    rounds = -(-len(batches) // replicas)
    assert rounds == -(-total // (replicas * most)), "more rounds than the memory asks for"


def test_four_replicas_get_a_quarter_each() -> None:
    jobs = [RenderJob(str(index), 0) for index in range(32)]
    assert [len(batch) for batch in evenly(jobs, batch_limit(32, 4, 32))] == [8, 8, 8, 8]
    assert [len(batch) for batch in evenly(jobs, batch_limit(32, 1, 32))] == [32]
    assert evenly([], 4) == []


@given(st.integers(1, 200), st.integers(0, 50), st.integers(1, 8), st.integers(1, 40))
def test_the_last_batches_of_several_replicas_are_ever_smaller(
    count: int, more: int, replicas: int, limit: int
) -> None:
    jobs = [RenderJob(str(index), 0) for index in range(count)]
    left = count + more
    parts = tapered(jobs, left, replicas, limit)
    assert [job for part in parts for job in part] == jobs
    sizes = [len(part) for part in parts]
    assert all(1 <= size <= limit for size in sizes)
    if replicas == 1 or left > replicas * limit:
        assert parts == evenly(jobs, limit)
    else:
        assert sizes == sorted(sizes, reverse=True)
        assert more or sizes[-1] == 1
        assert all(size <= max(1, -(-left // (2 * replicas))) for size in sizes)


def test_the_last_round_of_four_replicas_by_hand() -> None:
    jobs = [RenderJob(str(index), 0) for index in range(16)]
    assert [len(part) for part in tapered(jobs, 16, 4, 4)] == [2] * 4 + [1] * 8
    assert [len(part) for part in tapered(jobs, 17, 4, 4)] == [4] * 4
    assert [len(part) for part in tapered(jobs, 16, 1, 16)] == [16]


class Numbered:
    """Paints the number of the call: a picture says which rendering it is from."""

    def __init__(self) -> None:
        self.batches: list[list[RenderJob]] = []

    def render(self, jobs: Sequence[RenderJob], *, poll: Poll = no_poll) -> list[Picture]:
        self.batches.append(list(jobs))
        return [np.full((10, 10, 3), len(self.batches), np.uint8) for _ in jobs]

    def cut_tokens(self, text: str) -> int:
        return 0

    def told(self, kind: str, message: str) -> None:
        raise AssertionError(f"{kind}: {message}")


SIZE = 300  # bytes of such a picture


def jobs_of(texts: str) -> list[RenderJob]:
    return [RenderJob(text, 1) for text in texts]


def test_a_batch_is_rendered_once_and_each_of_its_pictures_once() -> None:
    model, cache = Numbered(), RenderCache(100 * SIZE)
    models: list[tuple[None, ImageModel]] = [(HERE, model)]  # type: ignore[list-item]
    first = render_all(jobs_of("abab"), models, 8, cache)
    again = render_all(jobs_of("ab"), models, 8, cache)
    assert model.batches == [jobs_of("ab")]
    assert first[0] is first[2] is again[0]
    assert cache.hits == 2
    render_all(jobs_of("a"), models, 8, cache)
    assert model.batches[1:] == [jobs_of("a")], "alone, its last bits may round differently"


def test_other_latents_or_words_are_other_pictures() -> None:
    model, cache = Numbered(), RenderCache(100 * SIZE)
    for job in (RenderJob("a", 1), RenderJob("a", 2), RenderJob("b", 1), RenderJob("a", 1)):
        render_all([job], [(HERE, model)], 8, cache)
    assert len(model.batches) == 3


@settings(max_examples=100, deadline=None)
@given(
    limit=st.integers(0, 6),
    asked=st.lists(st.text("abcd", min_size=1, max_size=3).map(lambda t: "".join(sorted(set(t)))), max_size=20),
)
def test_the_cache_forgets_the_least_recently_used_and_never_exceeds_its_size(limit: int, asked: list[str]) -> None:
    cache = RenderCache(limit * SIZE)
    model = Numbered()
    kept: list[str] = []  # the most recent last
    for texts in asked:
        known = texts in kept
        before = len(model.batches)
        render_all(jobs_of(texts), [(HERE, model)], 8, cache)
        assert (len(model.batches) == before) == known
        kept = [one for one in kept if one != texts]
        if len(texts) <= limit:
            kept.append(texts)
        while sum(map(len, kept)) > limit:
            kept.pop(0)


Rebuilt = Callable[..., PureGRPOPromptEnvironment]


@pytest.mark.parametrize("megabytes", [0, 1])
def test_an_evaluation_on_the_same_prompts_and_latents_gets_its_pictures_from_memory(
    rebuilt: Rebuilt, prompts: list[Prompt], megabytes: int
) -> None:
    environment = rebuilt(
        "models.image.steps=1", "evaluation.images_per_prompt=1", "evaluation.samples=1", "evaluation.judge=none",
        f"models.image.cache_mb={megabytes}",
    )  # fmt: skip
    evaluator = Evaluator(environment, None, prompts[:2], environment.config)

    def measured() -> list[tuple[float, bytes]]:
        items = [item for arm in evaluator.arms(trained=False) for item in evaluator.measure(arm)]
        return [(item.score.total, b"" if item.picture is None else item.picture.tobytes()) for item in items]

    first = measured()
    hits = environment.cache.hits
    assert measured() == first
    drawn = sum(bool(picture) for _, picture in first)
    assert environment.cache.hits - hits == (drawn if megabytes else 0)
