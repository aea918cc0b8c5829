"""Supervised training of the tiny policy's judgement: compare picture and question word by word.

A single Yes or No at the end of a question teaches almost nothing about which word was wrong: after 6,500 steps
a changed colour was noticed always, a changed shape, size, texture, place or background never, although the same
policy described all of them rightly. So every attribute's word in a question gets two lessons of its own: half way
up the network, to say what the picture shows of that attribute; at the top, whether the word fits. The two heads
are thrown away after.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .captions import (
    BACKGROUND_WORDS,
    CANONICAL_POSITION,
    COLOR_WORDS,
    POSITION_PHRASES,
    SHAPE_WORDS,
    SIZE_WORDS,
    TEXTURE_WORDS,
)
from .world import BACKGROUNDS, COLORS, POSITIONS, RELATIONS, SHAPES, SIZES, TEXTURES, Scene, Thing

VALUES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "size": SIZES,
    "texture": TEXTURES,
    "background": tuple(BACKGROUNDS),
    "place": POSITIONS,
}
_SYNONYMS = {
    "shape": SHAPE_WORDS,
    "color": COLOR_WORDS,
    "size": SIZE_WORDS,
    "texture": TEXTURE_WORDS,
    "background": BACKGROUND_WORDS,
    "place": {name: (CANONICAL_POSITION[name], *phrases) for name, phrases in POSITION_PHRASES.items()},
}
MEANINGS: dict[str, tuple[str, str]] = {
    word: (kind, value)
    for kind, words in _SYNONYMS.items()
    for value, others in words.items()
    for word in ((value, *others) if kind != "place" else others)
}
"""What each word or phrase of a paraphrase names: (kind, value). No word names two things."""
_WORD = re.compile(rf"(?<![\w-])({'|'.join(sorted(map(re.escape, MEANINGS), key=len, reverse=True))})(?![\w-])")
READ_AFTER = 2  # of the four layers: from there on a word's position is to know what the picture shows


def named(text: str, things: int) -> list[tuple[int, str, str]]:
    """(end in characters, kind, value) of every attribute's word in a paraphrase of a scene of so many objects.

    Between two objects "on the left side of" is no place, so places count for one object only.
    """
    found = [(match.end(), *MEANINGS[match.group(1)]) for match in _WORD.finditer(text)]
    return [part for part in found if part[1] != "place" or things == 1]


def shows(scene: Scene, kind: str, value: str) -> bool:
    """Whether any object of ``scene`` (or its ground, or its place) is what a word says."""
    if kind == "background":
        return value == scene.background
    if kind == "place":
        return value == scene.layout
    return any(getattr(thing, kind) == value for thing in scene.things)


def scramble(scene: Scene, rng: np.random.Generator) -> Scene:
    """``scene`` with each attribute drawn anew with probability 1/2: about half the words of its prompt fit."""

    def maybe(values: Sequence[str], value: str) -> str:
        return value if rng.random() < 0.5 else values[int(rng.integers(len(values)))]

    things = tuple(
        Thing(
            maybe(SHAPES, thing.shape),
            maybe(tuple(COLORS), thing.color),
            maybe(SIZES, thing.size),
            maybe(TEXTURES, thing.texture),
        )
        for thing in scene.things
    )
    layouts = POSITIONS if len(things) == 1 else RELATIONS
    return Scene(things, maybe(layouts, scene.layout), maybe(tuple(BACKGROUNDS), scene.background))


class Comparison(nn.Module):
    """The policy with a head half way up and one at the top."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy
        self.width = int(policy.config.text_config.hidden_size)
        self.reads = nn.Linear(self.width, sum(map(len, VALUES.values())))
        self.fits = nn.Linear(self.width, 2)

    def forward(
        self, inputs: dict[str, Tensor], labels: Tensor, words: Sequence[tuple[int, int, str, str]], scenes: list[Scene]
    ) -> dict[str, Tensor]:
        """The three losses: "answer" over Yes and No, "read" and "fit" over all words.

        Args:
            inputs: of B questions about B pictures, and ``labels`` int64 (B, L), -100 but on the answers.
            words: (row, column of its last token, kind, value) of every attribute's word.
            scenes: of the B pictures.
        """
        output = self.policy.model(**inputs, output_hidden_states=True)
        top = output.last_hidden_state
        wanted = labels[:, 1:]
        used = wanted != -100
        answer = F.cross_entropy(self.policy.lm_head(top[:, :-1][used]).float(), wanted[used])
        rows, columns = [word[0] for word in words], [word[1] for word in words]
        middle = F.layer_norm(output.hidden_states[READ_AFTER][rows, columns].float(), (self.width,))
        truth = torch.zeros(len(words), self.reads.out_features)
        asked = torch.zeros_like(truth)
        for index, (row, _, kind, _) in enumerate(words):
            start = sum(len(VALUES[other]) for other in list(VALUES)[: list(VALUES).index(kind)])
            for place, value in enumerate(VALUES[kind], start):
                asked[index, place] = 1.0
                truth[index, place] = float(shows(scenes[row], kind, value))
        read = F.binary_cross_entropy_with_logits(self.reads(middle), truth.to(top.device), reduction="none")
        fitting = torch.tensor([int(shows(scenes[row], kind, value)) for row, _, kind, value in words])
        return {
            "answer": answer,
            "read": (read * asked.to(top.device)).sum() / len(words),
            "fit": 2.0 * F.cross_entropy(self.fits(top[rows, columns].float()), fitting.to(top.device)),
        }
