"""The prompts of a measurement as columns of numbers: sorting, filtering, and what can be said of them.

A measurement of 100,000 prompts has a million pictures; these columns hold the means over each prompt's
pictures, are made once and kept, and every question of the screen is answered from them.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grpo_engine.prompts import TIERS
from grpo_engine.store.measured import PromptMeans

from .charts import BLUE, ORANGE
from .charts_compare import shown_text
from .run_table import number

Floats = NDArray[np.float64]

SAME = 0.005
"""Gains of the reward below this count as none: what two decimals show as 0.00."""

JUDGE_SAME = 1e-9  # the judge counts attributes: equal counts may differ in a sum's last digit

SORTS = ("gain", "loss", "judge", "tier", "prompt")
CHANGES = ("gained", "lost", "same")
MOST_POINTS = 2000  # drawn in the scatter; more would be a blot, and slow to draw

LABELS = {
    "original": "Original prompt",
    "untrained": "Untrained rewrite",
    "trained": "Trained rewrite",
    "untrained_greedy": "Untrained rewrite, likeliest",
    "trained_greedy": "Trained rewrite, likeliest",
}
_MANY = {
    "original": "the original prompts",
    "untrained": "untrained rewrites",
    "trained": "trained rewrites",
    "untrained_greedy": "the untrained policy's likeliest rewrites",
    "trained_greedy": "the trained policy's likeliest rewrites",
}


@dataclass(frozen=True)
class Query:
    """Which prompts, and in which order."""

    after: str
    before: str
    sort: str = "gain"
    tier: str = ""
    change: str = ""
    search: str = ""


class PromptTable:
    """The prompts (P) of a measurement under its arms (A).

    Attributes:
        ids, texts, tiers: lists of P.
        tier_names: the tiers there are, once each.
        arms: arm -> its column.
        reward, clip, judge: (P, A), NaN where there is no number.
        latents: the most pictures that a prompt has under an arm.
    """

    def __init__(self, rows: Sequence[PromptMeans]) -> None:
        position: dict[str, int] = {}
        self.ids: list[str] = []
        self.texts: list[str] = []
        self.tiers: list[str] = []
        self.arms = {arm: column for column, arm in enumerate(sorted({row.arm for row in rows}))}
        words: list[list[str]] = []
        for row in rows:
            if row.prompt_id not in position:
                position[row.prompt_id] = len(self.ids)
                self.ids.append(row.prompt_id)
                self.texts.append(row.prompt)
                self.tiers.append(row.tier)
                words.append([row.prompt])
            words[position[row.prompt_id]].append(row.rewrites)
        shape = (len(self.ids), len(self.arms))
        self.reward, self.clip, self.judge = (np.full(shape, np.nan) for _ in range(3))
        for row in rows:
            place = position[row.prompt_id], self.arms[row.arm]
            for column, value in ((self.reward, row.reward), (self.clip, row.clip), (self.judge, row.judge)):
                column[place] = np.nan if value is None else value
        self.latents = max((row.pictures for row in rows), default=0)
        self._position = position
        self._words = ["\n".join(parts).casefold() for parts in words]
        self.tier_names = sorted(set(self.tiers), key=lambda tier: (tier not in TIERS, tier))
        self._tier = np.array([TIERS.index(tier) if tier in TIERS else len(TIERS) for tier in self.tiers])

    def __len__(self) -> int:
        return len(self.ids)

    def gain(self, query: Query, values: Floats | None = None) -> Floats:
        """(P,): after - before of the reward, or of ``values`` (P, A); NaN where an arm is missing."""
        values = self.reward if values is None else values
        if query.after not in self.arms or query.before not in self.arms:
            return np.full(len(self), np.nan)
        found: Floats = values[:, self.arms[query.after]] - values[:, self.arms[query.before]]
        return found

    def largest_gain(self, query: Query) -> float:
        """The largest gain or loss of all prompts, filtered or not: the scale of their bars. 0 without any."""
        sizes = np.abs(self.gain(query))
        return float(np.max(sizes, where=np.isfinite(sizes), initial=0.0))

    def select(self, query: Query) -> tuple[NDArray[np.int64], dict[str, int]]:
        """Rows in the order asked for, and how many there are of each change before that filter is applied."""
        gain = self.gain(query)
        wanted = np.ones(len(self), dtype=bool)
        if query.tier:
            wanted &= np.array([tier == query.tier for tier in self.tiers], dtype=bool)
        if terms := query.search.casefold().split():
            wanted &= np.array([all(term in words for term in terms) for words in self._words], dtype=bool)
        masks = {"gained": gain >= SAME, "lost": gain <= -SAME, "same": np.abs(gain) < SAME}
        counts = {"all": int(wanted.sum())} | {name: int((mask & wanted).sum()) for name, mask in masks.items()}
        if query.change:
            wanted &= masks[query.change]
        rows = np.flatnonzero(wanted)
        return rows[self._order(query, gain, rows)], counts

    def _order(self, query: Query, gain: Floats, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Stable, so that equal prompts stay in the order of their ids; a missing number comes last."""
        if query.sort == "prompt":
            return np.array(sorted(range(len(rows)), key=lambda i: self.texts[rows[i]].casefold()), dtype=np.int64)
        if query.sort == "judge":
            keys: list[NDArray[Any]] = [self.gain(query, self.judge)[rows]]
        elif query.sort == "loss":
            keys = [gain[rows]]
        elif query.sort == "tier":
            keys = [-gain[rows], self._tier[rows]]
        else:
            keys = [-gain[rows]]
        return np.lexsort(keys)

    def place(self, prompt_id: str) -> int:
        """The row of a prompt. Raises `KeyError`."""
        return self._position[prompt_id]


