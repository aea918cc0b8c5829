"""The policy: what it samples, under which probabilities, and what its adapter touches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from grpo_engine.config import ConfigError
from grpo_engine.environment import PureGRPOPromptEnvironment
from grpo_engine.judge import CheckerJudge, Judge, VqaJudge, make_judge
from grpo_engine.loading import model_folder
from grpo_engine.policy import PureGRPOPolicy
from grpo_engine.policy_family import adapter_layers, language_model
from grpo_engine.prompts import Prompt
from grpo_engine.rollout import Completions
from grpo_engine.sampler import truncate
from grpo_engine.seeding import derive_seed
from grpo_engine.small_decoder import SmallDecoder, suits
from tests.conftest import run_config

Rebuilt = Callable[..., PureGRPOPromptEnvironment]
OwnPolicy = Callable[..., PureGRPOPolicy]
BaseOf = Callable[[PureGRPOPolicy], Any]
Biased = Callable[[PureGRPOPolicy, Callable[[Tensor], Tensor]], AbstractContextManager[None]]
Ending = Callable[[PureGRPOPolicy], AbstractContextManager[None]]

TRUNCATIONS = [(1.0, 0, 1.0), (1.2, 100, 0.9), (0.7, 20, 1.0), (1.5, 0, 0.8)]


def seeds_for(prompts: list[Prompt], size: int) -> list[list[int]]:
    return [[derive_seed(0, "test", prompt.id, k) for k in range(size)] for prompt in prompts]


def sample(policy: PureGRPOPolicy, prompts: list[Prompt], size: int = 4, **options: Any) -> list[Completions]:
    return policy.sample([prompt.text for prompt in prompts], seeds_for(prompts, size), **options)


def disturb(policy: PureGRPOPolicy, size: float = 0.05) -> None:
    """Add noise to everything that training changes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def same_completions(one: Completions, other: Completions) -> None:
    assert torch.equal(one.token_ids, other.token_ids)
    assert torch.equal(one.mask, other.mask)
    assert one.texts == other.texts
    torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-4, rtol=0)


# -- the ratio ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), TRUNCATIONS)
def test_the_ratio_is_one_before_the_first_update(
    rebuilt: Rebuilt, prompts: list[Prompt], ending: Ending, temperature: float, top_k: int, top_p: float
) -> None:
    settings = (f"sampling.temperature={temperature}", f"sampling.top_k={top_k}", f"sampling.top_p={top_p}")
    policy = rebuilt(*settings).policy
    with ending(policy), torch.no_grad():
        groups = sample(policy, prompts)
        measured = [policy.token_logprobs(group) for group in groups]
    assert any(not group.mask.all() for group in groups)  # padding is part of the test
    for group, (logprobs, entropies) in zip(groups, measured, strict=True):
        assert logprobs.dtype == torch.float32
        ratio = (logprobs - group.logprobs).exp()
        assert float((ratio - 1).abs().max()) < 1e-4
        torch.testing.assert_close(entropies, group.entropies, atol=1e-4, rtol=0)
        assert float(logprobs[~group.mask].abs().sum()) == 0.0
        assert float(entropies[~group.mask].abs().sum()) == 0.0


def test_the_ratio_leaves_one_when_the_weights_change(own_policy: OwnPolicy, prompts: list[Prompt]) -> None:
    policy = own_policy("sampling.top_k=50", "sampling.top_p=0.9")
    (group,) = sample(policy, prompts[:1])
    disturb(policy)
    with torch.no_grad():
        logprobs, _ = policy.token_logprobs(group)
    assert float(((logprobs - group.logprobs).exp() - 1)[group.mask].abs().max()) > 1e-2


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), TRUNCATIONS)
def test_recorded_distributions_are_those_of_an_uncached_forward_pass(
    rebuilt: Rebuilt, base_of: BaseOf, prompts: list[Prompt], temperature: float, top_k: int, top_p: float
) -> None:
    settings = (f"sampling.temperature={temperature}", f"sampling.top_k={top_k}", f"sampling.top_p={top_p}")
    policy = rebuilt(*settings).policy
    group = sample(policy, prompts[:2], size=2)[1]
    length = int(group.mask[1].sum())
    ids = torch.cat([group.prompt_ids, group.token_ids[1, :length]]).unsqueeze(0)
    with torch.no_grad():
        logits = base_of(policy)(input_ids=ids).logits[0, len(group.prompt_ids) - 1 : -1]
    kept, logprobs = truncate(logits, temperature=temperature, top_k=top_k, top_p=top_p, suppressed=policy.suppressed)
    place = (kept == group.token_ids[1, :length, None]).int().argmax(dim=1)
    expected = logprobs[torch.arange(length), place]
    torch.testing.assert_close(group.logprobs[1, :length], expected, atol=1e-4, rtol=0)
    if top_k == 0 and top_p == 1.0:
        assert group.kept is None
    else:
        assert group.kept is not None
        for position in range(length):
            recorded = group.kept[1, position]
            assert set(recorded[recorded >= 0].tolist()) == set(kept[position][kept[position] >= 0].tolist())


