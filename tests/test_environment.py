"""The environment: whole groups, shared latents, visible failures, and its token-by-token face."""

from __future__ import annotations

import string
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from engine_runs import RankScorer
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_engine.control import RunControl, StopRequested
from grpo_engine.environment import PureGRPOPromptEnvironment, parse_rewrite
from grpo_engine.policy import PureGRPOPolicy
from grpo_engine.prompts import Prompt
from grpo_engine.reward import RewardModel
from grpo_engine.rollout import Completions, Group
from grpo_engine.seeding import derive_seed

Rebuilt = Callable[..., PureGRPOPromptEnvironment]
Counted = Callable[[Any], list[int]]
Ending = Callable[[PureGRPOPolicy], AbstractContextManager[None]]

TEXTS = ("a red circle", "a blue square", "a red circle", "a large green star on white")


def written(policy: PureGRPOPolicy, prompt: Prompt, texts: tuple[str, ...]) -> Completions:
    """A group of completions that say ``texts`` and end."""
    rows = [[*policy.tokenizer(text).input_ids, policy.end_tokens[0]] for text in texts]
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row)], mask[index, : len(row)] = torch.tensor(row), True
    zeros, ended = torch.zeros(tokens.shape), torch.ones(len(rows), dtype=torch.bool)
    return Completions(policy.prompt_ids(prompt.text), tokens, mask, zeros, zeros, None, texts, ended)


def scored(
    environment: PureGRPOPromptEnvironment, prompt: Prompt, texts: tuple[str, ...], *, latent: int = 7, step: int = 1
) -> Group:
    group = environment.new_group(prompt, written(environment.policy, prompt, texts), latent)
    (whole,) = environment.score_groups([group], step)
    return whole


# -- parsing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "rewrite"),
    [
        ("a red circle", "a red circle"),
        ("  a   red\tcircle  ", "a red circle"),
        ('"a red circle"', "a red circle"),
        ("\u201ca red circle\u201d", "a red circle"),
        ("' a red circle '", "a red circle"),
        ("a 'red' circle", "a 'red' circle"),
        ("\n\n a red circle\nand more", "a red circle"),
        ("---\n***\na red circle", "a red circle"),
        ("7", "7"),
        ("ein größerer Kreis", "ein größerer Kreis"),
        ("", None),
        (" \n\t\n", None),
        ("...!?\n\"''\"", None),
    ],
)
def test_the_rewrite_is_the_first_line_with_text_in_it(completion: str, rewrite: str | None) -> None:
    assert parse_rewrite(completion) == rewrite


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=string.ascii_letters + "\"'` .,\n\r\t\u201c\u201d\u00ab7", max_size=30))
def test_a_rewrite_is_one_tidy_line_of_the_completion_or_none(completion: str) -> None:
    rewrite = parse_rewrite(completion)
    if rewrite is None:
        assert not any(character.isalnum() for character in completion)
    else:
        assert rewrite in " ".join(completion.split())
        assert "\n" not in rewrite and rewrite == " ".join(rewrite.split())
        assert any(character.isalnum() for character in rewrite)


# -- whole groups ---------------------------------------------------------------------------------------


def test_a_rollout_yields_whole_groups_in_the_order_of_the_prompts(
    environment: PureGRPOPromptEnvironment, prompts: list[Prompt]
) -> None:
    phases: list[tuple[str, int, int]] = []
    groups = list(environment.rollout(prompts, 3, 1, on_phase=lambda *told: phases.append(told)))
    assert [group.prompt for group in groups] == prompts
    for group in groups:
        assert len(group) == len(group.completions) == len(group.rewrites) == len(group.pictures) == 3
        assert [score.total for score in group.scores] == pytest.approx(group.rewards.tolist())
        assert group.rewards.shape == (3,) and group.rewards.dtype == torch.float32
        assert group.failures == sum(rewrite is None for rewrite in group.rewrites)
        for text, rewrite, picture in zip(group.completions.texts, group.rewrites, group.pictures, strict=True):
            assert rewrite == parse_rewrite(text)
            assert (picture is None) == (rewrite is None)
        assert set(group.seconds) == {"sample", "render", "score"}
    assert [name for name, _, _ in phases][0] == "sampling"
    assert {name for name, _, _ in phases} == {"sampling", "rendering", "scoring"}
    assert all(0 <= done < total == len(prompts) for _, done, total in phases)


