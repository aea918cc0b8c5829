"""The blind test: which pair of pictures comes next, which side is which, and what the answers say.

Order and sides follow from the measurement alone, so a reload, or a second browser, goes on with the same pair.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grpo_engine.store.choices import Choice, wilson_interval
from grpo_engine.store.measured import Pair

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Showing:
    """A pair as it is shown: ``left`` and ``right`` are arms."""

    pair: Pair
    left: str
    right: str


def arrange(pairs: Sequence[Pair], evaluation_id: int, after: str, before: str) -> list[Showing]:
    """The pairs in random order with random sides; all prompts come once before any of them comes again.

    So the first answers are about different prompts: independent, as the interval of their share assumes.
    """
    generator = np.random.default_rng([evaluation_id, zlib.crc32(f"{after} {before}".encode())])
    draws = generator.random((2, len(pairs)))
    swapped = generator.integers(0, 2, len(pairs))
    codes: dict[str, int] = {}
    prompt = np.array([codes.setdefault(pair.prompt_id, len(codes)) for pair in pairs], dtype=np.int64)
    grouped = np.lexsort((draws[0], prompt))
    first = np.searchsorted(prompt[grouped], prompt[grouped])
    turn = np.empty(len(pairs), dtype=np.int64)
    turn[grouped] = np.arange(len(pairs)) - first
    order = np.lexsort((draws[1], turn))
    return [
        Showing(pairs[i], *((after, before) if swapped[i] else (before, after)))
        for i in order
    ]  # fmt: skip


def clip_side(left: float | None, right: float | None) -> Any:
    """The side that CLIP prefers; "neither" for equal scores, or without one."""
    if left is None or right is None or left == right:
        return "neither"
    return "left" if left > right else "right"


def tally(made: Sequence[Choice], after: str, noun: str) -> dict[str, Any]:
    """What the choices say: counts, shares with their interval, and one or two sentences."""
    decided = [choice for choice in made if choice.choice != "neither"]
    won = sum(choice.arm(choice.choice) == after for choice in decided)
    compared = [choice for choice in decided if choice.clip_prefers != "neither"]
    agreed = sum(choice.choice == choice.clip_prefers for choice in compared)
    unsure = len(made) - len(decided)
    found: dict[str, Any] = {"answers": len(made), "decided": len(decided), "won": won, "unsure": unsure}
    found |= {"compared": len(compared), "agreed": agreed, "low": None, "high": None}
    if not decided:
        found["sentence"] = f"You could not say {_times(unsure)}." if unsure else "No answers yet."
        return found
    low, high = wilson_interval(won, len(decided), CONFIDENCE)
    found |= {"low": low, "high": high}
    text = (
        f"You preferred the {noun} in {won} of {len(decided)} "
        f"({100 * won / len(decided):.0f} %, {100 * CONFIDENCE:.0f} % interval {100 * low:.0f} to {100 * high:.0f} %)"
    )
    if low <= 0.5 <= high:
        text += ", which chance alone could bring about"
    text += f"; you could not say {_times(unsure)}." if unsure else "."
    if compared:
        text += f" CLIP agreed with you in {agreed} of {len(compared)}."
    return found | {"sentence": text}


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