# -- sampling -------------------------------------------------------------------------------------------


def test_completions_are_consistent(rebuilt: Rebuilt, prompts: list[Prompt], ending: Ending) -> None:
    policy = rebuilt("sampling.top_k=40", "sampling.max_new_tokens=4").policy
    with ending(policy):
        limit, groups = policy.sampling.max_new_tokens, sample(policy, prompts, size=8)
    ended = torch.cat([group.finished for group in groups])
    assert ended.any() and not ended.all()
    for prompt, group in zip(prompts, groups, strict=True):
        assert torch.equal(group.prompt_ids, policy.prompt_ids(prompt.text))
        assert group.kept is not None and group.kept.shape[:2] == group.token_ids.shape
        lengths = group.mask.sum(dim=1)
        assert group.token_ids.shape == (8, int(lengths.max()))
        assert torch.equal(group.mask, torch.arange(group.mask.shape[1]) < lengths[:, None])  # padding on the right
        assert float(group.logprobs[~group.mask].abs().sum() + group.entropies[~group.mask].abs().sum()) == 0.0
        assert (group.kept[~group.mask] == -1).all()
        chosen = (group.kept == group.token_ids.unsqueeze(-1)).any(dim=-1)
        assert chosen[group.mask].all()
        for k, length in enumerate(lengths.tolist()):
            tokens = group.token_ids[k, :length].tolist()
            ends = [token in policy.end_tokens for token in tokens]
            assert not any(ends[:-1])
            assert ends[-1] == bool(group.finished[k])
            assert ends[-1] or length == limit
            assert group.texts[k] == policy.tokenizer.decode(tokens, skip_special_tokens=True)


def test_the_first_token_is_drawn_from_the_models_distribution(
    rebuilt: Rebuilt, base_of: BaseOf, prompts: list[Prompt]
) -> None:
    policy = rebuilt("sampling.max_new_tokens=1", "sampling.top_k=15", "sampling.temperature=1.3").policy
    count = 800
    (group,) = sample(policy, prompts[:1], size=count)
    with torch.no_grad():
        logits = base_of(policy)(input_ids=group.prompt_ids.unsqueeze(0)).logits[0, -1:]
    kept, logprobs = truncate(logits, temperature=1.3, top_k=15, top_p=1.0, suppressed=policy.suppressed)
    observed = (group.token_ids == kept).sum(dim=0).double()  # (count, 1) against (1, 15)
    assert int(observed.sum()) == count
    expected = logprobs[0].double().exp() * count
    rare = expected < 5  # pooled: the test's approximation needs 5 expected in a bin
    if rare.any():
        observed = torch.cat([observed[~rare], observed[rare].sum().view(1)])
        expected = torch.cat([expected[~rare], expected[rare].sum().view(1)])
    if len(expected) > 1:
        expected = expected.clamp(min=1e-9)
        assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-4


def test_greedy_takes_the_likeliest_token_at_every_position(
    rebuilt: Rebuilt, base_of: BaseOf, prompts: list[Prompt]
) -> None:
    policy = rebuilt("sampling.max_new_tokens=6").policy
    groups = sample(policy, prompts, size=1, greedy=True)
    for group in groups:
        ids = group.prompt_ids.tolist()
        for token in group.token_ids[0][group.mask[0]].tolist():
            with torch.no_grad():
                logits = base_of(policy)(input_ids=torch.tensor([ids])).logits[0, -1]
            logits = logits.masked_fill(policy.suppressed, -torch.inf)
            assert float(logits.max() - logits[token]) < 1e-4
            ids.append(token)


