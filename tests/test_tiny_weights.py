"""The shipped weights: they load as the published classes, are small, and are as good as was promised.

Quality is asserted twice: on what the build measured (``metrics.json``), and measured anew on small samples. A
small sample of a good model may fall a little below a limit, so a share measured anew counts as kept unless
it would be that low in less than 1 % of the samples of a model that is exactly at the limit.
"""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from open_clip import CLIP
from safetensors import safe_open
from scipy.stats import binom
from transformers import (
    AutoTokenizer,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)

from grpo_engine.config import RunConfig
from grpo_engine.image_model import ImageModel, StableDiffusion3
from grpo_engine.loading import load_images, load_policy, load_reward
from grpo_engine.policy import PureGRPOPolicy
from grpo_engine.reward import ClipScorer, RewardModel
from grpo_engine.tiny import WEIGHTS
from grpo_engine.tiny.checker import KINDS
from grpo_engine.tiny.measure import (
    measure_answers,
    measure_autoencoder,
    measure_checker,
    measure_clip,
    measure_images,
    measure_policy,
)
from grpo_engine.tiny.world import RESOLUTION

CPU = torch.device("cpu")
MEGABYTE = 10**6

# Part and name of each measurement in metrics.json, and the least it may be.
LEAST = {
    ("checker", "attributes"): 0.99,
    ("autoencoder", "psnr_db"): 32.0,
    ("clip", "right_among_100_captions"): 0.90,
    ("clip", "right_among_100_paraphrases"): 0.90,
    ("image_model", "single_caption_names_right"): 0.90,
    ("image_model", "pair_caption_names_right"): 0.75,
    ("policy", "distinct_of_8"): 5.0,
    ("policy", "right_share"): 0.05,
    ("policy", "yes_no_accuracy"): 0.85,
}


