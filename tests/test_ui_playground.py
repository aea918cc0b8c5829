"""What the playground's screen asks of the app, and what the app makes of it."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_runs import create, small
from fastapi import FastAPI
from fastapi.testclient import TestClient

from grpo_engine.config import RunConfig
from grpo_engine.manager import execute
from grpo_engine.store import Store
from ui.context import Context
from ui.playground import routes
from ui.worker import Worker

PREFIX = "/grpo/playground"
PNG = b"\x89PNG\r\n\x1a\n"
BOTH = [{"kind": "original"}, {"kind": "untrained"}]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with Store(tmp_path_factory.mktemp("playground") / "runs.db") as opened:
        yield opened


@pytest.fixture(scope="module")
def run_id(store: Store) -> str:
    made = create(store, small("recording.name=Ruby", "recording.keep_checkpoints=3", "models.image.steps=2"))
    assert execute(store, made) == "finished"
    return made


@pytest.fixture(scope="module")
def client(store: Store) -> Iterator[TestClient]:
    app = FastAPI()
    app.include_router(routes(Context(store, Worker(store))), prefix="/grpo")
    with TestClient(app) as opened:
        yield opened


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[tuple[TestClient, Store]]:
    """An app on an empty database, with nothing started."""
    app = FastAPI()
    with Store(tmp_path / "runs.db") as store:
        app.include_router(routes(Context(store, Worker(store))), prefix="/grpo")
        yield TestClient(app), store


def refusal(client: TestClient, body: Any, status: int) -> dict[str, str]:
    answer = client.post(
        f"{PREFIX}/generate", content=json.dumps(body), headers={"Content-Type": "application/json"}
    )  # by json.dumps, which writes half a character as readily as a hostile browser
    assert answer.status_code == status, answer.text
    told: dict[str, str] = answer.json()
    assert "Traceback" not in told["error"]
    return told


def ended(client: TestClient, job: str) -> dict[str, Any]:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        state: dict[str, Any] = client.get(f"{PREFIX}/job", params={"id": job}).json()
        if state["state"] not in ("waiting", "working"):
            return state
        time.sleep(0.3)
    raise AssertionError(f"the try does not end: {state}")


def test_an_empty_database_offers_the_embedded_models_and_their_held_out_prompts(
    bare: tuple[TestClient, Store],
) -> None:
    client, _ = bare
    choices = client.get(f"{PREFIX}/choices").json()
    assert [models["id"] for models in choices["models"]] == [""]
    assert choices["runs"] == []
    prompts = client.get(f"{PREFIX}/examples").json()["prompts"]
    assert 5 < len(prompts) <= 60
    assert all(isinstance(prompt, str) for prompt in prompts)


def test_runs_are_offered_with_the_checkpoints_they_have_and_odd_ones_with_the_reason(
    client: TestClient, store: Store, run_id: str
) -> None:
    alike = create(store, small("training.learning_rate=0.5", "models.image.steps=2"))  # has saved nothing
    choices = client.get(f"{PREFIX}/choices").json()
    store.set_state(alike, "stopped")
    (run,) = choices["runs"]
    assert (run["name"], run["models"], run["policy"]) == ("Ruby", run_id, "tiny float32")
    assert [item["which"] for item in run["checkpoints"]][0] == "last"
    assert {"which": "3", "label": "step 3"} in run["checkpoints"]
    assert {"which": "2", "label": "step 2"} in run["checkpoints"]
    assert [models["id"] for models in choices["models"]] == ["", run_id]  # one entry for all that draw alike
    assert "2 steps" in choices["models"][1]["label"]


def test_a_run_whose_settings_can_t_be_read_any_more_says_so_and_can_t_be_chosen(
    bare: tuple[TestClient, Store],
) -> None:
    client, store = bare
    odd = create(store, small("recording.name=Odd"))
    (store.run_dir(odd) / "checkpoints" / "step-000001").mkdir(parents=True)
    with store.write() as db:
        db.execute("UPDATE runs SET config = ? WHERE id = ?", ['{"models": {"policy": {"gone": 1}}}', odd])
    (run,) = client.get(f"{PREFIX}/choices").json()["runs"]
    assert run["checkpoints"] == []
    assert "There is no setting 'models.policy.gone'" in run["problem"]
    told = refusal(client, {"prompt": "a disc", "models": odd, "columns": BOTH}, 422)
    assert "There is no setting" in told["error"]


def imported(store: Store, *overrides: str) -> str:
    """A run with these settings as a bundle of somebody else's brought it."""
    run_id = store.create_run(RunConfig.load("tiny", list(overrides)))
    with store.write() as db:
        db.execute("UPDATE runs SET source = 'imported', state = 'finished' WHERE id = ?", [run_id])
    return run_id


