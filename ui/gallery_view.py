"""A run's measurement as the Before / after screen sees it: its arms, its headline, its prompts' pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from grpo_engine.store import Store
from grpo_engine.store.measured import Measurement, PromptMeans, different_pairs, measurements, prompt_means
from grpo_engine.store.rows import ItemRow, RunRow

from .context import Refused
from .gallery_blind import Showing, arrange
from .gallery_table import LABELS, Kept, PromptTable, Query, clean_gain, gain_sentence
from .run_table import number

ARMS = ("original", "untrained", "trained", "untrained_greedy", "trained_greedy")
COMPARISONS = (
    ("trained", "untrained"),
    ("trained_greedy", "untrained_greedy"),
    ("trained", "original"),
    ("trained_greedy", "original"),
    ("untrained", "original"),
    ("untrained_greedy", "original"),
)


@dataclass(frozen=True)
class View:
    """A run's measurement with what belongs beside it: a final one is read with the run's baseline.

    The pictures come from ``parts``; the summary of the last of them, ``main``, covers all.
    """

    run: RunRow
    main: Measurement
    parts: tuple[Measurement, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """Ids of the parts: what the view shows follows from them."""
        return tuple(part.id for part in self.parts)


@dataclass(frozen=True)
class Kind:
    """What is kept of a view: its columns, and which measurement holds each arm."""

    table: PromptTable
    homes: Mapping[str, int]


class Views:
    """Answers about views, from the store; the columns of the last few are kept."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._kept = Kept()
        self._arranged = Kept()

    def find(self, run_id: str, at: int | None) -> View | None:
        """The measurement ``at``, or the one that says most; None when the run has none yet."""
        run = self.store.run(run_id)
        rows = measurements(self.store, run_id)
        if not rows:
            return None
        by_worth = sorted(rows, key=lambda row: (row.kind == "final", row.kind == "validation", row.step, row.id))
        main = next((row for row in rows if row.id == at), by_worth[-1])
        beside = [row for row in rows if row.kind == "baseline"] if main.kind == "final" else []
        return View(run, main, (*beside, main))

    def require(self, run_id: str, at: int | None) -> View:
        """The same, where there has to be one. Raises `Refused`."""
        view = self.find(run_id, at)
        if view is None:
            raise Refused(f"Run {run_id} has measured nothing yet.", status=404)
        return view

    def columns(self, view: View) -> Kind:
        """The view's prompts as columns."""

        def make() -> Kind:
            rows: list[PromptMeans] = []
            homes: dict[str, int] = {}
            for part in view.parts:
                means = prompt_means(self.store, part.id)
                homes |= {row.arm: part.id for row in means}
                rows += means
            return Kind(PromptTable(rows), homes)

        kind: Kind = self._kept.get(view.ids, make)
        return kind

    def arms(self, view: View, compare: str) -> tuple[str, str]:
        """(after, before) of a comparison's name, as ``trained_vs_original``. Raises `Refused`."""
        for after, before in COMPARISONS:
            if compare == f"{after}_vs_{before}" and {after, before} <= set(self.columns(view).homes):
                return after, before
        raise Refused(f"This measurement has no comparison {compare!r}; reload the page.", status=404)

    def pictures(self, view: View, prompt_id: str) -> dict[str, list[ItemRow]]:
        """Arm -> the prompt's pictures, by latents."""
        homes = self.columns(view).homes
        found: dict[str, list[ItemRow]] = {}
        for part in view.parts:
            for item in self.store.evaluation_items(part.id, prompt_id=prompt_id):
                if homes.get(item.arm) == part.id:
                    found.setdefault(item.arm, []).append(item)
        return found

    def rows(self, view: View, places: Iterable[int], query: Query) -> list[dict[str, Any]]:
        """Prompts, by their rows in the table, with the pictures of all their arms."""
        table = self.columns(view).table
        gain, judge = table.gain(query), table.gain(query, table.judge)
        return [
            {
                "id": table.ids[place],
                "text": table.texts[place],
                "tier": table.tiers[place],
                "gain": float(gain[place]),
                "judge_gain": float(judge[place]),
                "arms": {
                    arm: [picture(item) for item in items]
                    for arm, items in self.pictures(view, table.ids[place]).items()
                },
            }
            for place in places
        ]

    def showings(self, view: View, after: str, before: str) -> tuple[list[Showing], int]:
        """The blind test's pairs in their order, and how many pairs of pictures there are in all."""

        def make() -> tuple[list[Showing], int]:
            homes = self.columns(view).homes
            pairs, total = different_pairs(self.store, (homes[before], before), (homes[after], after))
            return arrange(pairs, homes[after], after, before), total

        found: tuple[list[Showing], int] = self._arranged.get((view.ids, after, before), make)
        return found

    def headline(self, view: View) -> dict[str, Any]:
        """What the measurement says as a whole."""
        kind = self.columns(view)
        rows = self.store.evaluations(view.run.id)
        summary: Mapping[str, Any] = next((row.summary for row in rows if row.id == view.main.id), {})
        confidence = number(summary.get("confidence")) or 0.95
        gains = summary.get("gains")
        comparisons = []
        for after, before in COMPARISONS:
            if not {after, before} <= set(kind.homes):
                continue
            name = f"{after}_vs_{before}"
            raw = gains.get(name) if isinstance(gains, Mapping) else None
            gain = clean_gain(raw)
            judged = clean_gain(raw.get("judge_gain")) if isinstance(raw, Mapping) else None
            _, counts = kind.table.select(Query(after, before))
            comparisons.append(
                {
                    "name": name,
                    "after": after,
                    "before": before,
                    "reward": gain,
                    "judge": judged,
                    "counts": counts,
                    "sentence": gain_sentence(gain, after, before, confidence) if gain else "",
                }
            )
        said = summary.get("arms")
        arms = {
            arm: _arm(said.get(arm) if isinstance(said, Mapping) else None) | {"label": LABELS[arm]}
            for arm in ARMS
            if arm in kind.homes
        }
        return {
            "at": view.main.id,
            "measured": label(view.main),
            "ids": view.ids,
            "prompts": len(kind.table),
            "latents": kind.table.latents,
            "confidence": confidence,
            "comparisons": comparisons,
            "arms": arms,
        }