def test_a_group_is_yielded_as_soon_as_it_is_whole(rebuilt: Rebuilt, prompts: list[Prompt], counted: Counted) -> None:
    environment = rebuilt("models.image.batch_size=2", "models.image.guidance=1", "models.image.steps=1")
    rendered = counted(environment.images.pipeline.transformer)  # type: ignore[attr-defined]
    groups = [
        environment.new_group(prompt, written(environment.policy, prompt, TEXTS), index)
        for index, prompt in enumerate(prompts)
    ]
    for count, group in enumerate(environment.score_groups(groups, 1), start=1):
        assert sum(rendered) == 3 * count  # its three distinct rewrites, and nothing of the groups behind it
        assert len(group.pictures) == 4  # though a group is larger than a batch of the image model


def test_prompts_sampled_in_passes_write_the_same(rebuilt: Rebuilt, prompts: list[Prompt]) -> None:
    whole = list(rebuilt().rollout(prompts, 2, 1))
    for width in (1, 3):
        for one, other in zip(whole, rebuilt(f"sampling.prompts_per_pass={width}").rollout(prompts, 2, 1), strict=True):
            assert torch.equal(one.completions.token_ids, other.completions.token_ids)
            assert one.latent_seed == other.latent_seed


def test_random_numbers_do_not_depend_on_the_order_of_prompts(
    environment: PureGRPOPromptEnvironment, prompts: list[Prompt]
) -> None:
    forward = {group.prompt.id: group for group in environment.rollout(prompts, 2, 4)}
    for group in environment.rollout(prompts[::-1][:2], 2, 4):
        same = forward[group.prompt.id]
        assert torch.equal(group.completions.token_ids, same.completions.token_ids)
        assert group.latent_seed == same.latent_seed


def test_latents_and_samples_are_fresh_for_each_step_attempt_prompt_and_run(
    environment: PureGRPOPromptEnvironment, rebuilt: Rebuilt, prompts: list[Prompt]
) -> None:
    def seen(environment: PureGRPOPromptEnvironment, step: int, attempt: int = 0) -> list[tuple[int, tuple[str, ...]]]:
        groups = environment.rollout(prompts[:2], 2, step, attempt=attempt)
        return [(group.latent_seed, group.completions.texts) for group in groups]

    draws = [*seen(environment, 1), *seen(environment, 2), *seen(environment, 1, 1), *seen(rebuilt("seed=1"), 1)]
    assert len({latent for latent, _ in draws}) == len(draws) == 8
    assert seen(environment, 1) == draws[:2]
    # A trained policy may well write the same twice; it does not do so everywhere.
    assert len({texts for _, texts in draws}) > 1