@pytest.mark.parametrize("ending", [".txt", ""])  # without one it is looked for as a shipped set, .jsonl, first
def test_an_imported_run_makes_the_app_read_no_file_of_this_machine(
    bare: tuple[TestClient, Store], tmp_path: Path, ending: str
) -> None:
    client, store = bare
    (tmp_path / "own.txt").write_text("\n".join(f"secret {n}" for n in range(60)))
    (tmp_path / "own.jsonl").write_text("\n".join(json.dumps({"text": f"secret {n}"}) for n in range(60)))
    setting = f"data.prompts={tmp_path / 'own'}{ending}"
    mine = store.create_run(RunConfig.load("tiny", [setting]))
    assert "secret" in client.get(f"{PREFIX}/examples", params={"models": mine}).json()["prompts"][0]
    told = client.get(f"{PREFIX}/examples", params={"models": imported(store, setting)}).json()
    assert told["prompts"] == []
    assert "write a prompt of your own" in told["note"]


def test_an_imported_run_with_a_shipped_prompt_set_offers_its_held_out_prompts(bare: tuple[TestClient, Store]) -> None:
    client, store = bare
    run_id = imported(store, "models.image.steps=7")
    shipped = client.get(f"{PREFIX}/examples").json()
    assert client.get(f"{PREFIX}/examples", params={"models": run_id}).json() == shipped
    assert shipped["prompts"]


def test_models_stand_under_a_run_of_this_machine_where_there_is_one_since_its_prompts_can_be_read(
    bare: tuple[TestClient, Store],
) -> None:
    client, store = bare
    imported(store, "models.image.steps=7")
    mine = store.create_run(RunConfig.load("tiny", ["models.image.steps=7"]))
    assert [models["id"] for models in client.get(f"{PREFIX}/choices").json()["models"]] == ["", mine]


def test_a_try_comes_back_with_rewrites_scores_and_pictures_and_leaves_no_trace(
    client: TestClient, store: Store, run_id: str
) -> None:
    files = {path for path in store.root.rglob("*") if path.is_file()}
    revision = store.revision()
    columns = [*BOTH, {"kind": "checkpoint", "run": run_id, "which": "2"}, {"kind": "edited", "text": " a\nred disc "}]
    prompt = client.get(f"{PREFIX}/examples", params={"models": run_id}).json()["prompts"][0]
    body = {"prompt": f"  {prompt}\n", "models": run_id, "columns": columns, "pictures": 2,
            "latent_seed": str(2**63 - 1), "sample_seed": "7"}  # fmt: skip
    answer = client.post(f"{PREFIX}/generate", json=body).json()
    assert answer["prompt"] == prompt
    job = ended(client, answer["job"])
    assert job["state"] == "done", job["error"]
    assert job["judge"] == "checker"  # the prompt is one of the set's, with its request
    assert job["latents"][0] == str(2**63 - 1)
    assert [column["text"] for column in job["columns"]][::3] == [prompt, "a red disc"]
    assert job["columns"][2]["step"] == 2
    for column in job["columns"]:
        for picture in column["pictures"]:
            assert isinstance(picture["clip"], float) and 0 <= picture["judge"] <= 1
            served = client.get(f"{PREFIX}/picture/{picture['token']}.png")
            assert (served.headers["content-type"], served.content[:8]) == ("image/png", PNG)
    assert {path for path in store.root.rglob("*") if path.is_file()} == files
    assert store.revision() == revision


