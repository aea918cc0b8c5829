"""Fixtures shared by the engine's tests: the embedded models, loaded once the way a run loads them.

Nothing here or in the tests that use it depends on how well those models are trained.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_engine.config import RunConfig
from grpo_engine.environment import PureGRPOPromptEnvironment
from grpo_engine.image_model import StableDiffusion3
from grpo_engine.loading import load_environment, load_policy, read_prompts
from grpo_engine.policy import PureGRPOPolicy
from grpo_engine.prompts import Prompt
from grpo_engine.reward import RewardModel

torch.set_num_threads(1)  # before anything asks how many there are: small models gain nothing from more

CHEAP = (
    "models.image.steps=2",
    "sampling.max_new_tokens=10",
    "placement.policy=cpu",
    "placement.image=cpu",
    "placement.reward=cpu",
)


def run_config(*overrides: str) -> RunConfig:
    """The default preset, made cheap enough for tests."""
    return RunConfig.load("tiny", [*CHEAP, *overrides])


@pytest.fixture(scope="session")
def environment() -> PureGRPOPromptEnvironment:
    """The embedded policy, image model and reward. Shared: no test may change its weights."""
    return load_environment(run_config())


@pytest.fixture(scope="session")
def rebuilt(environment: PureGRPOPromptEnvironment) -> Callable[..., PureGRPOPromptEnvironment]:
    """``rebuilt("sampling.top_k=5", ...)``: the same three models in an environment with other settings."""

    def build(*overrides: str) -> PureGRPOPromptEnvironment:
        config = run_config(*overrides)
        policy = copy.copy(environment.policy)
        policy.sampling, policy.config = config.sampling, config.models.policy
        loaded = environment.images
        assert isinstance(loaded, StableDiffusion3)
        images = StableDiffusion3(loaded.pipeline, config.models.image)
        reward = RewardModel(environment.reward.scorer, config.models.reward)
        return PureGRPOPromptEnvironment(policy, images, reward, config)

    return build


@pytest.fixture
def own_policy() -> Callable[..., PureGRPOPolicy]:
    """``own_policy("models.policy.adapter=full", ...)``: a policy whose weights a test may change."""
    return lambda *overrides: load_policy(run_config(*overrides), torch.device("cpu"))


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    """Four training prompts of different lengths, the shortest and the longest of the set among them."""
    by_length = sorted(read_prompts(run_config()).split("train"), key=lambda prompt: len(prompt.text))
    count = len(by_length)
    return [by_length[index] for index in (count - 1, 0, count // 2, count // 4)]


Biased = Callable[[PureGRPOPolicy, Callable[[Tensor], Tensor]], AbstractContextManager[None]]


@pytest.fixture(scope="session")
def biased() -> Biased:
    """``with biased(policy, change):`` the policy's logits (N, V) go through ``change``."""

    @contextmanager
    def context(policy: PureGRPOPolicy, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        def hook(_module: Any, _inputs: Any, logits: Tensor) -> Tensor:
            return change(logits)

        handle = base_model(policy).lm_head.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    return context


Ending = Callable[[PureGRPOPolicy], AbstractContextManager[None]]


@pytest.fixture(scope="session")
def ending(biased: Biased) -> Ending:
    """``with ending(policy):`` a chance of about 1 in 4 to end at each token, whatever the policy has learned.

    So completions differ in length. The chance holds after the policy's temperature and top-k.
    """

    def context(policy: PureGRPOPolicy) -> AbstractContextManager[None]:
        end, sampling = policy.end_tokens[0], policy.sampling

        def change(logits: Tensor) -> Tensor:
            is_end = torch.zeros(logits.shape[-1], dtype=torch.bool)
            is_end[end] = True
            others = (logits / sampling.temperature).masked_fill(policy.suppressed | is_end, -torch.inf)
            if sampling.top_k:
                others = others.topk(sampling.top_k - 1, dim=-1).values
            share = others.logsumexp(dim=-1, keepdim=True) + math.log(1 / 3)
            return torch.where(is_end, share * sampling.temperature, logits)

        return biased(policy, change)

    return context


def base_model(policy: PureGRPOPolicy) -> Any:
    """The transformers model under the adapter."""
    model = policy.model
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@pytest.fixture(scope="session")
def base_of() -> Callable[[PureGRPOPolicy], Any]:
    """``base_of(policy)``: the transformers model under its adapter."""
    return base_model


@pytest.fixture
def counted() -> Iterator[Callable[[Any], list[int]]]:
    """``calls = counted(module)``: grows by the batch size of each forward call of ``module``."""
    handles = []

    def count(module: Any) -> list[int]:
        sizes: list[int] = []

        def hook(_module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            tensors = [value for value in (*inputs, *named.values()) if isinstance(value, Tensor)]
            sizes.append(tensors[0].shape[0])

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return sizes

    yield count
    for handle in handles:
        handle.remove()
