"""Measures the shipped weights: the numbers of the model card and of the tests.

Everything is measured on held-out scenes, through the same loaders that a run uses.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ..config import RunConfig
from ..image_model import RenderJob
from ..loading import load_images, load_policy, load_reward
from ..seeding import derive_seed
from .captions import canonical, corrupt, full_request, is_right_rewrite, paraphrase
from .checker import check, share_right
from .corpus import draw_scene, rng_for
from .vocabulary import QUESTION
from .world import Scene, render

CPU = torch.device("cpu")
SEED = 1  # of the measurement; not the seed of the build


def _scenes(name: str, count: int, things: int | None = None) -> list[Scene]:
    rng = rng_for(SEED, "measure", name)
    return [draw_scene(rng, held_out=True, things=things) for _ in range(count)]


def measure_checker(count: int = 1000) -> dict[str, Any]:
    """The checker on drawn scenes, where the truth is known."""
    rng = rng_for(SEED, "checker")
    scenes = _scenes("checker", count)
    verdicts = [check(render(scene, rng), full_request(scene)) for scene in scenes]
    return {
        "all_right": float(np.mean([verdict.score == 1.0 for verdict in verdicts])),
        "attributes": float(np.mean([verdict.score for verdict in verdicts])),
        "by_kind": share_right(verdicts),
        "scenes": count,
    }


def measure_autoencoder(images: Any, count: int = 256) -> dict[str, float]:
    """Reconstruction PSNR in dB on drawn held-out scenes."""
    rng = rng_for(SEED, "autoencoder")
    vae = images.pipeline.vae
    values = []
    scenes = _scenes("autoencoder", count)
    for start in range(0, count, 32):
        pictures = np.stack([render(scene, rng) for scene in scenes[start : start + 32]])
        target = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        with torch.no_grad():
            output = F.hardtanh(vae.decode(vae.encode(target).latent_dist.mean).sample)
        error = ((output - target) * 127.5).square().mean(dim=(1, 2, 3))
        values.append(10 * torch.log10(255.0**2 / error))
    return {"psnr_db": float(torch.cat(values).mean())}


def measure_clip(reward: Any, count: int = 1000, choices: int = 100) -> dict[str, float]:
    """Share of pictures whose own text scores highest among 100, for captions and for paraphrases."""
    rng = rng_for(SEED, "clip")
    scenes = _scenes("clip", count)
    scorer = reward.scorer
    pixels = scorer._pixels([render(scene, rng) for scene in scenes])
    out = {}
    for name, texts in (
        ("captions", [canonical(scene) for scene in scenes]),
        ("paraphrases", [paraphrase(scene, rng)[0] for scene in scenes]),
    ):
        with torch.no_grad():
            image = torch.cat([F.normalize(scorer.model.encode_image(part), dim=-1) for part in pixels.split(64)])
            text = scorer._text_features(texts)
        scores = image @ text.T
        right = [
            int(scores[i, [(i + offset) % count for offset in range(choices)]].argmax() == 0) for i in range(count)
        ]
        out[f"right_among_{choices}_{name}"] = float(np.mean(right))
    return out


def measure_images(images: Any, count: int = 128) -> dict[str, float]:
    """What the checker finds in rendered canonical captions and in raw paraphrases."""
    out: dict[str, float] = {}
    rng = rng_for(SEED, "images")
    for things, label in ((1, "single"), (2, "pair")):
        scenes = _scenes(f"images-{label}", count, things)
        seeds = [derive_seed(SEED, "latent", label, index) for index in range(count)]
        asked = [paraphrase(scene, rng) for scene in scenes]
        for name, texts, requests in (
            ("caption", [canonical(scene) for scene in scenes], [full_request(scene) for scene in scenes]),
            ("paraphrase", [text for text, _ in asked], [request for _, request in asked]),
        ):
            pictures = images.render([RenderJob(t, s) for t, s in zip(texts, seeds, strict=True)])
            verdicts = [check(p, r) for p, r in zip(pictures, requests, strict=True)]
            out[f"{label}_{name}_names_right"] = float(np.mean([verdict.names_right for verdict in verdicts]))
            out[f"{label}_{name}_attributes"] = float(np.mean([verdict.score for verdict in verdicts]))
            if name == "caption":
                for kind, share in share_right(verdicts).items():
                    out[f"{label}_caption_{kind}"] = share
    return out


def measure_policy(policy: Any, count: int = 200, group: int = 8) -> dict[str, float]:
    """How varied and how often right sampled rewrites are."""
    rng = rng_for(SEED, "policy")
    asked = [paraphrase(scene, rng) for scene in _scenes("policy", count)]
    seeds = [[derive_seed(SEED, "sample", index, k) for k in range(group)] for index in range(count)]
    distinct, right = [], []
    for start in range(0, count, 20):
        chunk = asked[start : start + 20]
        for (_, request), completions in zip(
            chunk, policy.sample([text for text, _ in chunk], seeds[start : start + 20]), strict=True
        ):
            distinct.append(len(set(completions.texts)))
            right.append(np.mean([is_right_rewrite(text, request) for text in completions.texts]))
    greedy = []
    for start in range(0, count, 20):
        chunk = asked[start : start + 20]
        found = policy.sample([text for text, _ in chunk], [[0]] * len(chunk), greedy=True)
        greedy += [is_right_rewrite(c.texts[0], r) for (_, r), c in zip(chunk, found, strict=True)]
    return {
        "distinct_of_8": float(np.mean(distinct)),
        "right_share": float(np.mean(right)),
        "greedy_right_share": float(np.mean(greedy)),
    }


def measure_answers(policy: Any, count: int = 800) -> dict[str, float]:
    """How well the policy answers whether a picture shows a prompt: half yes, half no, each half counts the same.

    Half of the no-questions are about another scene, half about one with a single changed attribute; how often
    such a change is noticed is told by what was changed.
    """
    rng = rng_for(SEED, "answers")
    pictures, questions, changes = [], [], []
    for index, scene in enumerate(_scenes("answers", count)):
        told, change = scene, ""
        if index % 4 == 2:
            told, change = draw_scene(rng, held_out=True, things=len(scene.things)), "scene"
        elif index % 4 == 3:
            told = corrupt(scene, rng, 1)
            change = _change(scene, told)
        text, request = paraphrase(told, rng)
        if change and request.allows(scene):
            continue  # the change was left unsaid: neither yes nor no is wrong
        pictures.append(render(scene, rng))
        questions.append(text)
        changes.append(change)
    yes = np.array(policy.probability_of_yes(pictures, questions)) > 0.5
    kinds = np.array(changes)
    noticed = {f"noticed_{kind}": float((~yes[kinds == kind]).mean()) for kind in sorted(set(changes) - {""})}
    return {"yes_no_accuracy": float(0.5 * (yes[kinds == ""].mean() + (~yes[kinds != ""]).mean())), **noticed}


def _change(scene: Scene, told: Scene) -> str:
    """The first kind of attribute in which two scenes of equally many objects differ."""
    if told.background != scene.background:
        return "background"
    for old, new in zip(scene.things, told.things, strict=True):
        for kind in ("shape", "color", "size", "texture"):
            if getattr(old, kind) != getattr(new, kind):
                return kind
    return "place"


def measure_speed(images: Any, policy: Any) -> dict[str, float]:
    """Seconds for 32 pictures and for 32 rewrites, best of three, after one warm-up."""
    rng = rng_for(SEED, "speed")
    scenes = _scenes("speed", 32)
    jobs = [RenderJob(canonical(scene), index) for index, scene in enumerate(scenes)]
    texts = [paraphrase(scene, rng)[0] for scene in scenes[:4]]
    seeds = [[derive_seed(SEED, "speed", p, k) for k in range(8)] for p in range(4)]

    def best(action: Any) -> float:
        action()
        times = []
        for _ in range(3):
            begun = time.perf_counter()
            action()
            times.append(time.perf_counter() - begun)
        return min(times)

    return {
        "seconds_32_pictures": best(lambda: images.render(jobs)),
        "seconds_32_rewrites": best(lambda: policy.sample(texts, seeds)),
        "threads": torch.get_num_threads(),
    }


def measure() -> dict[str, Any]:
    """All of it, as plain data."""
    config = RunConfig.load("tiny")
    begun = time.perf_counter()
    policy, images, reward = load_policy(config, CPU), load_images(config, CPU), load_reward(config, CPU)
    loading = time.perf_counter() - begun
    return {
        "checker": measure_checker(),
        "autoencoder": measure_autoencoder(images),
        "clip": measure_clip(reward),
        "image_model": measure_images(images),
        "policy": measure_policy(policy) | measure_answers(policy),
        "speed": measure_speed(images, policy) | {"seconds_loading": loading},
        "question": QUESTION,
    }
