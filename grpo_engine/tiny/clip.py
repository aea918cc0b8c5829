"""The tiny CLIP: an open_clip model that reads canonical captions and paraphrases alike.

Its batches hold quadruplets that differ in exactly one attribute each. A contrastive model is only as
careful as its hardest negatives: without them it learns "red circle" and ignores where, how big and on
what ground, and a policy trained on it would be right to ignore them too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from .captions import Request, canonical, corrupt, full_request, paraphrase
from .corpus import Pool, is_held_out, rng_for
from .fitting import Recipe, autocast, fit
from .vocabulary import CLIP_CONTEXT
from .world import RESOLUTION, Scene, render

RECIPE = Recipe(steps=1100, batch=256, learning_rate=1.2e-3, weight_decay=0.05, warmup=150, ema=0.995)
QUADS = 40  # of each batch: this many times (a scene and three one-attribute changes of it)
PARAPHRASE_SHARE = 0.7
MEAN = STD = (0.5, 0.5, 0.5)


def model_config(vocabulary: int) -> dict[str, Any]:
    """open_clip's description of the model, as saved in ``open_clip_config.json``."""
    return {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": RESOLUTION,
            "layers": 5,
            "width": 128,
            "head_width": 32,
            "patch_size": 12,
        },
        "text_cfg": {
            "context_length": CLIP_CONTEXT + 8,  # paraphrases may be longer than captions
            "vocab_size": vocabulary,
            "hf_tokenizer_name": "tokenizer",  # any name: with local-dir, open_clip reads the folder itself
            "width": 128,
            "heads": 4,
            "layers": 4,
        },
    }


def new_clip(vocabulary: int) -> open_clip.CLIP:
    """An untrained open_clip model."""
    config = model_config(vocabulary)
    text = {k: v for k, v in config["text_cfg"].items() if k != "hf_tokenizer_name"}
    return open_clip.CLIP(config["embed_dim"], config["vision_cfg"], text)


def to_clip(pictures: NDArray[np.uint8], device: torch.device) -> Tensor:
    """uint8 (N, H, W, 3) to normalised float (N, 3, H, W)."""
    tensor = torch.from_numpy(np.ascontiguousarray(pictures)).to(device)
    return tensor.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def contrast_scenes(scene: Scene, rng: np.random.Generator, count: int) -> list[Scene]:
    """``count`` different scenes that differ from ``scene`` in one attribute, none of them held out."""
    out: dict[str, Scene] = {}
    while len(out) < count:
        other = corrupt(scene, rng, 1)
        colors, shapes = {t.color for t in other.things}, {t.shape for t in other.things}
        distinct = len(colors) == len(shapes) == len(other.things)
        if distinct and other.key() != scene.key() and not is_held_out(other):
            out[other.key()] = other
    return list(out.values())


def _describe(scene: Scene, rng: np.random.Generator) -> tuple[str, Request]:
    if rng.random() < PARAPHRASE_SHARE:
        return paraphrase(scene, rng)
    return canonical(scene), full_request(scene)


def _batch(pool: Pool, rng: np.random.Generator) -> tuple[NDArray[np.uint8], list[str], Tensor]:
    """Pictures, one text each, and a bool (N, N) of pairs that also fit although they are not the pair."""
    scenes: list[Scene] = []
    pictures: list[NDArray[np.uint8]] = []
    for index in rng.choice(len(pool), QUADS, replace=False):
        scenes.append(pool.scenes[index])
        pictures.append(pool.pictures[index])
        for other in contrast_scenes(pool.scenes[index], rng, 3):
            scenes.append(other)
            pictures.append(render(other, rng))
    for index in rng.choice(len(pool), RECIPE.batch - 4 * QUADS, replace=False):
        scenes.append(pool.scenes[index])
        pictures.append(pool.pictures[index])
    described = [_describe(scene, rng) for scene in scenes]
    also = torch.zeros(len(scenes), len(scenes), dtype=torch.bool)
    for start in range(0, 4 * QUADS, 4):
        for text in range(start, start + 4):
            for picture in range(start, start + 4):
                if text != picture and described[text][1].allows(scenes[picture]):
                    also[picture, text] = True
    return np.stack(pictures), [text for text, _ in described], also


def train_clip(
    pool: Pool,
    tokenizer: Callable[..., Any],
    vocabulary: int,
    folder: Path,
    seed: int,
    device: torch.device,
    log: Callable[[str], None],
    *,
    compiled: bool,
) -> open_clip.CLIP:
    """Symmetric contrastive training; pairs that fit by omission are neither rewarded nor punished."""
    torch.manual_seed(int(rng_for(seed, "clip", "init").integers(2**31)))
    model = new_clip(vocabulary).to(device)
    if compiled:
        for block in [*model.visual.transformer.resblocks, *model.transformer.resblocks]:
            block.compile(dynamic=False)

    def loss(step: int) -> Tensor:
        pictures, texts, also = _batch(pool, rng_for(seed, "clip", step))
        tokens = tokenizer(texts).to(device)
        with autocast(device):
            image = model.encode_image(to_clip(pictures, device))
            text = model.encode_text(tokens)
        image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
        logits = model.logit_scale.exp().clamp(max=60.0) * image @ text.T
        logits = logits.masked_fill(also.to(device), -1e4)
        target = torch.arange(len(texts), device=device)
        return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))

    fit("clip", model, loss, RECIPE, folder, log=log)
    return model


def save_clip(model: nn.Module, tokenizer_folder: Path, vocabulary: int, folder: Path, dtype: torch.dtype) -> None:
    """Write a folder that ``open_clip.create_model('local-dir:...')`` loads, tokenizer included."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    state = {k: (v.to(dtype) if v.is_floating_point() else v).contiguous() for k, v in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash"}
    config: dict[str, Any] = {"model_cfg": model_config(vocabulary), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.model_max_length = config["model_cfg"]["text_cfg"]["context_length"]
    tokenizer.save_pretrained(folder)
