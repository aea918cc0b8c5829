"""The image model renders repeatably and stops when asked; the reward is 100 x cosine, weighted by parts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from grpo_engine.config import ImageModelConfig, RewardModelConfig, RewardWeights
from grpo_engine.environment import PureGRPOPromptEnvironment
from grpo_engine.image_model import RenderJob, StableDiffusion3, read_length
from grpo_engine.loading import model_folder
from grpo_engine.reward import ClipScorer, RewardModel
from grpo_engine.rollout import Picture
from grpo_engine.seeding import normals

Rebuilt = Callable[..., PureGRPOPromptEnvironment]
Counted = Callable[[Any], list[int]]

JOBS = [RenderJob("a red circle", 1), RenderJob("a blue square", 1), RenderJob("a red circle", 2)]


@pytest.fixture
def images(environment: PureGRPOPromptEnvironment) -> Callable[..., StableDiffusion3]:
    """``images(steps=1, ...)``: the embedded pipeline with other settings and nothing cached."""
    loaded = environment.images
    assert isinstance(loaded, StableDiffusion3)
    settings = loaded.config.model_dump()
    return lambda **changes: StableDiffusion3(loaded.pipeline, ImageModelConfig(**(settings | changes)))


@pytest.fixture
def scorer(environment: PureGRPOPromptEnvironment) -> ClipScorer:
    found = environment.reward.scorer
    assert isinstance(found, ClipScorer)
    return found


def noise(count: int, side: int = 96) -> list[Picture]:
    """Random pictures, smooth enough for resizing to be meaningful."""
    generator = np.random.default_rng(side)
    small = generator.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    return [np.array(Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC)) for one in small]


# -- rendering ------------------------------------------------------------------------------------------


def test_rendering_repeats_bit_for_bit(images: Callable[..., StableDiffusion3]) -> None:
    first = images().render(JOBS)
    torch.manual_seed(99)  # nothing may come from the global generator
    again = images().render(JOBS)
    for one, other in zip(first, again, strict=True):
        assert one.dtype == np.uint8 and one.shape == (96, 96, 3)
        assert np.array_equal(one, other)
    assert not np.array_equal(first[0], first[1])  # another text
    assert not np.array_equal(first[0], first[2])  # another latent


def test_what_was_rendered_before_never_changes_a_picture(
    images: Callable[..., StableDiffusion3], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = images().render(JOBS)
    used = images()
    used.render([RenderJob("two large stars on black", 5), RenderJob("a blue square", 9)])
    assert all(np.array_equal(a, b) for a, b in zip(used.render(JOBS), expected, strict=True))
    forgetful = images()
    monkeypatch.setattr(forgetful, "EMBEDDING_CACHE", 1)
    for _ in range(2):
        assert all(np.array_equal(a, b) for a, b in zip(forgetful.render(JOBS), expected, strict=True))


def test_each_distinct_job_is_rendered_once_in_batches_of_the_configured_size(
    images: Callable[..., StableDiffusion3], counted: Counted
) -> None:
    model = images(batch_size=2, guidance=1.0, steps=1)
    sizes = counted(model.pipeline.transformer)
    pictures = model.render([*JOBS, *JOBS[::-1], JOBS[1]])
    assert sizes == [2, 1]
    assert pictures[0] is pictures[5] and pictures[1] is pictures[4] is pictures[6] and pictures[2] is pictures[3]
    assert model.render([]) == []


def test_a_picture_begins_from_the_noise_of_its_own_seed(images: Callable[..., StableDiffusion3]) -> None:
    model = images(guidance=1.0, steps=1)
    starts: list[torch.Tensor] = []
    transformer = model.pipeline.transformer
    handle = transformer.register_forward_pre_hook(
        lambda _module, _inputs, named: starts.append(named["hidden_states"]), with_kwargs=True
    )
    model.render(JOBS)
    handle.remove()
    (start,) = starts
    for row, job in zip(start, JOBS, strict=True):
        assert torch.equal(row, normals(job.latent_seed, row.shape).to(row.dtype))


def test_guidance_steers_away_from_the_negative_prompt(
    images: Callable[..., StableDiffusion3], counted: Counted
) -> None:
    sizes = counted(images().pipeline.transformer)
    (free,) = images(guidance=1.0, steps=1, negative_prompt="blue").render(JOBS[:1])
    assert sizes == [1]
    (plain,) = images(guidance=4.0, steps=1).render(JOBS[:1])
    assert sizes == [1, 2]  # with and without the text
    (steered,) = images(guidance=4.0, steps=1, negative_prompt="a blue square").render(JOBS[:1])
    assert not np.array_equal(free, plain)
    assert not np.array_equal(plain, steered)


def test_the_resolution_is_the_side_of_the_picture(images: Callable[..., StableDiffusion3]) -> None:
    (picture,) = images(resolution=64, steps=1).render(JOBS[:1])
    assert picture.shape == (64, 64, 3)


def test_poll_stops_rendering_at_once_and_leaves_the_model_usable(
    images: Callable[..., StableDiffusion3], counted: Counted
) -> None:
    model = images(steps=4)
    expected = model.render(JOBS[:1])[0]
    passes = counted(model.pipeline.transformer)

    class Halt(Exception):
        """Raised by the poll below."""

    for allowed in (0, 1, 3):
        passes.clear()
        left = itertools.count(allowed, -1)

        def poll(left: Any = left) -> None:
            if next(left) == 0:
                raise Halt

        with pytest.raises(Halt):
            model.render(JOBS[:1], poll=poll)
        assert len(passes) == allowed  # asked before the first denoising step and after each
    assert np.array_equal(model.render(JOBS[:1])[0], expected)


def test_words_beyond_the_image_models_limit_are_counted_and_unseen(images: Callable[..., StableDiffusion3]) -> None:
    model = images()
    tokenizer = model.pipeline.tokenizer
    room = tokenizer.model_max_length - 2  # the start and the end token
    assert len(tokenizer("red").input_ids) == 3
    for words, cut in ((1, 0), (room, 0), (room + 1, 1), (room + 8, 8)):
        assert model.cut_tokens(" ".join(["red"] * words)) == cut
    assert model.cut_tokens("") == 0
    full = " ".join(["red"] * room)
    whole, longer = model.render([RenderJob(full, 1), RenderJob(f"{full} blue star", 1)])
    assert np.abs(whole.astype(int) - longer.astype(int)).max() <= 1
    shorter, changed = model.render(
        [RenderJob(" ".join(["red"] * (room - 1)), 1), RenderJob(" ".join(["red"] * (room - 1) + ["star"]), 1)]
    )
    assert not np.array_equal(shorter, changed)  # the last word within the limit is read


def test_what_is_read_of_a_text_ends_where_its_cut_tail_begins(images: Callable[..., StableDiffusion3]) -> None:
    model = images()
    room = model.pipeline.tokenizer.model_max_length - 2
    full = " ".join(["red"] * room)
    for text in ("", "a red ring", full):
        assert read_length(text, model.cut_tokens) == len(text)
    assert read_length(f"{full} blue star", model.cut_tokens) == len(full)
    odd = "red " * (room - 1) + "redbluestar and more"  # a word of several tokens, of which the first fits
    read = read_length(odd, model.cut_tokens)
    assert model.cut_tokens(odd[:read]) == 0 < model.cut_tokens(odd[: read + 1])
    assert 4 * (room - 1) < read < len(odd) - len(" and more")


@given(st.lists(st.text("abc", min_size=1, max_size=9), max_size=12), st.integers(0, 30))
def test_the_end_that_is_not_read_is_found_for_any_tokens_inside_words(words: list[str], limit: int) -> None:
    text = "  ".join(words)

    def cut_tokens(said: str) -> int:
        return max(0, sum(math.ceil(len(word) / 2) for word in said.split()) - limit)

    read = read_length(text, cut_tokens)
    assert cut_tokens(text[:read]) == 0
    assert read == len(text) or cut_tokens(text[: read + 1]) > 0 or not text[read : read + 1].strip()
    assert (read == len(text)) == (cut_tokens(text) == 0)


# -- the CLIP score -------------------------------------------------------------------------------------


def test_the_score_is_a_hundred_times_the_cosine_of_open_clip(scorer: ClipScorer) -> None:
    name = f"local-dir:{model_folder('tiny', 'reward')}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    texts, pictures = ["a red circle", "two small blue stars on white", "a red circle"], noise(3)
    with torch.no_grad():
        seen = model.encode_image(torch.stack([preprocess(Image.fromarray(picture)) for picture in pictures]))
        read = model.encode_text(open_clip.get_tokenizer(name)(texts))
    cosine = (seen * read).sum(dim=1) / (seen.norm(dim=1) * read.norm(dim=1))
    scores = scorer.score(pictures, texts)
    assert scores == pytest.approx((100 * cosine).tolist(), abs=1e-3)
    assert len(set(scores)) == 3


def test_batching_and_caching_never_change_a_score(scorer: ClipScorer) -> None:
    pictures, texts = noise(5), ["a red circle", "a star", "a red circle", "a blue square", "a star"]
    small = ClipScorer(scorer.model, scorer.tokenizer, scorer.device, 2)
    expected = scorer.score(pictures, texts)
    assert small.score(pictures, texts) == pytest.approx(expected, abs=1e-3)
    assert small.score(pictures[::-1], texts[::-1]) == pytest.approx(expected[::-1], abs=1e-3)
    assert small.score([], []) == []


@pytest.mark.parametrize("side", [64, 160])
def test_pictures_of_another_size_are_resized_as_open_clip_does(scorer: ClipScorer, side: int) -> None:
    pictures, texts = noise(3, side), ["a red circle", "a large blue star", "a green square"]
    size = scorer.model.visual.image_size
    size = size[0] if isinstance(size, tuple) else size
    assert size != side
    resized = [
        transforms.resize(
            torch.from_numpy(picture).permute(2, 0, 1).float() / 255,
            [size, size],
            InterpolationMode.BICUBIC,
            antialias=True,
        )
        for picture in pictures
    ]
    mean, std = scorer.model.visual.image_mean, scorer.model.visual.image_std
    batch = torch.stack([transforms.normalize(one.clamp(0, 1), mean, std) for one in resized])
    with torch.no_grad():
        seen = scorer.model.encode_image(batch)
        read = scorer.model.encode_text(scorer.tokenizer(texts))
    cosine = torch.nn.functional.cosine_similarity(seen, read)
    scores = scorer.score(pictures, texts)
    assert scores == pytest.approx((100 * cosine).tolist(), abs=1e-3)
    _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{model_folder('tiny', 'reward')}")
    with torch.no_grad():  # Pillow resizes whole numbers, so this agrees to their rounding
        seen = scorer.model.encode_image(torch.stack([preprocess(Image.fromarray(one)) for one in pictures]))
    cosine = torch.nn.functional.cosine_similarity(seen, read)
    assert scores == pytest.approx((100 * cosine).tolist(), abs=1.0)


# -- the weighted reward --------------------------------------------------------------------------------


def test_the_total_is_the_weighted_sum_of_raw_parts(scorer: ClipScorer) -> None:
    pictures, prompts = noise(2), ["a red circle", "a blue square"]
    rewrites = ["one two three four five", "one two"]
    clip = scorer.score(pictures, prompts)
    config = RewardModelConfig(weights=RewardWeights(clip=0.5, length=2.0, format=3.0), length_limit=3)
    long, short = RewardModel(scorer, config).score(pictures, prompts, rewrites)
    assert long.parts == pytest.approx({"clip": clip[0], "length": -2.0, "format": 1.0}, abs=1e-3)
    assert short.parts == pytest.approx({"clip": clip[1], "length": 0.0, "format": 1.0}, abs=1e-3)
    assert long.total == pytest.approx(0.5 * clip[0] - 4.0 + 3.0, abs=1e-3)
    assert short.total == pytest.approx(0.5 * clip[1] + 3.0, abs=1e-3)


def test_by_default_the_reward_is_the_clip_score_and_other_parts_are_only_recorded(scorer: ClipScorer) -> None:
    pictures, prompts = noise(1), ["a red circle"]
    (score,) = RewardModel(scorer, RewardModelConfig(length_limit=1)).score(pictures, prompts, ["one two three"])
    assert score.total == score.parts["clip"]
    assert score.parts["length"] == -2.0 and score.parts["format"] == 1.0


def test_rollouts_without_a_picture_keep_their_place(scorer: ClipScorer) -> None:
    pictures, prompts = noise(3), ["a red circle", "a star", "a blue square"]
    config = RewardModelConfig(failure=-7.0, weights=RewardWeights(format=5.0))
    first, missing, last = RewardModel(scorer, config).score(
        [pictures[0], None, pictures[2]], prompts, ["a", None, "b"]
    )
    assert missing.total == -7.0 and missing.parts == {"format": 0.0}
    expected = scorer.score([pictures[0], pictures[2]], [prompts[0], prompts[2]])
    assert [first.parts["clip"], last.parts["clip"]] == pytest.approx(expected, abs=1e-3)
    assert first.total == pytest.approx(expected[0] + 5.0, abs=1e-3)


def test_a_picture_that_rollouts_share_is_looked_at_once_for_each_prompt(scorer: ClipScorer) -> None:
    one, other = noise(2)
    seen: list[int] = []

    class Counting:
        def score(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> list[float]:
            seen.append(len(pictures))
            return scorer.score(pictures, prompts)

    pictures, prompts = [one, other, one, None, one], ["a star", "a star", "a star", "a star", "a red circle"]
    scores = RewardModel(Counting(), RewardModelConfig()).score(pictures, prompts, ["a", "b", "a", None, "a"])
    assert seen == [3]
    alone = scorer.score([one, other, one], ["a star", "a star", "a red circle"])
    assert [score.parts.get("clip") for score in scores] == pytest.approx(
        [alone[0], alone[1], alone[0], None, alone[2]], abs=1e-3
    )
    assert scores[0].parts["clip"] == scores[2].parts["clip"]
