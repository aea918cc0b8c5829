"""What the measurements say of each prompt: small answers about many prompts, for screens that list them.

A measurement's rows never change once they are recorded (one made again has another id), so whatever follows
from its id may be kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .reader import RunReader


@dataclass(frozen=True)
class Measurement:
    """A measurement without its summary and its pictures."""

    id: int
    run_id: str
    kind: str  # "baseline", "validation", "final"
    step: int
    split: str
    time: float
    items: int


class PromptMeans(NamedTuple):
    """One prompt under one arm; means over its pictures, None when one of them has no number."""

    prompt_id: str
    arm: str
    prompt: str
    tier: str
    rewrites: str  # of all its pictures, a line each
    reward: float | None
    clip: float | None  # the reward's part of this name
    judge: float | None
    pictures: int


@dataclass(frozen=True)
class Pair:
    """A prompt's picture number ``index`` under two arms, on the same latents."""

    prompt_id: str
    index: int


def measurements(store: RunReader, run_id: str | None = None) -> list[Measurement]:
    """Every measurement, or those of one run, by step and then in the order they were made."""
    with store.read() as db:
        rows = db.query(
            """SELECT id, run_id, kind, step, split, time, items FROM evaluations
                WHERE :run IS NULL OR run_id = :run ORDER BY step, id""",
            {"run": run_id},
        )
        return [Measurement(**row) for row in rows]


def prompt_means(store: RunReader, evaluation_id: int) -> list[PromptMeans]:
    """The prompts of a measurement under each of its arms, by prompt and arm."""
    means = ", ".join(
        f"CASE WHEN count({value}) = count(*) THEN avg({value}) END"
        for value in ("reward", "json_extract(parts, '$.clip')", "judge")
    )
    with store.read() as db:
        rows = db.execute(
            f"""SELECT prompt_id, arm, prompt, tier, coalesce(group_concat(rewrite, char(10)), ''), {means},
                    count(*)
                FROM evaluation_items WHERE evaluation_id = ? GROUP BY prompt_id, arm ORDER BY prompt_id, arm""",
            [evaluation_id],
        )
        return [PromptMeans(*row) for row in rows.fetchall()]


def different_pairs(store: RunReader, before: tuple[int, str], after: tuple[int, str]) -> tuple[list[Pair], int]:
    """Pairs of pictures of two (measurement, arm) that a person can compare, and how many there are in all.

    Left out: a picture that is missing, and rewrites that are equal, whose pictures then are too.
    """
    values = {"before": before[0], "before_arm": before[1], "after": after[0], "after_arm": after[1]}
    with store.read() as db:
        rows = db.execute(
            """SELECT a.prompt_id, a."index", a.image IS NOT NULL AND b.image IS NOT NULL AND a.rewrite IS NOT b.rewrite
                FROM evaluation_items a JOIN evaluation_items b
                    ON b.evaluation_id = :before AND b.prompt_id = a.prompt_id AND b.arm = :before_arm
                    AND b."index" = a."index"
                WHERE a.evaluation_id = :after AND a.arm = :after_arm ORDER BY a.prompt_id, a."index" """,
            values,
        ).fetchall()
    return [Pair(prompt_id, index) for prompt_id, index, differs in rows if differs], len(rows)
