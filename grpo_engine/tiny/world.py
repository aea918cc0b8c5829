"""The tiny world: scenes of one or two objects on a plain background, and how they look.

A :class:`Scene` is the full truth about one picture. :func:`render` draws it from signed distance
functions, so edges are antialiased exactly and no drawing library's version can change a pixel.
The words for scenes live in ``captions.py``; reading scenes back from pixels lives in ``checker.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESOLUTION = 96  # pixels a side of every picture of this world

Rgb = tuple[int, int, int]
Floats = NDArray[np.floating[Any]]

# Hues are spread so that any two stay apart after a lossy decoder; every object colour also stays
# apart from every (pale) background, so a mask can always be cut out.
COLORS: dict[str, Rgb] = {
    "red": (216, 36, 40),
    "orange": (250, 132, 16),
    "yellow": (250, 214, 20),
    "green": (36, 156, 60),
    "cyan": (24, 192, 214),
    "blue": (34, 84, 216),
    "purple": (128, 48, 172),
    "pink": (248, 120, 182),
    "brown": (124, 74, 40),
    "black": (26, 26, 30),
}
BACKGROUNDS: dict[str, Rgb] = {
    "white": (252, 252, 252),
    "gray": (170, 173, 178),
    "beige": (232, 212, 176),
    "mint": (184, 230, 204),
    "lavender": (206, 196, 240),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring")
SIZES = ("large", "small")
TEXTURES = ("solid", "striped", "dotted")
POSITIONS = ("center", "left", "right", "top", "bottom")
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

# Circumscribed half-extents in pixels; the checker's threshold lies between the two ranges.
RADII: dict[str, tuple[float, float]] = {"large": (18.5, 20.5), "small": (11.5, 13.0)}
_MIDDLE, _OFFSET, _PAIR_OFFSET = RESOLUTION / 2, 21.0, 23.5
ANCHORS: dict[str, tuple[float, float]] = {
    "center": (_MIDDLE, _MIDDLE),
    "left": (_MIDDLE - _OFFSET, _MIDDLE),
    "right": (_MIDDLE + _OFFSET, _MIDDLE),
    "top": (_MIDDLE, _MIDDLE - _OFFSET),
    "bottom": (_MIDDLE, _MIDDLE + _OFFSET),
}


def shade(color: str) -> Rgb:
    """The second tone of a texture: a darker one (lighter for black), so textures never fade into a pale ground."""
    r, g, b = COLORS[color]
    return (112, 112, 118) if color == "black" else (r // 2, g // 2, b // 2)


@dataclass(frozen=True)
class Thing:
    """One object: its four nameable attributes."""

    shape: str
    color: str
    size: str
    texture: str


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    ``layout`` is a position (one thing) or the relation of ``things[0]`` to ``things[1]`` (two things).
    """

    things: tuple[Thing, ...]
    layout: str
    background: str

    def key(self) -> str:
        """A text that is equal for two scenes exactly when the same caption describes both."""
        things, layout = self.things, self.layout
        if len(things) == 2 and layout in ("right of", "below"):
            things, layout = (things[1], things[0]), OPPOSITE[layout]
        parts = [f"{t.size} {t.texture} {t.color} {t.shape}" for t in things]
        return "|".join([*parts, layout, self.background])

    def to_json(self) -> dict[str, Any]:
        """Plain data for a prompt file; :meth:`from_json` reads it back."""
        return {
            "things": [vars(thing) for thing in self.things],
            "layout": self.layout,
            "background": self.background,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Scene:
        """Inverse of :meth:`to_json`."""
        return cls(tuple(Thing(**thing) for thing in data["things"]), data["layout"], data["background"])


def random_thing(rng: np.random.Generator) -> Thing:
    """A uniformly drawn object, except that half of all objects are untextured."""
    texture = TEXTURES[rng.choice(3, p=(0.5, 0.25, 0.25))]
    return Thing(
        SHAPES[rng.integers(len(SHAPES))],
        tuple(COLORS)[rng.integers(len(COLORS))],
        SIZES[rng.integers(2)],
        texture,
    )


def random_scene(rng: np.random.Generator, things: int | None = None) -> Scene:
    """A random scene; ``things`` fixes the number of objects (default: one or two, evenly).

    The two objects of a pair always differ in shape and in colour, so that a description can tell them apart.
    """
    count = things or int(rng.integers(1, 3))
    first = random_thing(rng)
    background = tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    if count == 1:
        return Scene((first,), POSITIONS[rng.integers(len(POSITIONS))], background)
    second = random_thing(rng)
    while second.shape == first.shape or second.color == first.color:
        second = random_thing(rng)
    return Scene((first, second), RELATIONS[rng.integers(len(RELATIONS))], background)


# ---------------------------------------------------------------------------------------------
# Drawing


@lru_cache(maxsize=1)
def _grid() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Pixel centres, x and y, each of shape (RESOLUTION, RESOLUTION)."""
    axis = np.arange(RESOLUTION, dtype=np.float32) + 0.5
    x, y = np.meshgrid(axis, axis)
    return x, y


def _polygon(points: list[tuple[float, float]], x: Floats, y: Floats) -> Floats:
    """Signed distance (pixels, negative inside) to a simple polygon, by edge distance and crossing parity."""
    best = np.full(x.shape, np.inf, dtype=np.float32)
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1], strict=True):
        ex, ey = bx - ax, by - ay
        wx, wy = x - ax, y - ay
        along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0.0, 1.0)
        dx, dy = wx - ex * along, wy - ey * along
        best = np.minimum(best, dx * dx + dy * dy)
        if ay != by:
            crosses = (ay > y) != (by > y)
            inside ^= crosses & (x < ex * (y - ay) / ey + ax)
    return np.where(inside, -1.0, 1.0) * np.sqrt(best)


def _star_points(radius: float) -> list[tuple[float, float]]:
    angles = [math.pi * k / 5 - math.pi / 2 for k in range(10)]
    radii = [radius * (1.08 if k % 2 == 0 else 0.46) for k in range(10)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def _heart_points(radius: float) -> list[tuple[float, float]]:
    """The classic parametric heart, scaled to the half-extent ``radius`` and centred."""
    points = []
    for k in range(36):
        t = 2 * math.pi * k / 36
        px = 16 * math.sin(t) ** 3
        py = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((px * radius / 16.5, -(py + 2.5) * radius / 16.5))
    return points


def shape_distance(shape: str, radius: float, x: Floats, y: Floats) -> Floats:
    """Signed distance (pixels, negative inside) to ``shape`` of half-extent ``radius`` at the origin."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.74 * radius) - 0.26 * radius
    if shape == "square":
        half = 0.88 * radius
        return _polygon([(-half, -half), (half, -half), (half, half), (-half, half)], x, y)
    if shape == "diamond":
        wide, tall = 0.80 * radius, 1.06 * radius
        return _polygon([(0, -tall), (wide, 0), (0, tall), (-wide, 0)], x, y)
    if shape == "triangle":
        return _polygon([(0, -0.98 * radius), (1.04 * radius, 0.84 * radius), (-1.04 * radius, 0.84 * radius)], x, y)
    if shape == "star":
        return _polygon(_star_points(radius), x, y)
    if shape == "heart":
        return _polygon(_heart_points(radius), x, y)
    if shape == "cross":
        a, b = 0.34 * radius, 0.98 * radius
        corners = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a)]
        corners += [(a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
        return _polygon(corners, x, y)
    raise ValueError(f"Unknown shape {shape!r}; choose one of {', '.join(SHAPES)}.")


def _texture_weight(texture: str, x: Floats, y: Floats) -> Floats | float:
    """Weight of the second tone at each pixel (0..1), in the object's own coordinates."""
    if texture == "solid":
        return 0.0
    if texture == "striped":  # horizontal bands, 4 px light and 4 px dark
        phase = np.abs((y + 2.0) % 8.0 - 4.0) - 2.0
        return np.clip(0.5 - phase, 0.0, 1.0)
    row = np.floor(y / 7.0 + 0.5)  # dots on a staggered 7 px grid
    dx = (x + 3.5 * (row % 2)) / 7.0
    dx = (dx - np.floor(dx + 0.5)) * 7.0
    return np.clip(2.6 - np.hypot(dx, y - row * 7.0), 0.0, 1.0)


def render(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw ``scene`` as an RGB picture, uint8 of shape (RESOLUTION, RESOLUTION, 3).

    ``rng`` chooses what no caption names: the exact radius and a jitter of a few pixels.
    """
    x, y = _grid()
    canvas: Floats = np.broadcast_to(np.asarray(BACKGROUNDS[scene.background], np.float32), (RESOLUTION, RESOLUTION, 3))
    for thing, (cx, cy) in zip(scene.things, _centers(scene, rng), strict=True):
        radius = rng.uniform(*RADII[thing.size])
        local_x, local_y = x - cx, y - cy
        cover = np.clip(0.5 - shape_distance(thing.shape, radius, local_x, local_y), 0.0, 1.0)[..., None]
        weight = np.asarray(_texture_weight(thing.texture, local_x, local_y), np.float32)
        main, second = np.asarray(COLORS[thing.color], np.float32), np.asarray(shade(thing.color), np.float32)
        paint = main + weight[..., None] * (second - main)
        canvas = canvas * (1.0 - cover) + paint * cover
    return np.rint(canvas).astype(np.uint8)


def nominal_centers(scene: Scene) -> list[tuple[float, float]]:
    """Where each object's centre is before jitter, (x, y) in pixels."""
    if len(scene.things) == 1:
        return [ANCHORS[scene.layout]]
    along = [_MIDDLE - _PAIR_OFFSET, _MIDDLE + _PAIR_OFFSET]
    if scene.layout in ("right of", "below"):
        along.reverse()
    return [(a, _MIDDLE) if scene.layout in ("left of", "right of") else (_MIDDLE, a) for a in along]


def _centers(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Centres in pixels; the jitter never lets two objects touch or one leave the picture."""
    nominal = nominal_centers(scene)
    if len(scene.things) == 1:
        ((x, y),) = nominal
        return [(x + rng.uniform(-3, 3), y + rng.uniform(-3, 3))]
    along = [rng.uniform(-1.5, 1.5), rng.uniform(-1.5, 1.5)]
    if scene.layout in ("right of", "below"):
        along.reverse()
    across = [rng.uniform(-4, 4), rng.uniform(-4, 4)]
    beside = scene.layout in ("left of", "right of")
    return [(x + a, y + c) if beside else (x + c, y + a) for (x, y), a, c in zip(nominal, along, across, strict=True)]