def test_top_k_one_is_greedy_and_certain(rebuilt: Rebuilt, prompts: list[Prompt]) -> None:
    (greedy,) = sample(rebuilt().policy, prompts[:1], size=1, greedy=True)
    (group,) = sample(rebuilt("sampling.top_k=1").policy, prompts[:1], size=3)
    for k in range(3):
        assert torch.equal(group.token_ids[k], greedy.token_ids[0])
    assert float(group.logprobs.abs().max()) == 0.0
    assert float(group.entropies.abs().max()) == 0.0


def test_a_prompt_samples_the_same_alone_and_in_any_company(
    rebuilt: Rebuilt, prompts: list[Prompt], ending: Ending
) -> None:
    policy = rebuilt().policy
    assert len({len(policy.prompt_ids(prompt.text)) for prompt in prompts}) > 1  # else nothing is padded
    with ending(policy):
        together = sample(policy, prompts)
        backwards = sample(policy, prompts[::-1])[::-1]
        alone = [sample(policy, [prompt])[0] for prompt in prompts]
    assert len({int(length) for group in together for length in group.mask.sum(dim=1)}) > 1
    for index, group in enumerate(together):
        same_completions(alone[index], group)
        same_completions(backwards[index], group)


def test_a_rollout_depends_on_its_own_seed_alone(rebuilt: Rebuilt, prompts: list[Prompt], ending: Ending) -> None:
    policy = rebuilt().policy
    own = seeds_for(prompts[:1], 8)[0]
    with ending(policy):
        (group,) = sample(policy, prompts[:1], size=8)
        (turned,) = policy.sample([prompts[0].text], [[own[2], own[2], own[0]]])
    assert turned.texts == (group.texts[2], group.texts[2], group.texts[0])
    assert len(set(group.texts)) > 1


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_small_policy_samples_from_copies_of_its_present_weights_what_the_model_itself_would(
    own_policy: OwnPolicy, prompts: list[Prompt], ending: Ending, monkeypatch: pytest.MonkeyPatch, adapter: str
) -> None:
    policy = own_policy(f"models.policy.adapter={adapter}")
    disturb(policy)
    steps: list[int] = []
    decode = SmallDecoder.__call__

    def counting(self: SmallDecoder, tokens: Tensor, rows: Tensor, step: int, added: Tensor) -> Tensor:
        steps.append(step)
        return decode(self, tokens, rows, step, added)

    monkeypatch.setattr(SmallDecoder, "__call__", counting)
    found: list[list[Completions]] = []
    with ending(policy):
        for small in (True, False):
            monkeypatch.setattr(policy, "_small", small)
            steps.clear()
            found.append(sample(policy, prompts))
            with policy.reference():
                found[-1] += sample(policy, prompts)
            assert bool(steps) is small
    for one, other in zip(*found, strict=True):
        same_completions(one, other)
    trained, untrained = found[0][: len(prompts)], found[0][len(prompts) :]
    assert [group.texts for group in trained] != [group.texts for group in untrained]


@pytest.mark.parametrize("override", ["models.policy.dtype=bfloat16", "models.policy.lora.targets=attention"])
def test_only_whole_float32_policies_of_few_weights_are_copied(
    own_policy: OwnPolicy, monkeypatch: pytest.MonkeyPatch, override: str
) -> None:
    assert suits(own_policy(override)._base) is ("float" not in override)
    monkeypatch.setattr("grpo_engine.small_decoder.COPIED_BYTES", 2**20)
    assert not suits(own_policy(override)._base)


def test_completions_that_have_ended_leave_the_batch(
    own_policy: OwnPolicy, base_of: BaseOf, prompts: list[Prompt], ending: Ending
) -> None:
    policy = own_policy()
    rows: list[int] = []
    embedding = base_of(policy).get_input_embeddings()
    handle = embedding.register_forward_pre_hook(lambda _m, inputs: rows.append(inputs[0].shape[0]))
    with ending(policy):
        groups = sample(policy, prompts, size=8)
    handle.remove()
    running = torch.stack([group.mask[:, 1:].sum(dim=0) for group in trimmed(groups)]).sum(dim=0)
    decoding = rows[1:]
    assert len(decoding) == len(running) and decoding == sorted(decoding, reverse=True)
    assert decoding[-1] < decoding[0] <= 8 * len(prompts)
    for count, needed in zip(decoding, running.tolist(), strict=True):
        assert needed <= count < needed / 0.75 + 1


