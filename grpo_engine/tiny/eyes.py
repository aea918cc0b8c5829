"""Supervised training of the tiny policy's vision tower: every picture token names what it covers.

Captions and yes/no answers alone teach such a small tower colours and little else (a changed shape was
noticed in none of 100 questions): a word of text is too weak a sign for where in a picture to look. Here
each merged token, a cell of 16 x 16 pixels, says which object covers it; the heads are thrown away after.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from .corpus import Pool, rng_for
from .fitting import Recipe, autocast, fit
from .world import BACKGROUNDS, COLORS, RADII, RESOLUTION, SHAPES, SIZES, TEXTURES, Scene, Thing, nominal_centers

RECIPE = Recipe(steps=1400, batch=64, learning_rate=2e-3, weight_decay=0.01, warmup=50, decay_share=0.4, ema=0.98)

NOTHING = "nothing"
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": (*SHAPES, NOTHING),
    "color": tuple(COLORS),
    "size": SIZES,
    "texture": TEXTURES,
}
IGNORED = -100  # cross-entropy's own: a cell that no object covers has a shape (nothing), but no colour
CELLS = 6  # a side
COVERED = 0.95  # of a radius: a cell whose middle lies nearer to an object's is named after it


def cell_labels(scene: Scene) -> NDArray[np.int64]:
    """What each cell of a picture of ``scene`` shows: int64 (4, 36), a row for each of ``ATTRIBUTES``.

    From nominal places and sizes; a picture's own jitter of 3 pixels is small beside a cell's 16.
    """
    labels = np.full((len(ATTRIBUTES), CELLS * CELLS), IGNORED, np.int64)
    labels[0] = ATTRIBUTES["shape"].index(NOTHING)
    middles = (np.arange(CELLS) + 0.5) * RESOLUTION / CELLS
    x, y = np.meshgrid(middles, middles)
    for thing, (cx, cy) in zip(scene.things, nominal_centers(scene), strict=True):
        covered = (np.hypot(x - cx, y - cy) < COVERED * np.mean(RADII[thing.size])).ravel()
        labels[:, covered] = np.array(_indices(thing))[:, None]
    return labels


@cache
def _indices(thing: Thing) -> tuple[int, ...]:
    return tuple(names.index(getattr(thing, attribute)) for attribute, names in ATTRIBUTES.items())


class Eyes(nn.Module):
    """A vision tower with a linear head a cell, and one for the whole picture's background."""

    def __init__(self, visual: Any, width: int) -> None:
        super().__init__()
        self.visual = visual
        self.cells = nn.Linear(width, sum(map(len, ATTRIBUTES.values())))
        self.background = nn.Linear(width, len(BACKGROUNDS))

    def forward(self, pixels: Tensor, grids: Tensor) -> tuple[list[Tensor], Tensor]:
        """Logits: for each attribute (B, 36, its values), and (B, 5) for the background.

        Args:
            pixels: patches of B pictures, as the processor cuts them.
            grids: int64 (B, 3), patches a picture in time, height and width.
        """
        tokens = self.visual(pixels, grid_thw=grids).pooler_output.view(len(grids), CELLS * CELLS, -1).float()
        by_attribute = self.cells(tokens).split([len(names) for names in ATTRIBUTES.values()], dim=-1)
        return list(by_attribute), self.background(tokens.mean(dim=1))


def train_eyes(
    model: Any,
    images: Any,
    pool: Pool,
    folder: Path,
    seed: int,
    device: torch.device,
    log: Callable[[str], None],
) -> None:
    """Teach the vision tower of ``model`` in place; ``images`` is the policy's image processor."""
    torch.manual_seed(int(rng_for(seed, "policy-eyes", "init").integers(2**31)))
    eyes = eyes_of(model).to(device)
    begin_anew(eyes.visual)
    backgrounds = tuple(BACKGROUNDS)

    def loss(step: int) -> dict[str, Tensor]:
        rng = rng_for(seed, "policy-eyes", step)
        indices = rng.choice(len(pool), RECIPE.batch, replace=False)
        scenes = [pool.scenes[index] for index in indices]
        inputs = images(images=[np.array(pool.pictures[index]) for index in indices], return_tensors="pt")
        with autocast(device):
            logits, background = eyes(inputs["pixel_values"].to(device), inputs["image_grid_thw"].to(device))
        labels = torch.from_numpy(np.stack([cell_labels(scene) for scene in scenes])).to(device)
        parts = {
            name: F.cross_entropy(values.flatten(0, 1).float(), labels[:, row].flatten(), ignore_index=IGNORED)
            for row, (name, values) in enumerate(zip(ATTRIBUTES, logits, strict=True))
        }
        wanted = torch.tensor([backgrounds.index(scene.background) for scene in scenes], device=device)
        return parts | {"background": F.cross_entropy(background.float(), wanted)}

    fit("policy-eyes", eyes, loss, RECIPE, folder, log=log)


def begin_anew(visual: nn.Module) -> None:
    """Draw the tower's matrices again, each scaled by its inputs (variance 1 / fan-in).

    The published 0.02 is made for a width of 1280; at 128 a block adds next to nothing, and shapes are learned late.
    """
    with torch.no_grad():
        for module in visual.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)


def eyes_of(model: Any) -> Eyes:
    """The vision tower of a tiny policy with fresh heads; the tower stays the policy's own."""
    return Eyes(model.model.visual, model.config.text_config.hidden_size)