def label(row: Measurement) -> dict[str, Any]:
    """A measurement as it is named in a list."""
    names = {"final": f"Final, step {row.step:,}", "baseline": "Before training"}
    name = names.get(row.kind, f"Step {row.step:,}, {row.split} prompts")
    return {"id": row.id, "kind": row.kind, "step": row.step, "split": row.split, "label": name}


def note(run: RunRow, view: View | None) -> str:
    """What a person has to know about how complete the picture is; empty when nothing is missing."""
    if view is not None and view.main.kind == "final":
        return ""
    if view is None:
        if run.active:
            return f"This run is {run.state} and has measured nothing yet; its pictures appear here as soon as it has."
        return f"This run was {run.state} before it measured anything; resume it, or look at another run."
    if view.main.kind == "validation":
        after = "it goes on training" if run.active else f"the run is {run.state}"
        return (
            f"Measured after step {view.main.step:,} on {view.main.split} prompts; {after}. "
            "The measurement that counts is made on the test prompts at the end."
        )
    if run.active:
        return f"This run is {run.state}. Its trained rewrites are measured at the end, on these same latents."
    steps = f"step {run.step:,} of {run.total_steps:,}"
    return f"This run was {run.state} at {steps}, before its trained rewrites were measured; resume it to get them."


def picture(item: ItemRow) -> dict[str, Any]:
    """A measured picture as the screen needs it."""
    right, asked = (sum(counts[place] for counts in item.judge_parts.values()) for place in (0, 1))
    return {
        "index": item.index,
        "rewrite": item.rewrite,
        "reward": item.reward,
        "clip": item.parts.get("clip"),
        "judge": item.judge,
        "right": [right, asked] if asked else None,
        "cut": item.cut_tokens,
        "unread": item.unread,
        "image": item.image,
        "thumbnail": item.thumbnail,
    }


def _arm(said: Any) -> dict[str, Any]:
    """Means of an arm, numbers only: summaries can be imported."""
    said = said if isinstance(said, Mapping) else {}
    return {name: number(said.get(name)) for name in ("reward", "judge", "failures", "pictures", "cut_share")} | {
        name: _numbers(said.get(name)) for name in ("kinds", "tiers")
    }


def _numbers(said: Any) -> dict[str, float]:
    if not isinstance(said, Mapping):
        return {}
    return {str(key): value for key, raw in said.items() if (value := number(raw)) is not None}