def trimmed(groups: list[Completions]) -> list[Completions]:
    """The groups, all as wide as the widest."""
    width = max(group.mask.shape[1] for group in groups)
    return [replace(group, mask=nn.functional.pad(group.mask, (0, width - group.mask.shape[1]))) for group in groups]


def test_vision_placeholders_are_never_sampled_however_likely(
    environment: PureGRPOPromptEnvironment, biased: Biased, base_of: BaseOf, prompts: list[Prompt]
) -> None:
    policy = environment.policy
    config = base_of(policy).config
    placeholders = [config.image_token_id, config.video_token_id, config.vision_start_token_id]
    placeholders += [config.vision_end_token_id, *policy.tokenizer.all_special_ids]
    forbidden = sorted(set(placeholders) - set(policy.end_tokens))
    assert policy.suppressed[forbidden].all()
    assert not policy.suppressed[policy.end_tokens].any()

    def wanted(logits: Tensor) -> Tensor:
        change = torch.zeros(logits.shape[-1])
        change[forbidden] = 1000.0
        return logits + change

    with biased(policy, wanted):
        for group in [*sample(policy, prompts[:2]), *sample(policy, prompts[:1], greedy=True)]:
            assert not set(forbidden) & set(group.token_ids[group.mask].tolist())


def test_an_end_token_can_be_sampled_and_ends_the_completion(
    environment: PureGRPOPromptEnvironment, biased: Biased, prompts: list[Prompt]
) -> None:
    policy = environment.policy

    def wanted(logits: Tensor) -> Tensor:
        change = torch.zeros(logits.shape[-1])
        change[policy.end_tokens] = 1000.0
        return logits + change

    with biased(policy, wanted):
        (group,) = sample(policy, prompts[:1])
    assert group.token_ids.shape == (4, 1)
    assert set(group.token_ids.flatten().tolist()) <= set(policy.end_tokens)
    assert group.finished.all() and group.texts == ("",) * 4


def test_rows_of_the_table_beyond_the_vocabulary_are_never_sampled(
    environment: PureGRPOPromptEnvironment, biased: Biased, prompts: list[Prompt]
) -> None:
    folder, config = model_folder("tiny", "policy"), environment.config
    processor = AutoProcessor.from_pretrained(folder)
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    words = len(processor.tokenizer)
    model.resize_token_embeddings(words + 54, mean_resizing=False)  # published tables are padded to round sizes
    policy = PureGRPOPolicy(model, processor, config.models.policy, config.sampling, seed=0, path=folder)
    assert policy.suppressed.shape == (words + 54,)
    with biased(policy, lambda logits: logits + 1000.0 * (torch.arange(logits.shape[-1]) >= words)):
        (group,) = sample(policy, prompts[:1])
    assert int(group.token_ids[group.mask].max()) < words


def test_poll_is_asked_before_every_forward_pass_and_stops_at_once(
    environment: PureGRPOPromptEnvironment, base_of: BaseOf, counted: Callable[[Any], list[int]], prompts: list[Prompt]
) -> None:
    policy = environment.policy
    passes = counted(base_of(policy).get_input_embeddings())

    class Halt(Exception):
        """Raised by the poll below."""

    for allowed in (0, 1, 4):
        passes.clear()
        left = itertools.count(allowed, -1)

        def poll(left: Iterator[int] = left) -> None:
            if next(left) == 0:
                raise Halt

        with pytest.raises(Halt):
            sample(policy, prompts[:1], greedy=True, poll=poll)
        assert len(passes) == allowed


def test_groups_of_unequal_size_are_refused(environment: PureGRPOPromptEnvironment) -> None:
    for prompts, seeds in ((["a", "b"], [[1, 2], [3]]), (["a", "b"], [[1]]), ([], [])):
        with pytest.raises(ValueError, match="equally large group"):
            environment.policy.sample(prompts, seeds)


# -- what is computed -----------------------------------------------------------------------------------


def test_logits_are_computed_for_completion_tokens_only(
    rebuilt: Rebuilt,
    base_of: BaseOf,
    counted: Callable[[Any], list[int]],
    prompts: list[Prompt],
    ending: Ending,
) -> None:
    policy = rebuilt().policy
    rows = counted(base_of(policy).lm_head)
    with ending(policy):
        groups = sample(policy, prompts[:2])
    assert rows[0] == max(rows) == 8  # one position of each rollout at a time, none of the prompt's
    assert not groups[0].mask.all()
    rows.clear()
    policy.token_logprobs(groups[0])
    assert rows == [int(groups[0].mask.sum())]  # and none of the padding


