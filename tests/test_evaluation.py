"""The three-arm comparison: its statistics by hand and against scipy, and the arms of the real models."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from engine_runs import fresh_environment, small
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from grpo_engine.config import RunConfig
from grpo_engine.environment import PureGRPOPromptEnvironment
from grpo_engine.evaluation import Evaluator, Gain, by_prompt, paired_gain, sentence, summarise
from grpo_engine.judge import make_judge
from grpo_engine.plan import Plan
from grpo_engine.recorder import EvaluationItem
from grpo_engine.rollout import Score
from grpo_engine.seeding import normals


def gain_of(difference: Sequence[float], *, resamples: int = 20_000, confidence: float = 0.95, seed: int = 0) -> Gain:
    """The paired gain of arms that differ by ``difference``."""
    before = np.linspace(-3.0, 5.0, len(difference))
    return paired_gain(before + np.array(difference), before, resamples=resamples, confidence=confidence, seed=seed)


# -- statistics ----------------------------------------------------------------------------------------------


def test_mean_count_and_win_rate_by_hand() -> None:
    after, before = np.array([3.0, 1.0, 2.0, 5.0, 4.0]), np.array([1.0, 1.0, 3.0, 1.0, 4.0])
    gain = paired_gain(after, before, resamples=100, confidence=0.95, seed=0)
    assert gain.mean == pytest.approx((2 + 0 - 1 + 4 + 0) / 5)
    assert gain.n == 5
    assert gain.win_rate == pytest.approx((2 + 2 * 0.5) / 5), "2 wins, 2 ties that count half, 1 loss"


@pytest.mark.parametrize(("difference", "rate"), [([1, 2, 3], 1.0), ([-1, -2], 0.0), ([0, 0, 0], 0.5), ([1, -1], 0.5)])
def test_the_win_rate_of_clear_cases(difference: list[float], rate: float) -> None:
    assert gain_of(difference, resamples=100).win_rate == rate


@pytest.mark.parametrize("confidence", [0.6, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("difference", [[0.0, 1.0, 5.0], [-2.0, 1.0, 1.5, 4.0]])
def test_the_interval_is_that_of_all_possible_resamples(difference: list[float], confidence: float) -> None:
    # With so few prompts every resample can be listed; the interval holds the middle of their means.
    means = [np.mean(resample) for resample in itertools.product(difference, repeat=len(difference))]
    tail = (1 - confidence) / 2
    gain = gain_of(difference, confidence=confidence)
    # 20,000 random resamples place a quantile within a percent; between few means that may be either neighbour.
    for found, share in ((gain.low, tail), (gain.high, 1 - tail)):
        below = np.quantile(means, max(0.0, share - 0.01), method="lower")
        above = np.quantile(means, min(1.0, share + 0.01), method="higher")
        assert below - 1e-9 <= found <= above + 1e-9


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_interval_agrees_with_scipys_percentile_bootstrap(confidence: float) -> None:
    difference = np.random.default_rng(1).gamma(1.5, 2.0, 60) - 2.0
    other = scipy.stats.bootstrap(
        (difference,), np.mean, method="percentile", n_resamples=20_000, confidence_level=confidence, rng=2
    ).confidence_interval
    gain = gain_of(difference.tolist(), confidence=confidence)
    noise = 0.05 * difference.std()  # of two bootstraps of this size; the interval itself is about 0.3 deviations
    assert gain.low == pytest.approx(other.low, abs=noise)
    assert gain.high == pytest.approx(other.high, abs=noise)
    assert gain.high - gain.low > 4 * noise


def test_without_an_effect_the_interval_covers_zero_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(7)
    covered = [not gain_of(generator.normal(0, 2, 50).tolist(), resamples=500).distinguishable for _ in range(200)]
    # 95 % nominal; a percentile bootstrap of 50 is slightly narrow, and 200 repetitions scatter by 1.6 points.
    assert 0.88 <= np.mean(covered) <= 0.99


def test_a_clear_effect_is_distinguishable_on_either_side() -> None:
    noise = np.random.default_rng(0).normal(0, 1, 100)
    up, down = gain_of((noise + 3).tolist(), resamples=500), gain_of((noise - 3).tolist(), resamples=500)
    assert 0 < up.low < up.mean < up.high
    assert down.low < down.mean < down.high < 0
    assert up.distinguishable
    assert down.distinguishable


def test_pairing_ignores_how_much_prompts_differ_from_each_other() -> None:
    prompts = np.random.default_rng(3).normal(0, 100, 50)
    gain = paired_gain(prompts + 1.0, prompts, resamples=200, confidence=0.95, seed=0)
    assert (gain.low, gain.high) == (pytest.approx(1.0), pytest.approx(1.0))


@settings(deadline=None)
@given(
    arrays.arrays(np.float64, st.integers(2, 20), elements=st.floats(-100, 100)),
    st.floats(-50, 50),
    st.integers(0, 2**63 - 1),
)
def test_the_interval_holds_the_range_moves_with_a_shift_and_depends_on_the_seed_alone(
    difference: np.ndarray, shift: float, seed: int
) -> None:
    zeros = np.zeros_like(difference)
    bootstrap: dict[str, Any] = {"resamples": 200, "confidence": 0.9, "seed": seed}
    gain = paired_gain(difference, zeros, **bootstrap)
    assert difference.min() - 1e-9 <= gain.low <= gain.high <= difference.max() + 1e-9
    moved = paired_gain(difference + shift, zeros, **bootstrap)
    assert moved.low == pytest.approx(gain.low + shift, abs=1e-6)
    assert moved.high == pytest.approx(gain.high + shift, abs=1e-6)
    assert paired_gain(difference, zeros, **bootstrap) == gain


@pytest.mark.parametrize(("after", "before"), [([1.0], [2.0]), ([1.0, 2.0], [1.0, 2.0, 3.0]), ([], [])])
def test_what_is_no_pairing_is_refused(after: list[float], before: list[float]) -> None:
    with pytest.raises(ValueError, match="two equally long lists of 2 or more"):
        paired_gain(np.array(after), np.array(before), resamples=100, confidence=0.95, seed=0)


# -- the report ----------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.tuples(*[st.floats(-50, 50)] * 3).map(sorted), st.floats(-20, 20))
def test_the_sentence_says_not_distinguishable_exactly_when_the_interval_includes_zero(
    bounds: list[float], before: float
) -> None:
    low, mean, high = bounds
    gain = Gain(mean, low, high, 10, 0.5)
    data = {
        **vars(gain),
        "before": before,
        "after": before + mean,
        "percent": 100 * mean / abs(before) if before else None,
        "distinguishable": gain.distinguishable,
    }
    text = sentence(data, 0.95)
    assert ("not distinguishable from zero" in text) == (low <= 0.0 <= high)
    assert ("rose" in text) == (low > 0)
    assert ("fell" in text) == (high < 0)
    assert f"95% interval {low:+.2f} to {high:+.2f} over 10 prompts" in text
    assert text.endswith(".")
    assert "\n" not in text


def item(
    arm: str,
    prompt: str,
    reward: float,
    *,
    index: int = 0,
    tier: str = "basic",
    judge: float | None = None,
    kinds: dict[str, tuple[int, int]] | None = None,
    rewrite: str | None = "a rewrite",
) -> EvaluationItem:
    score = Score({"clip": reward, "format": 1.0}, reward)
    return EvaluationItem(arm, prompt, prompt, tier, index, 1, rewrite, score, judge, kinds or {}, None)


def test_values_are_averaged_within_a_prompt_first() -> None:
    items = [item("trained", "a", 1.0), item("trained", "a", 3.0, index=1), item("trained", "b", 7.0)]
    assert by_prompt(items, lambda entry: entry.score.total) == {"a": 2.0, "b": 7.0}


def test_the_share_of_cut_texts_is_over_those_that_were_drawn() -> None:
    items = [replace(item("trained", f"p{place}", 1.0), cut_tokens=cut) for place, cut in enumerate((0, 3, 0, 1))] + [
        item("trained", "failed", 0.0, rewrite=None)
    ]
    assert summarise(items, small())["arms"]["trained"]["cut_share"] == 0.5
    only_failures = summarise([item("trained", "failed", 0.0, rewrite=None)], small())
    assert only_failures["arms"]["trained"]["cut_share"] is None


def test_the_summary_of_hand_made_items() -> None:
    items = [
        item("original", "a", 10.0, judge=0.5, kinds={"color": (1, 2)}),
        item("original", "b", 20.0, tier="complex", judge=1.0, kinds={"color": (1, 1), "shape": (0, 1)}),
        item("untrained", "a", 8.0, judge=0.0),
        item("untrained", "a", 10.0, index=1, judge=0.5),
        item("untrained", "b", 16.0, tier="complex", judge=0.25, rewrite=None),
        item("trained", "a", 12.0, judge=1.0),
        item("trained", "b", 20.0, tier="complex", judge=1.0),
    ]
    summary = summarise(items, small())
    assert list(summary["arms"]) == ["original", "untrained", "trained"]
    original, untrained, trained = summary["arms"].values()
    assert original["reward"] == 15.0
    assert original["tiers"] == {"basic": 10.0, "complex": 20.0}
    assert original["kinds"] == {"color": pytest.approx(2 / 3), "shape": 0.0}
    assert original["judge"] == 0.75
    assert original["parts"] == {"clip": 15.0, "format": 1.0}
    assert original["cut_share"] is None, "recorded before what is cut was counted"
    assert (untrained["pictures"], untrained["failures"]) == (3, 1)
    assert untrained["reward"] == pytest.approx(34 / 3)
    assert (trained["pictures"], trained["failures"]) == (2, 0)

    gain = summary["gains"]["trained_vs_untrained"]
    assert gain["n"] == 2
    assert gain["before"] == pytest.approx((9 + 16) / 2), "a mean over prompts, however many pictures each has"
    assert gain["mean"] == pytest.approx((3 + 4) / 2)
    assert gain["after"] == pytest.approx(gain["before"] + 3.5)
    assert gain["percent"] == pytest.approx(100 * 3.5 / 12.5)
    assert gain["win_rate"] == 1.0
    assert (gain["low"], gain["high"]) == (3.0, 4.0)
    assert gain["distinguishable"] is True
    assert gain["judge_gain"]["mean"] == pytest.approx((0.75 + 0.75) / 2)
    assert set(summary["gains"]) == {"trained_vs_untrained", "trained_vs_original", "untrained_vs_original"}
    assert summary["gains"]["untrained_vs_original"]["mean"] == pytest.approx((-1 - 4) / 2)
    assert summary["headline"] == "trained_vs_untrained"
    assert summary["sentence"] == sentence(gain, 0.95)
    assert "rose from 12.50 to 16.00, +3.50 (+28 %)" in summary["sentence"]


def test_a_negative_reward_that_rises_is_a_gain_in_percent() -> None:
    items = [item("untrained", name, -10.0) for name in "ab"] + [item("trained", name, -5.0) for name in "ab"]
    gain = summarise(items, small())["gains"]["trained_vs_untrained"]
    assert gain["percent"] == 50.0
    assert gain["after"] == -5.0


def test_a_baseline_of_zero_has_no_percentage() -> None:
    items = [item("untrained", name, 0.0) for name in "ab"] + [item("trained", name, 5.0) for name in "ab"]
    summary = summarise(items, small())
    assert summary["gains"]["trained_vs_untrained"]["percent"] is None
    assert "%" not in summary["sentence"].split("(")[0]


def test_only_prompts_that_both_arms_have_are_compared() -> None:
    items = [item("untrained", name, 1.0) for name in "abc"] + [item("trained", name, 2.0) for name in "bcd"]
    assert summarise(items, small())["gains"]["trained_vs_untrained"]["n"] == 2


def test_the_order_in_which_items_come_does_not_move_an_interval() -> None:
    names = [f"p{number}" for number in random.Random(0).sample(range(40), 40)]
    values = np.random.default_rng(0).normal(0.0, 3.0, 40)
    items = [item(arm, name, value * factor) for arm, factor in (("untrained", 1.0), ("trained", 1.5))
             for name, value in zip(names, values, strict=True)]  # fmt: skip
    read_back = sorted(items, key=lambda one: one.prompt_id)  # as the database gives them to a resumed run
    assert summarise(read_back, small())["gains"] == summarise(items, small())["gains"]


def test_without_samples_the_greedy_arms_make_the_headline() -> None:
    items = [
        item(arm, name, reward)
        for arm, reward in (("original", 1.0), ("untrained_greedy", 2.0), ("trained_greedy", 3.0))
        for name in "ab"
    ]
    summary = summarise(items, small())
    assert summary["headline"] == "trained_greedy_vs_untrained_greedy"
    assert "sentence" in summary


def test_the_judge_is_left_out_unless_it_saw_every_item() -> None:
    items = [item("untrained", "a", 1.0, judge=0.5), item("untrained", "b", 1.0)]
    items += [item("trained", name, 2.0, judge=0.5) for name in "ab"]
    summary = summarise(items, small())
    assert summary["arms"]["trained"]["judge"] is None
    assert "judge_gain" not in summary["gains"]["trained_vs_untrained"]


def test_a_baseline_alone_promises_no_gain() -> None:
    summary = summarise([item("original", "a", 1.0), item("original", "b", 1.0)], small())
    assert summary["gains"] == {}
    assert "sentence" not in summary
    assert "headline" not in summary


# -- the arms of the real models -----------------------------------------------------------------------------

TWO_PICTURES = ("evaluation.images_per_prompt=2", "evaluation.samples=2", "evaluation.prompts=3")


def evaluator(*overrides: str) -> tuple[Evaluator, PureGRPOPromptEnvironment, RunConfig]:
    config = small(*overrides)
    loaded = fresh_environment(config)
    prompts = Plan(config).test
    judge = make_judge(config, prompts, loaded.policy)
    return Evaluator(loaded, judge, prompts, config), loaded, config


def train_a_little(loaded: PureGRPOPromptEnvironment, scale: float = 0.3) -> None:
    """Another policy than the untrained one."""
    with torch.no_grad():
        for index, parameter in enumerate(loaded.policy.trainable().values()):
            parameter += scale * normals(index, parameter.shape)


def plain(items: Sequence[EvaluationItem]) -> list[tuple[Any, ...]]:
    """What was measured, without the arm's name."""
    return [
        (entry.prompt_id, entry.index, entry.latent_seed, entry.rewrite, entry.score, entry.judge) for entry in items
    ]


