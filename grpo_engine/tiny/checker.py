"""Reads a picture of the tiny world back: which of the requested attributes does it show?

Classical image analysis, no learned part, so it cannot share a blind spot with the CLIP reward. The
ground is the border's median colour; objects are connected regions that differ from it; each object's
colour is a vote of its pixels, its shape the best overlap with drawn templates, its texture the way its
second tone varies by row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .captions import Request, ThingRequest
from .world import (
    ANCHORS,
    BACKGROUNDS,
    COLORS,
    OPPOSITE,
    POSITIONS,
    RADII,
    RESOLUTION,
    SHAPES,
    Floats,
    shade,
    shape_distance,
)

KINDS = ("count", "shape", "color", "size", "texture", "position", "relation", "background")

_MASK_DISTANCE = 46.0  # RGB distance from the ground at which a pixel belongs to an object
_MIN_PIXELS = 40
_SIZE_SPLIT = (RADII["small"][1] + RADII["large"][0]) / 2
_TEMPLATE = 32


@dataclass(frozen=True)
class Seen:
    """One object as read off a picture; ``x`` and ``y`` are its box's centre in pixels."""

    shape: str
    color: str
    size: str
    texture: str
    x: float
    y: float


@dataclass(frozen=True)
class Reading:
    """A whole picture as read: its objects, largest first, and its background."""

    things: tuple[Seen, ...]
    background: str


def read(picture: NDArray[np.uint8]) -> Reading:
    """Read ``picture``, uint8 (RESOLUTION, RESOLUTION, 3).

    Raises:
        ValueError: if the picture has another shape or type.
    """
    if picture.shape != (RESOLUTION, RESOLUTION, 3) or picture.dtype != np.uint8:
        raise ValueError(
            f"The checker reads uint8 pictures of {RESOLUTION} x {RESOLUTION} x 3, not {picture.dtype} {picture.shape}."
        )
    pixels = picture.astype(np.float32)
    border = np.concatenate([pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3), pixels[:, :3].reshape(-1, 3)])
    ground = np.median(np.concatenate([border, pixels[:, -3:].reshape(-1, 3)]), axis=0)
    mask = np.linalg.norm(pixels - ground, axis=2) > _MASK_DISTANCE
    labels, count = ndimage.label(mask)
    regions = [labels == index for index in range(1, count + 1)]
    regions = sorted((r for r in regions if r.sum() >= _MIN_PIXELS), key=lambda r: -int(r.sum()))
    things = tuple(_read_thing(pixels, region) for region in regions)
    return Reading(things, _nearest(ground, BACKGROUNDS))


def _nearest(color: Floats, palette: dict[str, tuple[int, int, int]]) -> str:
    names = tuple(palette)
    table = np.asarray([palette[name] for name in names], np.float32)
    return names[int(np.argmin(np.linalg.norm(table - color, axis=1)))]


@lru_cache(maxsize=1)
def _tones() -> NDArray[np.float32]:
    """Main and second tone of every colour: float (2 * colours, 3), mains first."""
    return np.asarray([*COLORS.values(), *(shade(color) for color in COLORS)], np.float32)


def _read_thing(pixels: NDArray[np.float32], region: NDArray[np.bool_]) -> Seen:
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    box = region[top:bottom, left:right]
    inner = ndimage.binary_erosion(region, iterations=1)  # antialiased edges have the colour of nothing
    if inner.sum() < _MIN_PIXELS // 2:
        inner = region
    color, tone = _read_color(pixels, inner)
    shape, radius = _read_shape(box)
    return Seen(
        shape=shape,
        color=color,
        size="large" if radius > _SIZE_SPLIT else "small",
        texture=_read_texture(tone, inner),
        x=float(left + right) / 2,
        y=float(top + bottom) / 2,
    )


def _read_color(pixels: NDArray[np.float32], inner: NDArray[np.bool_]) -> tuple[str, NDArray[np.float32]]:
    """The colour whose two tones explain the object's pixels best, and how much of the second tone each has.

    Every colour is a line segment from main to second tone; the colour with the smallest mean distance wins.
    The returned map, float (H, W) in 0..1, is the position along that segment.
    """
    values = pixels[inner]
    best_error, best = np.inf, (0, np.zeros(len(values), np.float32))
    mains, seconds = _tones()[: len(COLORS)], _tones()[len(COLORS) :]
    for index, (main, second) in enumerate(zip(mains, seconds, strict=True)):
        axis = second - main
        along = np.clip((values - main) @ axis / (axis @ axis), 0.0, 1.0)
        distance = np.linalg.norm(values - (main + along[:, None] * axis), axis=1)
        # An object is at most about half second tone: the lighter 60 % must be near the main tone.
        lighter = np.sort(along)[: int(0.4 * len(along)) + 1].mean()
        error = float(np.median(distance)) + 60.0 * float(lighter)
        if error < best_error:
            best_error, best = error, (index, along)
    tone = np.zeros(inner.shape, np.float32)
    tone[inner] = best[1]
    return tuple(COLORS)[best[0]], tone


