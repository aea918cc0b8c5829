"""Figures of a run's steps. Pure: bins of metrics and evaluations in, plotly figures out, as plain dicts.

A trace's ``meta`` says what the page may do with it: ``key`` names it among all figures, so that new points find
it, and ``smooth`` lets the page smooth it. A bin is drawn at its first step: that never moves while the bin
fills, and it is a step that can be looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from grpo_engine.recorder import STEP_METRICS
from grpo_engine.store.rows import Bins, EvaluationRow

from .context import column

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#8f2d5f", "#3a9bdc", "#7a5c00", "#4b2a87", "#6b6b6b")
"""Colours of lines on a light page: blue, orange and green of Okabe and Ito, the others as far from them and from each
other as the colour-blind can tell, all with a contrast of at least 3 to 1. The page has others for its dark theme."""
BLUE, ORANGE, GREEN, PURPLE, SKY = PALETTE[:5]

BINS = 600
"""Most points of a line: about as many as a chart has pixels to show."""
FEW = 40
"""Up to this many points a line has dots, else a run's first step would not be seen at all."""

SHARE = ".0%"  # d3's format of a share
NUMBER = "~g"


@dataclass(frozen=True)
class Line:
    """A metric as a line, ``factor`` times it. ``spread``: where bins hold several steps, how far they reach."""

    metric: str
    name: str
    color: str
    factor: float = 1.0
    right: bool = False  # which of the two axes
    spread: bool = True


@dataclass(frozen=True)
class Band:
    """What lies between two metrics, filled."""

    low: str
    high: str
    name: str
    color: str


@dataclass(frozen=True)
class ChartSpec:
    """One chart: what it shows and what is said beside it. Axes have a title with their unit, and a format."""

    name: str
    title: str
    unit: str
    note: str
    lines: tuple[Line, ...]
    bands: tuple[Band, ...] = ()
    left: tuple[str, str] = ("", NUMBER)
    right: tuple[str, str] = ("", NUMBER)
    evaluations: Literal["", "reward", "judge"] = ""  # which measurement of the evaluations stands beside the lines
    metrics: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        names = [line.metric for line in self.lines] + [name for band in self.bands for name in (band.low, band.high)]
        unknown = [name for name in names if name not in STEP_METRICS]
        if unknown:
            raise ValueError(f"Chart {self.name} asks for {unknown[0]!r}, which no step has.")
        object.__setattr__(self, "metrics", tuple(dict.fromkeys(names)))


def setting(config: Mapping[str, Any], path: str, default: Any) -> Any:
    """A recorded run's setting, as ``objective.kl_coef``; ``default`` where an older version had none."""
    value: Any = config
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return default
        value = value[name]
    return value


def chart_specs(config: Mapping[str, Any]) -> list[ChartSpec]:
    """The live screen's charts for a run with these settings, the reward first."""
    return [
        _reward(config),
        _advantage(config),
        _loss(config),
        _divergence(),
        _update(),
        _length(config),
        _judge(config),
    ]


def _reward(config: Mapping[str, Any]) -> ChartSpec:
    note = "Every step has other prompts, so single steps jump; the smoothed line is the trend."
    if setting(config, "models.reward.debug", "none") == "shuffle":
        note = (
            "A negative control: rewards are dealt out at random inside each group, so a change here is drift. " + note
        )
    return ChartSpec(
        "reward", "Reward", reward_unit(config), note,
        (Line("reward_mean", "mean of a step", BLUE),),
        (Band("reward_p10", "reward_p90", "10–90 %", BLUE),),
        left=("reward", NUMBER), evaluations="reward",
    )  # fmt: skip


def reward_unit(config: Mapping[str, Any]) -> str:
    """What a reward of 1 is, by the weights of its parts."""
    weights = dict(setting(config, "models.reward.weights", {}))
    clip, others = weights.pop("clip", 1.0), any(weights.values())
    if others:
        return "weighted sum of its parts"
    return "100 × cosine of picture and prompt" if clip == 1.0 else f"{100 * clip:g} × cosine of picture and prompt"


