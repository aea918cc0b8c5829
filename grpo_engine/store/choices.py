"""What a person preferred, blind: one row for each pair of pictures that was judged, and nothing about the person.

The pictures belong to a measurement; when it goes, or is made again, the choices about it go with it.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from .connection import StoreError
from .store import Store

Side = Literal["left", "right", "neither"]
SIDES: tuple[Side, ...] = ("left", "right", "neither")


@dataclass(frozen=True)
class Choice:
    """One answer. ``clip_prefers`` is the side with the higher CLIP score, "neither" when they are equal or missing."""

    run_id: str
    evaluation_id: int  # of the measurement of the later arm
    prompt_id: str
    index: int
    left_arm: str
    right_arm: str
    choice: Side
    clip_prefers: Side
    time: float

    def arm(self, side: Side) -> str | None:
        """The arm on a side; None for "neither"."""
        return {"left": self.left_arm, "right": self.right_arm}.get(side)


def add_choice(store: Store, choice: Choice) -> None:
    """Keep a choice; an earlier one about the same two pictures is replaced.

    Raises:
        StoreError: the measurement is gone or not of that run, or a side that is none.
    """
    if choice.choice not in SIDES or choice.clip_prefers not in SIDES:
        raise StoreError(f"A choice is one of {', '.join(SIDES)}, not {choice.choice!r} or {choice.clip_prefers!r}.")
    with store.write() as db:
        owner = db.execute("SELECT run_id FROM evaluations WHERE id = ?", [choice.evaluation_id]).fetchone()
        if owner is None or owner[0] != choice.run_id:
            raise StoreError(f"Run {choice.run_id} has no measurement {choice.evaluation_id} now; reload the page.")
        values = vars(choice) | {"time": choice.time or time.time()}
        db.execute(
            """DELETE FROM choices WHERE evaluation_id = :evaluation_id AND prompt_id = :prompt_id AND "index" = :index
                AND left_arm IN (:left_arm, :right_arm) AND right_arm IN (:left_arm, :right_arm)""",
            values,
        )
        columns = ", ".join(f'"{name}"' for name in values)
        db.execute(f"INSERT INTO choices ({columns}) VALUES ({', '.join(f':{name}' for name in values)})", values)


def choices(store: Store, evaluation_id: int, arms: tuple[str, str]) -> list[Choice]:
    """The choices between two arms (in either order) of a measurement, the oldest first."""
    with store.read() as db:
        rows = db.query(
            """SELECT run_id, evaluation_id, prompt_id, "index", left_arm, right_arm, choice, clip_prefers, time
                FROM choices WHERE evaluation_id = :evaluation AND left_arm IN (:one, :two)
                AND right_arm IN (:one, :two) ORDER BY id""",
            {"evaluation": evaluation_id, "one": arms[0], "two": arms[1]},
        )
        return [Choice(**row) for row in rows]


def forget_choices(store: Store, evaluation_id: int, arms: tuple[str, str], *, last_only: bool) -> int:
    """Delete the choices between two arms, or the last of them; returns how many went."""
    with store.write() as db:
        limit = "ORDER BY id DESC LIMIT 1" if last_only else ""
        done = db.execute(
            f"""DELETE FROM choices WHERE id IN (SELECT id FROM choices WHERE evaluation_id = :evaluation
                AND left_arm IN (:one, :two) AND right_arm IN (:one, :two) {limit})""",
            {"evaluation": evaluation_id, "one": arms[0], "two": arms[1]},
        )
        return int(done.rowcount)


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a share (Wilson 1927; Brown, Cai and DasGupta 2001, eq. 4): never outside 0..1.

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), with z the normal quantile of the confidence.

    Raises:
        ValueError: fewer than one trial, more successes than trials, or a confidence outside 0..1.
    """
    if n < 1 or not 0 <= successes <= n or not 0.0 < confidence < 1.0:
        raise ValueError(f"A share needs 0 <= successes <= n and n >= 1, not {successes} of {n} at {confidence}.")
    z = NormalDist().inv_cdf(0.5 + confidence / 2.0)
    p = successes / n
    center = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)
