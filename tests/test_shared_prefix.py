"""A prompt and its group as one sequence, and logits in chunks: less work, the same numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_runs import perturb, small, trainer, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from model_folders import FAMILIES, write_policy
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from grpo_engine import shared_prefix
from grpo_engine.policy import PureGRPOPolicy
from grpo_engine.policy_family import language_model, position_rows, shaped
from grpo_engine.prompts import Prompt
from grpo_engine.sampler import chunked_logprobs

ANY = torch.zeros(1010, dtype=torch.bool)
ANY[1000:] = True  # special tokens


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Random small models of the real classes, everything trainable."""
    folder = tmp_path_factory.mktemp("policies")
    return {
        family: AutoModelForImageTextToText.from_pretrained(write_policy(folder / family, family)).eval()
        for family in FAMILIES
    }


def apart(model: Any, prompt: Tensor, rows: list[Tensor]) -> Tensor:
    """Hidden states that predict each row's tokens, every row a sequence of its own, no padding anywhere."""
    states = []
    for row in rows:
        ids = torch.cat([prompt, row]).unsqueeze(0)
        positions = shaped(torch.arange(ids.shape[1]).unsqueeze(0), position_rows(model))
        hidden = model.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[0]
        states.append(hidden[len(prompt) - 1 : -1])
    return torch.cat(states)


def gradient(model: nn.Module, value: Tensor) -> Tensor:
    parameters = list(language_model(model).parameters())
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(parameters, found)])  # noqa: B905


@pytest.mark.parametrize("family", list(FAMILIES))
@settings(max_examples=12, deadline=None)
@given(
    length=st.integers(1, 7),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    seed=st.integers(0, 10_000),
)
def test_a_group_behind_one_prompt_is_the_group_in_sequences_of_their_own(
    models: dict[str, Any], family: str, length: int, lengths: list[int], seed: int
) -> None:
    model, generator = models[family], torch.Generator().manual_seed(seed)
    prompt = torch.randint(3, 1000, (length,), generator=generator)
    rows = [torch.randint(3, 1000, (n,), generator=generator) for n in lengths]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]
    expected = apart(model, prompt, rows)
    assert shared_prefix.prepare(model, ANY)
    packed = shared_prefix.hidden_states(model, [prompt], [len(tokens)], tokens, mask)
    assert packed.shape == (*tokens.shape, 48)
    torch.testing.assert_close(packed[mask], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(apart(model, prompt, rows), expected, atol=0, rtol=0)  # without a layout as before
    weights = torch.randn(expected.shape, generator=generator)
    one, other = (gradient(model, (states * weights).sum()) for states in (packed[mask], expected))
    assert float((one - other).norm()) <= 1e-5 * float(other.norm())


@pytest.mark.parametrize("family", list(FAMILIES))
@settings(max_examples=12, deadline=None)
@given(
    groups=st.lists(
        st.tuples(st.integers(1, 7), st.lists(st.integers(1, 6), min_size=1, max_size=3)), min_size=2, max_size=4
    ),
    seed=st.integers(0, 10_000),
)
def test_several_groups_together_are_each_group_by_itself(
    models: dict[str, Any], family: str, groups: list[tuple[int, list[int]]], seed: int
) -> None:
    model, generator = models[family], torch.Generator().manual_seed(seed)
    assert shared_prefix.prepare(model, ANY)
    prompts = [torch.randint(3, 1000, (length,), generator=generator) for length, _ in groups]
    rows = [[torch.randint(3, 1000, (n,), generator=generator) for n in lengths] for _, lengths in groups]
    tokens = nn.utils.rnn.pad_sequence([row for group in rows for row in group], batch_first=True)
    mask = torch.arange(tokens.shape[1]) < torch.tensor([n for _, lengths in groups for n in lengths])[:, None]
    packed = shared_prefix.hidden_states(model, prompts, [len(group) for group in rows], tokens, mask)[mask]
    expected = torch.cat([apart(model, prompt, group) for prompt, group in zip(prompts, rows, strict=True)])
    torch.testing.assert_close(packed, expected, atol=1e-4, rtol=0)
    weights = torch.randn(expected.shape, generator=generator)
    one, other = (gradient(model, (states * weights).sum()) for states in (packed, expected))
    assert float((one - other).norm()) <= 1e-5 * float(other.norm())


@pytest.mark.parametrize("change", [{"_attn_implementation": "eager"}, {"layer_types": ["sliding_attention"] * 3}])
def test_models_that_attend_otherwise_are_left_alone(models: dict[str, Any], change: dict[str, Any]) -> None:
    model = copy.deepcopy(models["qwen2_vl"])
    config: Any = language_model(model).config
    config._attn_implementation = "sdpa"
    for name, value in change.items():
        setattr(config, name, value)
    assert not shared_prefix.prepare(model, ANY)
    assert config._attn_implementation == change.get("_attn_implementation", "sdpa")


def test_an_untested_family_that_does_not_pass_the_layout_on_is_left_alone(models: dict[str, Any]) -> None:
    model = copy.deepcopy(models["llava"])
    config: Any = language_model(model).config
    config._attn_implementation = "sdpa"
    forward = model.model.forward
    model.model.forward = lambda shared_prefix, **named: forward(**named)
    assert not shared_prefix.prepare(model, ANY)
    assert config._attn_implementation == "sdpa"
    model.model.forward = forward
    assert shared_prefix.prepare(model, ANY)


def test_gradient_checkpointing_computes_no_more_tokens(
    own_policy: Callable[..., PureGRPOPolicy], base_of: Callable[[PureGRPOPolicy], Any], prompts: list[Prompt]
) -> None:
    counts = []
    for chosen in ("false", "true"):
        policy = own_policy(f"models.policy.gradient_checkpointing={chosen}")
        (group,) = policy.sample([prompts[0].text], [list(range(4))])
        policy.model.train()
        seen: list[int] = []
        layer = language_model(base_of(policy)).layers[0].mlp  # type: ignore[union-attr,index]
        handle = layer.register_forward_pre_hook(lambda _m, inputs, seen=seen: seen.append(inputs[0].shape[1]))  # type: ignore[misc,union-attr]
        policy.token_logprobs(group)[0].sum().backward()
        handle.remove()  # type: ignore[union-attr]
        counts.append(seen)
    expected = len(group.prompt_ids) + int(group.mask.sum()) - len(group)
    assert counts == [[expected], [expected, expected]]  # once, and once more in the backward pass


# -- logits in chunks -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 12),
    chunk=st.integers(1, 14),
    truncated=st.booleans(),
    temperature=st.sampled_from([0.7, 1.0, 1.5]),
    seed=st.integers(0, 10_000),
)
def test_chunks_never_change_log_probabilities_entropies_or_gradients(
    count: int, chunk: int, truncated: bool, temperature: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    vocabulary, width = 11, 5
    head = nn.Linear(width, vocabulary, bias=False, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator))
    hidden = torch.randn(count, width, generator=generator, dtype=torch.float64).requires_grad_()
    suppressed = torch.zeros(vocabulary, dtype=torch.bool)
    suppressed[3] = True
    ids = torch.randint(4, vocabulary, (count,), generator=generator)
    kept = None
    if truncated:
        kept = torch.stack([torch.cat([i[None], torch.tensor([0, 1 if i % 2 else -1])]) for i in ids])
    weights = torch.randn(2, count, generator=generator)
    results = []
    for size in (0, chunk):
        logprobs, entropies = chunked_logprobs(
            head, hidden, ids, kept, chunk=size, temperature=temperature, suppressed=suppressed
        )
        gradients = torch.autograd.grad((weights[0] * logprobs + weights[1] * entropies).sum(), [hidden, head.weight])
        results.append((logprobs, entropies, *gradients))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("learning", [True, False])