def test_every_arm_measures_each_prompt_on_the_same_latents() -> None:
    measured, loaded, config = evaluator(*TWO_PICTURES)
    train_a_little(loaded)
    arms = {arm: measured.measure(arm) for arm in (*measured.arms(False), *measured.arms(True))}
    assert list(arms) == ["original", "untrained", "untrained_greedy", "trained", "trained_greedy"]
    places = {
        arm: [(entry.prompt_id, entry.index, entry.latent_seed) for entry in items] for arm, items in arms.items()
    }
    assert len({tuple(rows) for rows in places.values()}) == 1
    rows = places["original"]
    assert len(rows) == 6
    assert len({seed for _, _, seed in rows}) == 6, "each picture of each prompt has a latent of its own"
    assert rows == [
        (prompt.id, index, measured.latent_seed(prompt, index)) for prompt in Plan(config).test for index in (0, 1)
    ]
    assert all(entry.rewrite == entry.prompt for entry in arms["original"])
    assert all(entry.judge is not None for items in arms.values() for entry in items)
    assert [entry.rewrite for entry in arms["trained"]] != [entry.rewrite for entry in arms["untrained"]]
    greedy = [entry.rewrite for entry in arms["trained_greedy"]]
    assert greedy[::2] == greedy[1::2], "one greedy rewrite, on both latents"
    for entry in (entry for items in arms.values() for entry in items if entry.rewrite is not None):
        assert entry.cut_tokens == loaded.images.cut_tokens(entry.rewrite)


