"""Placement: named plans, overrides, several image models, and what is refused before anything loads."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo_engine.config import ConfigError, PlacementConfig, RunConfig
from grpo_engine.placement import PLANS, Placement, apply_threads, intended, resolve, resolve_cell

EIGHT = [*(f"cuda:{index}" for index in range(8)), "cpu"]


def machine(gpus: int) -> list[str]:
    return [*(f"cuda:{index}" for index in range(gpus)), "cpu"]


def placed(gpus: int, **settings: Any) -> Placement:
    return resolve(PlacementConfig(**settings), machine(gpus))


def names(placement: Placement) -> tuple[str, list[str], str]:
    return str(placement.policy), [str(device) for device in placement.images], str(placement.reward)


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        RunConfig.load("tiny", overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ("three-gpu", ("cuda:0", ["cuda:1"], "cuda:2")),
        ("balanced", ("cuda:0", ["cuda:1", "cuda:2"], "cuda:2")),
        ("two-gpu", ("cuda:0", ["cuda:1"], "cuda:1")),
        ("one-gpu", ("cuda:0", ["cuda:0"], "cuda:0")),
        ("cpu", ("cpu", ["cpu"], "cpu")),
    ],
)
def test_each_named_plan_puts_the_models_where_it_says(plan: str, expected: tuple[str, list[str], str]) -> None:
    placement = placed(8, plan=plan)
    assert names(placement) == expected
    assert placement.plan == plan


@pytest.mark.parametrize(
    ("gpus", "plan"), [(0, "cpu"), (1, "one-gpu"), (2, "two-gpu"), (3, "three-gpu"), (8, "three-gpu")]
)
def test_auto_takes_the_plan_for_the_gpus_there_are(gpus: int, plan: str) -> None:
    assert placed(gpus).plan == plan


def test_the_first_of_several_image_models_is_the_primary_one() -> None:
    placement = placed(4, image="cuda:3, cuda:1")
    assert names(placement) == ("cuda:0", ["cuda:3", "cuda:1"], "cuda:2")
    assert placement.image == torch.device("cuda:3")
    assert [str(device) for device in placement.devices] == ["cuda:0", "cuda:3", "cuda:1", "cuda:2"]
    assert placement.describe() == (
        "policy on cuda:0, image models on cuda:3 and cuda:1, reward on cuda:2 (plan explicit)"
    )


def test_a_device_named_for_a_role_overrides_the_plan_for_that_role_only() -> None:
    assert names(placed(3, plan="three-gpu", reward="cpu")) == ("cuda:0", ["cuda:1"], "cpu")
    assert names(placed(2, plan="one-gpu", image="cuda:1")) == ("cuda:0", ["cuda:1"], "cuda:0")
    assert names(placed(1, policy="cuda")) == ("cuda:0", ["cuda:0"], "cuda:0")


def test_a_plan_whose_missing_devices_are_all_overridden_can_be_used() -> None:
    assert placed(0, plan="three-gpu", policy="cpu", image="cpu", reward="cpu").plan == "cpu"


def test_explicit_devices_are_called_by_the_plan_they_amount_to() -> None:
    by_hand = placed(3, plan="explicit", policy="cuda:0", image="cuda:1,cuda:2", reward="cuda:2")
    assert by_hand == placed(3, plan="balanced")
    assert placed(3, plan="explicit", policy="cuda:2", image="cuda:1", reward="cuda:0").plan == "explicit"


@pytest.mark.parametrize(
    ("plan", "gpus", "needs", "way_out"),
    [
        ("three-gpu", 1, "cuda:0, cuda:1 and cuda:2", "one-gpu"),
        ("balanced", 2, "cuda:0, cuda:1 and cuda:2", "two-gpu"),
        ("two-gpu", 0, "cuda:0 and cuda:1", "cpu"),
        ("one-gpu", 0, "cuda:0", "cpu"),
    ],
)
def test_a_plan_for_more_gpus_than_there_are_is_refused(plan: str, gpus: int, needs: str, way_out: str) -> None:
    with pytest.raises(ConfigError) as caught:
        placed(gpus, plan=plan)
    there = " and ".join(machine(gpus)) if gpus < 2 else "cuda:0, cuda:1 and cpu"
    assert str(caught.value) == (
        f"placement.plan is {plan!r}, which needs {needs}, but this machine has {there}; use {way_out!r} or 'auto'."
    )


@pytest.mark.parametrize("role", ["policy", "image", "reward"])
def test_a_named_device_that_is_not_there_is_refused_by_its_setting(role: str) -> None:
    with pytest.raises(ConfigError) as caught:
        placed(1, **{role: "cuda:5"})
    assert str(caught.value) == (
        f"placement.{role} is 'cuda:5', but this machine has only cuda:0 and cpu; name one of what it has, or 'auto'."
    )


def test_one_missing_image_device_among_several_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"placement.image is 'cuda:1,cuda:5'"):
        placed(3, image="cuda:1,cuda:5")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("placement.plan=explicit", ["explicit", "policy and image and reward", "auto"]),
        ("placement.plan=four-gpu", ["placement.plan is 'four-gpu'", "three-gpu"]),
        ("placement.image=cuda:1,cuda:1", ["'cuda:1,cuda:1'", "twice"]),
        ("placement.image=cuda,cuda:0", ["'cuda,cuda:0'", "twice"]),
        ("placement.image=cpu,cuda:0", ["placement.image is 'cpu,cuda:0'"]),  # they would not draw the same pictures
        ("placement.image=auto,cuda:0", ["placement.image is 'auto,cuda:0'"]),
        ("placement.policy=cuda:0,cuda:1", ["placement.policy is 'cuda:0,cuda:1'"]),
    ],
)
def test_settings_that_name_no_devices_are_refused(override: str, words: list[str]) -> None:
    message = refusal(override)
    assert all(word in message for word in words), message


def test_what_is_intended_can_be_said_where_it_is_not_possible() -> None:
    config = RunConfig.load("three-gpu").placement
    with pytest.raises(ConfigError):
        resolve(config, ["cpu"])
    assert intended(config, ["cpu"]) == resolve(config, EIGHT)
    alone = PlacementConfig(policy="cuda:7")
    assert names(intended(alone, ["cpu"])) == ("cuda:7", ["cpu"], "cpu")


@given(
    gpus=st.integers(0, 8),
    plan=st.sampled_from(["auto", *PLANS]),
    overrides=st.dictionaries(st.sampled_from(["policy", "image", "reward"]), st.sampled_from(EIGHT)),
)
def test_a_placement_uses_only_devices_that_are_there_or_is_refused(
    gpus: int, plan: str, overrides: dict[str, str]
) -> None:
    there = machine(gpus)
    settings = PlacementConfig.model_validate({"plan": plan, **overrides})
    try:
        placement = resolve(settings, there)
    except ConfigError:
        named = {name for parts in PLANS.get(plan, {}).values() for name in parts} | set(overrides.values())
        assert named - set(there), "nothing was missing"
        return
    assert {str(device) for device in placement.devices} <= set(there)
    assert all(str(asdict(placement)[role]) == name for role, name in overrides.items() if role != "image")
    assert intended(settings, there) == placement


# -- cells: several ranks on one machine ---------------------------------------------------------------------


def cells(gpus: int, ranks: int, **settings: Any) -> list[tuple[str, list[str], str]]:
    return [names(resolve_cell(PlacementConfig(**settings), rank, ranks, machine(gpus))) for rank in range(ranks)]


def test_each_rank_has_a_cell_of_neighbouring_gpus() -> None:
    assert cells(6, 2) == [("cuda:0", ["cuda:1"], "cuda:2"), ("cuda:3", ["cuda:4"], "cuda:5")]
    assert cells(8, 4) == [(f"cuda:{2 * rank}", [f"cuda:{2 * rank + 1}"], f"cuda:{2 * rank + 1}") for rank in range(4)]
    assert cells(2, 2) == [("cuda:0", ["cuda:0"], "cuda:0"), ("cuda:1", ["cuda:1"], "cuda:1")]


def test_a_cell_has_as_many_gpus_as_the_plan_needs_or_as_the_setting_says() -> None:
    assert cells(8, 2, plan="balanced")[1] == ("cuda:3", ["cuda:4", "cuda:5"], "cuda:5")
    assert cells(8, 2, plan="one-gpu", gpus_per_cell=4)[1] == ("cuda:4", ["cuda:4"], "cuda:4")
    assert cells(4, 2, plan="explicit", policy="cuda:1", image="cuda:0", reward="cpu")[1] == (
        "cuda:3",
        ["cuda:2"],
        "cpu",
    )


def test_without_gpus_every_rank_is_on_the_cpu() -> None:
    assert cells(0, 3) == [("cpu", ["cpu"], "cpu")] * 3
    assert cells(0, 2, gpus_per_cell=3) == [("cpu", ["cpu"], "cpu")] * 2
    assert cells(1, 2, policy="cpu", image="cpu", reward="cpu") == [("cpu", ["cpu"], "cpu")] * 2
    assert cells(4, 2, plan="cpu") == [("cpu", ["cpu"], "cpu")] * 2


def test_more_cells_than_the_machine_has_gpus_for_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        cells(5, 2, plan="three-gpu")
    assert str(caught.value) == (
        "2 ranks on this machine with 3 GPUs each need 6, but it has 5; start fewer ranks, lower "
        "placement.gpus_per_cell, or choose another placement.plan."
    )
    with pytest.raises(ConfigError, match="2 ranks on this machine with 1 GPUs each need 2, but it has 1; start fewer"):
        cells(1, 2)
    with pytest.raises(ConfigError, match="which needs cuda:0 and cuda:1, but"):
        cells(4, 2, plan="two-gpu", gpus_per_cell=1)


@given(ranks=st.integers(1, 8), each=st.integers(1, 5), spare=st.integers(0, 7))
def test_no_two_cells_share_a_gpu(ranks: int, each: int, spare: int) -> None:
    found = cells(ranks * each + spare, ranks)
    used = [device for policy, images, reward in found for device in {policy, *images, reward} if device != "cpu"]
    assert len(used) == len(set(used))


def test_the_limit_of_an_earlier_runs_threads_does_not_outlast_it() -> None:
    apply_threads(RunConfig.load("tiny"))
    before = torch.get_num_threads()
    apply_threads(RunConfig.load("tiny", [f"placement.threads={before + 1}"]))
    assert torch.get_num_threads() == before + 1
    apply_threads(RunConfig.load("tiny"))
    assert torch.get_num_threads() == before