def _advantage(config: Mapping[str, Any]) -> ChartSpec:
    scaled = {"group": "the group's spread", "batch": "the step's spread"}.get(
        setting(config, "objective.scale", "group"), ""
    )
    note = "The mean is 0 by construction: rewards are compared inside their group. One without spread teaches nothing."
    return ChartSpec(
        "advantage", "Advantage", f"in units of {scaled}" if scaled else "in points of reward", note,
        (Line("avg_advantage", "mean", BLUE, spread=False),
         Line("zero_spread_share", "no spread (right)", ORANGE, right=True)),
        (Band("advantage_p10", "advantage_p90", "10–90 %", BLUE),),
        left=("advantage", NUMBER), right=("share of groups", SHARE),
    )  # fmt: skip


def _loss(config: Mapping[str, Any]) -> ChartSpec:
    kl, entropy = setting(config, "objective.kl_coef", 0.0), setting(config, "objective.entropy_coef", 0.0)
    passes = setting(config, "training.inner_epochs", 1) * setting(config, "training.minibatches", 1)
    if passes == 1:
        note = (
            "No progress curve: with one update a step the policy's part is about 0 by construction, "
            "and the KL part rises because the policy learns."
        )
    else:
        note = (
            "No progress curve: every step has its own rollouts to fit, "
            "and the KL part rises because the policy learns."
        )
    lines = [Line("total_loss", "total", BLUE), Line("policy_loss", "policy", ORANGE)]
    if kl:
        lines.append(Line("kl_penalty", f"{kl:g} × KL", GREEN, factor=kl))
    if entropy:
        lines.append(Line("entropy", f"−{entropy:g} × entropy", PURPLE, factor=-entropy))
    return ChartSpec("loss", "Loss and its parts", "", note, tuple(lines), left=("loss", NUMBER))


def _divergence() -> ChartSpec:
    return ChartSpec(
        "divergence", "KL and entropy", "nats a token",
        "KL: how far the policy has moved from the untrained one. Entropy: how varied its words still are.",
        (Line("kl_penalty", "KL", BLUE), Line("entropy", "entropy (right)", ORANGE, right=True)),
        left=("KL, nats a token", NUMBER), right=("entropy, nats a token", NUMBER),
    )  # fmt: skip


def _update() -> ChartSpec:
    return ChartSpec(
        "update", "Clipping and gradient", "",
        "Tokens whose ratio was clipped (none with one update a step), and the gradient's norm before it is limited.",
        (Line("grad_norm", "norm", BLUE),
         Line("clip_low_fraction", "clipped low (right)", ORANGE, right=True, spread=False),
         Line("clip_high_fraction", "clipped high (right)", GREEN, right=True, spread=False)),
        left=("gradient norm", NUMBER), right=("share of tokens", "~%"),
    )  # fmt: skip


def _length(config: Mapping[str, Any]) -> ChartSpec:
    rollouts = setting(config, "training.batch_size", 1) * setting(config, "sampling.num_rollouts", 1)
    limit = setting(config, "sampling.max_new_tokens", 0)
    return ChartSpec(
        "length", "Rewrite length", "mean of a step",
        f"Truncated: reached the limit of {limit} tokens. Cut: longer than what the image model reads. Unreadable: no "
        "rewrite could be taken from it.",
        (Line("completion_tokens", "tokens", BLUE), Line("rewrite_words", "words", ORANGE),
         Line("truncated_share", "truncated (right)", GREEN, right=True, spread=False),
         Line("cut_share", "cut (right)", SKY, right=True, spread=False),
         Line("parse_failures", "unreadable (right)", PURPLE, factor=1.0 / rollouts, right=True, spread=False)),
        left=("tokens, words", NUMBER), right=("share of rollouts", SHARE),
    )  # fmt: skip


def _judge(config: Mapping[str, Any]) -> ChartSpec:
    if setting(config, "evaluation.judge", "auto") == "none":
        note = "This run has no judge (evaluation.judge is 'none'), so nothing stands beside the reward."
    else:
        note = "The judge is never optimised: a reward that rises without it is being gamed."
    return ChartSpec(
        "judge", "Judge against reward", "", note,
        (Line("reward_mean", "reward", BLUE), Line("judge_mean", "judge (right)", ORANGE, right=True)),
        left=("reward", NUMBER), right=("judge, 0 to 1", NUMBER), evaluations="judge",
    )  # fmt: skip