def test_rows_of_a_group_can_be_taken_apart(environment: PureGRPOPromptEnvironment, prompts: list[Prompt]) -> None:
    (group,) = sample(environment.policy, prompts[:1])
    with torch.no_grad():
        whole, _ = environment.policy.token_logprobs(group)
        parts = [environment.policy.token_logprobs(group.rows(slice(k, k + 1)))[0] for k in range(4)]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), TRUNCATIONS)
def test_sharing_the_prompt_never_changes_log_probabilities_or_gradient(
    own_policy: OwnPolicy,
    prompts: list[Prompt],
    ending: Ending,
    adapter: str,
    temperature: float,
    top_k: int,
    top_p: float,
) -> None:
    truncation = (f"sampling.temperature={temperature}", f"sampling.top_k={top_k}", f"sampling.top_p={top_p}")
    policy = own_policy(f"models.policy.adapter={adapter}", *truncation)
    disturb(policy, 0.02)
    with ending(policy):
        groups = sample(policy, prompts[:2])
    assert not all(group.mask.all() for group in groups)  # some rows are padded
    results, gradients = [], []
    for share in (False, True):
        policy.model.train()
        policy.model.zero_grad()
        measured = [policy.token_logprobs(group, share_prefix=share) for group in groups]
        sum((logprobs.sum() + 0.1 * entropies.sum() for logprobs, entropies in measured), torch.zeros(())).backward()
        results.append(torch.cat([torch.stack(pair).flatten() for pair in measured]).detach())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in policy.trainable().values()]))
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=0)
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < 1e-4


@pytest.mark.parametrize(("length", "computed"), [(1, 5), (3, 5 + 4 * 2)])
def test_the_prompt_goes_through_the_model_once_a_group(
    own_policy: OwnPolicy, base_of: BaseOf, prompts: list[Prompt], length: int, computed: int
) -> None:
    policy = own_policy()
    (group,) = sample(policy, prompts[:1])
    short = replace(
        group,
        prompt_ids=group.prompt_ids[:5],
        token_ids=group.token_ids[:, :length],
        mask=group.mask[:, :length],
        logprobs=group.logprobs[:, :length],
        entropies=group.entropies[:, :length],
    )
    tokens = []
    embedding = base_of(policy).get_input_embeddings()
    with policy.reference():
        handle = embedding.register_forward_hook(lambda _module, inputs, _output: tokens.append(inputs[0].numel()))
        policy.token_logprobs(short)
        handle.remove()
    assert sum(tokens) == computed


def test_the_prompt_stands_in_the_template_and_the_chat_markup(own_policy: OwnPolicy) -> None:
    policy = own_policy("models.policy.template=say {prompt} better", "models.policy.system=be brief")
    text = policy.tokenizer.decode(policy.prompt_ids("a {prompt} of red"))
    assert text.index("be brief") < text.index("say a {prompt} of red better")
    assert text.rstrip().endswith("assistant")
    assert len(policy.token_text(policy.prompt_ids("a red star").tolist())) == len(policy.prompt_ids("a red star"))


# -- the adapter and the reference ----------------------------------------------------------------------


@pytest.mark.parametrize(("targets", "count"), [("attention", 4), ("all-linear", 7)])
def test_adapters_stand_on_every_language_layer_and_none_on_the_vision_tower(
    own_policy: OwnPolicy, base_of: BaseOf, targets: str, count: int
) -> None:
    policy = own_policy(f"models.policy.lora.targets={targets}")
    layers = base_of(policy).config.text_config.num_hidden_layers
    assert len(policy.adapted_layers) == layers * count
    names = list(policy.trainable())
    assert len(names) == 2 * layers * count
    assert all("lora_" in name and "language_model" in name and "visual" not in name for name in names)
    visual = base_of(policy).model.visual
    assert not any("lora" in name for name, _ in visual.named_parameters())


def test_a_vision_tower_with_the_same_layer_names_gets_no_adapter() -> None:
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 32,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]},
        },
        vision_config={"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16},
    )
    with torch.random.fork_rng():
        model = Qwen2_5_VLForConditionalGeneration(config)
    alike = [name for name, _ in model.named_modules() if "visual" in name and name.endswith("gate_proj")]
    assert len(alike) == 2
    names = adapter_layers(model, "all-linear")
    assert len(names) == 2 * 7
    assert not any("visual" in name for name in names)


