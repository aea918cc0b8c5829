"""The Before / after screen's answers, from measurements recorded the way a run records them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from store_samples import config, group, metrics, picture, training_run

from grpo_engine.evaluation import summarise
from grpo_engine.recorder import Evaluation, EvaluationItem
from grpo_engine.rollout import Score
from grpo_engine.store import Store, StoreError
from grpo_engine.store.choices import Choice, Side, add_choice, choices, wilson_interval
from grpo_engine.store.measured import Pair, different_pairs, prompt_means
from grpo_engine.store.recorder import StoreRecorder
from ui import gallery
from ui.context import Context
from ui.gallery_blind import arrange, clip_side, tally
from ui.gallery_film import thinned
from ui.gallery_table import (
    Kept,
    PromptTable,
    Query,
    agreement,
    agreement_figure,
    clean_gain,
    gain_sentence,
    rank_correlation,
)
from ui.worker import Worker

# prompt -> (tier, untrained CLIP, trained CLIP, untrained judge, trained judge), the same on both latents
SCORES = {
    "p-apple": ("basic", 10.0, 40.0, 0.2, 0.9),
    "p-bear": ("complex", 30.0, 20.0, 0.5, 0.25),
    "p-cat": ("challenging", 5.0, 10.0, 0.75, 0.5),
    "p-dog": ("basic", 12.0, 12.0, 0.5, 0.5),
    "p-elk": ("complex", 20.0, 22.0, 0.25, 0.5),
}
TEXTS = {name: f"a {name[2:]} <b>& more</b>" for name in SCORES}


def shown(prompt: str, arm: str, index: int, *, clip: float, judge: float, rewrite: str | None = "") -> EvaluationItem:
    text = f"{arm.split('_')[0]} {prompt}" if rewrite == "" else rewrite
    seed = sum(map(ord, f"{prompt}{arm}{index}"))
    return EvaluationItem(
        arm=arm, prompt_id=prompt, prompt=TEXTS[prompt], tier=SCORES[prompt][0], index=index, latent_seed=index,
        rewrite=text, score=Score({"clip": clip, "length": 0.0}, clip), judge=judge, judge_parts={"shape": (1, 2)},
        picture=None if text is None else picture(seed),
    )  # fmt: skip


def arm_items(arm: str, step: int = 0) -> list[EvaluationItem]:
    """Both latents of every prompt; the later arm of "p-dog" writes what the earlier wrote."""
    found = []
    for name, (_, before, after, judged, rejudged) in SCORES.items():
        clip, judge = {"original": (1.0, 0.0), "untrained": (before, judged)}.get(arm, (after - step, rejudged))
        rewrite = TEXTS[name] if arm == "original" else "same words" if name == "p-dog" else ""
        found += [shown(name, arm, index, clip=clip, judge=judge, rewrite=rewrite) for index in range(2)]
    return found


def record(store: Store, run_id: str, kind: str, step: int, *arms: str, beside: tuple[str, ...] = ()) -> None:
    items = [item for arm in arms for item in arm_items(arm, step % 10)]
    everything = [item for arm in beside for item in arm_items(arm)] + items
    with StoreRecorder(store, run_id, config().recording) as recorder:
        recorder.evaluation(Evaluation(kind, step, "test", items, summarise(everything, config())))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "runs.db") as opened:
        yield opened


@pytest.fixture
def finished(store: Store) -> str:
    """A finished run, measured before and after."""
    run_id = training_run(store)
    record(store, run_id, "baseline", 0, "original", "untrained")
    store.add_step(run_id, 1, metrics(1), [])
    store.set_state(run_id, "evaluating")
    record(store, run_id, "final", 1, "trained", beside=("original", "untrained"))
    store.set_state(run_id, "finished")
    return run_id


def client_of(store: Store) -> TestClient:
    app = FastAPI()
    app.include_router(gallery.routes(Context(store, Worker(store))), prefix="/grpo")
    return TestClient(app)


@pytest.fixture
def client(store: Store) -> TestClient:
    return client_of(store)


@pytest.fixture
def ask(client: TestClient) -> Callable[..., Any]:
    """``ask("prompts", run=...)``: the answer to a question that is answered."""

    def question(path: str, **params: Any) -> Any:
        response = client.get(f"/grpo/gallery/{path}", params=params)
        assert response.status_code == 200, response.text
        return response.json()

    return question


PAIR = "trained_vs_untrained"


def test_the_end_of_a_rewrite_that_the_image_model_did_not_read_is_told_with_its_share(
    store: Store, ask: Callable[..., Any]
) -> None:
    run_id = training_run(store)
    items = [replace(item, cut_tokens=0, read_chars=len(item.rewrite or "")) for item in arm_items("untrained")]
    long = "a red apple \N{GRINNING FACE} and more"
    items[1] = replace(items[1], rewrite=long, cut_tokens=2, read_chars=len(long) - len("d more"))
    everything = [*items, *arm_items("original")]
    with StoreRecorder(store, run_id, config().recording) as recorder:
        recorder.evaluation(Evaluation("baseline", 0, "test", everything, summarise(everything, config())))
    rows = ask("prompts", run=run_id, compare="untrained_vs_original", sort="prompt")["rows"]
    whole, cut = rows[0]["arms"]["untrained"]
    assert (whole["cut"], whole["unread"]) == (0, "")
    assert (cut["cut"], cut["unread"]) == (2, "d more"), "the text itself, as browsers count characters otherwise"
    assert rows[0]["arms"]["original"][0]["cut"] is None, "recorded by an older version"
    arms = ask("overview", run=run_id)["arms"]
    assert arms["untrained"]["cut_share"] == pytest.approx(1 / len(items))
    assert arms["original"]["cut_share"] is None


# -- the headline --------------------------------------------------------------------------------------


def test_the_newest_run_with_a_final_measurement_is_offered_first(
    store: Store, ask: Callable[..., Any], finished: str
) -> None:
    newer = training_run(store)
    record(store, newer, "baseline", 0, "original", "untrained")
    found = ask("runs")
    assert found["newest"] == finished
    assert [run["id"] for run in found["runs"]] == [newer, finished]
    assert [row["kind"] for row in found["runs"][1]["measured"]] == ["baseline", "final"]


def test_the_headline_gives_the_gain_of_the_reward_and_of_the_judge(ask: Callable[..., Any], finished: str) -> None:
    found = ask("overview", run=finished)
    by_name = {item["name"]: item for item in found["comparisons"]}
    assert list(by_name) == [PAIR, "trained_vs_original", "untrained_vs_original"]
    told = by_name[PAIR]
    # Trained minus untrained, the final measurement being recorded one lower: 29, -11, 4, -1, 1.
    assert told["reward"]["mean"] == pytest.approx(4.4)
    assert told["judge"]["mean"] == pytest.approx((0.7 - 0.25 - 0.25 + 0.0 + 0.25) / 5)
    assert told["counts"] == {"all": 5, "gained": 3, "lost": 2, "same": 0}
    assert not told["reward"]["distinguishable"] and "not distinguishable from zero" in told["sentence"]
    assert (found["prompts"], found["latents"], found["note"]) == (5, 2, "")
    assert found["arms"]["trained"]["tiers"]["basic"] == pytest.approx((39 + 11) / 2)
    assert found["arms"]["trained"]["kinds"] == {"shape": 0.5}


def test_a_clear_gain_is_told_with_its_interval_its_n_and_its_win_rate() -> None:
    gain = clean_gain({"mean": 30.0, "low": 25.5, "high": 37.0, "n": 100, "win_rate": 0.9, "before": 50, "after": 80})
    assert gain is not None and gain["percent"] == pytest.approx(60.0)
    assert gain_sentence(gain, "trained", "untrained", 0.95) == (
        "Trained rewrites scored 80.00 against 50.00 for untrained rewrites, +30.00 (+60 %), "
        "95 % interval +25.50 to +37.00 over 100 prompts; win rate 90 % (a tie counts half)."
    )


def test_a_share_of_nothing_or_less_is_not_told() -> None:
    gain = clean_gain({"mean": 3.0, "low": 1, "high": 5, "n": 10, "win_rate": 0.9, "before": -2.0, "after": 1.0})
    assert gain is not None and gain["percent"] is None
    assert "%)" not in gain_sentence(gain, "trained", "original", 0.9)


@pytest.mark.parametrize("bad", ["1", None, True, float("nan"), float("inf"), [1]])
def test_a_recorded_gain_that_is_no_number_is_left_out(bad: Any) -> None:
    good = {"mean": 3.0, "low": 1, "high": 5, "n": 10, "win_rate": 0.9, "before": 2.0, "after": 5.0}
    assert clean_gain(good) is not None
    assert clean_gain(good | {"low": bad}) is None
    assert clean_gain(bad) is None


def test_before_the_end_the_untrained_arms_are_shown_and_what_is_missing_is_said(
    store: Store, ask: Callable[..., Any]
) -> None:
    run_id = training_run(store)
    record(store, run_id, "baseline", 0, "original", "untrained")
    found = ask("overview", run=run_id)
    assert [item["name"] for item in found["comparisons"]] == ["untrained_vs_original"]
    assert "measured at the end" in found["note"]
    row = ask("prompts", run=run_id, compare="untrained_vs_original")["rows"][0]
    assert set(row["arms"]) == {"original", "untrained"}
    store.set_state(run_id, "stopped")
    assert "resume it" in ask("overview", run=run_id)["note"]


def test_a_run_that_measured_nothing_says_so(store: Store, client: TestClient, ask: Callable[..., Any]) -> None:
    run_id = training_run(store)
    found = ask("overview", run=run_id)
    assert found["at"] is None and "measured nothing yet" in found["note"]
    assert client.get("/grpo/gallery/prompts", params={"run": run_id, "compare": PAIR}).status_code == 404


def test_a_validation_measurement_can_be_looked_at_by_itself(
    store: Store, ask: Callable[..., Any], finished: str
) -> None:
    running = training_run(store)
    record(store, running, "baseline", 0, "original", "untrained")
    store.add_step(running, 1, metrics(1), [])
    record(store, running, "validation", 1, "original", "untrained", "trained")
    found = ask("overview", run=running)
    assert found["measured"]["kind"] == "validation" and "after step 1" in found["note"]
    baseline = ask("overview", run=running, at=store.evaluations(running)[0].id)
    assert list(baseline["arms"]) == ["original", "untrained"]


# -- the gallery ---------------------------------------------------------------------------------------


def ids(answer: Any) -> list[str]:
    return [row["id"] for row in answer["rows"]]


@pytest.mark.parametrize(
    ("sort", "expected"),
    [
        ("gain", ["p-apple", "p-cat", "p-elk", "p-dog", "p-bear"]),
        ("loss", ["p-bear", "p-dog", "p-elk", "p-cat", "p-apple"]),
        ("judge", ["p-bear", "p-cat", "p-dog", "p-elk", "p-apple"]),
        ("tier", ["p-apple", "p-dog", "p-cat", "p-elk", "p-bear"]),
        ("prompt", ["p-apple", "p-bear", "p-cat", "p-dog", "p-elk"]),
    ],
)
def test_prompts_come_in_the_order_asked_for(
    ask: Callable[..., Any], finished: str, sort: str, expected: list[str]
) -> None:
    assert ids(ask("prompts", run=finished, compare=PAIR, sort=sort)) == expected


def test_filters_and_counts_go_together(ask: Callable[..., Any], finished: str) -> None:
    lost = ask("prompts", run=finished, compare=PAIR, change="lost", tier="complex")
    assert ids(lost) == ["p-bear"]
    assert lost["counts"] == {"all": 2, "gained": 1, "lost": 1, "same": 0} and lost["total"] == 1
    assert ids(ask("prompts", run=finished, compare=PAIR, search="MORE trained p-cat")) == ["p-cat"]  # its rewrite
    assert ask("prompts", run=finished, compare=PAIR, search="zebra")["rows"] == []


def test_equal_rewards_count_as_the_same(ask: Callable[..., Any], store: Store) -> None:
    run_id = training_run(store)
    record(store, run_id, "validation", 0, "untrained", "trained")
    found = ask("prompts", run=run_id, compare=PAIR)
    assert found["counts"] == {"all": 5, "gained": 3, "lost": 1, "same": 1}
    assert found["scale"] == pytest.approx(30.0)
    assert ids(ask("prompts", run=run_id, compare=PAIR, change="same")) == ["p-dog"]


def test_pages_together_are_all_prompts_once(ask: Callable[..., Any], finished: str) -> None:
    pages = [ask("prompts", run=finished, compare=PAIR, start=start, count=2) for start in (0, 2, 4, 6)]
    assert [len(page["rows"]) for page in pages] == [2, 2, 1, 0]
    assert sum((ids(page) for page in pages), []) == ids(ask("prompts", run=finished, compare=PAIR))


def test_a_prompt_is_found_in_the_present_order_or_said_to_be_hidden(ask: Callable[..., Any], finished: str) -> None:
    found = ask("prompts", run=finished, compare=PAIR, prompt="p-elk", count=1)
    assert (found["start"], ids(found)) == (2, ["p-elk"])
    assert ask("prompts", run=finished, compare=PAIR, prompt="p-elk", change="lost")["start"] is None
    assert ask("prompts", run=finished, compare=PAIR, prompt="p-nobody")["start"] is None


def test_a_prompt_carries_all_its_pictures_on_the_same_latents(ask: Callable[..., Any], finished: str) -> None:
    row = ask("prompts", run=finished, compare=PAIR, count=1)["rows"][0]
    assert (row["text"], row["tier"]) == (TEXTS["p-apple"], "basic")
    assert row["gain"] == pytest.approx(29.0) and row["judge_gain"] == pytest.approx(0.7)
    assert {arm: [item["index"] for item in items] for arm, items in row["arms"].items()} == {
        arm: [0, 1] for arm in ("original", "untrained", "trained")
    }
    trained = row["arms"]["trained"][0]
    assert (trained["rewrite"], trained["clip"], trained["judge"]) == ("trained p-apple", 39.0, 0.9)
    assert trained["right"] == [1, 2] and trained["image"].startswith(f"runs/{finished}/images/")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(-50, 50), st.floats(-50, 50)), min_size=1, max_size=30))
def test_every_order_holds_each_prompt_once_and_gains_fall(values: list[tuple[float, float]]) -> None:
    from grpo_engine.store.measured import PromptMeans

    rows = [
        PromptMeans(f"p{place:03d}", arm, "text", "basic", "", value, value, None, 1)
        for place, pair in enumerate(values)
        for arm, value in zip(("untrained", "trained"), pair, strict=True)
    ]
    table = PromptTable(rows)
    for sort in ("gain", "loss", "judge", "tier", "prompt"):
        order, counts = table.select(Query("trained", "untrained", sort))
        assert sorted(order.tolist()) == list(range(len(values)))
        assert counts["gained"] + counts["lost"] + counts["same"] == counts["all"] == len(values)
    gains = table.gain(Query("trained", "untrained"))[table.select(Query("trained", "untrained"))[0]]
    assert (np.diff(gains) <= 0).all()


def test_a_missing_number_makes_no_gain_and_comes_last(store: Store) -> None:
    run_id = training_run(store)
    items = arm_items("untrained") + arm_items("trained")
    items[-1] = shown("p-elk", "trained", 1, clip=float("nan"), judge=0.5)
    with StoreRecorder(store, run_id, config().recording) as recorder:
        recorder.evaluation(Evaluation("validation", 0, "test", items, {}))
    table = PromptTable(prompt_means(store, store.evaluations(run_id)[0].id))
    order, counts = table.select(Query("trained", "untrained", "gain"))
    assert table.ids[order[-1]] == "p-elk"
    assert counts == {"all": 5, "gained": 2, "lost": 1, "same": 1}


# -- the judge beside CLIP -----------------------------------------------------------------------------


def test_agreement_counts_directions_and_names_where_clip_may_be_fooled() -> None:
    clip = np.array([3.0, 2.0, -1.0, -2.0, 4.0, 0.0])
    judge = np.array([0.5, -0.5, -0.1, 0.2, 0.0, 0.3])
    found = agreement(clip, judge)
    assert found["counts"] == {"both_rose": 1, "both_fell": 1, "only_clip": 1, "only_judge": 1, "unmoved": 2}
    assert "2 of the 4 prompts where both moved" in found["sentence"] and "one prompt" in found["sentence"]


def test_rank_correlation_on_numbers_worked_out_by_hand() -> None:
    assert rank_correlation(np.array([1.0, 2.0, 9.0]), np.array([10.0, 20.0, 21.0])) == pytest.approx(1.0)
    assert rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0])) == pytest.approx(-1.0)
    # Ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4: centred products 4.5, squares 4.5 and 5.
    tied = rank_correlation(np.array([1.0, 5.0, 5.0, 7.0]), np.array([0.0, 2.0, 1.0, 3.0]))
    assert tied == pytest.approx(4.5 / np.sqrt(4.5 * 5.0))
    assert rank_correlation(np.array([1.0, 1.0, 1.0]), np.array([1.0, 2.0, 3.0])) is None
    assert rank_correlation(np.array([1.0, 2.0]), np.array([1.0, 2.0])) is None


def test_the_scatter_has_a_point_a_prompt_and_shows_prompts_as_text(ask: Callable[..., Any], finished: str) -> None:
    figure = ask("agreement", run=finished, compare=PAIR)["figure"]
    points = {
        key: (x, y)
        for trace in figure["data"]
        for key, x, y in zip(trace["customdata"], trace["x"], trace["y"], strict=True)
    }
    assert set(points) == set(SCORES) and points["p-apple"] == (29.0, 0.7)
    assert figure["data"][1]["customdata"] == ["p-cat"]  # the only one that CLIP and the judge disagree on
    assert all("<b>" not in text and "&lt;b&gt;" in text for trace in figure["data"] for text in trace["text"])


def test_a_large_scatter_is_thinned_evenly() -> None:
    from grpo_engine.store.measured import PromptMeans

    rows = [
        PromptMeans(f"p{place:05d}", arm, "text", "basic", "", value, value, value, 1)
        for place in range(5000)
        for arm, value in (("untrained", 0.0), ("trained", float(place + 1)))
    ]
    table = PromptTable(rows)
    figure = agreement_figure(table, Query("trained", "untrained"))
    assert [trace["customdata"][1:2] for trace in figure["data"]] == [["p00003"], []]
    assert len(figure["data"][0]["x"]) == 1667


def test_without_a_judge_it_is_said(store: Store, ask: Callable[..., Any]) -> None:
    run_id = training_run(store)
    items = [shown(name, arm, 0, clip=1.0, judge=0.0) for name in SCORES for arm in ("untrained", "trained")]
    bare = [EvaluationItem(**(vars(item) | {"judge": None})) for item in items]
    with StoreRecorder(store, run_id, config().recording) as recorder:
        recorder.evaluation(Evaluation("validation", 0, "test", bare, summarise(bare, config())))
    found = ask("agreement", run=run_id, compare=PAIR)
    assert found["n"] == 0 and found["sentence"] == "No judge measured these pictures."
    assert ask("overview", run=run_id)["comparisons"][0]["judge"] is None


# -- the film strip ------------------------------------------------------------------------------------


def test_a_measured_prompt_is_followed_from_untrained_to_the_end(store: Store, ask: Callable[..., Any]) -> None:
    run_id = training_run(store)
    record(store, run_id, "baseline", 0, "original", "untrained")
    for step in (1, 2, 3):
        store.add_step(run_id, step, metrics(step), [])
    record(store, run_id, "validation", 2, "original", "untrained", "trained")
    record(store, run_id, "final", 3, "trained")
    offered = ask("films", run=run_id, search="CAT")["measured"]
    assert (offered["total"], [row["id"] for row in offered["prompts"]]) == (5, ["p-cat"])
    film = ask("film", run=run_id, prompt="p-cat", kind="measured")
    assert [(frame["step"], frame["where"]) for frame in film["frames"]] == [
        (0, "untrained"), (2, "validation"), (3, "final"),
    ]  # fmt: skip
    assert [frame["pictures"][1]["clip"] for frame in film["frames"]] == [5.0, 8.0, 7.0]


def test_a_training_prompt_is_followed_by_the_best_rewrite_of_each_visit(store: Store, ask: Callable[..., Any]) -> None:
    run_id = training_run(store)
    groups = {step: [group(step, 0), group(step, 1)] for step in (1, 2)}
    with StoreRecorder(store, run_id, config().recording) as recorder:
        for step, made in groups.items():
            recorder.step(step, metrics(step), made)
    visits = store.prompt_visits(run_id, "p-1")
    assert [(visit.step, visit.g, visit.rollouts) for visit in visits] == [(1, 1, 4), (2, 1, 4)]
    for visit in visits:
        trained_on = groups[visit.step][1]
        best = int(trained_on.rewards.argmax())
        assert visit.rewrite == trained_on.rewrites[best] and visit.image is not None
        assert visit.image.endswith(f"step-{visit.step:06d}/g1-k{best}.png")
        assert visit.reward_mean == pytest.approx(float(trained_on.rewards.mean()), rel=1e-6)
    assert store.visited_prompts(run_id) == [(f"p-{g}", f"a prompt número {g}", 2) for g in range(2)]
    film = ask("film", run=run_id, prompt="p-1", kind="trained")
    assert [frame["step"] for frame in film["frames"]] == [1, 2] and "new latents" in film["note"]
    assert [row["id"] for row in ask("films", run=run_id, search="NÚMERO 1")["trained"]["prompts"]] == ["p-1"]
    assert len(thinned(visits * 100, 10)) == 10


def test_a_prompts_groups_are_found_without_reading_every_rollout(store: Store) -> None:
    with store.read() as db:
        plan = db.execute(
            "EXPLAIN QUERY PLAN SELECT step FROM rollouts WHERE run_id = 'r' AND prompt_id = 'p' AND k = 0"
        ).fetchall()
    assert "rollouts_prompt" in plan[0][3]


# -- the blind test ------------------------------------------------------------------------------------


def answer_next(client: TestClient, run: str, at: int, choice: str) -> Any:
    asked = client.get("/grpo/gallery/blind", params={"run": run, "compare": PAIR}).json()["pairs"][0]
    body = {"run": run, "at": at, "compare": PAIR, "prompt": asked["prompt"], "index": asked["index"], "choice": choice}
    response = client.post("/grpo/gallery/choose", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_choices_are_kept_counted_and_compared_with_clip(store: Store, client: TestClient, finished: str) -> None:
    at = store.evaluations(finished)[-1].id
    first = client.get("/grpo/gallery/blind", params={"run": finished, "compare": PAIR}).json()
    assert (first["total"], first["equal"], first["answers"]) == (8, 2, 0)  # both arms wrote the same for p-dog
    assert all(
        pair["prompt"] != "p-dog" and set(pair) == {"prompt", "index", "text", "left", "right"}
        for pair in first["pairs"]
    )
    reveal = answer_next(client, finished, at, "left")["reveal"]
    assert {reveal["left"]["arm"], reveal["right"]["arm"]} == {"trained", "untrained"}
    higher = max(("left", "right"), key=lambda side: reveal[side]["clip"])
    assert reveal["clip_prefers"] == higher
    answer_next(client, finished, at, "neither")
    again = client_of(store).get("/grpo/gallery/blind", params={"run": finished, "compare": PAIR}).json()
    won = int(reveal["left"]["arm"] == "trained")
    assert (again["answers"], again["tally"]["decided"], again["tally"]["won"]) == (2, 1, won)
    assert again["tally"]["agreed"] == int(higher == "left")
    assert f"trained rewrite in {won} of 1" in again["tally"]["sentence"] and "once" in again["tally"]["sentence"]
    assert first["pairs"][2] == again["pairs"][0]  # a reload goes on where it was


def test_choices_can_be_taken_back(store: Store, client: TestClient, finished: str) -> None:
    at = store.evaluations(finished)[-1].id
    for choice in ("left", "right", "left"):
        answer_next(client, finished, at, choice)
    body = {"run": finished, "at": at, "compare": PAIR}
    assert client.post("/grpo/gallery/forget", json=body | {"which": "last"}).json()["answers"] == 2
    assert [choice.choice for choice in choices(store, at, ("trained", "untrained"))] == ["left", "right"]
    assert client.post("/grpo/gallery/forget", json=body | {"which": "all"}).json()["answers"] == 0


def test_a_pair_answered_twice_counts_once(store: Store, finished: str) -> None:
    at = store.evaluations(finished)[-1].id
    sides: tuple[Side, Side] = ("left", "right")
    for choice in sides:
        add_choice(store, Choice(finished, at, "p-cat", 0, "trained", "untrained", choice, "left", 0.0))
    (kept,) = choices(store, at, ("untrained", "trained"))
    assert (kept.choice, kept.arm("right"), kept.arm("neither")) == ("right", "untrained", None) and kept.time > 0


def test_choices_go_with_their_measurement(store: Store, client: TestClient, finished: str) -> None:
    at = store.evaluations(finished)[-1].id
    answer_next(client, finished, at, "left")
    with pytest.raises(StoreError, match="no measurement"):
        add_choice(store, Choice("0009-other", at, "p-cat", 0, "trained", "untrained", "left", "left", 0.0))
    store.delete(finished)
    with store.read() as db:
        assert db.execute("SELECT count(*) FROM choices").fetchone() == (0,)
    assert store.check() == []


def test_a_database_of_before_the_blind_test_gets_its_table(tmp_path: Path) -> None:
    with Store(tmp_path / "runs.db") as store, store.write() as db:
        db.execute("DROP TABLE choices")
        db.execute("DROP INDEX rollouts_prompt")
        db.execute("DELETE FROM _sqlite_migrations WHERE name = 'm003_choices'")
    with Store(tmp_path / "runs.db") as store:
        assert choices(store, 1, ("trained", "untrained")) == []


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 1000))
def test_every_pair_comes_once_and_no_prompt_twice_before_all_came_once(prompts: int, latents: int, at: int) -> None:
    pairs = [Pair(f"p{place}", index) for place in range(prompts) for index in range(latents)]
    order = arrange(pairs, at, "trained", "untrained")
    assert sorted((shown.pair.prompt_id, shown.pair.index) for shown in order) == sorted(
        (pair.prompt_id, pair.index) for pair in pairs
    )
    for turn in range(latents):
        assert len({shown.pair.prompt_id for shown in order[turn * prompts : (turn + 1) * prompts]}) == prompts
    assert all({shown.left, shown.right} == {"trained", "untrained"} for shown in order)
    assert order == arrange(pairs, at, "trained", "untrained")


def test_sides_are_drawn_evenly() -> None:
    order = arrange([Pair(f"p{place}", 0) for place in range(2000)], 7, "trained", "untrained")
    assert abs(sum(shown.left == "trained" for shown in order) - 1000) < 120  # 5 standard deviations


def test_the_interval_of_a_share_on_numbers_worked_out_by_hand() -> None:
    # p = 0.7, n = 20, z^2 = 3.84146: centre (0.7 + 0.096036) / 1.192073, half 1.959964 * 0.113582 / 1.192073.
    low, high = wilson_interval(14, 20)
    assert [low, high] == pytest.approx([0.48103, 0.85452], abs=2e-5)
    assert [wilson_interval(0, 5)[0], wilson_interval(5, 5)[1]] == pytest.approx([0.0, 1.0], abs=1e-12)
    for successes, n in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="A share needs"):
            wilson_interval(successes, n)


def test_the_tally_says_when_chance_alone_would_do() -> None:
    def made(count: int, choice: Side, clip: Side) -> list[Choice]:
        return [
            Choice("r", 1, f"{choice}{clip}{k}", 0, "trained", "untrained", choice, clip, 1.0) for k in range(count)
        ]

    found = tally(
        made(12, "left", "left") + made(2, "left", "right") + made(6, "right", "right"), "trained", "trained rewrite"
    )
    assert found["sentence"] == (
        "You preferred the trained rewrite in 14 of 20 (70 %, 95 % interval 48 to 85 %), which chance alone could "
        "bring about. CLIP agreed with you in 18 of 20."
    )
    sure = tally(
        made(19, "left", "neither") + made(1, "right", "left") + made(2, "neither", "left"),
        "trained",
        "trained rewrite",
    )
    assert "chance" not in sure["sentence"] and "could not say 2 times" in sure["sentence"]
    assert "agreed with you in 0 of 1." in sure["sentence"]
    assert tally([], "trained", "trained rewrite")["sentence"] == "No answers yet."


def test_clip_prefers_neither_of_equal_or_missing_scores() -> None:
    assert [clip_side(2.0, 1.0), clip_side(1.0, 2.0), clip_side(1.0, 1.0), clip_side(None, 1.0)] == [
        "left", "right", "neither", "neither",
    ]  # fmt: skip


def test_a_picture_that_is_missing_is_never_asked_about(store: Store) -> None:
    run_id = training_run(store)
    items = [
        shown("p-cat", "untrained", 0, clip=1.0, judge=0.0),
        shown("p-cat", "trained", 0, clip=1.0, judge=0.0, rewrite=None),
    ]
    with StoreRecorder(store, run_id, config().recording) as recorder:
        recorder.evaluation(Evaluation("validation", 0, "test", items, {}))
    at = store.evaluations(run_id)[0].id
    assert different_pairs(store, (at, "untrained"), (at, "trained")) == ([], 1)


# -- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "params", "status"),
    [
        ("overview", {"run": "0099-nobody-x2x2"}, 404),
        ("overview", {"run": "../../etc/passwd"}, 404),
        ("overview", {}, 422),
        ("overview", {"run": "x" * 200}, 422),
        ("overview", {"run": "RUN", "at": "many"}, 422),
        ("prompts", {"run": "RUN", "compare": "trained_vs_nothing"}, 404),
        ("prompts", {"run": "RUN", "compare": PAIR, "sort": "random()"}, 422),
        ("prompts", {"run": "RUN", "compare": PAIR, "change": "stolen"}, 422),
        ("prompts", {"run": "RUN", "compare": PAIR, "start": -1}, 422),
        ("prompts", {"run": "RUN", "compare": PAIR, "count": 10_000}, 422),
        ("prompts", {"run": "RUN", "compare": PAIR, "search": "x" * 1000}, 422),
        ("agreement", {"run": "RUN", "compare": "' OR 1=1 --"}, 404),
        ("film", {"run": "RUN", "prompt": "nobody", "kind": "measured"}, 404),
        ("film", {"run": "RUN", "prompt": "nobody", "kind": "trained"}, 404),
        ("film", {"run": "RUN", "prompt": "p-cat", "kind": "stolen"}, 422),
        ("films", {"run": "nobody"}, 404),
    ],
)
def test_a_question_that_makes_no_sense_gets_one_sentence(
    client: TestClient, finished: str, path: str, params: dict[str, Any], status: int
) -> None:
    asked = {key: finished if value == "RUN" else value for key, value in params.items()}
    response = client.get(f"/grpo/gallery/{path}", params=asked)
    assert response.status_code == status, response.text
    told = response.json()
    assert set(told) == {"error", "field"} and told["error"].endswith((".", ")")) and "Traceback" not in told["error"]


@pytest.mark.parametrize(
    "change",
    [
        {"choice": "up"},
        {"prompt": "nobody"},
        {"prompt": "p-dog"},  # no difference to judge
        {"index": 7},
        {"index": -1},
        {"compare": "trained_vs_trained"},
        {"run": "nobody"},
        {"extra": 1},
        {"at": "x"},
    ],
)
def test_a_choice_that_makes_no_sense_changes_nothing(
    store: Store, client: TestClient, finished: str, change: dict[str, Any]
) -> None:
    at, before = store.evaluations(finished)[-1].id, store.revision()
    body = {"run": finished, "at": at, "compare": PAIR, "prompt": "p-cat", "index": 0, "choice": "left"} | change
    response = client.post("/grpo/gallery/choose", json=body)
    assert response.status_code in (404, 422) and set(response.json()) == {"error", "field"}
    assert store.revision() == before


@pytest.mark.parametrize("path", ["choose", "forget"])
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", json.dumps({"run": ["x"]}).encode()])
def test_malformed_bodies_get_one_sentence(client: TestClient, path: str, body: bytes) -> None:
    response = client.post(f"/grpo/gallery/{path}", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 422 and set(response.json()) == {"error", "field"}


def test_only_the_last_few_tables_are_kept() -> None:
    kept, made = Kept(2), []
    for key in ("a", "b", "a", "c", "a", "b"):
        kept.get(key, lambda key=key: made.append(key))
    assert made == ["a", "b", "c", "b"]