def test_a_free_prompt_is_judged_by_the_untrained_policy_and_a_long_one_is_refused_at_its_field(
    client: TestClient, run_id: str
) -> None:
    free = client.post(f"{PREFIX}/generate", json={"prompt": "a ruby disc", "columns": BOTH[:1]}).json()["job"]
    assert ended(client, free)["judge"] == "vqa"
    long = client.post(f"{PREFIX}/generate", json={"prompt": "a ruby disc " * 30, "columns": BOTH[:1]}).json()["job"]
    job = ended(client, long)
    assert (job["state"], job["field"]) == ("failed", "prompt")
    assert "the reward reads only" in job["error"]


def test_a_try_can_be_cancelled_and_an_unknown_one_can_not(client: TestClient) -> None:
    columns = [{"kind": "edited", "text": f"{n} discs"} for n in range(6)]
    job = client.post(f"{PREFIX}/generate", json={"prompt": "discs", "columns": columns, "pictures": 4}).json()["job"]
    assert client.post(f"{PREFIX}/cancel", json={"job": job}).status_code == 200
    assert ended(client, job)["state"] == "cancelled"
    assert client.post(f"{PREFIX}/cancel", json={"job": "nobody"}).status_code == 404
    assert client.get(f"{PREFIX}/job", params={"id": "nobody"}).status_code == 404


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"prompt": ""}, 422, "Write a prompt first"),
        ({"prompt": "x" * 20_001}, 422, "prompt"),
        ({"prompt": "x" * 500}, 422, "500 characters"),
        ({"prompt": "a \x00 disc"}, 422, "control character"),
        ({"prompt": "\ud800"}, 422, ""),
        ({"prompt": ["a"]}, 422, "prompt"),
        ({"columns": []}, 422, "columns"),
        ({"columns": [{"kind": "original"}] * 7}, 422, "columns"),
        ({"columns": [{"kind": "magic"}]}, 422, "columns"),
        ({"columns": [{"kind": "edited", "text": " "}]}, 422, "Write something to draw first."),
        ({"columns": [{"kind": "checkpoint", "run": "0042-none-aaaa"}]}, 404, "There is no run"),
        ({"columns": [{"kind": "checkpoint", "run": "../../etc"}]}, 404, "There is no run"),
        ({"columns": [{"kind": "checkpoint", "run": "x", "which": "../1"}]}, 422, "columns"),
        ({"models": "0042-none-aaaa"}, 404, "There is no run"),
        ({"latent_seed": "-1"}, 422, "latent_seed"),
        ({"latent_seed": "9" * 19}, 422, "A seed is a whole number up to"),
        ({"pictures": 5}, 422, "pictures"),
        ({"temperature": 0}, 422, "temperature"),
        ({"surprise": 1}, 422, "surprise"),
    ],
)
def test_a_malformed_try_is_refused_in_a_sentence(
    bare: tuple[TestClient, Store], change: dict[str, Any], status: int, said: str
) -> None:
    assert said in refusal(bare[0], {"prompt": "a disc", "columns": BOTH} | change, status)["error"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"\xff\xfe", base64.b64encode(b"x" * 100)])
@pytest.mark.parametrize("path", ["generate", "cancel"])
def test_what_is_no_json_object_is_refused(bare: tuple[TestClient, Store], path: str, body: bytes) -> None:
    answer = bare[0].post(f"{PREFIX}/{path}", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert "can't be read" in answer.json()["error"]


@pytest.mark.parametrize("token", ["none", "..%2f..%2fruns.db", "a/b", "%00"])
def test_only_pictures_of_tries_are_served(bare: tuple[TestClient, Store], token: str) -> None:
    assert bare[0].get(f"{PREFIX}/picture/{token}.png").status_code == 404


def test_looking_needs_no_engine_and_starts_no_process(bare: tuple[TestClient, Store]) -> None:
    import multiprocessing

    before = set(multiprocessing.active_children())
    for path in ("choices", "examples"):
        assert bare[0].get(f"{PREFIX}/{path}").status_code == 200
    assert set(multiprocessing.active_children()) == before