def test_a_model_without_known_layers_is_refused_with_a_way_out() -> None:
    with pytest.raises(ValueError, match="no layers named q_proj.*models.policy.adapter=full"):
        adapter_layers(nn.Sequential(nn.Linear(2, 2)), "attention")


def test_the_adapters_initial_weights_come_from_the_seed_alone(own_policy: OwnPolicy) -> None:
    torch.manual_seed(1)
    first = own_policy("seed=5").trainable()
    torch.manual_seed(2)
    again, other = own_policy("seed=5").trainable(), own_policy("seed=6").trainable()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_reference_is_the_untrained_policy_whatever_training_did(
    own_policy: OwnPolicy, prompts: list[Prompt], adapter: str
) -> None:
    policy = own_policy(f"models.policy.adapter={adapter}")
    (group,) = sample(policy, prompts[:1])

    def logprobs() -> Tensor:
        with torch.no_grad():
            return policy.token_logprobs(group)[0]

    before, names = logprobs(), list(policy.trainable())
    with policy.reference():
        torch.testing.assert_close(logprobs(), before, atol=1e-6, rtol=0)
    assert list(policy.trainable()) == names  # what is trained is not lost on the way
    disturb(policy)
    trained = logprobs()
    assert float((trained - before).abs().max()) > 1e-2
    with policy.reference():
        torch.testing.assert_close(logprobs(), before, atol=1e-6, rtol=0)
        same_completions(sample(policy, prompts[:1])[0], group)
    assert torch.equal(logprobs(), trained)
    with pytest.raises(RuntimeError, match="inside"), policy.reference():
        raise RuntimeError("inside")
    assert torch.equal(logprobs(), trained)


def test_full_training_reaches_the_language_model_and_nothing_else(
    own_policy: OwnPolicy, base_of: BaseOf, prompts: list[Prompt]
) -> None:
    policy = own_policy("models.policy.adapter=full")
    model = base_of(policy)
    language = {id(parameter) for parameter in language_model(model).parameters()}
    assert {id(parameter) for parameter in policy.trainable().values()} == language
    assert not any(parameter.requires_grad for parameter in model.model.visual.parameters())
    with policy.reference():
        assert policy.trainable() == {}
        reference = {name: p.clone() for name, p in base_of(policy).named_parameters()}
    (group,) = sample(policy, prompts[:1])
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.1)
    policy.token_logprobs(group)[0].sum().backward()
    optimizer.step()
    with policy.reference():
        now = dict(base_of(policy).named_parameters())
        assert all(torch.equal(now[name], value) for name, value in reference.items())
    changed = dict(model.named_parameters())
    moved = {name for name, value in reference.items() if not torch.equal(changed[name], value)}
    assert moved and not any("visual" in name for name in moved)


def test_the_gradient_reaches_every_adapter_and_no_base_weight(own_policy: OwnPolicy, prompts: list[Prompt]) -> None:
    policy = own_policy()
    disturb(policy)  # a fresh adapter's A matrices have gradient 0, since its B matrices are 0
    (group,) = sample(policy, prompts[:1])
    policy.token_logprobs(group)[0].sum().backward()
    for name, parameter in policy.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_gradient_checkpointing_never_changes_the_gradient(
    own_policy: OwnPolicy, prompts: list[Prompt], adapter: str
) -> None:
    gradients = []
    for checkpointing in ("false", "true"):
        policy = own_policy(f"models.policy.adapter={adapter}", f"models.policy.gradient_checkpointing={checkpointing}")
        (group,) = sample(policy, prompts[:1])
        policy.model.train()
        logprobs, entropies = policy.token_logprobs(group)
        (logprobs.sum() + entropies.sum()).backward()
        gradients.append({name: p.grad for name, p in policy.trainable().items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4, rtol=1e-4)


# -- the judge ------------------------------------------------------------------------------------------


def pictures(count: int) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (96, 96, 3), dtype=np.uint8) for _ in range(count)]


