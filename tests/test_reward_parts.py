"""Reward models by name, file and family, and the reward's parts that have a model of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from engine_runs import fresh_environment, small, trainer
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from grpo_engine.config import ConfigError, RewardModelConfig, RunConfig
from grpo_engine.environment import PureGRPOPromptEnvironment
from grpo_engine.judge import VqaJudge
from grpo_engine.loading import load_reward, prompt_token_limit
from grpo_engine.plan import Plan
from grpo_engine.prompts import Prompt
from grpo_engine.reward import AestheticScorer, ClipScorer, RewardModel, load_clip_scorer, load_head, with_its_gelu
from grpo_engine.rollout import Picture

CPU = torch.device("cpu")
TEXTS = ["a red circle", "two small blue stars", "a red circle"]
TOWERS = {
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "embed_dim": 24,
}


def pictures(count: int = 3, side: int = 96) -> list[Picture]:
    generator = np.random.default_rng(side)
    small = generator.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    return [np.array(Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC)) for one in small]


def with_seed(build: Callable[[], Any], seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)  # what starts at zero gets something to say
    return model.eval()


# -- SigLIP --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SigLIP as open_clip publishes it, small: a timm tower, text read whole, a tokenizer of its own, 64 tokens."""
    folder = tmp_path_factory.mktemp("siglip")
    settings = {
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 160,
            "timm_model_name": "test_vit",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "none",
        },
        "text_cfg": {
            "context_length": 64,
            "vocab_size": 40,
            "hf_tokenizer_name": "timm/small-SigLIP",
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "width": 64,
            "heads": 2,
            "layers": 2,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
        },
    }
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    about = {"model_cfg": settings, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    towers = {name: value for name, value in settings.items() if name != "custom_text"}
    model = with_seed(lambda: open_clip.model.CustomTextCLIP(**towers))
    save_file({name: value.contiguous() for name, value in model.state_dict().items()},
              folder / "open_clip_model.safetensors")  # fmt: skip
    words = ["<pad>", "</s>", "<unk>", *sorted({word for text in TEXTS for word in text.split()}), "on", "white"]
    inner = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    inner.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="</s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def test_siglip_scores_a_hundred_times_the_cosine_with_its_own_tokenizer(siglip: Path) -> None:
    config = small(f"models.reward.path={siglip}")
    reward = load_reward(config, CPU)
    assert isinstance(reward.scorer, ClipScorer)
    ids = reward.scorer.tokenizer([TEXTS[0]])
    assert ids.shape == (1, 64)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{siglip}")
    model.eval()
    with torch.no_grad():
        seen = model.encode_image(torch.stack([preprocess(Image.fromarray(one)) for one in pictures(3, 160)]))
        read = model.encode_text(open_clip.get_tokenizer(f"local-dir:{siglip}")(TEXTS))
    expected = 100 * torch.nn.functional.cosine_similarity(seen, read)
    scores = reward.scorer.score(pictures(3, 160), TEXTS)
    assert scores == pytest.approx(expected.tolist(), abs=1e-3)
    assert len({round(score, 3) for score in scores}) == 3
    other = reward.scorer.score(pictures(3, 160), ["two small blue stars"] * 3)
    assert other[0] != pytest.approx(scores[0], abs=1e-3)  # the words are read
    assert reward.scorer.score(pictures(3, 160), ["a, RED circle!"] * 3)[0] == pytest.approx(
        reward.scorer.score(pictures(3, 160), ["a red circle"] * 3)[0], abs=1e-4
    )  # its tokenizer drops punctuation and case


def test_a_prompts_length_is_counted_as_siglip_reads_it(siglip: Path) -> None:
    count = prompt_token_limit(small(f"models.reward.path={siglip}"))
    assert count("a red circle") == (4, 64)  # and the end token
    assert count("a, red; circle!!") == (4, 64)
    assert count(" ".join(["red"] * 64)) == (65, 64)


# -- names, tags and files -----------------------------------------------------------------------------------


@pytest.fixture
def named(tmp_path: Path) -> Iterator[Path]:
    """Two models that open_clip knows by name, with and without QuickGELU, and the file of their weights."""
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    known = dict(open_clip.factory._MODEL_CONFIGS)
    for name, quick in (("small-clip", False), ("small-clip-quickgelu", True)):
        settings = TOWERS | {"text_cfg": text, "quick_gelu": quick}
        (tmp_path / f"{name}.json").write_text(json.dumps(settings))
        open_clip.add_model_config(tmp_path / f"{name}.json")
    model = with_seed(lambda: open_clip.create_model("small-clip"))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    yield tmp_path / "weights.pt"
    open_clip.factory._MODEL_CONFIGS.clear()
    open_clip.factory._MODEL_CONFIGS.update(known)


def test_weights_may_be_a_file(named: Path) -> None:
    config = small("models.reward.path=small-clip", f"models.reward.pretrained={named}")
    Plan(config)
    scorer = load_reward(config, CPU).scorer
    assert isinstance(scorer, ClipScorer)
    stored = torch.load(named, weights_only=True)
    for name, value in scorer.model.state_dict().items():
        torch.testing.assert_close(value, stored[name])
    settings = config.models.reward
    quick = load_clip_scorer("small-clip-quickgelu", settings, CPU, torch.float32)
    plain = scorer.score(pictures(), TEXTS)
    assert quick.score(pictures(), TEXTS) != pytest.approx(plain, abs=1e-4)  # the name says which GELU


@pytest.mark.parametrize(
    ("name", "tag", "expected"),
    [
        ("ViT-B-32", "openai", "ViT-B-32-quickgelu"),
        ("ViT-L-14", "openai", "ViT-L-14-quickgelu"),
        ("ViT-H-14", "dfn5b", "ViT-H-14-quickgelu"),
        ("ViT-B-32-quickgelu", "metaclip_400m", "ViT-B-32-quickgelu"),
        ("ViT-B-32", "laion2b_s34b_b79k", "ViT-B-32"),
        ("ViT-B-16-SigLIP", "webli", "ViT-B-16-SigLIP"),
        ("local-dir:/somewhere", "", "local-dir:/somewhere"),
    ],
)
def test_weights_meet_the_activation_they_were_trained_with(name: str, tag: str, expected: str) -> None:
    assert with_its_gelu(name, tag) == expected


def test_a_model_that_would_score_with_random_weights_is_refused() -> None:
    for tag, said in (
        ("", "is empty, but ViT-B-32 needs weights"),
        ("opnai", "is 'opnai', which is no file and no tag"),
    ):
        with pytest.raises(ConfigError, match=rf"models.reward.pretrained {said}.*use one of its tags \(openai, "):
            Plan(small("models.reward.path=ViT-B-32", f"models.reward.pretrained={tag}"))


# -- the aesthetic head --------------------------------------------------------------------------------------


@pytest.fixture
def clip(environment: PureGRPOPromptEnvironment) -> ClipScorer:
    assert isinstance(environment.reward.scorer, ClipScorer)
    return environment.reward.scorer


def laion(width: int) -> nn.Sequential:
    """LAION's second predictor: linear layers and dropout, numbered with gaps, nothing else between them."""
    sizes = [width, 32, 16, 8, 4, 1]
    parts: list[nn.Module] = []
    for place, (wide, high) in enumerate(zip(sizes, sizes[1:], strict=False)):
        parts += [nn.Linear(wide, high), *([nn.Dropout(0.1)] if place < 3 else [])]
    return nn.Sequential(*parts)


def test_the_aesthetic_part_is_what_its_head_says_of_the_embedding(clip: ClipScorer, tmp_path: Path) -> None:
    embedded = clip.embed(pictures())
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(3))
    width = embedded.shape[1]
    one, many = with_seed(lambda: nn.Linear(width, 1)), with_seed(lambda: laion(width), 1)
    save_file(one.state_dict(), tmp_path / "one.safetensors")
    torch.save({f"layers.{name}": value for name, value in many.state_dict().items()}, tmp_path / "many.pth")
    for head, file in ((one, "one.safetensors"), (many, "many.pth")):
        with torch.no_grad():
            expected: Tensor = head(embedded)[:, 0]
        small_batches = ClipScorer(clip.model, clip.tokenizer, clip.device, 2)
        scorer = AestheticScorer(small_batches, *load_head(tmp_path / file, file), file)
        assert scorer.score(pictures(), TEXTS) == pytest.approx(expected.tolist(), abs=1e-4)
        assert scorer.score([], []) == []


