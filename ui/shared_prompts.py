"""What the final evaluations of runs say about one prompt: texts, pictures and scores by arm and latents."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo_engine.store import Store
from grpo_engine.store.measured import Measurement, measurements
from grpo_engine.store.rows import ItemRow, RunRow

ARMS = ("original", "untrained", "untrained_greedy", "trained", "trained_greedy")
KEPT = 128  # evaluations whose prompts are kept in memory: some kilobytes each


@dataclass
class PromptRow:
    """A measured prompt of one run: its latents by index, and each arm's rewards."""

    text: str
    tier: str
    latents: dict[int, int] = field(default_factory=dict)
    rewards: dict[str, list[float]] = field(default_factory=dict)

    def reward(self, arm: str) -> float | None:
        """Mean reward of an arm over the prompt's latents; None where it was not measured."""
        values = self.rewards.get(arm)
        return sum(values) / len(values) if values else None


class SharedPrompts:
    """Answers for several runs at a time. A recorded evaluation never changes, so its prompts are kept."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, ...], dict[str, PromptRow]] = OrderedDict()

    def shared(self, runs: Sequence[RunRow]) -> dict[str, Any]:
        """The prompts that all measured ones of ``runs`` share, the ones they differ most on first.

        Sharing means the same id and the same text. ``spread`` is the largest difference between two runs'
        trained reward.
        """
        tables: list[tuple[RunRow, dict[str, PromptRow]]] = []
        left_out: list[str] = []
        for run in runs:
            found = self._prompts(run.id)
            if found is None:
                left_out.append(run.id)
            else:
                tables.append((run, found))
        first = tables[0][1] if tables else {}
        common = [
            prompt_id
            for prompt_id, row in first.items()
            if all(prompt_id in table and table[prompt_id].text == row.text for _, table in tables)
        ]
        rows = [self._prompt(prompt_id, tables) for prompt_id in common]
        rows.sort(key=lambda row: -(row["spread"] or 0.0))
        same = [row["same_latents"] for row in rows]
        return {
            "runs": [run.id for run, _ in tables],
            "left_out": left_out,
            "prompts": rows,
            "note": _latents_note([run for run, _ in tables], same),
        }

    def pictures(self, runs: Sequence[RunRow], prompt_id: str) -> dict[str, Any]:
        """One prompt in every run that measured it: what each arm wrote and drew on each of the latents."""
        shown = []
        latents: dict[int, set[int]] = {}
        for run in runs:
            items = [
                item
                for evaluation in self._evaluations(run.id)
                for item in self._store.evaluation_items(evaluation.id, prompt_id=prompt_id)
            ]
            if not items:
                continue
            for item in items:
                latents.setdefault(item.index, set()).add(item.latent_seed)
            arms = {arm: [_picture(item) for item in items if item.arm == arm] for arm in ARMS}
            text, tier = items[0].prompt, items[0].tier
            shown.append({"run": run.id, "prompt": text, "tier": tier, "arms": {a: p for a, p in arms.items() if p}})
        return {
            "runs": shown,
            "latents": [{"index": index, "same": len(seeds) == 1} for index, seeds in sorted(latents.items())],
        }

    def _prompt(self, prompt_id: str, tables: Sequence[tuple[RunRow, dict[str, PromptRow]]]) -> dict[str, Any]:
        rows = [table[prompt_id] for _, table in tables]
        trained = [_first(row.reward("trained"), row.reward("trained_greedy")) for row in rows]
        known = [value for value in trained if value is not None]
        return {
            "id": prompt_id,
            "prompt": rows[0].text,
            "tier": rows[0].tier,
            "trained": trained,
            "spread": max(known) - min(known) if len(known) > 1 else None,
            "same_latents": all(row.latents == rows[0].latents for row in rows),
        }

    def _evaluations(self, run_id: str) -> list[Measurement]:
        """The last final evaluation and the baseline, whose original and untrained pictures belong to it."""
        found = measurements(self._store, run_id)
        final = [row for row in found if row.kind == "final"][-1:]
        return [*(row for row in found if row.kind == "baseline"), *final] if final else []

    def _prompts(self, run_id: str) -> dict[str, PromptRow] | None:
        evaluations = self._evaluations(run_id)
        if not evaluations:
            return None
        key = tuple(evaluation.id for evaluation in evaluations)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        table: dict[str, PromptRow] = {}
        for evaluation in evaluations:
            for item in self._store.evaluation_items(evaluation.id):
                row = table.setdefault(item.prompt_id, PromptRow(item.prompt, item.tier))
                row.latents[item.index] = item.latent_seed
                if item.reward is not None:
                    row.rewards.setdefault(item.arm, []).append(item.reward)
        with self._lock:
            self._kept[key] = table
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return table


def _picture(item: ItemRow) -> dict[str, Any]:
    return {
        "index": item.index,
        "rewrite": item.rewrite,
        "reward": item.reward,
        "judge": item.judge,
        "cut": item.cut_tokens,
        "unread": item.unread,
        "image": item.image,
        "thumbnail": item.thumbnail,
    }


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _latents_note(runs: Sequence[RunRow], same: Sequence[bool]) -> str:
    """Whether pictures of different runs can be compared, in a sentence; "" with fewer than two runs."""
    if len(runs) < 2 or not same:
        return ""
    if all(same):
        return "All runs drew these prompts on the same latents: what differs between their pictures is not chance."
    seeds = sorted({run.seed for run in runs})
    if len(seeds) > 1:
        shown = ", ".join(map(str, seeds[:6])) + (", ..." if len(seeds) > 6 else "")
        return (
            f"The runs have different seeds ({shown}), so their latents differ. Within a run the pictures share "
            "theirs; between runs a part of the difference is chance."
        )
    return "Some of these prompts were drawn on different latents; there a part of the difference is chance."