# -- figures -------------------------------------------------------------------------------------------------------


def wanted_metrics(specs: Iterable[ChartSpec]) -> list[str]:
    """Every metric that these charts show, once."""
    return list(dict.fromkeys(name for spec in specs for name in spec.metrics))


def shape(width: int, count: int) -> str:
    """What a figure's traces depend on besides their points. When it changes, figures must be made anew."""
    return f"{width}{'.' if count <= FEW else '-'}" if count else "empty"


def columns(spec: ChartSpec, bins: Mapping[str, Bins]) -> dict[str, dict[str, list[Any]]]:
    """Points of a chart's traces by their key: ``{key: {"x": first steps, "y": values}}``."""
    found = {}
    for line in spec.lines:
        values = bins[line.metric]
        x, key = values.first.tolist(), f"{spec.name}.{line.metric}"
        found[key] = {"x": x, "y": column(values.mean * line.factor)}
        if line.spread and values.width > 1:
            low, high = (values.low, values.high) if line.factor >= 0 else (values.high, values.low)
            found[f"{key}.low"] = {"x": x, "y": column(low * line.factor)}
            found[f"{key}.high"] = {"x": x, "y": column(high * line.factor)}
    for band in spec.bands:
        for metric in (band.low, band.high):
            found[f"{spec.name}.{metric}"] = {"x": bins[metric].first.tolist(), "y": column(bins[metric].mean)}
    return found


def figure(
    spec: ChartSpec, bins: Mapping[str, Bins], evaluations: Sequence[EvaluationRow] = (), revision: str = ""
) -> dict[str, Any]:
    """A chart as plotly's ``{"data": [...], "layout": {...}}``.

    Args:
        spec: what it shows.
        bins: of every metric of ``spec.metrics``, all of one width.
        evaluations: of the same run.
        revision: zoom and legend choices are kept from figure to figure while this stays the same.
    """
    points = columns(spec, bins)
    few = max(len(bins[name]) for name in spec.metrics) <= FEW
    legend = len(spec.lines) + len(spec.bands) > 1 or bool(spec.evaluations)
    data: list[dict[str, Any]] = []
    for band in spec.bands:
        keys = (f"{spec.name}.{band.low}", f"{spec.name}.{band.high}")
        names = (f"{band.low[-2:]}th percentile", f"{band.high[-2:]}th percentile")
        data += _filled(keys, names, points, band.color, 0.2, legend=band.name)
    for line in spec.lines:
        low, high = f"{spec.name}.{line.metric}.low", f"{spec.name}.{line.metric}.high"
        if low in points:
            names = (f"{line.name}, lowest in the bin", f"{line.name}, highest in the bin")
            data += _filled((low, high), names, points, line.color, 0.1, right=line.right)
    for line in spec.lines:
        key = f"{spec.name}.{line.metric}"
        axis_format = (spec.right if line.right else spec.left)[1]
        trace = _trace(key, points[key], line.name, right=line.right, smooth=True) | {
            "mode": "lines+markers" if few else "lines",
            "line": {"color": line.color, "width": 2},
            "marker": {"color": line.color, "size": 4},
            "hovertemplate": "%{y:.1%}" if "%" in axis_format else "%{y:.4~g}",
            "showlegend": legend,
        }
        data.append(trace)
    data += _measured(spec, evaluations)
    layout: dict[str, Any] = {"uirevision": revision, "showlegend": legend, **_axes(spec, bins[spec.metrics[0]].width)}
    if not any(trace["yaxis"] == "y2" for trace in data):
        del layout["yaxis2"]
    if not any(len(bins[name]) for name in spec.metrics):  # axes without a point have no numbers worth reading
        blank = {"showticklabels": False, "showgrid": False, "zeroline": False}
        layout |= {name: axis | blank for name, axis in layout.items() if "axis" in name}
        layout["annotations"] = [{"text": "The first step draws the first point.", "showarrow": False,
                                  "xref": "paper", "yref": "paper", "x": 0.5, "y": 0.5}]  # fmt: skip
    return {"data": data, "layout": layout}


