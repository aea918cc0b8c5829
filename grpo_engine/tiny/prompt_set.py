"""Writes ``configs/prompts/tiny.jsonl``: ``python -m grpo_engine.tiny.prompt_set``.

Training prompts ask for scenes that the models may have met; validation and test prompts ask for held-out
scenes, in words that all occur in the training prompts. Each prompt carries its ``request``, which the
checker reads and no model ever sees.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..prompts import TIERS, Prompt, PromptSet, Split, Tier, normalize, save_prompts
from .captions import Request, paraphrase
from .corpus import draw_scene, rng_for
from .world import Scene

PATH = Path(__file__).resolve().parents[2] / "configs" / "prompts" / "tiny.jsonl"
SIZES: dict[Split, int] = {"train": 240, "validation": 48, "test": 120}
SEED = 7


def tier_of(request: Request) -> Tier:
    """basic: one object; challenging: two plain objects; complex: two objects, at least one with a texture."""
    if len(request.things) == 1:
        return "basic"
    textured = any(thing.texture not in (None, "solid") for thing in request.things)
    return "complex" if textured else "challenging"


def words(text: str) -> set[str]:
    """The words of a prompt."""
    return set(re.findall(r"[a-z-]+", text.lower()))


def make_prompts() -> list[Prompt]:
    """All prompts, a third of each split in each tier."""
    prompts: list[Prompt] = []
    seen_texts: set[str] = set()
    seen_scenes: set[str] = set()
    known: set[str] = set()
    for split, size in SIZES.items():
        rng = rng_for(SEED, "prompts", split)
        left = dict.fromkeys(TIERS, size // 3)
        while any(left.values()):
            scene: Scene = draw_scene(rng, held_out=split != "train")
            text, request = paraphrase(scene, rng)
            tier = tier_of(request)
            fresh = normalize(text) not in seen_texts and scene.key() not in seen_scenes
            if not left[tier] or not fresh or (split != "train" and not words(text) <= known):
                continue
            left[tier] -= 1
            seen_texts.add(normalize(text))
            seen_scenes.add(scene.key())
            if split == "train":
                known |= words(text)
            number = len(prompts) + 1
            prompts.append(Prompt(f"tiny-{number:04d}", text, tier, split, {"request": request.to_json()}))
    return prompts


def main() -> None:
    """Write the file."""
    save_prompts(PromptSet(tuple(make_prompts()), "tiny"), PATH)


if __name__ == "__main__":
    main()
