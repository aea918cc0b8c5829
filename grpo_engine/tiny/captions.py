"""The language of the tiny world.

Three ways to speak of a scene:

* :func:`canonical` -- the one exact form that the image model was trained on;
* :func:`paraphrase` -- how people ask: synonyms, any order, some attributes left out. It comes with a
  :class:`Request`, the machine-readable record of what was asked for, against which the checker judges;
* :func:`loose_rewrite` -- what an untrained rewriter would say: copies, fluff, half translations, wrong
  words and a minority of right canonical captions. The policy's supervised training ends on these.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .world import BACKGROUNDS, COLORS, OPPOSITE, POSITIONS, RELATIONS, SHAPES, SIZES, TEXTURES, Scene, Thing

SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("disc", "disk", "orb", "ball"),
    "square": ("box", "block", "tile", "quadrate"),
    "triangle": ("wedge", "pyramid", "trigon", "delta"),
    "star": ("pentagram", "starburst", "sparkle", "asterisk"),
    "heart": ("valentine", "lovesign", "sweetheart"),
    "diamond": ("rhombus", "lozenge", "kite"),
    "cross": ("plus", "plus sign", "crucifix"),
    "ring": ("hoop", "donut", "annulus", "loop"),
}
COLOR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("scarlet", "crimson", "ruby", "cherry"),
    "orange": ("tangerine", "amber", "pumpkin", "apricot"),
    "yellow": ("golden", "lemon", "canary", "mustard"),
    "green": ("emerald", "jade", "grassy", "leafy"),
    "cyan": ("turquoise", "aqua", "teal"),
    "blue": ("navy", "cobalt", "sapphire", "azure"),
    "purple": ("violet", "plum", "grape", "amethyst"),
    "pink": ("rose", "fuchsia", "bubblegum", "flamingo"),
    "brown": ("chocolate", "coffee", "chestnut", "walnut"),
    "black": ("ebony", "inky", "onyx", "jet"),
}
BACKGROUND_WORDS: dict[str, tuple[str, ...]] = {
    "white": ("snowy", "chalk", "ivory", "paper"),
    "gray": ("grey", "ash", "slate", "silver"),
    "beige": ("sand", "tan", "cream", "ecru"),
    "mint": ("seafoam", "pistachio", "celadon"),
    "lavender": ("lilac", "mauve", "wisteria"),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "large": ("big", "huge", "giant", "enormous"),
    "small": ("tiny", "little", "mini", "petite"),
}
TEXTURE_WORDS: dict[str, tuple[str, ...]] = {
    "solid": ("plain", "filled", "uniform"),
    "striped": ("stripy", "banded", "lined"),
    "dotted": ("spotted", "speckled", "polka-dot"),
}
POSITION_PHRASES: dict[str, tuple[str, ...]] = {
    "center": ("in the middle", "dead centre", "right in the middle", "centered"),
    "left": ("on the left side", "at left", "over to the left", "on the left hand side"),
    "right": ("on the right side", "at right", "over to the right", "on the right hand side"),
    "top": ("up top", "near the top", "along the upper edge", "high up"),
    "bottom": ("down low", "near the bottom", "along the lower edge", "low down"),
}
RELATION_PHRASES: dict[str, tuple[str, ...]] = {
    "left of": ("left of", "on the left side of", "on the left of"),
    "right of": ("right of", "on the right side of", "on the right of"),
    "above": ("over", "on top of", "higher than", "atop"),
    "below": ("under", "beneath", "underneath", "lower than"),
}
BESIDE_PHRASES = ("beside", "next to", "alongside")
OPENERS = ("show me", "please draw", "i need", "picture of", "can you make", "give me", "i want", "draw")
FLUFF = (
    "beautiful", "highly detailed", "stunning", "a photo of", "digital art", "masterpiece", "a painting of",
    "elegant", "dramatic lighting", "4k",
)  # fmt: skip

CANONICAL_POSITION = {
    "center": "in the center",
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
}
CANONICAL_RELATION = {
    "left of": "to the left of",
    "right of": "to the right of",
    "above": "above",
    "below": "below",
}


@dataclass(frozen=True)
class ThingRequest:
    """What a prompt asks of one object; ``None`` = not mentioned, so anything is right."""

    shape: str
    color: str
    size: str | None = None
    texture: str | None = None


@dataclass(frozen=True)
class Request:
    """What a prompt asks for; ``layouts`` holds every layout that would satisfy it (empty = any)."""

    things: tuple[ThingRequest, ...]
    layouts: tuple[str, ...]
    background: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain data for a prompt file; :meth:`from_json` reads it back."""
        return {
            "things": [{k: v for k, v in vars(thing).items() if v is not None} for thing in self.things],
            "layouts": list(self.layouts),
            "background": self.background,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Request:
        """Inverse of :meth:`to_json`."""
        things = tuple(ThingRequest(**thing) for thing in data["things"])
        return cls(things, tuple(data["layouts"]), data["background"])

    def allows(self, scene: Scene) -> bool:
        """Whether ``scene`` gives everything that was asked for, with either object named first."""
        if len(scene.things) != len(self.things):
            return False
        orders = [(scene.things, scene.layout)]
        if len(scene.things) == 2:
            orders.append((scene.things[::-1], OPPOSITE[scene.layout]))
        if self.background not in (None, scene.background):
            return False
        return any(
            all(_fits(want, got) for want, got in zip(self.things, things, strict=True))
            and (not self.layouts or layout in self.layouts)
            for things, layout in orders
        )


def _fits(want: ThingRequest, got: Thing) -> bool:
    return all(value is None or value == getattr(got, name) for name, value in vars(want).items())


def full_request(scene: Scene) -> Request:
    """The request that a canonical caption makes: every attribute."""
    return Request(tuple(ThingRequest(**vars(t)) for t in scene.things), (scene.layout,), scene.background)


# ---------------------------------------------------------------------------------------------
# Canonical captions


def _canonical_thing(thing: Thing) -> str:
    texture = "" if thing.texture == "solid" else f"{thing.texture} "
    return f"a {thing.size} {texture}{thing.color} {thing.shape}"


def canonical(scene: Scene) -> str:
    """The exact caption of ``scene``: "a large red circle in the center on a white background"."""
    first = _canonical_thing(scene.things[0])
    if len(scene.things) == 1:
        body = f"{first} {CANONICAL_POSITION[scene.layout]}"
    else:
        body = f"{first} {CANONICAL_RELATION[scene.layout]} {_canonical_thing(scene.things[1])}"
    return f"{body} on a {scene.background} background"


def _any_of(words: Sequence[str]) -> str:
    return "(" + "|".join(words) + ")"


_THING = rf"a {_any_of(SIZES)} (?:{_any_of(TEXTURES[1:])} )?{_any_of(tuple(COLORS))} {_any_of(SHAPES)}"
_LAYOUT = {phrase: name for name, phrase in (CANONICAL_POSITION | CANONICAL_RELATION).items()}
_CANONICAL = re.compile(
    rf"{_THING} (?:{_any_of(tuple(CANONICAL_POSITION.values()))}|"
    rf"{_any_of(tuple(CANONICAL_RELATION.values()))} {_THING}) on a {_any_of(tuple(BACKGROUNDS))} background"
)


def parse_canonical(text: str) -> Scene | None:
    """The scene that a canonical caption describes, or ``None`` when ``text`` is not exactly canonical."""
    match = _CANONICAL.fullmatch(text.strip())
    if match is None:
        return None
    size, texture, color, shape, position, relation, size2, texture2, color2, shape2, background = match.groups()
    first = Thing(shape, color, size, texture or "solid")
    if position:
        return Scene((first,), _LAYOUT[position], background)
    return Scene((first, Thing(shape2, color2, size2, texture2 or "solid")), _LAYOUT[relation], background)


def is_right_rewrite(text: str, request: Request) -> bool:
    """Whether ``text`` is a canonical caption of a scene that gives everything ``request`` asks for."""
    scene = parse_canonical(text)
    return scene is not None and request.allows(scene)


# ---------------------------------------------------------------------------------------------
# Paraphrases


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _say(rng: np.random.Generator, name: str, words: dict[str, tuple[str, ...]], plain: float) -> str:
    """A synonym of ``name``, or with probability ``plain`` the canonical word itself."""
    return name if rng.random() < plain else _pick(rng, words[name])


def _mentioned_request(scene: Scene, rng: np.random.Generator) -> Request:
    """Choose what a person would bother to say. Visible textures are always said, plainness seldom."""
    things = tuple(
        ThingRequest(
            thing.shape,
            thing.color,
            thing.size if rng.random() < 0.8 else None,
            thing.texture if thing.texture != "solid" or rng.random() < 0.25 else None,
        )
        for thing in scene.things
    )
    layouts: tuple[str, ...] = (scene.layout,)
    if len(things) == 1:
        layouts = layouts if rng.random() < 0.85 else ()
    elif scene.layout in ("left of", "right of") and rng.random() < 0.2:
        layouts = ("left of", "right of")
    return Request(things, layouts, scene.background if rng.random() < 0.85 else None)


def _loose_thing(want: ThingRequest, rng: np.random.Generator, plain: float) -> tuple[str, str]:
    """("big scarlet disc", ", stripy") -- the noun phrase and what may trail behind it."""
    color, shape = _say(rng, want.color, COLOR_WORDS, plain), _say(rng, want.shape, SHAPE_WORDS, plain)
    extras = []
    if want.size:
        extras.append(_say(rng, want.size, SIZE_WORDS, plain))
    if want.texture:
        extras.append(_say(rng, want.texture, TEXTURE_WORDS, plain))
    if rng.random() < 0.5:
        extras.reverse()
    if extras and rng.random() < 0.2:
        return f"{color} {shape}", " and ".join(extras)
    return " ".join([*extras, color, shape]), ""


def paraphrase(
    scene: Scene, rng: np.random.Generator, *, plain: float = 0.08, request: Request | None = None
) -> tuple[str, Request]:
    """How a person might ask for ``scene``, and what exactly that asks for.

    ``plain`` is the probability that a word is the canonical one; ``request`` fixes what is mentioned.
    """
    request = request or _mentioned_request(scene, rng)
    nouns = [_loose_thing(want, rng, plain) for want in request.things]
    article = _pick(rng, ("a ", "", "one "))
    parts = [article + nouns[0][0]]
    if len(nouns) == 2:
        layout = (
            _pick(rng, BESIDE_PHRASES)
            if len(request.layouts) > 1
            else (
                CANONICAL_RELATION[scene.layout] if rng.random() < plain else _pick(rng, RELATION_PHRASES[scene.layout])
            )
        )
        first = f"{article}{nouns[0][0]}" + (f" ({nouns[0][1]})" if nouns[0][1] else "")
        second = f"{article}{nouns[1][0]}" + (f" ({nouns[1][1]})" if nouns[1][1] else "")
        parts = [f"{first} {layout} {second}"]
    else:
        if nouns[0][1]:
            parts.append(nouns[0][1])
        if request.layouts:
            place = scene.layout
            parts.append(CANONICAL_POSITION[place] if rng.random() < plain else _pick(rng, POSITION_PHRASES[place]))
    if request.background:
        tone = _say(rng, request.background, BACKGROUND_WORDS, plain)
        ground = _pick(rng, ("on {} background", "against a {} backdrop", "{} backdrop", "{} behind", "on {}"))
        parts.append(ground.format(tone))
        if rng.random() < 0.15:  # "snowy backdrop, scarlet disc dead centre"
            parts.insert(0, parts.pop())
    text = (", " if rng.random() < 0.5 else " ").join(parts)
    if rng.random() < 0.3:
        text = f"{_pick(rng, OPENERS)} {text}"
    return text, request


# ---------------------------------------------------------------------------------------------
# The untrained rewriter


def fill(request: Request, rng: np.random.Generator) -> Scene:
    """A scene that gives what ``request`` asks for, the rest chosen at random."""
    things = tuple(
        Thing(want.shape, want.color, want.size or _pick(rng, SIZES), want.texture or "solid")
        for want in request.things
    )
    layouts = request.layouts or (POSITIONS if len(things) == 1 else RELATIONS)
    return Scene(things, _pick(rng, layouts), request.background or _pick(rng, tuple(BACKGROUNDS)))


def corrupt(scene: Scene, rng: np.random.Generator, changes: int) -> Scene:
    """``scene`` with ``changes`` randomly chosen attributes redrawn to a different value."""
    for _ in range(changes):
        kind = _pick(rng, ("shape", "color", "color", "shape", "size", "texture", "layout", "background"))
        if kind == "background":
            others = [b for b in BACKGROUNDS if b != scene.background]
            scene = replace(scene, background=_pick(rng, others))
        elif kind == "layout":
            pool: tuple[str, ...] = POSITIONS if len(scene.things) == 1 else RELATIONS
            scene = replace(scene, layout=_pick(rng, [p for p in pool if p != scene.layout]))
        else:
            pool = {"shape": SHAPES, "color": tuple(COLORS), "size": SIZES, "texture": TEXTURES}[kind]
            index = int(rng.integers(len(scene.things)))
            things = list(scene.things)
            others = [v for v in pool if v != getattr(things[index], kind)]
            things[index] = replace(things[index], **{kind: _pick(rng, others)})
            scene = replace(scene, things=tuple(things))
    return scene


@dataclass(frozen=True)
class Mixture:
    """Shares of what a careless rewriter says; the rest is half translated."""

    right: float
    wrong: float  # the right form with wrong words
    copy: float
    fluff: float  # a copy with ornaments


LOOSE = Mixture(right=0.12, wrong=0.24, copy=0.26, fluff=0.18)
CARELESS = Mixture(right=0.12, wrong=0.12, copy=0.38, fluff=0.18)
"""More copies than anything else: even the likeliest rewrite is no right one, so greedy decoding can improve too."""


def loose_rewrite(text: str, request: Request, rng: np.random.Generator, mixture: Mixture = LOOSE) -> str:
    """One rewrite of ``text`` as a careless rewriter would give it: seldom right, never random noise."""
    scene = fill(request, rng)
    roll = rng.random()
    if roll < mixture.right:
        return canonical(scene)
    if roll < mixture.right + mixture.wrong:
        return canonical(corrupt(scene, rng, int(rng.integers(1, 3))))
    if roll < mixture.right + mixture.wrong + mixture.copy:
        return text
    if roll < mixture.right + mixture.wrong + mixture.copy + mixture.fluff:
        words = f"{_pick(rng, FLUFF)} {text}"
        return f"{words}, {_pick(rng, FLUFF)}" if rng.random() < 0.4 else words
    return paraphrase(scene, rng, plain=0.45, request=request)[0]  # half translated
