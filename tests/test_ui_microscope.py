"""The group microscope's one question: what it tells of a recorded step, and what it refuses."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from store_samples import config, group, training_run

from grpo_engine.rollout import Completions, Group
from grpo_engine.store import Store
from grpo_engine.store.recorder import StoreRecorder
from grpo_engine.store.rollouts import rollout_rows
from ui.context import Context
from ui.microscope import routes
from ui.worker import Worker


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "runs.db") as opened:
        yield opened


@pytest.fixture
def client(store: Store) -> TestClient:
    app = FastAPI()
    app.include_router(routes(Context(store, Worker(store))), prefix="/grpo")
    return TestClient(app)


def record(store: Store, *steps: list[Group], **changes: Any) -> str:
    """A run with these groups as its steps, recorded the way a run is."""
    run_id = training_run(store, **changes)
    with StoreRecorder(store, run_id, config(**changes).recording) as recorder:
        recorder.token_text = lambda ids: [f" {token}" for token in ids]
        for number, groups in enumerate(steps, start=1):
            recorder.step(number, {}, groups)
    return run_id


def ask(client: TestClient, run: str, step: int) -> dict[str, Any]:
    response = client.get("/grpo/microscope/step", params={"run": run, "step": step})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def rewarded(*rewards: float, rewrites: tuple[str | None, ...] | None = None) -> Group:
    made = group(size=len(rewards))
    made.rewards = torch.tensor(rewards)
    made.advantages = made.rewards - made.rewards.mean()
    made.rewrites = made.rewrites if rewrites is None else rewrites
    made.pictures = [None if text is None else shown for text, shown in zip(made.rewrites, made.pictures, strict=True)]
    return made


def wide(g: int, rollouts: int, tokens: int) -> Group:
    """A group of the given size whose completions all have ``tokens`` tokens."""
    generator = torch.Generator().manual_seed(g)
    shape = (rollouts, tokens)
    mask = torch.ones(shape, dtype=torch.bool)
    numbers = [torch.rand(shape, generator=generator) for _ in range(4)]
    texts = tuple(f"rewrite {k}" for k in range(rollouts))
    done = Completions(torch.arange(3), torch.ones(shape), mask, -numbers[0], numbers[1], None, texts, mask[:, 0])
    made = group(g=g, size=rollouts)
    return Group(
        made.prompt, done, texts, 7, made.pictures, made.scores, made.rewards, made.advantages, numbers[2], numbers[3]
    )


def test_a_step_is_told_whole(store: Store, client: TestClient) -> None:
    groups = [group(1, 0), group(1, 1)]
    run_id = record(store, groups)
    told = ask(client, run_id, 1)
    assert (told["run"], told["step"], told["last"]) == (run_id, 1, 1)
    assert [(one["g"], len(one["rollouts"])) for one in told["groups"]] == [(0, 4), (1, 4)]
    for one, kept in zip(told["groups"], groups, strict=True):
        assert (one["prompt"], one["tier"], one["seed"]) == (kept.prompt.text, "basic", str(kept.latent_seed))
        for rollout in one["rollouts"]:
            k, real = rollout["k"], kept.completions.mask[rollout["k"]]
            assert rollout["text"] == kept.rewrites[k] and rollout["parsed"] and rollout["count"] == k + 1
            assert rollout["finished"] == bool(kept.completions.finished[k])
            assert rollout["reward"] == pytest.approx(float(kept.rewards[k]), abs=1e-4)
            assert rollout["advantage"] == pytest.approx(float(kept.advantages[k]), abs=1e-4)
            assert rollout["parts"]["clip"] == pytest.approx(float(kept.rewards[k]), abs=1e-4)
            tokens = rollout["tokens"]
            assert tokens["text"] == [f" {token}" for token in kept.completions.token_ids[k][real].tolist()]
            assert kept.kl is not None and kept.shift is not None
            assert tokens["logprob"] == pytest.approx(kept.completions.logprobs[k][real].tolist(), abs=1e-4)
            assert tokens["entropy"] == pytest.approx(kept.completions.entropies[k][real].tolist(), abs=1e-4)
            assert tokens["kl"] == pytest.approx(kept.kl[k][real].tolist(), abs=1e-4)
            assert tokens["shift"] == pytest.approx(kept.shift[k][real].tolist(), abs=1e-4)
            assert rollout["kl"] == pytest.approx(float(kept.kl[k][real].mean()), abs=1e-4)
            assert store.file(rollout["image"]).is_file() and rollout["thumbnail"] == rollout["image"]


@pytest.mark.parametrize(("unbiased", "spread"), [(False, math.sqrt(5.0)), (True, math.sqrt(20 / 3))])
def test_a_groups_mean_and_spread_are_those_its_advantages_were_made_with(
    store: Store, client: TestClient, unbiased: bool, spread: float
) -> None:
    run_id = record(store, [rewarded(1.0, 3.0, 5.0, 7.0)], objective={"unbiased": unbiased})
    (one,) = ask(client, run_id, 1)["groups"]
    assert (one["mean"], one["spread"]) == (4.0, pytest.approx(spread, abs=1e-4))


def test_rewards_that_differ_little_are_shown_with_the_places_that_tell_them_apart(
    store: Store, client: TestClient
) -> None:
    run_id = record(store, [rewarded(28.31, 28.32, 28.33), rewarded(10.0, 60.0, 90.0)])
    assert [one["places"] for one in ask(client, run_id, 1)["groups"]] == [4, 1]


def test_a_group_without_spread_says_that_it_taught_nothing(store: Store, client: TestClient) -> None:
    run_id = record(store, [rewarded(2.0, 2.0, 2.0), rewarded(1.0, 2.0, 3.0)])
    flat, lively = ask(client, run_id, 1)["groups"]
    assert "taught nothing" in flat["lesson"] and lively["lesson"] == ""


def test_equal_rewrites_point_at_the_first_of_them_and_unreadable_ones_at_none(
    store: Store, client: TestClient
) -> None:
    run_id = record(store, [rewarded(1.0, 2.0, 3.0, 4.0, 5.0, rewrites=("a", None, "a", None, "b"))])
    (one,) = ask(client, run_id, 1)["groups"]
    assert [rollout["same_as"] for rollout in one["rollouts"]] == [None, None, 0, None, None]
    assert (one["distinct"], one["failures"]) == (2, 2)
    unreadable = one["rollouts"][1]
    assert not unreadable["parsed"] and unreadable["text"] == "rewrite 1 0 1", "the raw completion"
    assert unreadable["image"] is None


def test_where_pictures_were_not_kept_the_nearest_steps_that_have_some_are_named(
    store: Store, client: TestClient
) -> None:
    every = {"recording": {"images_every": 3}}
    run_id = record(store, *([rewarded(1.0, 2.0)] for _ in range(7)), **every)
    found = {step: ask(client, run_id, step)["pictures"] for step in range(1, 8)}
    assert [step for step, pictures in found.items() if pictures["kept"]] == [1, 3, 6]
    assert [(found[step]["before"], found[step]["after"]) for step in (2, 4, 5, 7)] == [
        (1, 3),
        (3, 6),
        (3, 6),
        (6, None),
    ]
    assert "images_every = 3" in found[2]["note"] and found[3]["note"] == ""
    never = record(store, [rewarded(1.0, 2.0)], recording={"images_every": 0})
    pictures = ask(client, never, 1)["pictures"]
    assert (pictures["any"], pictures["before"], pictures["after"]) == (False, None, None) and pictures["note"]


def test_rollouts_of_before_changes_were_recorded_say_so(store: Store, client: TestClient) -> None:
    run_id = training_run(store)
    older = group()
    older.shift = None
    store.add_step(run_id, 1, {}, rollout_rows(0, older))
    told = ask(client, run_id, 1)
    assert any("change of each token" in note and "not recorded" in note for note in told["notes"])
    tokens = told["groups"][0]["rollouts"][3]["tokens"]
    assert tokens["shift"] is None and len(tokens["kl"]) == 4
    assert tokens["text"] == [f"[{token}]" for token in older.completions.token_ids[3].tolist()], "ids without texts"


def test_a_run_that_keeps_no_tokens_and_a_step_without_rollouts_say_so(store: Store, client: TestClient) -> None:
    run_id = record(store, [group()], recording={"tokens": False})
    told = ask(client, run_id, 1)
    assert told["groups"][0]["rollouts"][0]["tokens"] is None and "recording.tokens" in told["notes"][0]
    bare = training_run(store)
    store.add_step(bare, 1, {}, [])
    told = ask(client, bare, 1)
    assert told["groups"] == [] and told["notes"] == ["The rewrites of this step were not recorded."]


def test_a_negative_control_is_told_apart(store: Store, client: TestClient) -> None:
    run_id = record(store, [group()], models={"reward": {"debug": "shuffle"}})
    assert any("negative control" in note for note in ask(client, run_id, 1)["notes"])


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ({}, "Advantage: reward minus its group's mean, divided by the group's spread."),
        (
            {"baseline": "leave_one_out", "scale": "none"},
            "Advantage: reward minus the mean of the others in its group.",
        ),
        (
            {"scale": "batch"},
            "Advantage: reward minus its group's mean, divided by the spread of the whole step's rewards.",
        ),
    ],
)
def test_what_an_advantage_is_follows_the_runs_settings(
    store: Store, client: TestClient, objective: dict[str, Any], said: str
) -> None:
    assert ask(client, record(store, [group()], objective=objective), 1)["advantage"] == said


def test_colors_are_strongest_where_nearly_all_tokens_stay_below_and_never_paint_rounding_noise(
    store: Store, client: TestClient
) -> None:
    loud, quiet = wide(0, 2, 100), wide(0, 2, 100)
    assert loud.shift is not None and quiet.shift is not None
    loud.shift[:] = torch.arange(100) / 100
    loud.advantages = quiet.advantages = torch.tensor([2.0, -2.0])
    quiet.shift[:] = 1e-6
    run_id = record(store, [loud], [quiet])
    scales = ask(client, run_id, 1)["scales"]
    assert scales["shift"] == pytest.approx(0.94, abs=0.011) and scales["product"] == pytest.approx(1.9, abs=0.11)
    assert scales["advantage"] == 2.0
    assert ask(client, run_id, 2)["scales"]["shift"] == 0.05


def test_an_unknown_run_or_step_is_refused_in_a_sentence(store: Store, client: TestClient) -> None:
    run_id = record(store, [group()])
    asked: tuple[tuple[dict[str, str | int], int, str], ...] = (
        ({"run": "0009-none-aaaa", "step": 1}, 404, "There is no run"),
        ({"run": "../../etc/passwd", "step": 1}, 404, "There is no run"),
        ({"run": run_id, "step": 2}, 404, "has no step 2; it has steps 1 to 1"),
        ({"run": run_id, "step": 0}, 404, "has no step 0"),
        ({"run": run_id, "step": 2**62}, 404, "has no step"),
        ({"run": training_run(store), "step": 1}, 404, "has no step yet"),
        ({"run": run_id, "step": -1}, 422, "step"),
        ({"run": run_id, "step": 2**70}, 422, "step"),
        ({"run": run_id, "step": "x"}, 422, "step"),
        ({"run": run_id}, 422, "step"),
        ({"step": 1}, 422, "run"),
        ({"run": "r" * 1000, "step": 1}, 422, "run"),
    )
    for params, status, words in asked:
        response = client.get("/grpo/microscope/step", params=params)
        assert response.status_code == status, params
        assert words in response.json()["error"] and "Traceback" not in response.text


def test_asking_changes_nothing(store: Store, client: TestClient) -> None:
    run_id = record(store, [group()])
    before = store.revision()
    ask(client, run_id, 1)
    assert store.revision() == before


def test_a_step_of_eight_groups_of_eight_is_told_in_a_blink(store: Store, client: TestClient) -> None:
    run_id = record(store, [wide(g, 8, 32) for g in range(8)], recording={"images_every": 0})
    best = math.inf
    for _ in range(7):
        begun = time.perf_counter()
        ask(client, run_id, 1)
        best = min(best, time.perf_counter() - begun)
    assert best < 0.1, f"{best * 1000:.0f} ms"