@dataclass(frozen=True)
class Loaded:
    """The three models as a run loads them, and the network addresses that loading asked for."""

    policy: PureGRPOPolicy
    images: ImageModel
    reward: RewardModel
    asked: list[Any]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    asked: list[Any] = []

    def refuse(_socket: socket.socket, address: Any) -> None:
        asked.append(address)
        raise OSError("there is no network")

    config = RunConfig.load("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        return Loaded(load_policy(config, CPU), load_images(config, CPU), load_reward(config, CPU), asked)


@pytest.fixture(scope="module")
def metrics() -> dict[str, Any]:
    """What the build measured."""
    path = WEIGHTS / "metrics.json"
    assert path.exists(), f"{path} is missing; 'python -m grpo_engine.tiny.build --measure' writes it"
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["metrics"]
    return report


def kept(share: float, limit: float, count: int) -> bool:
    """Whether ``share`` of ``count`` is too much to reject that the true share is at least ``limit``, at 1 %."""
    return round(share * count) >= int(binom.ppf(0.01, count, limit))


# -- the folders ---------------------------------------------------------------------------------------------


def weight_files() -> list[Path]:
    return sorted(WEIGHTS.rglob("*.safetensors"))


def test_weights_are_small_enough_to_ship() -> None:
    sizes = [path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(sizes) <= 40 * MEGABYTE


def test_weights_are_half_precision_safetensors_and_nothing_else() -> None:
    assert {path.parent.relative_to(WEIGHTS).as_posix() for path in weight_files()} == {
        "policy",
        "reward",
        "image/text_encoder",
        "image/text_encoder_2",
        "image/transformer",
        "image/vae",
    }
    assert {path.suffix for path in WEIGHTS.rglob("*") if path.is_file()} <= {".safetensors", ".json", ".jinja", ".md"}
    for path in weight_files():
        with safe_open(path, framework="pt") as tensors:
            values = [tensors.get_tensor(name) for name in tensors.keys()]  # noqa: SIM118 - not a dict
        assert {value.dtype for value in values if value.is_floating_point()} == {torch.float16}, path
        assert all(bool(torch.isfinite(value).all()) for value in values), path


def test_folders_load_as_the_published_classes_without_a_network(loaded: Loaded) -> None:
    policy: Any = loaded.policy
    assert type(policy.model.get_base_model()) is Qwen2VLForConditionalGeneration
    assert type(policy.processor) is Qwen2VLProcessor
    assert isinstance(loaded.images, StableDiffusion3)
    pipeline = loaded.images.pipeline
    classes = {name: type(part) for name, part in pipeline.components.items() if part is not None}
    assert classes == {
        "transformer": SD3Transformer2DModel,
        "scheduler": FlowMatchEulerDiscreteScheduler,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
        "tokenizer": CLIPTokenizer,
        "tokenizer_2": CLIPTokenizer,
    }
    assert type(pipeline) is StableDiffusion3Pipeline
    assert isinstance(loaded.reward.scorer, ClipScorer)
    assert type(loaded.reward.scorer.model) is CLIP
    assert loaded.asked == []


def test_each_model_has_a_row_for_each_token_of_its_tokenizer(loaded: Loaded) -> None:
    policy, images, scorer = loaded.policy, loaded.images, loaded.reward.scorer
    assert isinstance(images, StableDiffusion3) and isinstance(scorer, ClipScorer)
    assert policy.model.get_input_embeddings().weight.shape[0] == len(policy.tokenizer)
    for encoder, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        config = getattr(images.pipeline, encoder).config
        words = getattr(images.pipeline, tokenizer)
        assert config.vocab_size == len(words)
        assert config.eos_token_id == words.eos_token_id
        assert config.max_position_embeddings == words.model_max_length
    clip_words = AutoTokenizer.from_pretrained(WEIGHTS / "reward")
    assert scorer.model.token_embedding.weight.shape[0] == len(clip_words)
    assert scorer.model.visual.image_size == (RESOLUTION, RESOLUTION)


# -- what the build measured ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "name"), LEAST, ids="-".join)
def test_recorded_quality_is_as_promised(metrics: dict[str, Any], part: str, name: str) -> None:
    assert metrics[part][name] >= LEAST[part, name]


def test_recorded_checker_is_right_on_every_kind_of_attribute(metrics: dict[str, Any]) -> None:
    shares = metrics["checker"]["by_kind"]
    assert set(shares) == set(KINDS) and min(shares.values()) >= 0.99


@pytest.mark.parametrize("scenes", ["single", "pair"])
def test_recorded_images_of_raw_prompts_are_less_than_half_as_often_right(metrics: dict[str, Any], scenes: str) -> None:
    images = metrics["image_model"]
    assert images[f"{scenes}_paraphrase_names_right"] < 0.5 * images[f"{scenes}_caption_names_right"]


def test_recorded_policy_leaves_something_to_learn(metrics: dict[str, Any]) -> None:
    assert metrics["policy"]["right_share"] <= 0.35


# -- measured anew -------------------------------------------------------------------------------------------


def test_checker_measures_as_recorded(metrics: dict[str, Any]) -> None:
    measured = measure_checker(300)
    assert measured["attributes"] >= 0.99
    assert measured["attributes"] == pytest.approx(metrics["checker"]["attributes"], abs=0.005)


def test_autoencoder_keeps_held_out_pictures(loaded: Loaded) -> None:
    assert measure_autoencoder(loaded.images, 64)["psnr_db"] >= LEAST["autoencoder", "psnr_db"]


def test_reward_finds_the_right_text_among_a_hundred(loaded: Loaded) -> None:
    measured = measure_clip(loaded.reward, 200)
    assert kept(measured["right_among_100_captions"], 0.90, 200), measured
    assert kept(measured["right_among_100_paraphrases"], 0.90, 200), measured


def test_images_show_what_captions_name_and_seldom_what_raw_prompts_name(loaded: Loaded) -> None:
    count = 32
    measured = measure_images(loaded.images, count)
    assert kept(measured["single_caption_names_right"], 0.90, count), measured
    assert kept(measured["pair_caption_names_right"], 0.75, count), measured
    raw = measured["single_paraphrase_names_right"] + measured["pair_paraphrase_names_right"]
    told = measured["single_caption_names_right"] + measured["pair_caption_names_right"]
    assert raw < 0.5 * told, measured


def test_policy_writes_variously_and_seldom_rightly(loaded: Loaded) -> None:
    count = 80
    measured = measure_policy(loaded.policy, count)
    assert measured["distinct_of_8"] >= LEAST["policy", "distinct_of_8"], measured
    assert 0.05 <= measured["right_share"] <= 0.35, measured


def test_policy_answers_questions_about_pictures_rightly(loaded: Loaded) -> None:
    count = 240
    measured = measure_answers(loaded.policy, count)
    assert kept(measured["yes_no_accuracy"], LEAST["policy", "yes_no_accuracy"], count), measured


def test_no_kind_of_change_goes_unnoticed(metrics: dict[str, Any]) -> None:
    """Once a policy that told colours apart, and nothing else, passed for one that sees."""
    noticed = {name: value for name, value in metrics["policy"].items() if name.startswith("noticed_")}
    assert len(noticed) == 7 and min(noticed.values()) > 0.25, noticed