def test_a_head_for_another_model_or_of_another_kind_is_refused(clip: ClipScorer, tmp_path: Path) -> None:
    save_file(nn.Linear(768, 1).state_dict(), tmp_path / "l14.safetensors")
    with pytest.raises(
        ConfigError, match="reads embeddings of length 768, but those of models.reward.path have length"
    ):
        AestheticScorer(clip, *load_head(tmp_path / "l14.safetensors", "l14"), "l14")
    for name, tensors in (
        ("two", nn.Linear(8, 2).state_dict()),
        ("norm", nn.LayerNorm(8).state_dict()),
        ("none", {"x": torch.zeros(2)}),
        ("torn", nn.Sequential(nn.Linear(8, 4), nn.Linear(3, 1)).state_dict()),
    ):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(ConfigError, match=f"{name}' holds no linear head with one output"):
            load_head(tmp_path / f"{name}.safetensors", name)
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ConfigError, match="can't be read as a file of weights"):
        load_head(tmp_path / "text.pth", "text.pth")
    with pytest.raises(ConfigError, match="there is no such file"):
        Plan(small("models.reward.aesthetic=heads/none.pth"))
    with pytest.raises(ConfigError, match="weights.aesthetic is not 0, but no head is named"):
        small("models.reward.weights.aesthetic=1")