def _read_texture(tone: NDArray[np.float32], inner: NDArray[np.bool_]) -> str:
    """Solid when the second tone is rare; else striped or dotted by how far rows explain where it is."""
    values = tone[inner]
    if float((values > 0.45).mean()) < 0.08:
        return "solid"
    counts = inner.sum(axis=1)
    used = counts >= 3
    row_means = (tone * inner).sum(axis=1)[used] / counts[used]
    grand = values.mean()
    between = float((counts[used] * (row_means - grand) ** 2).sum())
    total = float(((values - grand) ** 2).sum()) + 1e-6
    return "striped" if between / total > 0.55 else "dotted"


@lru_cache(maxsize=1)
def _templates() -> dict[str, tuple[NDArray[np.bool_], float, float]]:
    """For every shape: its mask scaled to its box, its aspect (width / height), and its box's width at radius 1."""
    out = {}
    scale = 60.0
    axis = (np.arange(160) - 79.5).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    for shape in SHAPES:
        mask = shape_distance(shape, scale, x, y) < 0
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        width, height = len(columns), len(rows)
        out[shape] = (_resize(box), width / height, np.sqrt(width * height) / scale)
    return out


def _resize(box: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Scale a mask to (_TEMPLATE, _TEMPLATE), linearly, then cut at one half."""
    height, width = box.shape
    steps = (np.arange(_TEMPLATE) + 0.5) / _TEMPLATE
    coordinates = np.meshgrid(steps * height - 0.5, steps * width - 0.5, indexing="ij")
    return ndimage.map_coordinates(box.astype(np.float32), coordinates, order=1, mode="nearest") > 0.5


def _read_shape(box: NDArray[np.bool_]) -> tuple[str, float]:
    """The best-overlapping shape, and the radius in pixels that the box then implies."""
    mask = _resize(box)
    aspect = box.shape[1] / box.shape[0]
    scores = {}
    for shape, (template, template_aspect, _) in _templates().items():
        overlap = (mask & template).sum() / max(1, (mask | template).sum())
        scores[shape] = float(overlap) - 0.5 * abs(np.log(aspect / template_aspect))
    shape = max(scores, key=lambda name: scores[name])
    return shape, float(np.sqrt(box.shape[0] * box.shape[1])) / _templates()[shape][2]


# ---------------------------------------------------------------------------------------------
# Judging a reading against a request


@dataclass(frozen=True)
class Verdict:
    """Per kind of attribute: how many were asked for, and how many of those the picture shows."""

    asked: dict[str, int]
    right: dict[str, int]

    @property
    def score(self) -> float:
        """Share of the requested attributes that the picture shows, 0..1."""
        return sum(self.right.values()) / sum(self.asked.values())

    @property
    def names_right(self) -> bool:
        """Whether count, shape and colour of every object are right."""
        return all(self.right[kind] == self.asked[kind] for kind in ("count", "shape", "color"))


def check(picture: NDArray[np.uint8], request: Request) -> Verdict:
    """Which of the attributes in ``request`` does ``picture`` show?"""
    return judge(read(picture), request)


def judge(reading: Reading, request: Request) -> Verdict:
    """The verdict for a picture already read; objects are matched to the request in the kindest order."""
    wanted = request.things
    seen = reading.things[: len(wanted)]
    candidates = [seen] if len(seen) < 2 else [seen, seen[::-1]]
    if len(seen) == 1 and len(wanted) == 2:  # one object is missing: it may be either
        verdicts = [
            _judge_things(wanted, seen, request, reading),
            _judge_things(wanted[::-1], seen, request, reading),
        ]
    else:
        verdicts = [_judge_things(wanted, order, request, reading) for order in candidates]
    return max(verdicts, key=lambda verdict: verdict.score)


def _judge_things(
    wanted: tuple[ThingRequest, ...], seen: tuple[Seen, ...], request: Request, reading: Reading
) -> Verdict:
    asked, right = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)

    def note(kind: str, ok: bool) -> None:
        asked[kind] += 1
        right[kind] += ok

    note("count", len(reading.things) == len(wanted))
    for index, want in enumerate(wanted):
        got = seen[index] if index < len(seen) else None
        for kind, value in vars(want).items():
            if value is not None:
                note(kind, got is not None and getattr(got, kind) == value)
    if request.layouts:
        if len(wanted) == 1:
            note("position", bool(seen) and _position(seen[0]) in request.layouts)
        else:
            note("relation", len(seen) == 2 and _relation(seen[0], seen[1]) in request.layouts)
    if request.background is not None:
        note("background", reading.background == request.background)
    return Verdict(asked, right)


def _position(thing: Seen) -> str:
    return min(POSITIONS, key=lambda name: (ANCHORS[name][0] - thing.x) ** 2 + (ANCHORS[name][1] - thing.y) ** 2)


def _relation(first: Seen, second: Seen) -> str:
    dx, dy = second.x - first.x, second.y - first.y
    if abs(dx) >= abs(dy):
        return "left of" if dx > 0 else OPPOSITE["left of"]
    return "above" if dy > 0 else OPPOSITE["above"]


def share_right(verdicts: Iterable[Verdict]) -> dict[str, float]:
    """Share of right attributes by kind over many pictures; kinds that nobody asked for are left out."""
    asked, right = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    for verdict in verdicts:
        for kind in KINDS:
            asked[kind] += verdict.asked[kind]
            right[kind] += verdict.right[kind]
    return {kind: right[kind] / asked[kind] for kind in KINDS if asked[kind]}