def test_all_rollouts_of_a_group_share_one_latent(rebuilt: Rebuilt, prompts: list[Prompt]) -> None:
    environment = rebuilt("models.image.guidance=1")
    starts: list[torch.Tensor] = []
    transformer = environment.images.pipeline.transformer  # type: ignore[attr-defined]
    handle = transformer.register_forward_pre_hook(
        lambda _module, _inputs, named: starts.append(named["hidden_states"].clone()), with_kwargs=True
    )
    scored(environment, prompts[0], TEXTS, latent=derive_seed(0, "latent", 1))
    scored(environment, prompts[0], TEXTS, latent=derive_seed(0, "latent", 2))
    handle.remove()
    first, second = starts[0], starts[len(starts) // 2]  # the noise each rendering began from
    assert all(torch.equal(first[0], row) for row in first)
    assert all(torch.equal(second[0], row) for row in second)
    assert not torch.equal(first[0], second[0])


def test_identical_rewrites_are_rendered_once_and_share_their_picture(
    rebuilt: Rebuilt, prompts: list[Prompt], counted: Counted
) -> None:
    environment = rebuilt("models.image.guidance=1", "models.image.steps=1")
    rendered = counted(environment.images.pipeline.transformer)  # type: ignore[attr-defined]
    group = scored(environment, prompts[0], TEXTS)
    assert sum(rendered) == len(set(TEXTS))
    assert group.pictures[0] is group.pictures[2]
    assert group.scores[0] == group.scores[2]
    assert not np.array_equal(group.pictures[0], group.pictures[1])  # type: ignore[arg-type]


def test_the_same_rewrite_of_two_prompts_is_two_pictures(rebuilt: Rebuilt, prompts: list[Prompt]) -> None:
    environment = rebuilt()
    groups = [environment.new_group(p, written(environment.policy, p, TEXTS), i) for i, p in enumerate(prompts[:2])]
    one, other = environment.score_groups(groups, 1)
    assert not np.array_equal(one.pictures[0], other.pictures[0])  # type: ignore[arg-type]


def test_a_completion_that_cannot_be_parsed_is_counted_and_never_drawn(
    rebuilt: Rebuilt, prompts: list[Prompt], counted: Counted
) -> None:
    environment = rebuilt("models.reward.failure=-3.5", "models.image.guidance=1", "models.image.steps=1")
    rendered = counted(environment.images.pipeline.transformer)  # type: ignore[attr-defined]
    group = scored(environment, prompts[0], ("a red circle", "...", "a blue square", ""))
    assert group.failures == 2
    assert group.rewrites == ("a red circle", None, "a blue square", None)
    assert [picture is None for picture in group.pictures] == [False, True, False, True]
    assert sum(rendered) == 2
    assert group.rewards[[1, 3]].tolist() == [-3.5, -3.5]
    assert [score.parts["format"] for score in group.scores] == [1.0, 0.0, 1.0, 0.0]
    assert "clip" not in group.scores[1].parts
    alone = scored(environment, prompts[0], ("a red circle", "a blue square"))
    assert group.rewards[[0, 2]].tolist() == pytest.approx(alone.rewards.tolist(), abs=1e-3)


def test_a_group_without_any_rewrite_has_the_failure_reward_throughout(rebuilt: Rebuilt, prompts: list[Prompt]) -> None:
    group = scored(rebuilt("models.reward.failure=-1"), prompts[0], ("", "?", "\n"))
    assert group.failures == 3
    assert group.pictures == [None] * 3
    assert group.rewards.tolist() == [-1.0] * 3


def test_shuffled_rewards_are_permuted_inside_their_group_only(rebuilt: Rebuilt, prompts: list[Prompt]) -> None:
    texts = ("a red circle", "a blue square", "a green star", "a large yellow heart", "a small white cross")
    honest, shuffled = rebuilt(), rebuilt("models.reward.debug=shuffle")
    orders = []
    for step in (1, 2, 3):
        for prompt in prompts[:2]:
            true, dealt = scored(honest, prompt, texts, step=step), scored(shuffled, prompt, texts, step=step)
            assert [score.total for score in dealt.scores] == [score.total for score in true.scores]
            assert sorted(dealt.rewards.tolist()) == sorted(true.rewards.tolist())
            assert len(set(true.rewards.tolist())) == len(texts)
            orders.append(tuple(true.rewards.tolist().index(reward) for reward in dealt.rewards.tolist()))
            assert torch.equal(scored(shuffled, prompt, texts, step=step).rewards, dealt.rewards)
    assert len(set(orders)) > 3  # dealt anew for each prompt and step


def test_every_rollout_is_dealt_every_reward_equally_often(rebuilt: Rebuilt, prompts: list[Prompt]) -> None:
    environment = rebuilt("models.reward.debug=shuffle")
    environment.reward = RewardModel(RankScorer(), environment.config.models.reward)
    texts = ("a red circle", "a blue square", "a green star")  # all different, so their rewards are 0, 1 and 2
    group = scored(environment, prompts[0], texts)
    deals = 1000
    dealt = torch.stack([environment.score(group, step) for step in range(deals)])
    share = torch.stack([(dealt == reward).float().mean(0) for reward in range(len(texts))])
    expected = 1 / len(texts)
    assert float((share - expected).abs().max()) < 5 * (expected * (1 - expected) / deals) ** 0.5


def test_a_stop_inside_a_rollout_yields_nothing_more(
    environment: PureGRPOPromptEnvironment, prompts: list[Prompt]
) -> None:
    asked = 0

    def count() -> None:
        nonlocal asked
        asked += 1

    complete = len(list(environment.rollout(prompts[:2], 2, 1, poll=count)))
    tokens = environment.config.sampling.max_new_tokens
    assert complete == 2 and asked >= 2 + environment.images.config.steps  # type: ignore[attr-defined]
    for allowed in (0, 1, min(tokens, asked - 2), asked - 1):
        control, seen = RunControl(), 0

        def poll(control: RunControl = control, allowed: int = allowed) -> None:
            nonlocal seen
            if seen == allowed:
                control.command("stop")
            seen += 1
            control.poll()

        groups = []
        with pytest.raises(StopRequested):
            for group in environment.rollout(prompts[:2], 2, 1, poll=poll):
                groups.append(group)
        assert groups == [] and seen == allowed + 1


# -- token by token -------------------------------------------------------------------------------------


def play(
    environment: PureGRPOPromptEnvironment, prompts: list[Prompt], rows: list[list[int]], *, step: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[dict[str, Any]]]:
    """Feed ``rows`` of tokens until all end; returns summed rewards, terminated, truncated, and every info."""
    observation, _ = environment.reset(prompts, step=step)
    count = len(prompts)
    total, terminated, truncated = torch.zeros(count), torch.zeros(count).bool(), torch.zeros(count).bool()
    infos, position = [], 0
    while observation["mask"].any():
        tokens = torch.tensor([row[position] if position < len(row) else 0 for row in rows])
        observation, reward, ended, cut, info = environment.step(tokens)
        total, terminated, truncated = total + reward, terminated | ended, truncated | cut
        infos.append(info)
        position += 1
    return total, terminated, truncated, infos


def test_token_by_token_and_whole_groups_reward_equal_tokens_equally(
    rebuilt: Rebuilt, prompts: list[Prompt], ending: Ending
) -> None:
    # Pictures rendered one at a time on both sides, so that they agree bit for bit.
    environment = rebuilt("models.image.batch_size=1", "models.image.steps=1", "sampling.max_new_tokens=3")
    with ending(environment.policy):
        groups = list(environment.rollout(prompts, 4, 3))
    ended = torch.stack([group.completions.finished for group in groups])
    assert ended.any() and not ended.all()
    for k in range(4):
        rows = [group.completions.token_ids[k][group.completions.mask[k]].tolist() for group in groups]
        reward, terminated, truncated, infos = play(environment, prompts, rows, step=3)
        assert reward.tolist() == pytest.approx([float(group.rewards[k]) for group in groups], abs=1e-3)
        assert torch.equal(terminated, ended[:, k])
        assert torch.equal(truncated, ~ended[:, k])
        for index, group in enumerate(groups):
            (last,) = (info for info in infos if info["score"][index] is not None)
            assert last["rewrite"][index] == group.rewrites[k]
            picture = group.pictures[k]
            if picture is None:
                assert last["picture"][index] is None
            else:
                assert np.array_equal(last["picture"][index], picture)


def test_an_episode_terminates_at_an_end_token_and_is_truncated_at_the_limit(
    rebuilt: Rebuilt, prompts: list[Prompt]
) -> None:
    environment = rebuilt("sampling.max_new_tokens=4")
    policy = environment.policy
    (word,) = policy.tokenizer("red").input_ids
    end = policy.end_tokens[0]
    observation, info = environment.reset(prompts[:3])
    assert info == {"prompts": [prompt.text for prompt in prompts[:3]]}
    for prompt, ids, tokens in zip(prompts, observation["prompt_ids"], observation["token_ids"], strict=False):
        assert torch.equal(ids, policy.prompt_ids(prompt.text)) and len(tokens) == 0
    assert observation["mask"].tolist() == [True] * 3

    steps = []
    for tokens in ([word, end, word], [end, word, word], [word, word, word], [word, word, end]):
        steps.append(environment.step(torch.tensor(tokens)))
    assert [step[0]["mask"].tolist() for step in steps] == [[1, 0, 1], [0, 0, 1], [0, 0, 1], [0, 0, 0]]
    # An end token at the very limit is an end, not a cut.
    assert [step[2].tolist() for step in steps] == [[0, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 1]]
    assert not any(step[3].any() for step in steps)
    # The finished rows ignored what came after.
    assert [tokens.tolist() for tokens in steps[-1][0]["token_ids"]] == [[word, end], [end], [word, word, word, end]]
    for _, reward, terminated, _, info in steps:
        assert reward.dtype == torch.float32
        assert (reward[~terminated] == 0).all()
        assert [score is not None for score in info["score"]] == terminated.tolist()
    assert steps[1][4]["rewrite"] == ["red", None, None]
    assert steps[1][4]["picture"][0].shape == (96, 96, 3)

    environment.reset(prompts[:1])
    for position in range(4):
        observation, _, terminated, truncated, _ = environment.step(torch.tensor([word]))
        assert not terminated.any()
        assert truncated.tolist() == [position == 3]
    assert not observation["mask"].any()


def test_an_empty_rewrite_gets_the_failure_reward_token_by_token(rebuilt: Rebuilt, prompts: list[Prompt]) -> None:
    environment = rebuilt("models.reward.failure=-2")
    environment.reset(prompts[:1])
    _, reward, terminated, _, info = environment.step(torch.tensor([environment.policy.end_tokens[0]]))
    assert reward.tolist() == [-2.0] and terminated.tolist() == [True]
    assert info["rewrite"] == [None] and info["picture"] == [None]
    assert info["score"][0].parts == {"format": 0.0}


def test_stepping_without_a_running_episode_is_refused(rebuilt: Rebuilt, prompts: list[Prompt]) -> None:
    environment = rebuilt()
    end = environment.policy.end_tokens[0]
    with pytest.raises(RuntimeError, match="call reset"):
        environment.step(torch.tensor([end]))
    environment.reset(prompts[:2])
    for wrong in (torch.tensor([end]), torch.tensor([[end, end]]), torch.tensor(end)):
        with pytest.raises(ValueError, match="one token an episode"):
            environment.step(wrong)
    environment.step(torch.tensor([end, end]))
    with pytest.raises(RuntimeError, match="call reset"):
        environment.step(torch.tensor([end, end]))
    observation, _ = environment.reset(prompts[:1])
    assert observation["mask"].tolist() == [True]
