"""Figures of the compare screen: one metric of several runs. Pure: rows in, plotly figure out.

A figure is a plain dict with ``data`` and ``layout``. A trace's ``meta`` says which run it is of: ``key`` and
``run`` are its id, ``series`` its name as typed; ``smooth`` lets the page smooth it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from grpo_engine.recorder import STEP_METRICS
from grpo_engine.store.rows import Bins

from .charts import PALETTE

Axis = Literal["step", "minutes"]

DASHES = ("solid", "dash", "dot", "dashdot")
"""Runs that share a colour, because there are more runs than colours, differ by these."""

AXIS_TITLES: dict[Axis, str] = {"step": "step", "minutes": "minutes in training steps"}
DEFAULT_METRICS = ("reward_mean", "kl_penalty", "entropy", "judge_mean")
CROWDED = 8
"""With more runs than this the pointer shows one run and not all of them."""

_TITLES = {
    "reward_mean": "Reward",
    "kl_penalty": "KL to the untrained policy",
    "entropy": "Entropy",
    "judge_mean": "Judge",
}
_UNITS = {
    "reward_mean": "mean a step",
    "reward_clip": "100 x cosine",
    "reward_vqa": "0 to 1",
    "judge_mean": "0 to 1",
    "kl_penalty": "nats a token",
    "entropy": "nats a token",
    "completion_tokens": "tokens",
    "cut_tokens": "tokens",
    "rewrite_words": "words",
    "images_rendered": "pictures",
}


@dataclass(frozen=True)
class RunCurve:
    """One run's line: ``x`` as the axis asks, ``y`` the metric, equally long."""

    run_id: str
    number: int
    name: str
    x: Sequence[float | None]
    y: Sequence[float | None]


def metric_title(metric: str) -> str:
    """What a person calls a metric."""
    return _TITLES.get(metric) or metric.replace("_", " ").capitalize()


def metric_unit(metric: str) -> str:
    """The unit of a metric, "" for a plain number."""
    if metric.endswith(("_share", "_fraction")):
        return "share"
    return "seconds" if metric.startswith("seconds") else _UNITS.get(metric, "")


def metric_list() -> list[dict[str, Any]]:
    """Every metric a step has, the reward first: name, title, unit, meaning, and whether it is shown at first."""
    names = [*DEFAULT_METRICS, *(name for name in STEP_METRICS if name not in DEFAULT_METRICS)]
    return [
        {
            "name": name,
            "title": metric_title(name),
            "unit": metric_unit(name),
            "meaning": STEP_METRICS[name],
            "default": name in DEFAULT_METRICS,
        }
        for name in names
    ]


def run_color(number: int) -> str:
    """The colour of run number ``number`` (from 1), the same on every screen."""
    return PALETTE[(number - 1) % len(PALETTE)]


def run_dash(number: int) -> str:
    """The dash of run number ``number``: tells runs of one colour apart."""
    return DASHES[(number - 1) // len(PALETTE) % len(DASHES)]


def shown_text(text: str) -> str:
    """Text for plotly, which takes ``<b>`` or a link in it for markup: shown as it was typed."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def curve_points(values: Bins, seconds: Bins | None = None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """x and y of a metric's bins, (B,) each: y is a bin's mean, x its first step, as on the other charts.

    With ``seconds``, the bins of the metric of that name: x is the minutes that the steps took up to the end of
    that first step. Both must come from the same range of steps. Where no step has its seconds there is no time
    axis, and both are empty.
    """
    if seconds is None:
        return values.first.astype(np.float64), values.mean
    if not len(seconds):
        return np.empty(0), np.empty(0)
    until = np.cumsum(seconds.count * seconds.mean)
    begin = until - (seconds.count - 1) * seconds.mean  # the end of a bin's first step, were all its steps alike
    place = np.searchsorted(seconds.first, values.first, side="right") - 1
    inside = (place >= 0) & (seconds.first[place] == values.first)
    earlier = np.where(place < 0, 0.0, until[place])  # a bin without seconds adds none
    return np.where(inside, begin[place], earlier) / 60.0, values.mean


def overlay_figure(metric: str, curves: Sequence[RunCurve], axis: Axis = "step") -> dict[str, Any]:
    """``metric`` of several runs over steps or minutes, one line a run in the run's own colour."""
    unit = metric_unit(metric)
    data = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": shown_text(curve.name),
            "x": list(curve.x),
            "y": list(curve.y),
            "line": {"color": run_color(curve.number), "width": 2, "dash": run_dash(curve.number)},
            "hovertemplate": "%{y:.4~g}<extra>%{fullData.name}</extra>",
            "meta": {"key": curve.run_id, "run": curve.run_id, "series": curve.name, "smooth": True},
        }
        for curve in curves
    ]
    layout = {
        "showlegend": False,  # lines carry their run's name at their end, and the runs stand above the charts
        "hovermode": "x unified" if len(curves) <= CROWDED else "closest",
        "xaxis": {"title": AXIS_TITLES[axis]},
        "yaxis": {"title": unit},
    }
    return {"data": data, "layout": layout}