def test_the_probability_of_yes_is_that_of_the_two_answers(
    environment: PureGRPOPromptEnvironment, base_of: BaseOf
) -> None:
    policy, shown = environment.policy, pictures(2)
    texts = ["a red circle", "two small blue stars on a white background"]
    answers = policy.probability_of_yes(shown, texts)
    assert all(0.0 <= answer <= 1.0 for answer in answers)
    for picture, text, answer in zip(shown, texts, answers, strict=True):
        question = policy.config.question.replace("{prompt}", text)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        chat = policy.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        with torch.no_grad():
            inputs = policy.processor(text=[chat], images=[picture], return_tensors="pt")
            assert int((inputs.input_ids == base_of(policy).config.image_token_id).sum()) > 1  # the picture is read
            logits = base_of(policy)(**inputs).logits[0, -1]
        base_of(policy).model.rope_deltas = None
        yes, no = (policy.tokenizer(word).input_ids[0] for word in ("Yes", "No"))
        both = logits[[yes, no]].double().softmax(dim=0)
        assert answer == pytest.approx(float(both[0]), abs=1e-4)
    assert policy.probability_of_yes(shown[1:], texts[1:]) == pytest.approx(answers[1:], abs=1e-5)
    black = policy.probability_of_yes([np.zeros_like(shown[0])], texts[:1])
    assert black != pytest.approx(answers[:1], abs=1e-7)


def test_judging_pictures_leaves_text_only_log_probabilities_unchanged(
    environment: PureGRPOPromptEnvironment, base_of: BaseOf, prompts: list[Prompt]
) -> None:
    policy = environment.policy
    (group,) = sample(policy, prompts[:1])
    ids, model = group.prompt_ids.unsqueeze(0), base_of(policy)

    def text_only() -> tuple[Tensor, ...]:
        with torch.no_grad():
            start = model(input_ids=ids, use_cache=True)
            # Continued without explicit positions, a model adds the offset it remembers of the last picture.
            cached = model(input_ids=ids[:, -1:], past_key_values=start.past_key_values).logits
            return *policy.token_logprobs(group), start.logits, cached

    before = text_only()
    policy.probability_of_yes(pictures(1), ["a red circle"])
    for one, other in zip(before, text_only(), strict=True):
        assert torch.equal(one, other)
    same_completions(sample(policy, prompts[:1])[0], group)


def test_the_vqa_judge_answers_as_the_untrained_policy(own_policy: OwnPolicy, prompts: list[Prompt]) -> None:
    policy, shown = own_policy(), pictures(2)
    texts = [prompt.text for prompt in prompts[:2]]
    judge = VqaJudge(policy)
    before = [judgement.score for judgement in judge.judge(shown, prompts[:2])]
    disturb(policy)
    assert policy.probability_of_yes(shown, texts) != pytest.approx(before, abs=1e-6)
    assert [judgement.score for judgement in judge.judge(shown, prompts[:2])] == pytest.approx(before, abs=1e-6)


def test_the_judge_is_chosen_by_what_the_prompts_carry(
    environment: PureGRPOPromptEnvironment, prompts: list[Prompt]
) -> None:
    policy, plain = environment.policy, [Prompt("x", "a lighthouse", "basic", "test")]

    def made(choice: str, asked: list[Prompt], *others: str) -> Judge | None:
        return make_judge(run_config(f"evaluation.judge={choice}", *others), asked, policy)

    assert isinstance(made("auto", prompts), CheckerJudge)
    assert isinstance(made("checker", prompts), CheckerJudge)
    assert isinstance(made("auto", plain), VqaJudge)
    assert isinstance(made("auto", [*prompts, *plain]), VqaJudge)
    assert isinstance(made("vqa", prompts), VqaJudge)
    assert made("none", prompts) is None
    with pytest.raises(ConfigError, match="evaluation.judge is 'checker'.*'auto' or 'vqa'"):
        made("checker", plain)
    other_size = "models.image.resolution=128"
    assert isinstance(made("auto", prompts, other_size), VqaJudge), "the checker reads pictures of its own size"
    with pytest.raises(ConfigError, match="models.image.resolution is 128; use 'auto' or 'vqa'"):
        made("checker", prompts, other_size)


def test_the_checker_judge_sums_its_parts(environment: PureGRPOPromptEnvironment, prompts: list[Prompt]) -> None:
    for judgement in CheckerJudge().judge(pictures(len(prompts)), prompts):
        assert 0.0 <= judgement.score <= 1.0
        assert judgement.parts
        assert all(0 <= right <= asked and asked > 0 for right, asked in judgement.parts.values())
