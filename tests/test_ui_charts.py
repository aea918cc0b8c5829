"""The live screen's figures: what a run's numbers become, and that new points join the old ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_samples import config

from grpo_engine.recorder import STEP_METRICS
from grpo_engine.store.rows import Bins, EvaluationRow
from ui.charts import (
    BLUE,
    FEW,
    Band,
    ChartSpec,
    Line,
    chart_specs,
    columns,
    faint,
    figure,
    reward_unit,
    setting,
    shape,
    wanted_metrics,
)

SPEC = ChartSpec(
    "loss",
    "Loss",
    "",
    "",
    (Line("total_loss", "total", BLUE), Line("entropy", "bonus", BLUE, factor=-0.5, right=True)),
    (Band("reward_p10", "reward_p90", "10–90 %", BLUE),),
)


def bins(*means: float, width: int = 1, spread: float = 0.25, first: int = 1) -> Bins:
    """Bins side by side from step ``first`` on, ``spread`` to both sides of their means; NaN = no bin there."""
    mean = np.array(means, dtype=np.float64)
    starts = np.arange(len(mean), dtype=np.int64) * width + first
    there = ~np.isnan(mean)
    mean, starts = mean[there], starts[there]
    count = np.full(len(mean), width, dtype=np.int64)
    return Bins(width, starts, starts + width - 1, count, mean - spread, mean, mean + spread)


def everything(*means: float, width: int = 1) -> dict[str, Bins]:
    return {name: bins(*(mean + place for mean in means), width=width) for place, name in enumerate(STEP_METRICS)}


def defaults(**changes: Any) -> dict[str, Any]:
    return config(**changes).model_dump(mode="json")


def spec(name: str, settings: dict[str, Any]) -> ChartSpec:
    return next(chart for chart in chart_specs(settings) if chart.name == name)


def trace(fig: dict[str, Any], key: str) -> dict[str, Any]:
    return next(found for found in fig["data"] if found["meta"]["key"] == key)


def evaluation(kind: str, step: int, split: str, arms: dict[str, dict[str, float | None]]) -> EvaluationRow:
    return EvaluationRow(1, "run", kind, step, split, 0.0, 4, {"arms": arms})


@pytest.mark.parametrize("width", [1, 8])
def test_every_chart_is_a_valid_plotly_figure_of_metrics_that_steps_have(width: int) -> None:
    specs = chart_specs(defaults())
    assert specs[0].name == "reward"
    assert set(wanted_metrics(specs)) <= set(STEP_METRICS)
    keys = []
    for chart in specs:
        fig = figure(chart, everything(1.0, 2.0, 3.0, width=width))
        go.Figure(
            fig["data"], {key: value for key, value in fig["layout"].items()}
        )  # refuses what plotly does not know
        assert chart.title and chart.note and fig["layout"]["yaxis"]["title"]
        keys += [found["meta"]["key"] for found in fig["data"]]
    assert len(set(keys)) == len(keys)


def test_lines_carry_a_bins_mean_at_its_first_step_times_their_factor() -> None:
    found = columns(SPEC, {**everything(1.0), "total_loss": bins(1.0, 2.5, width=4), "entropy": bins(3.0, width=4)})
    assert found["loss.total_loss"] == {"x": [1, 5], "y": [1.0, 2.5]}
    assert found["loss.entropy"] == {"x": [1], "y": [-1.5]}
    assert found["loss.total_loss.low"] == {"x": [1, 5], "y": [0.75, 2.25]}
    assert found["loss.total_loss.high"] == {"x": [1, 5], "y": [1.25, 2.75]}
    # a negative factor turns the spread around: low stays below high
    assert (found["loss.entropy.low"]["y"], found["loss.entropy.high"]["y"]) == ([-1.625], [-1.375])


def test_bins_without_a_value_leave_a_gap_and_no_number_is_made_up() -> None:
    found = columns(SPEC, {**everything(1.0), "total_loss": bins(1.0, np.nan, 3.0)})
    assert found["loss.total_loss"] == {"x": [1, 3], "y": [1.0, 3.0]}


def test_single_steps_have_no_spread_and_wide_bins_show_theirs_behind_the_line() -> None:
    narrow, wide = (figure(SPEC, everything(1.0, 2.0, width=width)) for width in (1, 2))
    assert [found["meta"]["key"] for found in narrow["data"]] == [
        "loss.reward_p10",
        "loss.reward_p90",
        "loss.total_loss",
        "loss.entropy",
    ]
    keys = [found["meta"]["key"] for found in wide["data"]]
    assert keys.index("loss.total_loss.high") == keys.index("loss.total_loss.low") + 1 < keys.index("loss.total_loss")
    assert trace(wide, "loss.total_loss.high")["fill"] == "tonexty"
    assert "fill" not in trace(wide, "loss.total_loss.low")
    assert narrow["layout"]["xaxis"]["title"] == "step"
    assert wide["layout"]["xaxis"]["title"] == "step (means of 2 steps)"


def test_what_may_be_smoothed_are_the_lines_and_nothing_else() -> None:
    fig = figure(SPEC, everything(1.0, 2.0, width=2))
    smooth = [found["meta"]["key"] for found in fig["data"] if found["meta"].get("smooth")]
    assert smooth == ["loss.total_loss", "loss.entropy"]


def test_series_of_a_csv_are_told_apart() -> None:
    fig = figure(SPEC, everything(1.0, 2.0, width=2))
    series = [found["meta"].get("series") or found["name"] for found in fig["data"]]
    assert len(set(series)) == len(series)
    assert series[:2] == ["10th percentile", "90th percentile"]


def test_the_right_axis_is_there_for_the_lines_that_ask_for_it() -> None:
    fig = figure(SPEC, everything(1.0))
    assert [found["yaxis"] for found in fig["data"]] == ["y", "y", "y", "y2"]
    assert fig["layout"]["yaxis2"]["overlaying"] == "y"
    assert "yaxis2" not in figure(spec("loss", defaults()), everything(1.0))["layout"]


def test_few_points_are_dots_too_and_the_shape_says_when_that_ends() -> None:
    few, many = (figure(SPEC, everything(*range(count))) for count in (FEW, FEW + 1))
    assert trace(few, "loss.total_loss")["mode"] == "lines+markers"
    assert trace(many, "loss.total_loss")["mode"] == "lines"
    assert shape(1, 1) == shape(1, FEW) != shape(1, FEW + 1) == shape(1, FEW + 9)
    assert shape(1, 9) != shape(2, 9)


def test_a_run_without_a_step_has_axes_without_numbers_and_says_so() -> None:
    fig = figure(SPEC, everything())
    assert not any(found["x"] for found in fig["data"])
    assert fig["layout"]["annotations"][0]["text"] == "The first step draws the first point."
    assert fig["layout"]["yaxis"]["showticklabels"] is fig["layout"]["yaxis2"]["showticklabels"] is False
    assert "annotations" not in figure(SPEC, everything(1.0))["layout"]
    assert shape(1, 0) != shape(1, 1)


@given(count=st.integers(2, 30), cut=st.integers(1, 29), width=st.sampled_from([1, 4]))
@settings(max_examples=20, deadline=None)
def test_old_points_with_the_new_ones_in_their_place_are_the_whole_figure(count: int, cut: int, width: int) -> None:
    cut = min(cut, count - 1)
    values = [float(value) for value in range(count)]
    begun = [*values[:cut], values[cut] - 0.5]  # the last bin was still filling
    whole = figure(SPEC, everything(*values, width=width))
    known = figure(SPEC, everything(*begun, width=width))
    fresh = columns(SPEC, {name: bins(*(value + place for value in values[cut:]), width=width, first=cut * width + 1)
                           for place, name in enumerate(STEP_METRICS)})  # fmt: skip
    for old, wanted in zip(known["data"], whole["data"], strict=True):
        new = fresh[old["meta"]["key"]]
        kept = [index for index, x in enumerate(old["x"]) if x < new["x"][0]]  # as charts.js does it
        assert [old["x"][index] for index in kept] + new["x"] == wanted["x"]
        assert [old["y"][index] for index in kept] + new["y"] == wanted["y"]


def test_evaluations_stand_at_their_step_with_what_was_trained_by_then() -> None:
    arms = {"untrained": {"reward": 10.0, "judge": 0.5}, "trained": {"reward": 30.0, "judge": None}}
    rows = [
        evaluation("baseline", 0, "test", {"original": {"reward": 1.0, "judge": 0.1}, "untrained": arms["untrained"]}),
        evaluation("validation", 5, "validation", arms),
        evaluation("final", 9, "test", arms),
    ]
    fig = figure(spec("reward", defaults()), everything(1.0), rows)
    test, validation = trace(fig, "reward.test prompts"), trace(fig, "reward.validation prompts")
    assert (test["x"], test["y"], test["mode"]) == ([0, 9], [10.0, 30.0], "markers")
    assert (validation["x"], validation["y"]) == ([5], [30.0])
    assert test["marker"]["symbol"] != validation["marker"]["symbol"]
    judged = figure(spec("judge", defaults()), everything(1.0), rows)
    assert (trace(judged, "judge.test prompts")["x"], trace(judged, "judge.test prompts")["yaxis"]) == ([0], "y2")
    assert "test" not in str(
        [found["meta"]["key"] for found in figure(spec("loss", defaults()), everything(1.0), rows)["data"]]
    )


def test_without_sampled_arms_the_greedy_ones_stand_in_and_are_called_so() -> None:
    rows = [evaluation("final", 9, "test", {"trained_greedy": {"reward": 7.0, "judge": None}})]
    found = trace(figure(spec("reward", defaults()), everything(1.0), rows), "reward.test prompts, greedy")
    assert (found["y"], found["name"]) == ([7.0], "test prompts, greedy")


def test_the_loss_shows_the_parts_it_has_with_their_weights() -> None:
    chosen = defaults(objective={"kl_coef": 0.04, "entropy_coef": 0.0})
    lines = {line.metric: line for line in spec("loss", chosen).lines}
    assert set(lines) == {"total_loss", "policy_loss", "kl_penalty"}
    assert (lines["kl_penalty"].factor, lines["kl_penalty"].name) == (0.04, "0.04 × KL")
    chosen = defaults(objective={"kl_coef": 0.0, "entropy_coef": 0.01})
    lines = {line.metric: line for line in spec("loss", chosen).lines}
    assert set(lines) == {"total_loss", "policy_loss", "entropy"}
    assert (lines["entropy"].factor, lines["entropy"].name) == (-0.01, "−0.01 × entropy")


def test_the_policy_loss_is_called_zero_by_construction_only_where_it_is() -> None:
    assert "about 0 by construction" in spec("loss", defaults()).note
    assert "about 0" not in spec("loss", defaults(training={"steps": 40, "inner_epochs": 2})).note
    assert "The mean is 0 by construction" in spec("advantage", defaults()).note


def test_parse_failures_are_a_share_of_the_rollouts() -> None:
    chosen = defaults(training={"batch_size": 4, "steps": 40}, sampling={"num_rollouts": 5})
    counted = {**everything(1.0), "parse_failures": bins(2.0)}
    assert columns(spec("length", chosen), counted)["length.parse_failures"]["y"] == [0.1]


def test_the_rewards_unit_follows_from_the_weights_of_its_parts() -> None:
    assert reward_unit(defaults()) == "100 × cosine of picture and prompt"
    assert (
        reward_unit({"models": {"reward": {"weights": {"clip": 0.5, "length": 0.0}}}})
        == "50 × cosine of picture and prompt"
    )
    assert reward_unit({"models": {"reward": {"weights": {"clip": 1.0, "length": 0.1}}}}) == "weighted sum of its parts"


def test_a_negative_control_and_a_missing_judge_are_told() -> None:
    shuffled = defaults()
    shuffled["models"]["reward"]["debug"] = "shuffle"
    shuffled["evaluation"]["judge"] = "none"
    assert spec("reward", shuffled).note.startswith("A negative control")
    assert "no judge" in spec("judge", shuffled).note
    assert "gamed" in spec("judge", defaults()).note


def test_settings_of_an_older_version_have_defaults() -> None:
    assert setting({"a": {"b": 3}}, "a.b", 4) == 3
    assert setting({"a": {"b": 3}}, "a.c", 4) == setting({"a": 7}, "a.c", 4) == setting({}, "a.c", 4) == 4
    assert [chart.name for chart in chart_specs({})] == [chart.name for chart in chart_specs(defaults())]


def test_a_chart_of_what_no_step_has_is_refused() -> None:
    with pytest.raises(ValueError, match="Chart odd asks for 'rewrad_mean'"):
        ChartSpec("odd", "", "", "", (Line("rewrad_mean", "", BLUE),))


def test_a_color_is_made_faint() -> None:
    assert faint("#0072b2", 0.16) == "rgba(0,114,178,0.16)"