class Kept:
    """The last few things made, by key: making one again costs more than keeping it."""

    def __init__(self, most: int = 4) -> None:
        self.most = most
        self._items: OrderedDict[Any, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any, make: Any) -> Any:
        """The thing under ``key``, made by ``make()`` when it is not there. One is made at a time."""
        with self._lock:
            if key not in self._items:
                self._items[key] = make()
                while len(self._items) > self.most:
                    self._items.popitem(last=False)
            self._items.move_to_end(key)
            return self._items[key]


# ---------------------------------------------------------------------------------------------
# What can be said


def clean_gain(raw: Any) -> dict[str, Any] | None:
    """A paired gain of a recorded summary with numbers only, or None if one is missing: summaries can be imported."""
    if not isinstance(raw, Mapping):
        return None
    gain: dict[str, Any] = {}
    for name in ("mean", "low", "high", "n", "win_rate", "before", "after"):
        if (value := number(raw.get(name))) is None:
            return None
        gain[name] = value
    # Relative to nothing, or to less than nothing, a share means nothing.
    gain["percent"] = 100.0 * gain["mean"] / gain["before"] if gain["before"] > 0 else None
    gain["distinguishable"] = bool(gain["low"] > 0 or gain["high"] < 0)
    return gain


def gain_sentence(gain: Mapping[str, Any], after: str, before: str, confidence: float) -> str:
    """One honest sentence on a gain of the reward."""
    share = gain["percent"]
    percent = "" if share is None else f" ({_signed(share, 0 if abs(share) >= 9.95 else 1)} %)"
    interval = f"{100 * confidence:.0f} % interval {_signed(gain['low'])} to {_signed(gain['high'])}"
    interval += f" over {gain['n']:,} prompts"
    text = f"{_MANY[after][0].upper()}{_MANY[after][1:]} scored {_fixed(gain['after'])}"
    text += f" against {_fixed(gain['before'])} for {_MANY[before]}, {_signed(gain['mean'])}{percent}"
    if not gain["distinguishable"]:
        return f"{text}: not distinguishable from zero ({interval})."
    return f"{text}, {interval}; win rate {100 * gain['win_rate']:.0f} % (a tie counts half)."


def _fixed(value: float) -> str:
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def _signed(value: float, places: int = 2) -> str:
    return f"{value:+.{places}f}".replace("-", "\N{MINUS SIGN}")