def test_what_the_image_model_did_not_read_is_measured_with_every_picture() -> None:
    measured, loaded, config = evaluator("evaluation.prompts=2", "evaluation.images_per_prompt=1")
    short, long = measured.prompts
    measured.prompts = [short, replace(long, text=" ".join(["red"] * 40))]
    items = measured.measure("original")
    assert (items[0].cut_tokens, items[0].read_chars) == (0, len(short.text))
    cut, read = items[1].cut_tokens, items[1].read_chars
    assert cut is not None and cut > 0
    assert read == len(" ".join(["red"] * (40 - cut))), "a token a word"
    assert summarise(items, config)["arms"]["original"]["cut_share"] == 0.5


def test_the_untrained_arms_do_not_notice_the_training() -> None:
    measured, loaded, _ = evaluator(*TWO_PICTURES)
    before = {arm: plain(measured.measure(arm)) for arm in measured.arms(False)}
    train_a_little(loaded)
    assert {arm: plain(measured.measure(arm)) for arm in measured.arms(False)} == before


def test_a_policy_that_has_learned_nothing_gains_exactly_nothing() -> None:
    measured, _, config = evaluator(*TWO_PICTURES)
    items = [entry for arm in (*measured.arms(False), *measured.arms(True)) for entry in measured.measure(arm)]
    summary = summarise(items, config)
    for name in ("trained_vs_untrained", "trained_greedy_vs_untrained_greedy"):
        gain = summary["gains"][name]
        assert (gain["mean"], gain["low"], gain["high"], gain["win_rate"]) == (0.0, 0.0, 0.0, 0.5)
        assert gain["distinguishable"] is False
    assert "not distinguishable from zero" in summary["sentence"]


