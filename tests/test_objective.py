"""objective.py against hand-computed numbers, plain loops, the papers' gradients, and invariants."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo_engine.objective import (
    Aggregation,
    Baseline,
    KLKind,
    LossKind,
    Scale,
    aggregate,
    aggregate_size,
    aggregate_sum,
    clip_fractions,
    clipped_tokens,
    group_advantages,
    kl_estimate,
    policy_loss,
    zero_spread_groups,
)

NAN, INF = math.nan, math.inf
SCALES: tuple[Scale, ...] = get_args(Scale)
BASELINES: tuple[Baseline, ...] = get_args(Baseline)
KINDS: tuple[LossKind, ...] = get_args(LossKind)
RATIO_CLIPPED: tuple[LossKind, ...] = ("grpo", "gspo")
KL_KINDS: tuple[KLKind, ...] = get_args(KLKind)
AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)
GARBAGE = (NAN, INF, -INF, 1e4, -1e4)

quick = settings(max_examples=100, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_equal(actual: Tensor, expected: object, atol: float = 1e-12) -> None:
    torch.testing.assert_close(
        actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=1e-12, atol=atol, equal_nan=True
    )


def gradient(output: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(output, leaf)[0]


class Batch:
    """Random tokens: lengths from 0 to T, log-ratios on both sides of the clip, one advantage a sequence."""

    def __init__(self, seed: int, b: int = 4, t: int = 6, spread: float = 0.5) -> None:
        g = torch.Generator().manual_seed(seed)
        self.lengths = torch.randint(0, t + 1, (b,), generator=g)
        self.mask = torch.arange(t)[None] < self.lengths[:, None]
        self.old = -torch.rand(b, t, generator=g, dtype=torch.float64) * 3 - 0.1
        self.new = self.old + spread * torch.randn(b, t, generator=g, dtype=torch.float64)
        self.ref = self.old + spread * torch.randn(b, t, generator=g, dtype=torch.float64)
        self.advantages = torch.randn(b, generator=g, dtype=torch.float64)

    def leaf(self) -> Tensor:
        return self.new.clone().requires_grad_()


# ---------------------------------------------------------------------------------------------------------
# group_advantages
# ---------------------------------------------------------------------------------------------------------


def reference_advantages(
    rewards: list[list[float]], scale: Scale, baseline: Baseline, eps: float, unbiased: bool, min_std: float
) -> list[list[float]]:
    deviation = statistics.stdev if unbiased else statistics.pstdev
    everything = [r for row in rewards for r in row if not math.isnan(r)]
    rows = []
    for row in rewards:
        kept = [r for r in row if not math.isnan(r)]
        if len(kept) < 2 or deviation(kept) <= min_std or (scale == "batch" and deviation(everything) <= min_std):
            rows.append([0.0] * len(row))
            continue
        divisor = {"group": deviation(kept) + eps, "batch": deviation(everything) + eps, "none": 1.0}[scale]
        out = []
        for i, r in enumerate(row):
            if baseline == "mean":
                base = statistics.fmean(kept)
            else:
                others = [x for j, x in enumerate(row) if j != i and not math.isnan(x)]
                base = statistics.fmean(others)
            out.append(0.0 if math.isnan(r) else (r - base) / divisor)
        rows.append(out)
    return rows


def test_advantages_of_one_group_by_hand() -> None:
    rewards = f64([[1.0, 2.0, 3.0, 6.0]])  # mean 3, squares 4 + 1 + 0 + 9 = 14
    std = math.sqrt(14 / 4)
    assert_equal(group_advantages(rewards, eps=0.0), [[-2 / std, -1 / std, 0.0, 3 / std]])
    sample_std = math.sqrt(14 / 3)
    assert_equal(
        group_advantages(rewards, eps=0.0, unbiased=True),
        [[-2 / sample_std, -1 / sample_std, 0.0, 3 / sample_std]],
    )
    assert_equal(group_advantages(rewards, scale="none"), [[-2.0, -1.0, 0.0, 3.0]])
    # Others' means: 11/3, 10/3, 9/3, 6/3.
    assert_equal(group_advantages(rewards, scale="none", baseline="leave_one_out"), [[-8 / 3, -4 / 3, 0.0, 4.0]])
    assert_equal(group_advantages(rewards, eps=0.5), [[v / (std + 0.5) for v in (-2.0, -1.0, 0.0, 3.0)]])


def test_batch_scale_centers_by_group_and_divides_by_the_std_of_all_raw_rewards() -> None:
    rewards = f64([[0.0, 2.0], [10.0, 12.0]])  # all: mean 6, squares 36 + 16 + 16 + 36 = 104
    std = math.sqrt(104 / 4)
    assert_equal(group_advantages(rewards, scale="batch", eps=0.0), [[-1 / std, 1 / std]] * 2)
    std = math.sqrt(104 / 3)
    assert_equal(group_advantages(rewards, scale="batch", eps=0.0, unbiased=True), [[-1 / std, 1 / std]] * 2)


def test_missing_rewards_are_left_out_of_every_statistic_and_get_zero() -> None:
    rewards = f64([[NAN, 1.0, 3.0, NAN, 5.0]])  # mean 3, population std sqrt(8/3)
    std = math.sqrt(8 / 3)
    assert_equal(group_advantages(rewards, eps=0.0), [[0.0, -2 / std, 0.0, 0.0, 2 / std]])
    assert_equal(group_advantages(rewards, scale="none", baseline="leave_one_out"), [[0.0, -3.0, 0.0, 0.0, 3.0]])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("unbiased", [False, True])
def test_groups_with_fewer_than_two_rewards_or_without_spread_get_exactly_zero(
    scale: Scale, baseline: Baseline, unbiased: bool
) -> None:
    rewards = f64([[NAN, NAN, NAN], [NAN, 7.0, NAN], [0.1, 0.1, 0.1], [1.0, 2.0, NAN]])
    out = group_advantages(rewards, scale=scale, baseline=baseline, unbiased=unbiased, eps=0.0, min_std=0.0)
    assert (out[:3] == 0).all()
    assert out[3, 0] < 0 < out[3, 1] and out[3, 2] == 0
    assert zero_spread_groups(rewards, 0.0, unbiased=unbiased).tolist() == [True, True, True, False]


@pytest.mark.parametrize("scale", SCALES)
def test_float_noise_in_a_constant_group_is_not_an_advantage(scale: Scale) -> None:
    noisy = [0.1 + 0.2, 0.3, 0.3, 0.1 * 3]  # the same number by different roads
    assert len(set(noisy)) > 1
    rewards = f64([noisy, [0.0, 1.0, 2.0, 3.0]])
    assert (group_advantages(rewards, scale=scale, eps=1e-9)[0] == 0).all()
    constant = torch.full((1, 7), 1 / 3, dtype=torch.float32)
    assert (group_advantages(constant, scale=scale, eps=0.0, min_std=0.0) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_spread_at_the_floor_is_degenerate_and_one_above_it_is_not(dtype: torch.dtype) -> None:
    rewards = torch.tensor([[0.3, 0.7, 1.9]], dtype=dtype)
    spread = float(rewards.std(correction=0))
    assert zero_spread_groups(rewards, spread).all()
    assert not zero_spread_groups(rewards, spread * 0.9999).any()
    for scale in SCALES:
        assert (group_advantages(rewards, scale=scale, min_std=spread) == 0).all()
        assert group_advantages(rewards, scale=scale, min_std=spread * 0.9999).abs().sum() > 0


def test_the_floor_is_compared_with_the_std_that_was_chosen() -> None:
    rewards = f64([[0.0, 2.0]])  # population std 1, sample std sqrt(2)
    assert zero_spread_groups(rewards, 1.2).tolist() == [True]
    assert zero_spread_groups(rewards, 1.2, unbiased=True).tolist() == [False]
    assert (group_advantages(rewards, min_std=1.2) == 0).all()
    assert_equal(group_advantages(rewards, min_std=1.2, unbiased=True, eps=0.0), [[-(0.5**0.5), 0.5**0.5]])


def test_a_batch_whose_own_spread_is_at_the_floor_gets_zero_under_batch_scale() -> None:
    # Sample std: sqrt(2) in the first group, sqrt(2/5) over all six; the floor stands between them.
    rewards = f64([[-1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    assert not zero_spread_groups(rewards, 1.0, unbiased=True)[0]
    assert (group_advantages(rewards, scale="batch", min_std=1.0, unbiased=True) == 0).all()
    assert group_advantages(rewards, scale="group", min_std=1.0, unbiased=True)[0].abs().sum() > 0


def test_a_large_offset_in_float32_costs_no_digits() -> None:
    rewards = torch.tensor([[1e6, 1e6 + 1, 1e6 + 2, 1e6 + 5]], dtype=torch.float32)
    torch.testing.assert_close(group_advantages(rewards), group_advantages(rewards - 1e6), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_advantages_keep_the_floating_dtype_and_have_no_graph(dtype: torch.dtype) -> None:
    rewards = torch.tensor([[0.0, 1.0]], dtype=dtype, requires_grad=True)
    out = group_advantages(rewards)
    assert out.dtype == dtype and not out.requires_grad
    assert group_advantages(torch.tensor([[0, 1]])).tolist() == [[-1.0, 1.0]]


rewards_lists = st.integers(2, 5).flatmap(
    lambda g: st.lists(
        st.lists(st.one_of(st.just(NAN), st.integers(-40, 40).map(lambda i: i / 8)), min_size=g, max_size=g),
        min_size=1,
        max_size=4,
    )
)


@quick
@given(
    rewards_lists,
    st.sampled_from(SCALES),
    st.sampled_from(BASELINES),
    st.sampled_from([0.0, 1e-8, 1e-4, 0.5]),
    st.booleans(),
    st.sampled_from([0.0, 1e-6, 0.3]),
)
def test_advantages_equal_the_plain_loops(
    rewards: list[list[float]], scale: Scale, baseline: Baseline, eps: float, unbiased: bool, min_std: float
) -> None:
    expected = reference_advantages(rewards, scale, baseline, eps, unbiased, min_std)
    actual = group_advantages(f64(rewards), scale=scale, baseline=baseline, eps=eps, unbiased=unbiased, min_std=min_std)
    assert_equal(actual, expected, atol=1e-10)
    degenerate = zero_spread_groups(f64(rewards), min_std, unbiased=unbiased)
    assert (actual[degenerate] == 0).all()


@quick
@given(rewards_lists, st.sampled_from(SCALES), st.sampled_from(BASELINES), st.integers(-100, 100))
def test_adding_a_constant_to_all_rewards_changes_no_advantage(
    rewards: list[list[float]], scale: Scale, baseline: Baseline, shift: int
) -> None:
    values = f64(rewards)
    before = group_advantages(values, scale=scale, baseline=baseline)
    assert_equal(group_advantages(values + shift, scale=scale, baseline=baseline), before, atol=1e-9)


@quick
@given(rewards_lists, st.sampled_from(("group", "batch")), st.sampled_from(BASELINES), st.floats(1e-3, 1e3))
def test_the_unit_of_the_reward_changes_no_scaled_advantage(
    rewards: list[list[float]], scale: Scale, baseline: Baseline, unit: float
) -> None:
    values = f64(rewards)
    before = group_advantages(values, scale=scale, baseline=baseline, eps=0.0)
    assert_equal(group_advantages(values * unit, scale=scale, baseline=baseline, eps=0.0), before, atol=1e-9)


@quick
@given(rewards_lists, st.sampled_from(SCALES), st.sampled_from(BASELINES), seeds)
def test_the_order_of_the_rollouts_in_a_group_is_only_carried_along(
    rewards: list[list[float]], scale: Scale, baseline: Baseline, seed: int
) -> None:
    values = f64(rewards)
    order = torch.randperm(values.shape[1], generator=torch.Generator().manual_seed(seed))
    before = group_advantages(values, scale=scale, baseline=baseline)
    after = group_advantages(values[:, order], scale=scale, baseline=baseline)
    assert_equal(after, before[:, order], atol=1e-10)


@pytest.mark.parametrize("scale", [s for s in SCALES if s != "batch"])
def test_a_group_does_not_depend_on_the_other_groups_unless_scaled_by_batch(scale: Scale) -> None:
    a, b = f64([[1.0, 2.0, 4.0]]), f64([[100.0, NAN, -7.0]])
    together = group_advantages(torch.cat([a, b]), scale=scale)
    assert_equal(together, torch.cat([group_advantages(a, scale=scale), group_advantages(b, scale=scale)]))


@pytest.mark.parametrize(
    ("rewards", "options", "words"),
    [
        ([1.0, 2.0], {}, ["(2,)", "prompts, rollouts"]),
        ([[1.0], [2.0]], {}, ["(2, 1)", "2 rollouts"]),
        ([[1.0, INF]], {}, ["rewards[0, 1]", "inf", "finite"]),
        ([[1.0, 2.0]], {"scale": "sigma"}, ["'sigma'", "group, batch, none"]),
        ([[1.0, 2.0]], {"baseline": "median"}, ["'median'", "mean, leave_one_out"]),
        ([[1.0, 2.0]], {"eps": -1e-8}, ["eps", "at least 0"]),
        ([[1.0, 2.0]], {"min_std": NAN}, ["min_std", "nan", "at least 0"]),
    ],
)
def test_bad_rewards_and_options_are_refused_by_name(
    rewards: list[Any], options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError) as refusal:
        group_advantages(torch.tensor(rewards), **options)
    assert all(word in str(refusal.value) for word in words), refusal.value


# ---------------------------------------------------------------------------------------------------------
# policy_loss
# ---------------------------------------------------------------------------------------------------------


def reference_loss(
    batch: Batch, advantages: Tensor, kind: LossKind, clip_low: float, clip_high: float
) -> list[list[float]]:
    rows = []
    for i in range(batch.mask.shape[0]):
        n = int(batch.lengths[i])
        row = [0.0] * batch.mask.shape[1]
        logs = [float(batch.new[i, t] - batch.old[i, t]) for t in range(n)]
        for t in range(n):
            a = float(advantages[i, t] if advantages.ndim == 2 else advantages[i])
            w = math.exp(sum(logs) / n) if kind == "gspo" else math.exp(logs[t])
            if kind == "cispo":
                row[t] = -min(w, clip_high) * a * float(batch.new[i, t])
            else:
                row[t] = -min(w * a, min(max(w, 1 - clip_low), 1 + clip_high) * a)
        rows.append(row)
    return rows


def test_grpo_loss_by_hand() -> None:
    ratios = f64([[1.0, 1.5, 0.5], [1.0, 1.5, 0.5]])
    old = f64([[-1.0, -2.0, -3.0]] * 2)
    loss = policy_loss(old + ratios.log(), old, f64([2.0, -2.0]), torch.ones(2, 3), clip_low=0.2, clip_high=0.3)
    # A = 2: min(2, 2), min(3, 2.6), min(1, 1.6). A = -2: min(-2, -2), min(-3, -2.6), min(-1, -1.6).
    assert_equal(loss, [[-2.0, -2.6, -1.0], [2.0, 3.0, 1.6]])


def test_gspo_loss_by_hand() -> None:
    old = f64([[-1.0, -2.0, -9.0], [-1.0, -2.0, -3.0]])
    ratios = f64([[1.1, 1.0, 7.0], [2.0, 4.0, 1.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    loss = policy_loss(old + ratios.log(), old, f64([3.0, 1.0]), mask, kind="gspo")
    # Geometric means: sqrt(1.1), inside the clip; (2 * 4 * 1) ^ (1/3) = 2, clipped to 1.2.
    assert_equal(loss, [[-3 * math.sqrt(1.1), -3 * math.sqrt(1.1), 0.0], [-1.2, -1.2, -1.2]])


def test_cispo_loss_by_hand() -> None:
    new = f64([[-1.0, -2.0, -4.0]])
    ratios = f64([[1.5, 5.0, 0.25]])
    loss = policy_loss(new, new - ratios.log(), f64([2.0]), torch.ones(1, 3), kind="cispo", clip_high=3.0)
    assert_equal(loss, [[1.5 * 2 * 1, 3.0 * 2 * 2, 0.25 * 2 * 4]])


@quick
@given(
    seeds,
    st.sampled_from(KINDS),
    st.sampled_from([0.0, 0.1, 0.2, 2.0]),
    st.sampled_from([0.0, 0.2, 0.28, 5.0]),
    st.booleans(),
)
def test_policy_loss_equals_the_plain_loops(
    seed: int, kind: LossKind, clip_low: float, clip_high: float, per_token: bool
) -> None:
    batch = Batch(seed)
    advantages = batch.advantages
    if per_token:
        advantages = advantages[:, None] * torch.linspace(-1, 2, 6, dtype=torch.float64)
    for mask in (batch.mask, batch.mask.long(), batch.mask.double()):
        loss = policy_loss(batch.new, batch.old, advantages, mask, kind=kind, clip_low=clip_low, clip_high=clip_high)
        assert_equal(loss, reference_loss(batch, advantages, kind, clip_low, clip_high))


@quick
@given(seeds)
def test_grpo_gradient_is_minus_ratio_times_advantage_and_zero_where_clipped(seed: int) -> None:
    batch, (low, high) = Batch(seed), (0.2, 0.3)
    leaf = batch.leaf()
    loss = policy_loss(leaf, batch.old, batch.advantages, batch.mask, clip_low=low, clip_high=high)
    actual = gradient(loss.sum(), leaf)
    for i, t in indices(batch.mask):
        a, w = float(batch.advantages[i]), math.exp(float(batch.new[i, t] - batch.old[i, t]))
        clipped = (a > 0 and w > 1 + high) or (a < 0 and w < 1 - low)
        expected = -w * a if batch.mask[i, t] and not clipped else 0.0
        assert float(actual[i, t]) == pytest.approx(expected, rel=1e-12, abs=0)


@quick
@given(seeds)
def test_gspo_gradient_is_that_of_the_sequence(seed: int) -> None:
    batch = Batch(seed)
    leaf = batch.leaf()
    loss = policy_loss(leaf, batch.old, batch.advantages, batch.mask, kind="gspo")
    actual = gradient(aggregate(loss, batch.mask, how="sequence"), leaf)
    sequences = int((batch.lengths > 0).sum())
    for i, t in indices(batch.mask):
        n, a = int(batch.lengths[i]), float(batch.advantages[i])
        expected = 0.0
        if t < n:
            w = math.exp(float((batch.new[i, :n] - batch.old[i, :n]).mean()))
            if not ((a > 0 and w > 1.2) or (a < 0 and w < 0.8)):
                expected = -a * w / n / sequences
        assert float(actual[i, t]) == pytest.approx(expected, rel=1e-12, abs=0)


@quick
@given(seeds)
def test_cispo_gradient_is_the_capped_weight_times_advantage_and_never_cut(seed: int) -> None:
    batch = Batch(seed)
    leaf = batch.leaf()
    loss = policy_loss(leaf, batch.old, batch.advantages, batch.mask, kind="cispo", clip_high=1.1)
    weight = (batch.new - batch.old).exp().clamp(max=1.1)
    expected = torch.where(batch.mask, -weight * batch.advantages[:, None], 0.0)
    assert_equal(gradient(loss.sum(), leaf), expected)


@pytest.mark.parametrize("kind", RATIO_CLIPPED)
def test_gradients_agree_with_finite_differences(kind: LossKind) -> None:
    batch = Batch(11, b=3, t=4, spread=0.3)
    weights = torch.linspace(0.5, 2, 12, dtype=torch.float64).reshape(3, 4)

    def objective(logprobs: Tensor) -> Tensor:
        loss = policy_loss(logprobs, batch.old, batch.advantages, batch.mask, kind=kind)
        return (weights * (loss + 0.1 * kl_estimate(logprobs, batch.ref))).sum()

    assert torch.autograd.gradcheck(objective, (batch.leaf(),))


@pytest.mark.parametrize("how", AGGREGATIONS)
@quick
@given(seed=seeds)
def test_before_the_first_update_the_gradient_is_that_of_reinforce(how: Aggregation, seed: int) -> None:
    batch = Batch(seed)
    batch.new = batch.old
    leaf = batch.leaf()
    reinforce = aggregate(-batch.advantages[:, None] * leaf, batch.mask, how=how, max_tokens=6)
    expected = gradient(reinforce, leaf)
    for kind in KINDS:
        clip_high = 4.0 if kind == "cispo" else 0.2
        loss = policy_loss(leaf, batch.old, batch.advantages, batch.mask, kind=kind, clip_high=clip_high)
        assert_equal(gradient(aggregate(loss, batch.mask, how=how, max_tokens=6), leaf), expected)


def test_old_logprobs_and_advantages_receive_no_gradient() -> None:
    batch = Batch(3)
    for kind in KINDS:
        new, old, advantages = (x.clone().requires_grad_() for x in (batch.new, batch.old, batch.advantages))
        policy_loss(new, old, advantages, batch.mask, kind=kind).sum().backward()
        assert new.grad is not None and old.grad is None and advantages.grad is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_is_exactly_zero_in_value_and_gradient_whatever_it_holds(
    kind: LossKind, garbage: float, dtype: torch.dtype
) -> None:
    batch = Batch(5)
    assert 0 < int(batch.mask.sum()) < batch.mask.numel()
    per_token = batch.advantages[:, None].expand_as(batch.mask)
    clean = [x.to(dtype) for x in (batch.new, batch.old, per_token)]
    expected_leaf = clean[0].clone().requires_grad_()
    expected = policy_loss(expected_leaf, clean[1], clean[2], batch.mask, kind=kind)
    expected_gradient = gradient(expected.sum(), expected_leaf)
    for dirty in range(1, 8):  # every non-empty choice of the three inputs
        new, old, advantages = (
            torch.where(batch.mask, x, garbage) if dirty >> i & 1 else x for i, x in enumerate(clean)
        )
        leaf = new.clone().requires_grad_()
        loss = policy_loss(leaf, old, advantages, batch.mask, kind=kind)
        assert torch.equal(loss, expected)
        assert (loss[~batch.mask] == 0).all()
        actual_gradient = gradient(loss.sum(), leaf)
        assert torch.equal(actual_gradient, expected_gradient)
        assert (actual_gradient[~batch.mask] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_without_tokens_is_zero_even_with_a_nan_advantage(kind: LossKind) -> None:
    leaf = torch.full((2, 3), NAN, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    loss = policy_loss(leaf, torch.zeros(2, 3), f64([NAN, 1.0]), mask, kind=kind)
    assert torch.equal(loss, torch.zeros_like(loss))
    assert torch.equal(gradient(loss.sum(), leaf), torch.zeros_like(loss))


@pytest.mark.parametrize("kind", RATIO_CLIPPED)
def test_an_overflowing_ratio_on_the_clipped_side_has_a_finite_value_and_no_gradient(kind: LossKind) -> None:
    leaf = torch.tensor([[0.0]], requires_grad=True)
    loss = policy_loss(leaf, torch.tensor([[-200.0]]), torch.tensor([2.0]), torch.ones(1, 1), kind=kind)
    assert float(loss.detach()) == pytest.approx(-2.4)
    assert gradient(loss.sum(), leaf).tolist() == [[0.0]]


@pytest.mark.parametrize("kind", KINDS)
def test_zero_advantage_is_zero_loss_even_where_the_ratio_overflows(kind: LossKind) -> None:
    leaf = torch.tensor([[0.0, -INF]], requires_grad=True)
    loss = policy_loss(leaf, torch.tensor([[-200.0, -1.0]]), torch.zeros(1), torch.ones(1, 2), kind=kind)
    assert loss.tolist() == [[0.0, 0.0]]
    assert gradient(loss.sum(), leaf).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_at_a_real_token_is_not_hidden(kind: LossKind) -> None:
    logprobs = torch.tensor([[NAN, -1.0]])
    loss = policy_loss(logprobs, torch.full((1, 2), -1.0), torch.ones(1), torch.ones(1, 2), kind=kind)
    assert loss[0, 0].isnan()


def test_loss_has_the_dtype_of_the_log_probabilities() -> None:
    for dtype in (torch.float32, torch.float64):
        new = torch.full((1, 2), -1.0, dtype=dtype)
        assert policy_loss(new, new, torch.ones(1, 2, dtype=torch.float64), torch.ones(1, 2)).dtype == dtype


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "ppo"}, ["'ppo'", "grpo, gspo, cispo"]),
        ({"clip_low": -0.1}, ["clip_low", "-0.1", "at least 0"]),
        ({"clip_high": -0.1}, ["clip_high", "-0.1", "at least 0"]),
        ({"mask": torch.ones(2, 2)}, ["mask", "(2, 2)", "(2, 3)"]),
        ({"mask": torch.full((2, 3), 0.5)}, ["mask", "0 and 1"]),
        ({"old_logprobs": torch.zeros(3)}, ["old_logprobs", "(3,)", "(2, 3)"]),
        ({"advantages": torch.zeros(3)}, ["advantages", "(3,)", "(2,)", "(2, 3)"]),
    ],
)
def test_bad_loss_inputs_are_refused_by_name(change: dict[str, object], words: list[str]) -> None:
    inputs: dict[str, Any] = {
        "logprobs": torch.zeros(2, 3),
        "old_logprobs": torch.zeros(2, 3),
        "advantages": torch.zeros(2),
        "mask": torch.ones(2, 3),
    }
    with pytest.raises(ValueError) as refusal:
        policy_loss(**(inputs | change))
    assert all(word in str(refusal.value) for word in words), refusal.value


def indices(mask: Tensor) -> Iterator[tuple[int, int]]:
    return ((i, t) for i in range(mask.shape[0]) for t in range(mask.shape[1]))


# ---------------------------------------------------------------------------------------------------------
# clip_fractions
# ---------------------------------------------------------------------------------------------------------


def test_clip_fractions_by_hand() -> None:
    ratios = f64([[1.5, 1.1, 0.5, 9.0], [1.5, 0.5, 0.6, 0.1], [9.0, 0.1, 1.0, 1.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0]])
    old = torch.full_like(ratios, -10.0)
    low, high = clip_fractions(old + ratios.log(), old, f64([1.0, -1.0, 0.0]), mask, clip_low=0.2, clip_high=0.2)
    assert float(low) == pytest.approx(2 / 8)  # 0.5 and 0.6 under the negative advantage
    assert float(high) == pytest.approx(1 / 8)  # 1.5 under the positive one


@quick
@given(seeds)
def test_clip_fractions_count_exactly_the_tokens_that_lost_their_gradient(seed: int) -> None:
    batch = Batch(seed)
    clips: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.3}
    leaf = batch.leaf()
    lost = gradient(policy_loss(leaf, batch.old, batch.advantages, batch.mask, **clips).sum(), leaf) == 0
    low, high = clip_fractions(batch.new, batch.old, batch.advantages, batch.mask, **clips)
    tokens = max(int(batch.mask.sum()), 1)
    assert float(low + high) * tokens == pytest.approx(int((lost & batch.mask).sum()), abs=1e-4)


def test_clip_fractions_ignore_garbage_in_padding_and_are_zero_without_tokens() -> None:
    batch = Batch(5)
    clips: dict[str, Any] = {"clip_low": 0.1, "clip_high": 0.1}
    expected = clip_fractions(batch.new, batch.old, batch.advantages, batch.mask, **clips)
    assert float(sum(expected)) > 0
    for garbage in GARBAGE:
        new = torch.where(batch.mask, batch.new, garbage)
        assert clip_fractions(new, batch.old, batch.advantages, batch.mask, **clips) == expected
    none = clip_fractions(batch.new, batch.old, batch.advantages, torch.zeros_like(batch.mask), **clips)
    assert [float(x) for x in none] == [0.0, 0.0]


def test_clipped_tokens_follow_the_kind_of_ratio() -> None:
    old = torch.full((1, 2), -10.0, dtype=torch.float64)
    new, advantages, mask = old + f64([[2.0, 0.5]]).log(), f64([1.0]), torch.ones(1, 2)
    clips: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2}
    low, high = clipped_tokens(new, old, advantages, mask, kind="grpo", **clips)
    assert (low.tolist(), high.tolist()) == ([[False, False]], [[True, False]])
    # The sequence ratio is sqrt(2 * 0.5) = 1: nothing is clipped.
    low, high = clipped_tokens(new, old, advantages, mask, kind="gspo", **clips)
    assert not low.any() and not high.any()
    # The cap stands for itself, for either sign of the advantage; padding is never counted.
    low, high = clipped_tokens(new, old, -advantages, mask, kind="cispo", clip_low=0.2, clip_high=1.9)
    assert (low.tolist(), high.tolist()) == ([[False, False]], [[True, False]])
    high = clipped_tokens(new, old, advantages, f64([[1, 0]]), kind="cispo", clip_low=0.2, clip_high=0.3)[1]
    assert high.tolist() == [[True, False]]


# ---------------------------------------------------------------------------------------------------------
# kl_estimate
# ---------------------------------------------------------------------------------------------------------


def test_kl_estimates_by_hand() -> None:
    logprobs, ref = f64([[-1.0, -1.0, -2.0]]), f64([[-1.0, -3.0, -1.5]])  # r = 0, -2, 0.5
    assert_equal(kl_estimate(logprobs, ref, kind="k1"), [[0.0, 2.0, -0.5]])
    assert_equal(kl_estimate(logprobs, ref, kind="k2"), [[0.0, 2.0, 0.125]])
    expected = [[0.0, math.exp(-2) + 1, math.exp(0.5) - 1.5]]
    assert_equal(kl_estimate(logprobs, ref, kind="k3"), expected)
    assert_equal(kl_estimate(logprobs, ref), expected)


def test_kl_gradients_by_hand() -> None:
    batch = Batch(2)
    expected: dict[KLKind, Tensor] = {
        "k1": torch.ones_like(batch.new),
        "k2": batch.new - batch.ref,
        "k3": 1 - (batch.ref - batch.new).exp(),
    }
    for kind, wanted in expected.items():
        leaf, ref = batch.leaf(), batch.ref.clone().requires_grad_()
        kl_estimate(leaf, ref, kind=kind).sum().backward()
        assert leaf.grad is not None and ref.grad is None
        assert_equal(leaf.grad, wanted)


def test_kl_estimates_and_their_gradients_have_the_stated_means() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 7, generator=g, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(1, 7, generator=g, dtype=torch.float64).log_softmax(-1)
    logp = logits.log_softmax(-1)
    p = logp.exp().detach()  # the mean over everything that could be sampled, exactly
    reverse, forward = (logp.exp() * (logp - ref)).sum(), (ref.exp() * (ref - logp)).sum()
    estimates = {k: (p * kl_estimate(logp, ref, kind=k)).sum() for k in KL_KINDS}
    assert_equal(estimates["k1"], reverse)
    assert_equal(estimates["k3"], reverse)
    gradients = {
        name: torch.autograd.grad(value, logits, retain_graph=True)[0]
        for name, value in (estimates | {"reverse": reverse, "forward": forward}).items()
    }
    assert_equal(gradients["k1"], torch.zeros_like(logits))
    assert_equal(gradients["k2"], gradients["reverse"])
    assert_equal(gradients["k3"], gradients["forward"])


def test_k3_keeps_its_digits_near_zero_and_is_never_negative() -> None:
    r = torch.tensor([[1e-3, -1e-3, 1e-2]], dtype=torch.float32)
    exact = torch.expm1(r.double()) - r.double()
    torch.testing.assert_close(kl_estimate(torch.zeros(1, 3), r).double(), exact, rtol=1e-3, atol=0)
    sizes = torch.logspace(-12, 0, 2000, dtype=torch.float32)
    both_signs = torch.stack([sizes, -sizes])
    assert (kl_estimate(torch.zeros_like(both_signs), both_signs) >= 0).all()


@pytest.mark.parametrize("kind", KL_KINDS)
@pytest.mark.parametrize("garbage", GARBAGE)
def test_padding_never_leaks_through_the_kl_estimate_into_the_aggregate(kind: KLKind, garbage: float) -> None:
    batch = Batch(5)
    for new, ref in (
        (torch.where(batch.mask, batch.new, garbage), batch.ref),
        (batch.new, torch.where(batch.mask, batch.ref, garbage)),
    ):
        dirty, clean = new.float().requires_grad_(), batch.new.float().requires_grad_()
        actual = aggregate(kl_estimate(dirty, ref.float(), kind=kind), batch.mask)
        expected = aggregate(kl_estimate(clean, batch.ref.float(), kind=kind), batch.mask)
        assert torch.equal(actual, expected)
        assert torch.equal(gradient(actual, dirty), gradient(expected, clean))


def test_a_real_token_outside_the_references_support_shows_as_infinite_kl() -> None:
    logprobs = torch.tensor([[-1.0]], requires_grad=True)
    assert kl_estimate(logprobs, torch.tensor([[-INF]]), kind="k1").tolist() == [[INF]]
    assert kl_estimate(logprobs, torch.tensor([[NAN]])).isnan().all()


def test_bad_kl_inputs_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'k4'.*k1, k2, k3"):
        kl_estimate(torch.zeros(1, 2), torch.zeros(1, 2), kind="k4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"ref_logprobs has shape \(2,\).*\(1, 2\)"):
        kl_estimate(torch.zeros(1, 2), torch.zeros(2))


# ---------------------------------------------------------------------------------------------------------
# aggregate
# ---------------------------------------------------------------------------------------------------------


def test_aggregates_by_hand() -> None:
    values = f64([[1.0, 2.0, 3.0, 6.0], [10.0, 99.0, 99.0, 99.0], [99.0, 99.0, 99.0, 99.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    assert_equal(aggregate(values, mask), 22 / 5)
    assert_equal(aggregate(values, mask, how="token"), 22 / 5)
    assert_equal(aggregate(values, mask, how="sequence"), (3.0 + 10.0) / 2)  # the empty sequence has no mean
    assert_equal(aggregate(values, mask, how="constant", max_tokens=20), 22 / (3 * 20))


def test_aggregate_need_not_see_the_tokens_first() -> None:
    values, mask = f64([[7.0, 1.0, 7.0, 5.0]]), torch.tensor([[False, True, False, True]])
    assert [float(aggregate(values, mask, how=how, max_tokens=4)) for how in AGGREGATIONS] == [3.0, 3.0, 1.5]


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_without_tokens_the_aggregate_is_zero_and_still_has_a_graph(how: Aggregation) -> None:
    for shape in ((2, 3), (2, 0), (0, 3)):
        values = torch.full(shape, NAN, requires_grad=True)
        out = aggregate(values, torch.zeros(shape), how=how, max_tokens=3)
        assert float(out.detach()) == 0.0
        assert torch.equal(gradient(out, values), torch.zeros(shape))


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_in_padding_does_not_reach_the_aggregate(how: Aggregation, garbage: float) -> None:
    batch = Batch(5)
    clean, dirty = batch.leaf(), torch.where(batch.mask, batch.new, garbage).requires_grad_()
    expected = aggregate(clean, batch.mask, how=how, max_tokens=6)
    actual = aggregate(dirty, batch.mask, how=how, max_tokens=6)
    assert torch.equal(actual, expected)
    assert torch.equal(gradient(actual, dirty), gradient(expected, clean))


def test_bad_aggregation_inputs_are_refused_by_name() -> None:
    values, mask = torch.zeros(1, 2), torch.ones(1, 2)
    with pytest.raises(ValueError, match="'mean'.*token, sequence, constant"):
        aggregate(values, mask, how="mean")  # type: ignore[arg-type]
    for max_tokens in (None, 0):
        with pytest.raises(ValueError, match=f"max_tokens is {max_tokens}.*1 or more"):
            aggregate(values, mask, how="constant", max_tokens=max_tokens)
    with pytest.raises(ValueError, match="mask has shape"):
        aggregate(values, torch.ones(2, 2))
    with pytest.raises(ValueError, match="mask has shape"):
        aggregate(torch.zeros(3), torch.ones(3))


# ---------------------------------------------------------------------------------------------------------
# The whole objective
# ---------------------------------------------------------------------------------------------------------


def loss_per_token(batch: Batch, rows: Tensor, width: int, theta: Tensor, kind: LossKind) -> tuple[Tensor, Tensor]:
    """Policy + 0.1 KL of some rows, cut or padded to ``width``, as a function of two shared parameters."""

    def fit(x: Tensor, padding: float) -> Tensor:
        extra = torch.full((len(rows), max(width - x.shape[1], 0)), padding, dtype=x.dtype)
        return torch.cat([x[rows], extra], dim=1)[:, :width]

    mask = fit(batch.mask.double(), 0.0)
    feature = torch.arange(width, dtype=torch.float64).sin()
    new = fit(batch.new, NAN) + theta[0] + theta[1] * feature
    loss = policy_loss(new, fit(batch.old, INF), batch.advantages[rows], mask, kind=kind)
    return loss + 0.1 * kl_estimate(new, fit(batch.ref, -INF)), mask


def parameters() -> Tensor:
    return torch.tensor([0.01, -0.02], dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("how", AGGREGATIONS)
@quick
@given(
    seed=seeds,
    parts=st.lists(st.integers(0, 3), min_size=6, max_size=6),
    kind=st.sampled_from(KINDS),
    extra=st.integers(0, 3),
)
def test_micro_batches_of_any_size_and_width_accumulate_to_the_full_batch(
    how: Aggregation, seed: int, parts: list[int], kind: LossKind, extra: int
) -> None:
    batch = Batch(seed, b=6)
    whole = parameters()
    loss, mask = loss_per_token(batch, torch.arange(6), 6, whole, kind)
    expected = aggregate(loss, mask, how=how, max_tokens=6)
    expected.backward()

    accumulated, total = parameters(), 0.0
    chosen = [torch.tensor([i for i in range(6) if parts[i] == p]) for p in sorted(set(parts))]
    size = sum(aggregate_size(batch.mask[rows], how=how, max_tokens=6) for rows in chosen)
    for rows in chosen:
        width = int(batch.lengths[rows].max()) + extra  # each part is padded to a width of its own
        loss, mask = loss_per_token(batch, rows, width, accumulated, kind)
        part = aggregate_sum(loss, mask, how=how) / max(size, 1)
        part.backward()
        total += float(part.detach())
    assert total == pytest.approx(float(expected.detach()), rel=1e-10, abs=1e-12)
    assert whole.grad is not None and accumulated.grad is not None
    assert_equal(accumulated.grad, whole.grad, atol=1e-10)


@pytest.mark.parametrize("how", AGGREGATIONS)
@quick
@given(seed=seeds, kind=st.sampled_from(KINDS), extra=st.integers(1, 5))
def test_more_padding_changes_neither_loss_nor_gradient(
    how: Aggregation, seed: int, kind: LossKind, extra: int
) -> None:
    batch = Batch(seed)
    results = []
    for width in (6, 6 + extra):
        theta = parameters()
        loss, mask = loss_per_token(batch, torch.arange(4), width, theta, kind)
        value = aggregate(loss, mask, how=how, max_tokens=6)
        results.append((value.detach(), gradient(value, theta)))
    assert_equal(results[1][0], results[0][0])
    assert_equal(results[1][1], results[0][1])


def test_a_group_without_spread_adds_no_policy_gradient() -> None:
    advantages = group_advantages(f64([[0.3, 0.3], [0.0, 1.0]])).reshape(-1)
    batch = Batch(5)
    batch.mask[:] = True
    leaf = batch.leaf()
    loss = policy_loss(leaf, batch.old, advantages, batch.mask, clip_low=9.0, clip_high=9.0)
    moved = gradient(aggregate(loss, batch.mask), leaf).abs().sum(dim=1)
    assert (moved[:2] == 0).all() and (moved[2:] > 0).all()
