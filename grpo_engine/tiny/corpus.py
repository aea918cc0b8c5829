"""Training data of the embedded models: a fixed pool of drawn scenes, and the split that nothing may cross.

The pool is drawn once per build and kept as one memory-mapped file, so that all stages share it and no
stage spends its time drawing. A scene's split is decided by a hash of its key: what a test prompt asks
for is then never in any training picture or caption, whatever the pool's size or the build's seed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .world import RESOLUTION, Scene, random_scene, render

HELD_OUT_PERCENT = 10


def is_held_out(scene: Scene) -> bool:
    """Whether ``scene`` belongs to the tenth of all scenes that no model is ever trained on."""
    digest = hashlib.sha256(scene.key().encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def draw_scene(rng: np.random.Generator, *, held_out: bool, things: int | None = None) -> Scene:
    """A random scene of the asked-for side of the split."""
    while True:
        scene = random_scene(rng, things)
        if is_held_out(scene) == held_out:
            return scene


def rng_for(seed: int, *purpose: str | int) -> np.random.Generator:
    """A generator that depends on the build's seed and on what it is for, and on nothing else."""
    text = "/".join(map(str, (seed, *purpose)))
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))


@dataclass(frozen=True)
class Pool:
    """Scenes and their pictures; ``pictures`` is uint8 (N, RESOLUTION, RESOLUTION, 3), memory-mapped."""

    scenes: list[Scene]
    pictures: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.scenes)


def build_pool(
    folder: Path, name: str, size: int, seed: int, *, held_out: bool, report: Callable[[int, int], None]
) -> Pool:
    """Draw (or reopen) the pool ``name``: ``size`` scenes, one or two objects in equal parts.

    ``report(done, total)`` is called as pictures are drawn.
    """
    pictures_path, scenes_path = folder / f"{name}.npy", folder / f"{name}.jsonl"
    if not (pictures_path.exists() and scenes_path.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        rng = rng_for(seed, "pool", name)
        partial = pictures_path.with_suffix(".partial.npy")
        shape = (size, RESOLUTION, RESOLUTION, 3)
        pictures = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
        lines = []
        for index in range(size):
            scene = draw_scene(rng, held_out=held_out)
            pictures[index] = render(scene, rng)
            lines.append(json.dumps(scene.to_json()))
            if index % 250 == 0:
                report(index, size)
        pictures.flush()
        del pictures
        scenes_path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        partial.rename(pictures_path)
    with scenes_path.open(encoding="utf-8") as lines_file:
        scenes = [Scene.from_json(json.loads(line)) for line in lines_file]
    return Pool(scenes, np.load(pictures_path, mmap_mode="r"))
