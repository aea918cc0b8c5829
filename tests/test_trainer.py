"""The GRPO loop on the real policy: its gradient, its batches, its schedule, and what it does with bad numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from engine_runs import (
    ListRecorder,
    RankScorer,
    equal,
    fresh_environment,
    gradients,
    perturb,
    small,
    trainer,
    weights,
)
from torch import Tensor

from grpo_engine.config import RunConfig
from grpo_engine.environment import PureGRPOPromptEnvironment
from grpo_engine.methods import METHODS
from grpo_engine.plan import Plan
from grpo_engine.policy import PureGRPOPolicy
from grpo_engine.prompts import Prompt
from grpo_engine.recorder import STEP_METRICS
from grpo_engine.rollout import Group
from grpo_engine.trainer import PureGRPOTrainer, TrainingFailed

UNPARSED_IS_FLAT = "models.reward.failure=7"  # what RankScorer gives the prompts whose rewards shall not differ
UNCLIPPED = ("training.max_grad_norm=1e6", "training.learning_rate=1e-5")


@pytest.fixture(scope="module")
def shared() -> PureGRPOPromptEnvironment:
    """For tests that leave the weights alone."""
    return fresh_environment(small(), RankScorer())


def scored(trained: PureGRPOTrainer, step: int = 1) -> list[Group]:
    """The groups of a step with their advantages."""
    groups, _ = trained.collect(step)
    trained.assign_advantages(groups)
    return groups


def gradient_of(overrides: Sequence[str], order: Sequence[int] = (0, 1), flat: Sequence[int] = ()) -> Tensor:
    """The gradient of one update on the same weights and the same groups, whatever the overrides."""
    trained, _ = trainer(small(*UNCLIPPED, *overrides))
    groups = scored(trained)
    for index in flat:
        groups[index].rewards = torch.full_like(groups[index].rewards, 3.0)
    trained.assign_advantages(groups)
    perturb(trained)
    trained.update([groups[index] for index in order], 1)
    return gradients(trained)


def distance(first: Tensor, second: Tensor) -> float:
    """|a - b| / |b|."""
    return float((first - second).norm() / second.norm())


# -- the gradient --------------------------------------------------------------------------------------------


def brute_force(policy: PureGRPOPolicy, groups: Sequence[Group], config: RunConfig) -> tuple[float, Tensor, int]:
    """(loss, gradient, clipped tokens) of GRPO, eq. 3 of arXiv 2402.03300, one completion and one token at a time.

    Whole-sequence forward passes without padding or cache, and nothing of the engine's objective. The loss is
    over all groups, the gradient over those that have spread, divided by the number of all completions.
    """
    low, high = 1 - config.objective.clip_ratio, 1 + config.objective.clip_ratio
    temperature = config.sampling.temperature
    everything: list[Tensor] = []
    learned: list[Tensor] = []
    clipped = 0
    for group in groups:
        rewards = [float(reward) for reward in group.rewards]
        mean = sum(rewards) / len(rewards)
        spread = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / len(rewards))
        flat = spread < config.objective.min_std
        done = group.completions
        for row, reward in enumerate(rewards):
            advantage = 0.0 if flat else (reward - mean) / (spread + 1e-8)
            tokens = done.token_ids[row][done.mask[row]]
            ids = torch.cat([done.prompt_ids, tokens])[None]
            logits = policy.model(input_ids=ids).logits[0].float()
            with torch.no_grad(), policy.model.disable_adapter():
                reference_logits = policy.model(input_ids=ids).logits[0].float()
            losses = []
            for position, token in enumerate(tokens.tolist()):
                place = len(done.prompt_ids) - 1 + position
                allowed = (~policy.suppressed).nonzero().flatten()
                if done.kept is not None:
                    kept = done.kept[row, position]
                    allowed = kept[kept >= 0]
                index = allowed.tolist().index(token)
                logp = (logits[place, allowed] / temperature).log_softmax(0)
                reference = (reference_logits[place, allowed] / temperature).log_softmax(0)[index]
                ratio = torch.exp(logp[index] - done.logprobs[row, position])
                clipped += int((advantage > 0 and ratio > high) or (advantage < 0 and ratio < low))
                surrogate = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
                gap = reference - logp[index]
                kl = torch.exp(gap) - gap - 1
                entropy = -(logp.exp() * logp).sum()
                losses.append(-surrogate + config.objective.kl_coef * kl - config.objective.entropy_coef * entropy)
            everything.append(torch.stack(losses).mean())
            learned += [] if flat else everything[-1:]
    gradient = torch.autograd.grad(torch.stack(learned).sum() / len(everything), list(policy.trainable().values()))
    return float(torch.stack(everything).mean().detach()), torch.cat([part.flatten() for part in gradient]), clipped


@pytest.mark.parametrize(
    "sampling",
    [("sampling.temperature=1.3",), ("sampling.temperature=0.9", "sampling.top_k=30", "sampling.top_p=0.9")],
    ids=["whole distribution", "truncated"],
)
def test_the_gradient_of_a_step_is_that_of_grpo_written_out_by_hand(sampling: tuple[str, ...]) -> None:
    config = small(
        *UNCLIPPED,
        *sampling,
        "training.batch_size=3",
        "objective.kl_coef=0.3",
        "objective.entropy_coef=0.1",
        "objective.clip_ratio=0.01",
    )
    trained, _ = trainer(config)
    groups = scored(trained)
    generator = torch.Generator().manual_seed(3)
    for group in groups:
        group.rewards = torch.randn(len(group), generator=generator)
    groups[1].rewards = torch.full((3,), 0.25)  # teaches nothing, but counts
    trained.assign_advantages(groups)
    perturb(trained)
    loss, gradient, clipped = brute_force(trained.policy, groups, config)
    figures = trained.update(groups, 1)
    found = gradients(trained)
    tokens = sum(int(group.completions.mask.sum()) for group in groups)
    assert clipped > 0, "the comparison must reach the clip"
    assert distance(found, gradient) < 1e-4
    assert figures["total_loss"] == pytest.approx(loss, rel=1e-4)
    assert figures["grad_norm"] == pytest.approx(float(gradient.norm()), rel=1e-4)
    assert figures["clip_low_fraction"] + figures["clip_high_fraction"] == pytest.approx(clipped / tokens)


def test_rewards_dealt_out_at_random_teach_nothing_on_average() -> None:
    def gradient(order: Sequence[int]) -> Tensor:
        trained, _ = trainer(small(*UNCLIPPED, "sampling.num_rollouts=3", "objective.kl_coef=0"))
        perturb(trained)
        groups = scored(trained)
        for group in groups:
            group.rewards = torch.tensor([0.0, 1.0, 5.0])[list(order)]
        trained.assign_advantages(groups)
        trained.update(groups, 1)
        return gradients(trained)

    each = [gradient(order) for order in itertools.permutations(range(3))]
    assert min(float(one.norm()) for one in each) > 0
    assert torch.stack(each).mean(0).norm() < 1e-4 * max(float(one.norm()) for one in each)


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
def test_micro_batches_never_change_the_gradient(aggregation: str) -> None:
    settings = [f"objective.aggregation={aggregation}", "sampling.num_rollouts=4"]
    whole = gradient_of([*settings, "training.update_rows=0"])
    assert whole.norm() > 0
    for rows in (1, 3, 64):
        assert distance(gradient_of([*settings, f"training.update_rows={rows}"]), whole) < 1e-4


def test_the_order_of_the_groups_does_not_change_the_gradient() -> None:
    assert distance(gradient_of([], order=(1, 0)), gradient_of([], order=(0, 1))) < 1e-5


def test_groups_that_go_through_the_policy_together_are_told_the_same_as_alone() -> None:
    def told(rows: int) -> tuple[dict[str, float], Tensor, list[Group]]:
        trained, _ = trainer(small(*UNCLIPPED, "training.batch_size=3", f"training.update_rows={rows}"))
        groups = scored(trained)
        perturb(trained)
        groups[1].rewards = torch.ones(len(groups[1]))  # no spread: in the midst of those that have
        trained.assign_advantages(groups)
        return trained.update(groups, 1), gradients(trained), groups

    figures, gradient, groups = told(0)
    others, together, packed = told(3 * len(groups[0]))
    assert others == pytest.approx(figures, rel=1e-3, abs=1e-6)
    assert distance(together, gradient) < 1e-4
    for one, other in zip(packed, groups, strict=True):
        assert one.kl is not None and other.kl is not None and one.shift is not None and other.shift is not None
        torch.testing.assert_close(one.kl, other.kl, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(one.shift, other.shift, atol=1e-4, rtol=0)
        assert float(other.kl.max()) > 1e-3 and not one.kl[~one.completions.mask].any()


def test_a_group_without_spread_is_left_out_of_the_backward_pass_but_counts_in_the_mean() -> None:
    both = gradient_of([], order=(0, 1), flat=[1])
    alone = gradient_of([], order=(0,))
    assert distance(both * 2, alone) < 1e-4


def test_a_step_without_any_spread_changes_nothing_and_is_counted() -> None:
    config = small("training.steps=1", "training.weight_decay=0.1", "training.learning_rate=1e-2", UNPARSED_IS_FLAT)
    prompts = Plan(config).train
    loaded = fresh_environment(config, RankScorer(flat=[prompt.text for prompt in prompts]))
    trained, recorder = trainer(config, loaded=loaded)
    perturb(trained)
    before = weights(trained)
    trained.train()
    assert equal(weights(trained), before)
    (metrics,) = recorder.metrics
    assert metrics["zero_spread_share"] == 1.0
    assert metrics["skipped"] == 0.0
    assert metrics["grad_norm"] == 0.0
    assert metrics["reward_std"] == 0.0
    assert metrics["avg_advantage"] == 0.0


def test_a_share_of_groups_without_spread_is_counted() -> None:
    config = small("training.steps=1", UNPARSED_IS_FLAT)
    trained, recorder = trainer(config)
    first, second = trained.batch(1)
    trained.environment.reward.scorer.flat.add(second.text)  # type: ignore[attr-defined]
    trained.train()
    assert recorder.metrics[0]["zero_spread_share"] == 0.5
    spread = {group.prompt.id: float(group.advantages.abs().max()) for group in recorder.groups[0]}
    assert spread[second.id] == 0.0
    assert spread[first.id] > 1.0


def test_several_updates_on_one_batch_move_on_from_each_other() -> None:
    config = small("training.steps=1", "training.inner_epochs=2", "training.minibatches=2")
    trained, recorder = trainer(config)
    trained.train()
    (metrics,) = recorder.metrics
    assert metrics["ratio_error"] is not None
    assert metrics["ratio_error"] < 1e-4, "measured before the first update only"
    steps = {int(trained.optimizer.state[parameter]["step"]) for parameter in trained.parameters}
    assert steps == {4}


@pytest.mark.parametrize("method", METHODS)
def test_every_named_method_runs_a_step_that_learns(method: str) -> None:
    config = small("training.steps=1", "training.learning_rate=1e-2", f"objective={method}")
    trained, recorder = trainer(config)
    before = weights(trained)
    trained.train()
    (metrics,) = recorder.metrics
    assert not equal(weights(trained), before)
    assert metrics["skipped"] == 0.0
    assert metrics["grad_norm"] is not None
    assert 0.0 < metrics["grad_norm"] < math.inf
    assert metrics["ratio_error"] is not None
    assert metrics["ratio_error"] < 1e-4
    # Before the first update every ratio is 1, so no method has anything to clip.
    assert (metrics["clip_low_fraction"], metrics["clip_high_fraction"]) == (0.0, 0.0)


def test_with_dropout_the_same_seed_gives_the_same_step() -> None:
    def run() -> PureGRPOTrainer:
        trained, _ = trainer(small("training.steps=2", "models.policy.lora.dropout=0.2"))
        trained.train()
        return trained

    assert equal(weights(run()), weights(run()))


# -- schedule and batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        # The step after the last would have rate 0; no step that is taken is wasted on it.
        ("linear", [0.5, 1.0, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [0.5, 1.0, *((1 + math.cos(math.pi * share)) / 2 for share in (0.2, 0.4, 0.6, 0.8))]),
    ],
)
def test_the_learning_rate_warms_up_and_falls_as_computed_by_hand(
    shared: PureGRPOPromptEnvironment, schedule: str, expected: list[float]
) -> None:
    config = small(
        "training.steps=6",
        "training.warmup_steps=2",
        "training.learning_rate=0.004",
        f"training.schedule={schedule}",
    )
    trained, _ = trainer(config, loaded=shared)
    rates = [trained.learning_rate(step) for step in range(1, 7)]
    assert rates == pytest.approx([0.004 * share for share in expected], abs=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 3, 10])
def test_every_step_has_a_rate_above_zero(shared: PureGRPOPromptEnvironment, schedule: str, warmup: int) -> None:
    for steps in (1, 2, 7):
        config = small(f"training.steps={steps}", f"training.warmup_steps={warmup}", f"training.schedule={schedule}")
        trained, _ = trainer(config, loaded=shared)
        rates = [trained.learning_rate(step) for step in range(1, steps + 1)]
        assert min(rates) > 0.0
        assert max(rates) <= config.training.learning_rate


def test_the_optimiser_uses_the_rate_that_is_recorded() -> None:
    trained, recorder = trainer(small("training.steps=2", "training.warmup_steps=4", "training.learning_rate=0.002"))
    trained.train()
    assert [metrics["learning_rate"] for metrics in recorder.metrics] == pytest.approx([0.0005, 0.001])
    assert trained.optimizer.param_groups[0]["lr"] == pytest.approx(0.001)


def prompts_of(count: int) -> list[Prompt]:
    return [Prompt(f"p{number}", f"prompt {number}", "basic", "train") for number in range(count)]


def test_batches_hold_distinct_prompts_and_an_epoch_holds_each_at_most_once(
    shared: PureGRPOPromptEnvironment,
) -> None:
    trained, _ = trainer(small("training.batch_size=3"), loaded=shared, prompts=prompts_of(12))
    epochs = [[prompt.id for step in range(4) for prompt in trained.batch(4 * epoch + step + 1)] for epoch in range(3)]
    everyone = {f"p{number}" for number in range(12)}
    assert all(set(epoch) == everyone for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3, "each epoch has an order of its own"


def test_prompts_that_do_not_fill_a_batch_wait_for_another_epoch(shared: PureGRPOPromptEnvironment) -> None:
    trained, _ = trainer(small("training.batch_size=3"), loaded=shared, prompts=prompts_of(7))
    seen: set[str] = set()
    for epoch in range(20):
        ids = [prompt.id for step in (1, 2) for prompt in trained.batch(2 * epoch + step)]
        assert len(set(ids)) == 6
        seen |= set(ids)
    assert len(seen) == 7


def test_batches_depend_on_the_seed_and_the_step_alone(shared: PureGRPOPromptEnvironment) -> None:
    prompts = prompts_of(12)

    def ids(seed: int, steps: Sequence[int], *overrides: str) -> list[list[str]]:
        trained, _ = trainer(small(f"seed={seed}", *overrides), loaded=shared, prompts=prompts)
        return [[prompt.id for prompt in trained.batch(step)] for step in steps]

    forwards = ids(5, [1, 2, 3, 9])
    assert ids(5, [9, 3, 2, 1], "training.steps=50", "sampling.num_rollouts=2") == forwards[::-1]
    assert ids(6, [1, 2, 3, 9]) != forwards


def test_fewer_prompts_than_a_batch_are_refused(shared: PureGRPOPromptEnvironment) -> None:
    with pytest.raises(ValueError, match=r"training\.batch_size = 2.*only 1"):
        trainer(small(), loaded=shared, prompts=prompts_of(1))


# -- dynamic sampling ----------------------------------------------------------------------------------------


def replaced(flat: Sequence[int], *, prompts: int, limit: int) -> tuple[list[int], int]:
    """(prompts of the step's groups, groups resampled) of a step on ``prompts`` prompts.

    Prompts are numbered so that 0 and 1 are the step's batch; those in ``flat`` have rewards without spread.
    """
    config = small(f"objective.dynamic_sampling={limit}", UNPARSED_IS_FLAT)
    every = Plan(config).train[:prompts]
    scorer = RankScorer()
    trained, _ = trainer(config, loaded=fresh_environment(config, scorer), prompts=every)
    batch = trained.batch(1)
    order = [*batch, *(prompt for prompt in every if prompt not in batch)]
    scorer.flat |= {order[index].text for index in flat}
    groups, resampled = trained.collect(1)
    return [order.index(group.prompt) for group in groups], resampled


def test_a_group_without_spread_is_replaced_in_its_place_by_another_prompt() -> None:
    (first, second), resampled = replaced([0], prompts=6, limit=1)
    assert first not in (0, 1)
    assert second == 1
    assert resampled == 1


def test_replacing_goes_on_up_to_its_limit_and_then_keeps_what_there_is() -> None:
    (first, second), resampled = replaced([0, 2, 3, 4, 5, 6, 7], prompts=8, limit=2)
    assert resampled == 2
    assert first not in (0, 1)
    assert second == 1


@pytest.mark.parametrize(("flat", "good"), [(2, 3), (3, 2)])
def test_every_prompt_that_is_left_gets_its_turn(flat: int, good: int) -> None:
    groups, resampled = replaced([0, flat], prompts=4, limit=3)
    assert groups == [good, 1]
    assert resampled in (1, 2)


def test_without_prompts_to_spare_or_without_a_limit_nothing_is_replaced() -> None:
    assert replaced([0, 1], prompts=2, limit=3) == ([0, 1], 0)
    assert replaced([0, 1], prompts=6, limit=0) == ([0, 1], 0)


# -- numbers that are not finite -----------------------------------------------------------------------------


def broken_gradient(trained: PureGRPOTrainer, times: int) -> None:
    """An overflow in the backward pass: the gradient of one weight is NaN, ``times`` times."""
    left = [times]

    def overflow(gradient: Tensor) -> Tensor:
        if left[0] == 0:
            return gradient
        left[0] -= 1
        return gradient * math.nan

    trained.parameters[-1].register_hook(overflow)


def test_a_gradient_that_is_not_finite_skips_the_update_and_is_counted() -> None:
    trained, recorder = trainer(small("training.steps=3", "training.learning_rate=1e-3"))
    broken_gradient(trained, 1)
    before = weights(trained)
    trained.after_step = lambda step, metrics: snapshots.append(weights(trained))
    snapshots: list[list[Tensor]] = []
    trained.train()
    assert [metrics["skipped"] for metrics in recorder.metrics] == [1.0, 0.0, 0.0]
    assert equal(snapshots[0], before)
    assert not equal(snapshots[1], before)
    assert trained.bad_steps == 0
    assert [kind for kind, _ in recorder.events if kind != "ratio_check"] == ["skipped_step"]
    assert all(torch.isfinite(weight).all() for weight in weights(trained))
    steps = {int(trained.optimizer.state[parameter]["step"]) for parameter in trained.parameters}
    assert steps == {2}, "a skipped update leaves the optimiser's moments alone"


def test_a_ratio_that_is_not_a_number_is_never_called_perfect() -> None:
    trained, recorder = trainer(small(*UNCLIPPED))
    groups = scored(trained)
    groups[0].completions.logprobs[0, 0] = math.nan
    figures = trained.update(groups, 1)
    assert math.isnan(figures["ratio_error"]) and figures["skipped"] == 1.0
    trained._report_ratio(figures["ratio_error"])
    assert recorder.events[-1] == ("ratio_check", "Before the first update the probability ratio is not a number.")


def test_a_loss_that_is_not_finite_skips_the_update() -> None:
    trained, recorder = trainer(small())
    groups = scored(trained)
    worst = int(groups[0].advantages.argmin())
    # An impossible old probability: the ratio overflows, and a negative advantage is not clipped from above.
    groups[0].completions.logprobs[worst] -= 200.0
    before = weights(trained)
    figures = trained.update(groups, 1)
    assert not math.isfinite(figures["total_loss"])
    assert figures["skipped"] == 1.0
    assert trained.bad_steps == 1
    assert equal(weights(trained), before)
    assert [kind for kind, _ in recorder.events if kind != "ratio_check"] == ["skipped_step"]


def test_three_bad_steps_in_a_row_end_the_run_with_the_weights_as_they_were() -> None:
    trained, recorder = trainer(small("training.steps=9"))
    perturb(trained)
    broken_gradient(trained, 100)
    before = weights(trained)
    with pytest.raises(TrainingFailed, match="not a finite number in 3 steps in a row") as caught:
        trained.train()
    assert "training.learning_rate" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [metrics["skipped"] for metrics in recorder.metrics] == [1.0, 1.0, 1.0]
    assert equal(weights(trained), before)


def test_bad_steps_that_are_not_in_a_row_do_not_end_the_run() -> None:
    trained, recorder = trainer(small("training.steps=4", "training.max_bad_steps=2"))
    trained.after_step = lambda step, metrics: broken_gradient(trained, 1) if step in (1, 3) else None
    trained.train()
    assert [metrics["skipped"] for metrics in recorder.metrics] == [0.0, 1.0, 0.0, 1.0]


def test_a_reward_that_is_missing_leaves_the_other_rollouts_their_lesson() -> None:
    class Torn(RankScorer):
        """The scorer fails on the first picture of each call."""

        def score(self, pictures: Sequence[Any], prompts: Sequence[str]) -> list[float]:
            return [math.nan, *super().score(pictures, prompts)[1:]]

    config = small("training.steps=1", "training.learning_rate=1e-3")
    trained, recorder = trainer(config, loaded=fresh_environment(config, Torn()))
    before = weights(trained)
    trained.train()
    (metrics,) = recorder.metrics
    assert not equal(weights(trained), before)
    assert metrics["skipped"] == 0.0
    assert [group.advantages.tolist() for group in recorder.groups[0]] == [pytest.approx([0.0, -1.0, 1.0])] * 2
    assert metrics["reward_mean"] == pytest.approx(1.5), "the mean of the rewards there are"


# -- what is recorded ----------------------------------------------------------------------------------------


def test_the_metrics_of_a_step_are_exactly_those_described() -> None:
    trained, recorder = trainer(small("training.steps=1", "recording.checkpoint_every=1"))
    trained.train()
    (metrics,) = recorder.metrics
    assert set(metrics) <= set(STEP_METRICS)
    # The judge and the parts with a model of their own are not asked by every setting; all else is measured.
    assert set(STEP_METRICS) - set(metrics) <= {"judge_mean", "reward_aesthetic", "reward_vqa"}


def test_the_metrics_of_a_step_are_the_figures_of_its_groups() -> None:
    trained, recorder = trainer(small("training.steps=1"))
    trained.train()
    (metrics,), (groups,) = recorder.metrics, recorder.groups
    rewards = [reward for group in groups for reward in group.rewards.tolist()]
    lengths = [int(row.sum()) for group in groups for row in group.completions.mask]
    words = [len(text.split()) for group in groups for text in group.rewrites if text is not None]
    assert len(rewards) == 6
    assert metrics["reward_mean"] == pytest.approx(sum(rewards) / 6)
    assert metrics["avg_advantage"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["completion_tokens"] == pytest.approx(sum(lengths) / 6)
    assert metrics["rewrite_words"] == pytest.approx(sum(words) / len(words))
    assert metrics["parse_failures"] == sum(text is None for group in groups for text in group.rewrites)
    assert metrics["kl_penalty"] == pytest.approx(0.0, abs=1e-6), "the policy is still the reference"
    entropies = [value for group in groups for value in group.completions.entropies[group.completions.mask].tolist()]
    assert metrics["entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-4)
    phases = [metrics[f"seconds_{name}"] for name in ("sample", "render", "score", "update")]
    assert all(seconds is not None and seconds > 0 for seconds in phases)
    assert sum(seconds for seconds in phases if seconds is not None) <= (metrics["seconds"] or 0.0)


def test_the_shift_of_a_token_is_its_log_probability_when_sampled_minus_the_untrained_policys() -> None:
    for settings in ((), ("sampling.top_k=20", "training.inner_epochs=2", "training.update_rows=2")):
        trained, _ = trainer(small(*settings))
        groups = scored(trained)
        trained.update(groups, 1)
        assert all(float(group.shift.abs().max()) < 1e-5 for group in groups if group.shift is not None)
        perturb(trained)
        groups = scored(trained, step=2)
        trained.update(groups, 2)
        for group in groups:
            with torch.no_grad(), trained.policy.reference():
                reference, _ = trained.policy.token_logprobs(group.completions)
            assert group.shift is not None
            mask = group.completions.mask
            torch.testing.assert_close(group.shift[mask], (group.completions.logprobs - reference)[mask])
            assert float(group.shift[mask].abs().max()) > 0.01
            assert not group.shift[~mask].any()


def test_the_recorder_hears_of_every_phase() -> None:
    trained, recorder = trainer(small("training.steps=1"))
    trained.train()
    assert isinstance(recorder, ListRecorder)
    assert list(dict.fromkeys(recorder.phases)) == ["sampling", "rendering", "scoring", "updating"]