def _axes(spec: ChartSpec, width: int) -> dict[str, Any]:
    """The axes of a chart of bins of ``width`` steps."""
    return {
        "xaxis": {
            "title": "step" if width == 1 else f"step (means of {width} steps)",
            "tickformat": ",d",
            "hoverformat": ",d",
            "rangemode": "tozero",
            "minallowed": 0,
            "unifiedhovertitle": {"text": "step %{x}" if width == 1 else f"{width} steps from %{{x}} on"},
        },
        "yaxis": {"title": spec.left[0], "tickformat": spec.left[1], "zeroline": True},
        "yaxis2": {
            "title": spec.right[0],
            "tickformat": spec.right[1],
            "overlaying": "y",
            "side": "right",
            "showgrid": False,
            "zeroline": False,
            "rangemode": "tozero" if "%" in spec.right[1] else "normal",
            "tickmode": "auto",  # else ticks stand where those of the left axis do, at odd numbers
            "nticks": 5,
        },
    }


def _trace(
    key: str, points: Mapping[str, Any], name: str, *, right: bool = False, **meta: str | bool
) -> dict[str, Any]:
    axis = "y2" if right else "y"
    return {"type": "scatter", "name": name, **points, "yaxis": axis, "meta": {"key": key, **meta}}


def _filled(
    keys: tuple[str, str],
    names: tuple[str, str],
    points: Mapping[str, Any],
    color: str,
    alpha: float,
    *,
    right: bool = False,
    legend: str = "",
) -> list[dict[str, Any]]:
    """Two traces with the room between them filled; they must stay neighbours in this order.

    ``keys`` and ``names`` are of the lower and of the upper edge. With a ``legend`` the pointer is told of them.
    """
    fill = {"fill": "tonexty", "fillcolor": faint(color, alpha), "showlegend": bool(legend)}
    edges = []
    for key, name in zip(keys, names, strict=True):
        tip = {"hovertemplate": f"%{{y:.4~g}}<extra>{name}</extra>"} if legend else {"hoverinfo": "skip"}
        trace = _trace(key, points[key], legend or name, right=right, series=name)
        line = {"mode": "lines", "line": {"width": 0, "color": color}, "legendgroup": keys[1], "showlegend": False}
        edges.append(trace | line | tip | (fill if key == keys[1] else {}))
    return edges


def _measured(spec: ChartSpec, evaluations: Sequence[EvaluationRow]) -> list[dict[str, Any]]:
    """The evaluations' points: what was measured on prompts that are not trained on."""
    if not spec.evaluations:
        return []
    series: dict[str, tuple[list[int], list[float]]] = {}
    for row in evaluations:
        arms = row.summary.get("arms", {})
        kinds = ("untrained", "untrained_greedy") if row.kind == "baseline" else ("trained", "trained_greedy")
        arm = next((name for name in kinds if name in arms), None)
        value = arms[arm].get(spec.evaluations) if arm else None
        if arm and value is not None:
            greedy = ", greedy" if arm.endswith("greedy") else ""
            x, y = series.setdefault(f"{row.split} prompts{greedy}", ([], []))
            x.append(row.step)
            y.append(float(f"{value:.6g}"))
    looks = {"test": ("square", GREEN), "validation": ("diamond", PURPLE)}
    found = []
    for name, (x, y) in series.items():
        symbol, color = looks.get(name.split()[0], ("circle", GREEN))
        right = spec.evaluations == "judge"
        what = f"judge, {name.replace(' prompts', '')} (right)" if right else name
        trace = _trace(f"{spec.name}.{name}", {"x": x, "y": y}, what, right=right)
        marker = {"symbol": symbol, "size": 9, "color": color}
        found.append(trace | {"mode": "markers", "cliponaxis": False, "marker": marker, "hovertemplate": "%{y:.4~g}"})
    return found


def faint(color: str, alpha: float) -> str:
    """``#rrggbb`` with an opacity, as a fill that shows the grid through it."""
    red, green, blue = (int(color[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha:g})"