# -- the policy as a reward ----------------------------------------------------------------------------------


def test_parts_with_a_model_are_weighed_recorded_and_only_then_computed(
    environment: PureGRPOPromptEnvironment, tmp_path: Path
) -> None:
    clip = environment.reward.scorer
    assert isinstance(clip, ClipScorer)
    head = with_seed(lambda: nn.Linear(clip.embed(pictures(1)).shape[1], 1))
    save_file(head.state_dict(), tmp_path / "head.safetensors")
    config = small(
        f"models.reward.aesthetic={tmp_path / 'head.safetensors'}", "models.reward.weights.vqa=50", "training.steps=1",
        "models.reward.weights.aesthetic=2", "training.learning_rate=1e-2",
    )  # fmt: skip
    loaded = fresh_environment(config)
    assert loaded.reward.uses_policy and not environment.reward.uses_policy
    trained, recorder = trainer(config, loaded=loaded)
    trained.train()
    (metrics,) = recorder.metrics
    scores = [score for group in recorder.groups[0] for score in group.scores if "clip" in score.parts]
    for name in ("clip", "aesthetic", "vqa"):
        assert metrics[f"reward_{name}"] == pytest.approx(np.mean([score.parts[name] for score in scores]))
    for score in scores:
        parts = score.parts
        assert score.total == pytest.approx(parts["clip"] + 2 * parts["aesthetic"] + 50 * parts["vqa"])
    group = recorder.groups[0][0]
    shown = [(k, picture) for k, picture in enumerate(group.pictures) if picture is not None]
    answers = VqaJudge(loaded.policy).judge([p for _, p in shown], [group.prompt] * len(shown))  # adapter off
    assert [group.scores[k].parts["vqa"] for k, _ in shown] == pytest.approx([a.score for a in answers], abs=1e-6)

    plain = RewardModel(clip, RewardModelConfig())
    assert set(plain.score(pictures(1), TEXTS[:1], ["a"])[0].parts) == {"clip", "length", "format"}


def test_a_judge_that_is_part_of_the_reward_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="evaluation.judge is 'vqa', but models.reward.weights.vqa trains on"):
        small("models.reward.weights.vqa=1", "evaluation.judge=vqa")
    Plan(small("models.reward.weights.vqa=1"))  # its prompts have a checker
    plain = [
        Prompt(f"p{k}", f"a lighthouse number {k}", "basic", split) for k in range(4) for split in ("train", "test")
    ]
    rows = [{"id": f"{one.id}{one.split}", "text": f"{one.text} {one.split}", "tier": one.tier, "split": one.split}
            for one in plain]  # fmt: skip
    file = tmp_path / "plain.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    settings = RunConfig.parse(small(f"data.prompts={file}", "models.reward.weights.vqa=1").model_dump())
    with pytest.raises(ConfigError, match="evaluation.judge is 'auto', which for these prompts is 'vqa'"):
        Plan(settings)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("models.policy.quantize=4bit",), "works on a GPU only, but the policy is placed on cpu; set it to 'none'"),
        (("models.policy.quantize=4bit", "models.policy.adapter=full"), "weights of 4 bits can't be trained"),
    ],
)
def test_a_policy_of_4_bits_is_refused_where_it_cannot_work(overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Plan(small(*overrides))
