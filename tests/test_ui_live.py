"""The live screen's questions and buttons: what they tell of a run, and what they refuse."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from store_samples import ACTIVE, config, evaluation, fill, group, item, metrics, to_state, training_run, wait_until

from grpo_engine.recorder import RUN_STATES
from grpo_engine.store import Store
from grpo_engine.store.recorder import StoreRecorder
from grpo_engine.store.rows import COMMANDS, CommandRow, EventRow
from grpo_engine.store.schema import BLOCK
from grpo_engine.store.writes import sum_up, update_run
from ui.charts import BINS, chart_specs, wanted_metrics
from ui.context import Context
from ui.live import routes
from ui.run_status import asked, pace, patience, phases, remark
from ui.worker import Worker

READY = {"engine": "ready", "imported": 6, "imports": 6, "problem": "", "current": None, "queue": []}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "runs.db") as opened:
        yield opened


@pytest.fixture
def worker(store: Store) -> Iterator[Worker]:
    made = Worker(store)
    yield made
    made.close()


@pytest.fixture
def client(store: Store, worker: Worker) -> TestClient:
    app = FastAPI()
    app.include_router(routes(Context(store, worker)), prefix="/grpo")
    return TestClient(app)


def ask(client: TestClient, what: str, **params: Any) -> dict[str, Any]:
    response = client.get(f"/grpo/live/{what}", params=params)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def known(figures: dict[str, Any]) -> dict[str, Any]:
    """What a page with these figures says it has."""
    return {name: figures[name] for name in ("run", "step", "at", "shape")}


def lines(figures: dict[str, Any]) -> dict[str, tuple[list[int], list[float]]]:
    return {
        trace["meta"]["key"]: (trace["x"], trace["y"])
        for chart in figures["charts"]
        for trace in chart["figure"]["data"]
    }


def orphaned(store: Store) -> str:
    """A run whose process ended without a word."""
    run_id = training_run(store)
    with store.write() as db:
        update_run(db, run_id, {"process_token": "of a process that is gone"})
    return run_id


def command(client: TestClient, run: str, name: str) -> Any:
    return client.post("/grpo/live/command", json={"run": run, "command": name})


# -- which run -------------------------------------------------------------------------------------------------------


def test_the_run_that_goes_on_is_shown_before_newer_ones_that_wait_or_ended(client: TestClient, store: Store) -> None:
    assert ask(client, "state") == {"run": None}
    older = to_state(store, "finished")
    assert ask(client, "state")["run"]["id"] == older
    going = training_run(store)
    to_state(store, "queued")
    newest = to_state(store, "failed")
    assert ask(client, "state")["run"]["id"] == going
    store.set_state(going, "stopped")
    assert ask(client, "state")["run"]["id"] == newest
    assert [run["id"] for run in ask(client, "runs")["runs"]] == [run.id for run in store.runs()]


@pytest.mark.parametrize("state", RUN_STATES)
def test_a_run_in_any_state_can_be_looked_at(client: TestClient, store: Store, state: str) -> None:
    run_id = to_state(store, state)
    told = ask(client, "state", run=run_id)
    assert told["run"]["state"] == state
    assert set(told["actions"]) == set(COMMANDS)
    assert ask(client, "figures", run=run_id)["step"] == 0
    assert ask(client, "pictures", run=run_id)["groups"] == []


@pytest.mark.parametrize("what", ["state", "figures", "pictures"])
@pytest.mark.parametrize("run", ["0099-tiny-aaaa", "../../etc/passwd", "' OR 1=1 --", "<script>"])
def test_unknown_runs_are_refused_in_one_sentence(client: TestClient, store: Store, what: str, run: str) -> None:
    training_run(store)
    response = client.get(f"/grpo/live/{what}", params={"run": run})
    assert response.status_code == 404
    assert response.json()["error"].startswith("There is no run")


@pytest.mark.parametrize(
    "query",
    ["state?step=-2", "state?step=x", "state?event=-1", "state?at=soon", "state?run=" + "a" * 300, "pictures?step=1.5",
     "state?step=99999999999999999999", "state?shape=" + "-" * 30],
)  # fmt: skip
def test_malformed_questions_are_refused_and_change_nothing(client: TestClient, store: Store, query: str) -> None:
    training_run(store)
    before = store.revision()
    response = client.get(f"/grpo/live/{query}")
    assert response.status_code == 422
    assert "Traceback" not in response.text and response.json()["error"]
    assert store.revision() == before


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"run": 1, "command": "stop"}', b'{"command": "stop"}', b'{"run": "x", "command": "explode"}',
     b'{"run": "x", "command": "stop", "and": 1}', b'{"run": "", "command": "stop"}'],
)  # fmt: skip
def test_malformed_commands_are_refused(client: TestClient, body: bytes) -> None:
    response = client.post("/grpo/live/command", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 422
    assert list(response.json()) == ["error", "field"]


# -- curves ----------------------------------------------------------------------------------------------------------


def test_a_page_that_has_the_curves_is_sent_only_what_is_new(client: TestClient, store: Store) -> None:
    run_id = training_run(store)
    fill(store, run_id, 5)
    have = known(ask(client, "figures", run=run_id))
    assert not {"points", "reload"} & set(ask(client, "state", **have))
    fill(store, run_id, 7)
    told = ask(client, "state", **have)
    assert told["points"]["reward.reward_mean"] == {"x": [6, 7], "y": [metrics(step)["reward_mean"] for step in (6, 7)]}
    assert told["step"] == 7 and "reload" not in told
    assert not {"points", "reload"} & set(ask(client, "state", **(have | {"step": 7, "at": told["at"]})))


def test_points_are_those_of_the_whole_figures_also_where_a_bin_was_still_filling(
    client: TestClient, store: Store
) -> None:
    run_id = training_run(store)
    fill(store, run_id, BINS + 1)  # bins of 2 steps, the last one half full
    before = ask(client, "figures", run=run_id)
    fill(store, run_id, BINS + 4)
    told = ask(client, "state", **known(before))
    after = lines(ask(client, "figures", run=run_id))
    assert told["points"]["loss.total_loss"]["x"] == [BINS + 1, BINS + 3]
    for key, (x, y) in lines(before).items():
        new = told["points"][key]
        kept = [index for index, at in enumerate(x) if at < new["x"][0]]
        assert ([x[i] for i in kept] + new["x"], [y[i] for i in kept] + new["y"]) == after[key]


def test_figures_are_asked_for_anew_when_bins_widen_or_the_first_step_comes(client: TestClient, store: Store) -> None:
    run_id = training_run(store)
    empty = known(ask(client, "figures", run=run_id))
    fill(store, run_id, 1)
    assert ask(client, "state", **empty)["reload"] is True
    fill(store, run_id, BINS)
    full = known(ask(client, "figures", run=run_id))
    fill(store, run_id, BINS + 1)
    assert ask(client, "state", **full)["reload"] is True
    assert "reload" not in ask(client, "state", **known(ask(client, "figures", run=run_id)))


def test_a_run_resumed_from_an_earlier_step_is_never_drawn_from_two_histories(client: TestClient, store: Store) -> None:
    run_id = training_run(store)
    fill(store, run_id, 8)
    have = known(ask(client, "figures", run=run_id))
    store.truncate_after(run_id, 4)
    assert ask(client, "state", **have)["reload"] is True
    fill(store, run_id, 8)
    assert ask(client, "state", **have)["reload"] is True  # as long as before, but other steps
    fill(store, run_id, 9)
    assert ask(client, "state", **have)["reload"] is True


def test_a_page_far_behind_is_given_all_figures(client: TestClient, store: Store) -> None:
    run_id = long_run(store, 5000)
    have = known(ask(client, "figures", run=run_id))
    at = store.steps(run_id, ["time"], since_step=2998)["time"][0]
    assert ask(client, "state", **(have | {"step": 2999, "at": at}))["reload"] is True
    at = store.steps(run_id, ["time"], since_step=3999)["time"][0]
    assert "points" in ask(client, "state", **(have | {"step": 4000, "at": at}))


def long_run(store: Store, steps: int) -> str:
    """A run with so many steps, written in one go."""
    run_id = training_run(store)
    names = wanted_metrics(chart_specs(config().model_dump(mode="json")))
    values = np.random.default_rng(0).normal(size=(steps, len(names)))
    values[steps // 2, names.index("reward_mean")] = 99.0
    marks = ", ".join("?" for _ in range(len(names) + 3))
    with store.write() as db:
        rows = ((run_id, step, float(step), *row) for step, row in enumerate(values.tolist(), start=1))
        db.conn.executemany(f"INSERT INTO steps (run_id, step, time, {', '.join(names)}) VALUES ({marks})", rows)
        update_run(db, run_id, {"step": steps, "total_steps": 2 * steps})
        for block in range(steps // BLOCK):
            sum_up(db, run_id, block)
    return run_id


def test_a_hundred_thousand_steps_are_few_points_that_keep_the_extremes_and_come_quickly(
    client: TestClient, store: Store
) -> None:
    run_id = long_run(store, 100_000)
    ask(client, "figures", run=run_id)
    begun = time.process_time()
    figures = ask(client, "figures", run=run_id)
    assert time.process_time() - begun < 1.0  # seconds of the processor; 0.2 when this was written
    found = lines(figures)
    assert all(len(x) <= BINS for x, _ in found.values())
    assert max(found["reward.reward_mean.high"][1]) == 99.0 > max(found["reward.reward_mean"][1])
    have = known(figures)
    fill(store, run_id, 100_001)
    begun = time.process_time()
    told = ask(client, "state", **have)
    assert time.process_time() - begun < 0.1  # 0.01 when this was written
    assert told["step"] == 100_001 and len(told["points"]["reward.reward_mean"]["x"]) == 1


def test_the_headline_is_that_of_the_last_evaluation_with_one(client: TestClient, store: Store) -> None:
    run_id = training_run(store)
    fill(store, run_id, 3)
    assert ask(client, "figures", run=run_id)["headline"] is None
    arms = {"arms": {"trained": {"reward": 5.0}}}
    store.add_evaluation(run_id, "validation", 2, "validation", [], {"sentence": "It rose.", **arms})
    assert ask(client, "figures", run=run_id)["headline"] == {"text": "It rose.", "kind": "validation", "step": 2}
    store.add_evaluation(run_id, "final", 3, "test", [], {"sentence": "It fell.", **arms})
    figures = ask(client, "figures", run=run_id)
    assert figures["headline"]["text"] == "It fell."
    assert lines(figures)["reward.validation prompts"] == ([2], [5.0])
    assert lines(figures)["reward.test prompts"] == ([3], [5.0])


# -- pictures and log ------------------------------------------------------------------------------------------------


def test_the_best_and_the_worst_picture_of_each_group_of_the_newest_pictured_step(
    client: TestClient, store: Store
) -> None:
    settings: dict[str, Any] = {"recording": {"images_every": 2}}
    run_id = training_run(store, **settings)
    with StoreRecorder(store, run_id, config(**settings).recording) as recorder:
        for step in (1, 2, 3):
            recorder.step(step, metrics(step), [group(step, g) for g in range(6)])
    found = ask(client, "pictures", run=run_id)
    assert (found["step"], len(found["groups"]), found["more"]) == (2, 4, 2)
    rows = [row for row in store.rollouts(run_id, 2) if row.g == 0]
    rewards = [row.reward for row in rows]
    shown = found["groups"][0]
    assert (shown["best"]["reward"], shown["worst"]["reward"]) == (max(rewards), min(rewards))
    assert shown["best"]["picture"] == rows[int(np.argmax(rewards))].thumbnail
    assert ask(client, "pictures", run=run_id, step=1)["step"] == 1
    unpictured = ask(client, "pictures", run=run_id, step=3)
    assert (unpictured["groups"], unpictured["note"]) == ([], "No pictures were kept of step 3.")


def test_a_run_that_keeps_no_pictures_says_so(client: TestClient, store: Store) -> None:
    run_id = training_run(store, recording={"images_every": 0})
    fill(store, run_id, 2)
    assert "images_every is 0" in ask(client, "pictures", run=run_id)["note"]


def test_the_log_brings_each_line_once(client: TestClient, store: Store) -> None:
    run_id = training_run(store)
    store.add_event(run_id, "skipped_step", "The loss was <b>not</b> finite.")
    events = ask(client, "state", run=run_id)["events"]
    assert [event["message"] for event in events][-1] == "The loss was <b>not</b> finite."
    assert (events[-1]["label"], events[-1]["level"]) == ("skipped", "warning")
    assert ask(client, "state", run=run_id, event=events[-1]["id"])["events"] == []
    store.add_event(run_id, "checkpoint", "Saved.")
    assert [event["label"] for event in ask(client, "state", run=run_id, event=events[-1]["id"])["events"]] == ["saved"]


# -- buttons ---------------------------------------------------------------------------------------------------------

POSSIBLE = {
    "queued": {"stop", "resume"},  # resume: it waits in no queue of this app
    "loading": {"stop"},
    "baseline": {"stop", "pause"},
    "training": {"stop", "pause", "save", "evaluate"},
    "paused": {"stop", "resume"},
    "evaluating": {"stop", "pause"},
    "finished": set(),
    "stopped": {"resume"},
    "failed": {"resume"},
    "interrupted": {"resume"},
}


@pytest.mark.parametrize("state", RUN_STATES)
def test_buttons_say_what_is_possible_and_the_rest_is_refused_with_the_same_reason(
    client: TestClient, store: Store, state: str
) -> None:
    run_id = to_state(store, state)
    told = ask(client, "state", run=run_id)["actions"]
    assert {name for name, why_not in told.items() if not why_not} == POSSIBLE[state]
    before = store.revision()
    for name in set(COMMANDS) - POSSIBLE[state]:
        response = command(client, run_id, name)
        assert (response.status_code, response.json()["error"]) == (409, told[name])
    assert store.revision() == before and store.commands(run_id) == []


@pytest.mark.parametrize("state", sorted({"interrupted", "finished", "stopped"}))
def test_an_imported_run_can_only_be_looked_at(client: TestClient, store: Store, state: str) -> None:
    run_id = to_state(store, state)
    with store.write() as db:
        update_run(db, run_id, {"source": "imported"})
    told = ask(client, "state", run=run_id)
    assert all("imported" in why_not for why_not in told["actions"].values())
    assert "Resume" not in told["remark"]["text"]
    assert command(client, run_id, "resume").status_code == 409


def test_a_command_reaches_the_run_and_every_page_sees_that_it_was_asked(client: TestClient, store: Store) -> None:
    run_id = training_run(store)
    fill(store, run_id, 1)
    assert command(client, run_id, "pause").json() == {}
    assert [row.command for row in store.commands(run_id)] == ["pause"]
    assert ask(client, "state", run=run_id)["asked"] == ["pause"]
    store.set_state(run_id, "paused")
    assert ask(client, "state", run=run_id)["asked"] == []
    command(client, run_id, "resume")
    assert ask(client, "state", run=run_id)["asked"] == ["resume"]
    store.set_state(run_id, "training")
    command(client, run_id, "save")
    command(client, run_id, "stop")
    assert ask(client, "state", run=run_id)["asked"] == ["save", "stop"]
    store.add_event(run_id, "checkpoint", "Saved.")
    assert ask(client, "state", run=run_id)["asked"] == ["stop"]
    store.set_state(run_id, "stopped")
    assert ask(client, "state", run=run_id)["asked"] == []


def test_stop_takes_a_waiting_run_out_of_the_queue(client: TestClient, store: Store) -> None:
    run_id = to_state(store, "queued")
    assert command(client, run_id, "stop").status_code == 200
    assert store.run(run_id).state == "stopped"


def test_resume_puts_an_ended_run_to_work_again(client: TestClient, store: Store) -> None:
    run_id = store.create_run(config(data={"prompts": "no-such-set"}))  # goes as far as that, and loads no model
    store.set_state(run_id, "stopped")
    assert command(client, run_id, "resume").status_code == 200
    wait_until(lambda: store.run(run_id).state == "failed", 120.0)
    told = ask(client, "state", run=run_id)
    assert told["remark"]["kind"] == "bad"
    assert "no-such-set" in told["remark"]["text"] and told["remark"]["text"].endswith(
        "Resume goes on from the last saved step."
    )


def test_a_run_whose_process_died_is_told_and_can_be_closed(client: TestClient, store: Store) -> None:
    run_id = orphaned(store)
    told = ask(client, "state", run=run_id)
    assert store.run(run_id).state == "training"  # looking changes nothing
    assert told["remark"]["kind"] == "warn" and str(os.getpid()) in told["remark"]["text"]
    assert {name for name, why_not in told["actions"].items() if not why_not} == {"stop", "resume"}
    assert (told["busy"], told["watched"], told["memory"]) == (False, False, [])
    assert command(client, run_id, "pause").status_code == 409
    assert command(client, run_id, "stop").status_code == 200
    assert store.run(run_id).state == "interrupted"


# -- in words and numbers --------------------------------------------------------------------------------------------


def test_memory_is_that_of_the_runs_own_process(client: TestClient, store: Store) -> None:
    run_id = training_run(store)
    (held,) = ask(client, "state", run=run_id)["memory"]
    assert held["label"] == "RAM, this app"
    assert 10 * 2**20 < held["used"] < held["total"]
    store.set_state(run_id, "stopped")
    assert ask(client, "state", run=run_id)["memory"] == []


def test_phases_show_what_is_done_what_goes_on_and_what_comes(store: Store) -> None:
    def of(state: str, name: str, done: int, total: int) -> list[tuple[str, str, float]]:
        run_id = to_state(store, state)
        store.set_phase(run_id, name, done, total)
        return [(part["name"], part["state"], part["share"]) for part in phases(store.run(run_id))]

    assert of("training", "rendering", 1, 4) == [
        ("sampling", "done", 1.0),
        ("rendering", "now", 0.25),
        ("scoring", "later", 0.0),
        ("updating", "later", 0.0),
    ]
    assert of("loading", "loading image model", 1, 3) == [
        ("policy", "done", 1.0),
        ("image model", "now", 0.0),
        ("reward", "later", 0.0),
    ]
    assert [state for _, state, _ in of("loading", "models loaded", 3, 3)] == ["done"] * 3
    assert of("loading", "downloading owner/policy (MB)", 4150, 16600) == [
        ("downloading owner/policy", "now", 0.25),
        ("policy", "later", 0.0),
        ("image model", "later", 0.0),
        ("reward", "later", 0.0),
    ]
    assert of("loading", "downloading a/b (MB)", 120, 480) == [
        ("downloading a/b", "now", 0.25),
        ("policy", "later", 0.0),
        ("image model", "later", 0.0),
        ("reward", "later", 0.0),
    ]
    assert of("baseline", "untrained", 32, 100) == [
        ("original prompts", "done", 1.0),
        ("untrained, sampled", "now", 0.32),
        ("untrained, greedy", "later", 0.0),
    ]
    assert of("paused", "", 0, 0) == []


def test_a_phase_says_how_far_it_is_in_what_it_counts(store: Store) -> None:
    notes = {}
    for state, name in (("training", "rendering"), ("training", "updating"), ("baseline", "untrained"),
                        ("loading", "downloading a/b (MB)")):  # fmt: skip
        run_id = to_state(store, state)
        store.set_phase(run_id, name, 1, 4)
        notes[name] = [part["note"] for part in phases(store.run(run_id)) if part["state"] == "now"]
    assert notes == {
        "rendering": ["1 of 4 groups"],
        "updating": [""],
        "untrained": ["1 of 4"],
        "downloading a/b (MB)": ["1 of 4 MB"],
    }


def test_a_validation_measures_all_arms_and_the_final_evaluation_the_trained_ones(store: Store) -> None:
    run_id = store.create_run(config(training={"steps": 2, "batch_size": 2}, evaluation={"samples": 0}))
    for state in ("loading", "training"):
        store.set_state(run_id, state)
    fill(store, run_id, 1)
    store.set_state(run_id, "evaluating")
    assert [part["name"] for part in phases(store.run(run_id))] == [
        "original prompts",
        "untrained, greedy",
        "trained, greedy",
    ]
    fill(store, run_id, 2)
    assert [part["name"] for part in phases(store.run(run_id))] == ["trained, greedy"]


def test_the_pace_ignores_a_pause_between_two_steps(store: Store) -> None:
    run = store.run(to_state(store, "training"))  # 40 steps, none done
    times = np.array([0.0, 2.0, 4.0, 600.0, 602.0, 604.0])
    assert pace(run, times) == {"per_minute": 30.0, "left": 80.0, "interval": 2.0}
    assert pace(run, times[:1]) == {"per_minute": None, "left": None, "interval": None}
    assert pace(store.run(to_state(store, "finished")), times)["left"] is None


def test_a_page_waits_for_slow_steps_and_for_loading_before_it_wonders(store: Store) -> None:
    training, loading = (store.run(to_state(store, state)) for state in ("training", "loading"))
    assert patience(training, 1.0) == 120.0
    assert patience(training, 90.0) == 450.0
    assert patience(training, None) == patience(loading, 1.0) == 900.0


def test_of_pause_and_resume_the_later_is_what_was_asked() -> None:
    def row(name: str, at: float) -> CommandRow:
        return CommandRow(1, "run", name, at, None, None)

    state = [EventRow(1, "run", 10.0, "state", "info", "", {"state": "training"})]
    assert asked([row("pause", 11.0), row("resume", 12.0)], state) == ["resume"]
    assert asked([row("resume", 11.0), row("pause", 12.0)], state) == ["pause"]
    assert asked([row("pause", 9.0)], state) == []  # that was before, and happened
    assert asked([row("stop", 9.0)], [*state, EventRow(2, "run", 11.0, "checkpoint", "info", "", {})]) == []


def test_a_waiting_run_says_what_for(store: Store) -> None:
    first, second = (store.run(to_state(store, "queued")) for _ in range(2))

    def said(run: Any, **status: Any) -> str:
        return remark(run, READY | status, alive=True)["text"]

    assert said(first).startswith("Left in the queue by another process")
    assert said(first, queue=[first.id], engine="loading", imported=2) == "Loading the engine, 2 of 6 parts."
    assert said(first, queue=[first.id]) == "Next in line; starting."
    assert said(second, queue=[first.id, second.id]) == "Waiting for 1 run before it."
    assert said(second, queue=[first.id, second.id], current="x") == "Waiting for 2 runs before it."
    ended = store.run(to_state(store, "stopped"))
    assert said(ended, queue=[ended.id]) == "To be resumed. Next in line; starting."


@pytest.mark.parametrize("state", ["stopped", "failed", "interrupted", *ACTIVE])
def test_what_is_said_is_a_whole_sentence(store: Store, state: str) -> None:
    text = remark(store.run(to_state(store, state)), READY, alive=True)["text"]
    assert text == "" if state == "training" else text[0].isupper() and text.endswith(".")


def test_an_evaluation_is_told_in_the_log_and_in_the_figures(client: TestClient, store: Store) -> None:
    run_id = training_run(store)
    with StoreRecorder(store, run_id, config().recording) as recorder:
        recorder.evaluation(evaluation("baseline", 0, item("p-0")))
    events = ask(client, "state", run=run_id)["events"]
    assert events[-1]["kind"] == "evaluation" and events[-1]["label"] == "measured"