def ranks(values: Floats) -> Floats:
    """1..n for the smallest to the largest, equal ones sharing the mean of their ranks."""
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    found: Floats = ((last - counts + 1 + last) / 2.0)[where]
    return found


def rank_correlation(one: Floats, other: Floats) -> float | None:
    """Spearman's rho: Pearson's correlation of the ranks. None for fewer than 3 or without any spread."""
    if len(one) < 3:
        return None
    a, b = ranks(one) - (len(one) + 1) / 2, ranks(other) - (len(other) + 1) / 2
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale else None


def agreement(clip: Floats, judge: Floats) -> dict[str, Any]:
    """How two gains (P,) go together: counts of directions, the rank correlation, and a sentence."""
    known = np.isfinite(clip) & np.isfinite(judge)
    clip, judge = clip[known], judge[known]
    up, down = clip >= SAME, clip <= -SAME
    better, worse = judge > JUDGE_SAME, judge < -JUDGE_SAME
    counts = {
        "both_rose": int((up & better).sum()),
        "both_fell": int((down & worse).sum()),
        "only_clip": int((up & worse).sum()),
        "only_judge": int((down & better).sum()),
    }
    n = len(clip)
    counts["unmoved"] = n - sum(counts.values())
    rho = rank_correlation(clip, judge)
    if n == 0:
        return {"counts": counts, "n": 0, "rho": None, "sentence": "No judge measured these pictures."}
    moved = n - counts["unmoved"]
    agreed = counts["both_rose"] + counts["both_fell"]
    both = f"{moved:,} prompts where both moved" if moved != 1 else "one prompt where both moved"
    text = f"CLIP and the judge moved the same way for {agreed:,} of the {both}"
    if counts["unmoved"]:
        text += f" (for {counts['unmoved']:,} at least one did not)"
    text += "." if rho is None else f"; their gains' rank correlation is {rho:.2f} over {n:,} prompts."
    if counts["only_clip"]:
        many = f"{counts['only_clip']:,} prompts" if counts["only_clip"] > 1 else "one prompt"
        text += f" Look at the {many} where CLIP rose and the judge fell: there CLIP may have been fooled."
    return {"counts": counts, "n": n, "rho": rho, "sentence": text}


def agreement_figure(table: PromptTable, query: Query) -> dict[str, Any]:
    """Gain in CLIP (x) against gain in the judge (y), a point a prompt (customdata: its id), by kind of agreement."""
    clip, judge = table.gain(query, table.clip), table.gain(query, table.judge)
    rows = np.flatnonzero(np.isfinite(clip) & np.isfinite(judge))
    rows = rows[:: max(1, math.ceil(len(rows) / MOST_POINTS))]
    against = (clip[rows] * judge[rows] < 0) & (np.abs(clip[rows]) >= SAME) & (np.abs(judge[rows]) > JUDGE_SAME)
    data = []
    for name, chosen, color, symbol in (
        ("they agree, or one did not move", rows[~against], BLUE, "circle"),
        ("they disagree", rows[against], ORANGE, "diamond"),
    ):
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "x": [round(float(value), 4) for value in clip[chosen]],
                "y": [round(float(value), 4) for value in judge[chosen]],
                "customdata": [table.ids[row] for row in chosen],
                "text": [_short(table.texts[row]) for row in chosen],
                "hovertemplate": "%{text}<br>CLIP %{x:+.2f}, judge %{y:+.2f}<extra></extra>",
                "marker": {"color": color, "symbol": symbol, "size": 8, "opacity": 0.65},
            }
        )
    layout = {
        "hovermode": "closest",
        "xaxis": {"title": {"text": "gain in CLIP, 100 x cosine"}, "zeroline": True, "zerolinewidth": 2},
        "yaxis": {"title": {"text": "gain in the judge, 0 to 1"}, "zeroline": True, "zerolinewidth": 2},
    }
    return {"data": data, "layout": layout}


def _short(text: str) -> str:
    """The beginning of a prompt, for a hover."""
    return shown_text(text if len(text) <= 80 else f"{text[:79]}…")