@pytest.mark.parametrize(
    ("overrides", "baseline", "trained"),
    [
        ((), ["original", "untrained", "untrained_greedy"], ["trained", "trained_greedy"]),
        (("evaluation.samples=0",), ["original", "untrained_greedy"], ["trained_greedy"]),
        (("evaluation.greedy=false",), ["original", "untrained"], ["trained"]),
    ],
)
def test_the_arms_are_those_the_settings_ask_for(
    overrides: tuple[str, ...], baseline: list[str], trained: list[str]
) -> None:
    measured, _, _ = evaluator(*overrides)
    assert (measured.arms(False), measured.arms(True)) == (baseline, trained)


def test_the_size_of_the_render_batches_changes_no_rewrite_and_no_latent() -> None:
    (small_batches, _, _), (large_batches, _, _) = (
        evaluator(*TWO_PICTURES, f"models.image.batch_size={size}") for size in (2, 32)
    )
    first, second = small_batches.measure("untrained"), large_batches.measure("untrained")
    assert [row[:4] for row in plain(first)] == [row[:4] for row in plain(second)]


def test_progress_is_told_and_a_stop_is_heard_between_prompts() -> None:
    measured, _, _ = evaluator("evaluation.prompts=3", "models.image.batch_size=1")
    told: list[tuple[str, int, int]] = []

    class Stop(Exception):
        pass

    def poll() -> None:
        if told and told[-1][1] == 1:
            raise Stop

    with pytest.raises(Stop):
        measured.measure("original", poll=poll, told=lambda *progress: told.append(progress))
    assert told == [("original", 0, 3), ("original", 1, 3)]