def test_never_more_logits_than_a_chunk_are_alive(learning: bool) -> None:
    vocabulary, count, chunk = 50, 30, 4
    head = nn.Linear(6, vocabulary)
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    hidden = torch.randn(count, 6, generator=torch.Generator().manual_seed(0)).requires_grad_(learning)
    calls: list[int] = []
    head.register_forward_hook(lambda _module, inputs, _output: calls.append(len(inputs[0])))
    with torch.set_grad_enabled(learning), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logprobs, entropies = chunked_logprobs(
            head, hidden, torch.zeros(count, dtype=torch.long), None, chunk=chunk, temperature=1.0, suppressed=None
        )
    assert calls == [4] * 7 + [2]
    assert max(sizes, default=0) < chunk * vocabulary  # nothing as wide as the vocabulary waits for the backward pass
    if learning:
        (logprobs.sum() + entropies.sum()).backward()
        assert sorted(calls) == sorted(2 * ([4] * 7 + [2]))  # each chunk's logits are computed once more


def test_a_run_with_chunks_updates_as_one_without(
    own_policy: Callable[..., PureGRPOPolicy], prompts: list[Prompt]
) -> None:
    results = []
    for chunk in (0, 5):
        made, recorder = trainer(small(f"training.logit_chunk={chunk}", "training.steps=2"))
        perturb(made)
        head, calls = made.policy._base.lm_head, []
        handle = head.register_forward_hook(lambda _m, inputs, _o, calls=calls: calls.append(inputs[0].shape))  # type: ignore[misc]
        groups, _ = made.collect(1)
        made.assign_advantages(groups)
        calls.clear()
        made.update(groups, 1)
        handle.remove()
        assert (max(shape[0] for shape in calls) <= 5) == (chunk == 5)
        results.append(torch.cat([value.flatten() for value in weights(made)]))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=0)
