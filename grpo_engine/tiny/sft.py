"""Supervised training of the tiny Qwen2-VL: a loose rewriter that can also see.

Three lessons share the steps: rewriting (clean translations first, then the loose mixture of
``captions.loose_rewrite``, so that skill is there but seldom shown), describing a picture, and answering
whether a picture shows something. The last makes the policy with its adapter off a usable judge.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    PreTrainedTokenizerBase,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from .captions import CARELESS, LOOSE, Mixture, canonical, corrupt, fill, loose_rewrite, paraphrase
from .comparing import Comparison, named, scramble
from .corpus import Pool, draw_scene, rng_for
from .eyes import train_eyes
from .fitting import Recipe, autocast, fit
from .vocabulary import CHAT_TEMPLATE, DESCRIBE, QUESTION, TEMPLATE
from .world import RESOLUTION, Scene

PATCH, MERGE = 8, 2  # pixels a side of a patch; patches a side of what becomes one token

RECIPE = Recipe(steps=4500, batch=56, learning_rate=2e-3, weight_decay=0.01, warmup=100, ema=0.995)
CLEAN_SHARE = 0.7  # of those steps: rewriting is taught right before it is taught loose
SEEN = (16, 40)  # of those steps: pictures described, pictures asked about

# The last lesson, with eyes that see shapes: careless rewriting, and saying what is seen.
LAST = Recipe(steps=2000, batch=32, learning_rate=1e-3, weight_decay=0.01, warmup=50, decay_share=0.5, ema=0.99)
LAST_SEEN = (24, 56)

# Then judging, word by word (``comparing.py``); rewriting goes along, so that it is not forgotten.
JUDGE = Recipe(steps=1300, batch=16, learning_rate=1.2e-3, weight_decay=0.01, warmup=50, decay_share=0.4, ema=0.99)
SCRAMBLED, ASKED = 40, 24  # pictures a step: words that fit or not in equal parts; questions that end in an answer


def new_policy(tokenizer: PreTrainedTokenizerBase) -> Qwen2VLForConditionalGeneration:
    """An untrained Qwen2-VL of 2 to 3 million parameters."""
    token_id: Callable[[str], Any] = tokenizer.convert_tokens_to_ids  # one token in, one id out
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 160,
            "intermediate_size": 448,
            "num_hidden_layers": 4,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 3,
            "embed_dim": 128,
            "hidden_size": 160,
            "mlp_ratio": 3,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def new_processor(tokenizer: PreTrainedTokenizerBase) -> Qwen2VLProcessor:
    """The published processor with 8-pixel patches; every picture becomes 6 x 6 = 36 tokens."""
    size = {"shortest_edge": RESOLUTION**2, "longest_edge": RESOLUTION**2}
    images = Qwen2VLImageProcessor(patch_size=PATCH, merge_size=MERGE, temporal_patch_size=2, size=size)
    videos = Qwen2VLVideoProcessor(patch_size=PATCH, merge_size=MERGE, temporal_patch_size=2, size=size)
    return Qwen2VLProcessor(images, tokenizer, videos, chat_template=CHAT_TEMPLATE)


def chat(question: str, *, picture: bool) -> str:
    """The rendered chat up to where the answer begins."""
    vision = "<|vision_start|><|image_pad|><|vision_end|>" if picture else ""
    return f"<|im_start|>user\n{vision}{question}<|im_end|>\n<|im_start|>assistant\n"


def question_about(scene: Scene, rng: np.random.Generator) -> tuple[str, bool]:
    """A yes/no question about a picture of ``scene`` and its answer; yes and no are equally likely.

    Half of the no-questions ask for a wholly different scene, half for one or two changed attributes.
    """
    if rng.random() < 0.5:
        asked = scene
    elif rng.random() < 0.5:
        asked = draw_scene(rng, held_out=False, things=len(scene.things))
    else:
        asked = corrupt(scene, rng, int(rng.integers(1, 3)))
    text, request = paraphrase(asked, rng)
    return QUESTION.format(prompt=text), request.allows(scene)


def _rewriting(rng: np.random.Generator, count: int, mixture: Mixture | None) -> list[tuple[str, str]]:
    pairs = []
    for _ in range(count):
        scene = draw_scene(rng, held_out=False)
        text, request = paraphrase(scene, rng, plain=0.3 if rng.random() < 0.2 else 0.08)
        if mixture is None:
            target = canonical(fill(request, rng))
        else:
            target = loose_rewrite(text, request, rng, mixture)
        pairs.append((chat(TEMPLATE.format(prompt=text), picture=False), target))
    return pairs


class Examples:
    """Turns (prompt, answer) pairs into padded tensors with the loss on the answer only."""

    def __init__(self, processor: Qwen2VLProcessor, device: torch.device) -> None:
        self.processor = processor
        self.tokenizer: Any = processor.tokenizer
        self.device = device

    def __call__(self, pairs: list[tuple[str, str]], pictures: Any = None) -> tuple[dict[str, Tensor], Tensor]:
        """Model inputs and labels (-100 where no loss); rows are right-padded."""
        texts = [f"{prompt}{answer}<|im_end|>" for prompt, answer in pairs]
        if pictures is not None:
            image_inputs = self.processor.image_processor(images=list(pictures), return_tensors="pt")
            merge = self.processor.image_processor.merge_size**2
            pads = [int(grid.prod()) // merge for grid in image_inputs["image_grid_thw"]]
            texts = [t.replace("<|image_pad|>", "<|image_pad|>" * n) for t, n in zip(texts, pads, strict=True)]
        rows = [self.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        answers = [len(self.tokenizer(f"{a}<|im_end|>", add_special_tokens=False).input_ids) for _, a in pairs]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        labels = torch.full((len(rows), width), -100)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for index, (row, length) in enumerate(zip(rows, answers, strict=True)):
            ids[index, : len(row)] = torch.tensor(row)
            labels[index, len(row) - length : len(row)] = torch.tensor(row[-length:])
            mask[index, : len(row)] = 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        if pictures is None:
            inputs["position_ids"] = torch.arange(width).expand(3, len(rows), width)
        else:
            inputs |= dict(image_inputs)
            image_token = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
            inputs["mm_token_type_ids"] = (ids == image_token).int()
        return {k: v.to(self.device) for k, v in inputs.items()}, labels.to(self.device)

    def words(self, questions: list[str], scenes: list[Scene]) -> list[tuple[int, int, str, str]]:
        """(row, column, kind, value) of every attribute's word in questions about one picture each, as batched."""
        vision = (RESOLUTION // PATCH // MERGE) ** 2 - 1  # a placeholder becomes so many tokens more
        found = []
        for row, (question, scene) in enumerate(zip(questions, scenes, strict=True)):
            text = chat(question, picture=True)
            start = text.index(question)
            offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
            columns = {end: column + vision for column, (_, end) in enumerate(offsets)}
            for end, kind, value in named(question, len(scene.things)):
                found.append((row, columns[start + end], kind, value))
        return found


def answer_loss(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Mean cross-entropy over answer tokens; logits are computed for those positions only."""
    hidden = model.model(**inputs).last_hidden_state[:, :-1]
    wanted = labels[:, 1:]
    used = wanted != -100
    return F.cross_entropy(model.lm_head(hidden[used]).float(), wanted[used])


def train_policy(
    pool: Pool,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    seed: int,
    device: torch.device,
    log: Callable[[str], None],
) -> Qwen2VLForConditionalGeneration:
    """Teach rewriting, describing and answering together, then seeing, then all with carelessness, then judging."""
    torch.manual_seed(int(rng_for(seed, "policy", "init").integers(2**31)))
    model: Any = new_policy(tokenizer)
    model.to(device)
    examples = Examples(new_processor(tokenizer), device)

    def lesson(
        rng: np.random.Generator,
        rewrites: int,
        mixture: Mixture | None,
        seen: tuple[int, int],
    ) -> dict[str, Tensor]:
        parts = {}
        with autocast(device):
            inputs, labels = examples(_rewriting(rng, rewrites, mixture))
            parts["rewrite"] = answer_loss(model, inputs, labels)
            described, asked = seen
            indices = rng.choice(len(pool), described + asked, replace=False)
            scenes = [pool.scenes[index] for index in indices]
            pictures = [np.asarray(pool.pictures[index]) for index in indices]
            captions = [(chat(DESCRIBE, picture=True), canonical(scene)) for scene in scenes[:described]]
            parts["describe"] = answer_loss(model, *examples(captions, pictures[:described]))
            answers = []
            for scene in scenes[described:]:
                question, answer = question_about(scene, rng)
                answers.append((chat(question, picture=True), "Yes" if answer else "No"))
            parts["answer"] = answer_loss(model, *examples(answers, pictures[described:]))
        return parts

    def first(step: int) -> dict[str, Tensor]:
        mixture = None if step < RECIPE.steps * CLEAN_SHARE else LOOSE
        return lesson(rng_for(seed, "policy", step), RECIPE.batch, mixture, SEEN)

    def last(step: int) -> dict[str, Tensor]:
        return lesson(rng_for(seed, "policy-last", step), LAST.batch, CARELESS, LAST_SEEN)

    fit("policy", model, first, RECIPE, folder, log=log)
    train_eyes(model, examples.processor.image_processor, pool, folder, seed, device, log)
    fit("policy-last", model, last, LAST, folder, log=log)

    torch.manual_seed(int(rng_for(seed, "policy-judge", "init").integers(2**31)))
    comparison = Comparison(model).to(device)

    def judge(step: int) -> dict[str, Tensor]:
        rng = rng_for(seed, "policy-judge", step)
        with autocast(device):
            inputs, labels = examples(_rewriting(rng, JUDGE.batch, CARELESS))
            rewriting = answer_loss(model, inputs, labels)
            indices = rng.choice(len(pool), SCRAMBLED + ASKED, replace=False)
            scenes = [pool.scenes[index] for index in indices]
            questions, answers = compared(scenes, rng)
            inputs, labels = examples(
                [(chat(q, picture=True), "Yes" if a else "No") for q, a in zip(questions, answers, strict=True)],
                [np.array(pool.pictures[index]) for index in indices],
            )
            labels[:SCRAMBLED] = -100  # hardly one of them is answered Yes
            words = examples.words(questions, scenes)
            return {"rewrite": rewriting} | comparison(inputs, labels, words, scenes)

    fit("policy-judge", comparison, judge, JUDGE, folder, log=log)
    return model


def compared(scenes: list[Scene], rng: np.random.Generator) -> tuple[list[str], list[bool]]:
    """Questions about pictures of ``scenes`` and their answers: scrambled ones, then balanced ones.

    A balanced one is about the very scene, or (as often) about one that differs in a single attribute.
    """
    questions, answers = [], []
    for index, scene in enumerate(scenes):
        if index < SCRAMBLED:
            told = scramble(scene, rng)
        else:
            told = scene if rng.random() < 0.5 else corrupt(scene, rng, 1)
        text, request = paraphrase(told, rng)
        questions.append(QUESTION.format(prompt=text))
        answers.append(request.allows(scene))
    return questions, answers
