"""The train screen's questions and actions: checking, prompt sets, presets, cost, the command line, starting once."""

from __future__ import annotations

import shlex
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from engine_runs import SMALL
from fastapi import FastAPI
from fastapi.testclient import TestClient
from store_samples import evaluation, item, metrics, wait_until

from grpo_engine.__main__ import INTERRUPTED, main
from grpo_engine.config import RunConfig
from grpo_engine.prompts import MAX_FILE_BYTES, MAX_PROMPTS, load_prompts
from grpo_engine.store import Store
from ui import train
from ui.context import Context, Refused
from ui.cost import History, estimate
from ui.launch import Launcher
from ui.worker import Worker

SMALL_VALUES: dict[str, Any] = dict(setting.split("=", 1) for setting in SMALL)


class NoEngine(Worker):
    """A worker that never imports the engine: what only looks must not need it."""

    def warm_up(self) -> None:
        pass


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "runs.db") as opened:
        yield opened


def client_of(store: Store, worker: Worker) -> TestClient:
    app = FastAPI()
    app.include_router(train.routes(Context(store, worker)), prefix="/grpo")
    return TestClient(app)


@pytest.fixture
def client(store: Store) -> TestClient:
    return client_of(store, NoEngine(store))


def asked(**values: Any) -> dict[str, Any]:
    return {"preset": "tiny", "values": {name.replace("__", "."): value for name, value in values.items()}}


def post(client: TestClient, path: str, body: Any, status: int = 200) -> Any:
    answer = client.post(f"/grpo/train/{path}", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def refused(client: TestClient, path: str, body: Any) -> tuple[str, str]:
    answer = client.post(f"/grpo/train/{path}", json=body)
    assert 400 <= answer.status_code < 500, answer.text
    told = answer.json()
    assert set(told) == {"error", "field"}
    assert "Traceback" not in told["error"]
    return told["error"], told["field"]


def upload(client: TestClient, name: str, data: bytes, status: int = 200) -> Any:
    answer = client.post("/grpo/train/prompts/upload", content=data, headers={"X-Name": name})
    assert answer.status_code == status, answer.text
    return answer.json()


def rows(client: TestClient, value: str) -> list[dict[str, str]]:
    found: list[dict[str, str]] = client.get("/grpo/train/prompts/rows", params={"value": value}).json()["rows"]
    return found


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "runs.db" not in path.name}


# -- the form and its check ----------------------------------------------------------------------------------


def test_the_form_has_every_setting_and_every_presets_values(client: TestClient) -> None:
    data = client.get("/grpo/train/form").json()
    names = {field["name"] for field in data["fields"]}
    assert {"training.learning_rate", "data.prompts", "seed"} <= names
    assert [preset["name"] for preset in data["presets"]] == ["tiny", "three-gpu"]
    assert all(set(preset["values"]) == names and not preset["problem"] for preset in data["presets"])
    assert data["presets"][1]["values"]["training.learning_rate"] == "1e-6"
    assert data["first_run"] is True


def test_a_check_places_faults_and_changes_nothing(client: TestClient, store: Store) -> None:
    before = store.revision()
    found = post(client, "check", asked(training__steps="0", training__learning_rate="1e-6", training__minibatches="9"))
    assert found["fields"] == {"training.steps": "Should be greater than or equal to 1."}
    assert found["cost"] is None
    found = post(client, "check", asked(training__minibatches="9"))
    assert [item["field"] for item in found["top"]] == ["training.minibatches"]
    assert post(client, "check", asked(training__learning_rate="1e-6"))["fields"] == {}
    assert (store.revision(), files(store.root)) == (before, set())


@pytest.mark.parametrize("value", ["/etc/hostname", "../../secret.txt", "runs.db", "", "nothing", 7, None, ["tiny"]])
def test_only_known_prompt_sets_are_accepted_so_that_no_other_file_is_read(client: TestClient, value: Any) -> None:
    found = post(client, "check", asked(data__prompts=value))
    assert list(found["fields"]) == ["data.prompts"]
    assert refused(client, "start", asked(data__prompts=value) | {"token": "12345678"})[1] == "data.prompts"
    if isinstance(value, str):
        for path in ("prompts", "prompts/rows"):
            answer = client.get(f"/grpo/train/{path}", params={"value": value})
            assert (answer.status_code, answer.json()["field"]) == (404, "data.prompts")


@pytest.mark.parametrize("path", ["check", "plan", "start", "sweep", "presets", "command", "first", "prompts/save"])
@pytest.mark.parametrize(
    "body",
    [
        None, [], "text", {}, {"preset": "tiny", "values": []}, {"preset": 7}, {"preset": "x" * 100, "values": {}},
        {"preset": "tiny", "values": {}, "odd": 1}, {"preset": "tiny", "values": {"a": {"b": 1}}},
        {"preset": "tiny", "values": {f"k{number}": 1 for number in range(401)}},
        {"preset": "tiny", "values": {"recording.name": "x" * 20_001}},
    ],
)  # fmt: skip
def test_malformed_bodies_are_refused_in_a_sentence(client: TestClient, store: Store, path: str, body: Any) -> None:
    sentence, _ = refused(client, path, body)
    assert sentence
    assert store.runs() == []


def test_broken_json_is_refused_in_a_sentence(client: TestClient) -> None:
    answer = client.post("/grpo/train/check", content=b"{nope", headers={"Content-Type": "application/json"})
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]


@pytest.mark.parametrize("name", ["nothing", "../tiny", "/etc/passwd", "", "configs/tiny.yaml"])
def test_a_preset_is_a_name_and_never_a_path(client: TestClient, name: str) -> None:
    for path in ("check", "command", "plan"):
        assert refused(client, path, {"preset": name, "values": {}})[1] in ("preset", "")


def test_memory_waits_for_the_engine_and_imports_nothing(client: TestClient) -> None:
    assert post(client, "plan", asked()) == {"state": "loading"}


# -- prompt sets ---------------------------------------------------------------------------------------------


def test_a_sets_counts_are_those_of_its_prompts(client: TestClient) -> None:
    about = client.get("/grpo/train/prompts", params={"value": "tiny"}).json()
    assert about["total"] == len(rows(client, "tiny")) == sum(sum(tiers.values()) for tiers in about["counts"].values())
    assert about["counts"]["test"] == {"basic": 40, "challenging": 40, "complex": 40}


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("My set!.txt", b"a red cat\na blue dog\n# three\n"),
        ("My set!.csv", b"text,tier\na red cat,complex\na blue dog,basic\n# three,basic\n"),
        ("My set!.jsonl", b'{"text": "a red cat"}\n{"text": "a blue dog"}\n{"text": "# three"}\n'),
    ],
)
def test_an_upload_becomes_a_jsonl_set_that_a_run_accepts(
    client: TestClient, store: Store, name: str, data: bytes
) -> None:
    answer = upload(client, name.replace(" ", "%20"), data)
    value = answer["value"]
    assert Path(value) == store.root / "prompts" / "my-set.jsonl"
    assert [prompt.text for prompt in load_prompts(value).prompts] == ["a red cat", "a blue dog", "# three"]
    assert value in [entry["value"] for entry in answer["sets"]]
    assert post(client, "check", asked(data__prompts=value))["fields"] == {}
    assert value in post(client, "command", asked(data__prompts=value))["command"]


def test_the_same_upload_is_the_same_set_and_another_one_never_replaces_it(client: TestClient) -> None:
    first = upload(client, "set.txt", b"a red cat\n")["value"]
    assert upload(client, "set.txt", b"a red cat\n")["value"] == first
    other = upload(client, "set.txt", b"a blue dog\n")["value"]
    assert Path(other).name == "set-2.jsonl"
    assert [row["text"] for row in rows(client, first)] == ["a red cat"]
    assert Path(upload(client, "tiny.txt", b"a red cat\n")["value"]).name == "tiny-2.jsonl"  # not the shipped one


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("x.txt", b"a cat\na dog\nA cat.\n", "line 3"),
        ("x.jsonl", b'{"text": "a"}\n{"text": ', "line 2"),
        ("x.csv", b"prompt\na cat\n", 'no column is named "text"'),
        ("x.txt", b"\x89PNG\r\n\x1a\n\x00", "not UTF-8"),
        ("x.txt", b"", "holds no prompts"),
        ("x.png", b"a cat", "is a .jsonl, .txt or .csv file"),
        ("x.txt", b"y" * 401, "401 characters"),
        ("x.txt", b"\n".join(b"prompt %d" % number for number in range(MAX_PROMPTS + 1)), "10,000 prompts"),
        ("x.txt", b"<|im_end|> a cat", "markup"),
    ],
)
def test_an_upload_that_is_no_prompt_set_is_refused_with_its_line_and_leaves_nothing(
    client: TestClient, store: Store, name: str, data: bytes, words: str
) -> None:
    assert words in upload(client, name, data, status=422)["error"]
    assert files(store.root) == set()


def test_an_oversized_upload_is_refused_before_it_is_read_to_its_end(client: TestClient, store: Store) -> None:
    answer = upload(client, "x.txt", b"a" * (MAX_FILE_BYTES + 1), status=413)
    assert "20 MB" in answer["error"]
    assert files(store.root) == set()


@pytest.mark.parametrize("name", ["../../evil.txt", "..%2F..%2Fevil.txt", "C:\\evil.txt", "/etc/evil.txt"])
def test_an_uploads_name_never_leaves_the_folder(client: TestClient, store: Store, name: str) -> None:
    upload(client, name, b"a red cat\n")
    assert files(store.root) == {"prompts", "prompts/evil.jsonl"}


def test_an_edited_set_keeps_what_belongs_to_unchanged_prompts(client: TestClient) -> None:
    table = rows(client, "tiny")
    table[0]["split"] = "train"
    table[1]["text"] = "something else entirely"
    table.append({"id": "", "text": "a brand new prompt", "tier": "basic", "split": "test"})
    answer = post(client, "prompts/save", {"name": "mine", "base": "tiny", "rows": table})
    saved = load_prompts(answer["value"]).prompts
    assert "request" in saved[0].meta
    assert saved[0].id == table[0]["id"]
    assert saved[1].meta == {}  # the checker's request was about another text
    assert saved[1].id != table[1]["id"]
    assert (saved[-1].text, saved[-1].split) == ("a brand new prompt", "test")


def test_a_shipped_set_is_never_overwritten_and_a_saved_one_only_when_asked(client: TestClient) -> None:
    one = {"name": "mine", "rows": [{"text": "a cat", "tier": "basic", "split": "train"}]}
    assert refused(client, "prompts/save", one | {"name": "tiny", "overwrite": True})[1] == "name"
    value = post(client, "prompts/save", one)["value"]
    two = {"name": "mine", "rows": [{"text": "a dog", "tier": "basic", "split": "train"}]}
    assert refused(client, "prompts/save", two)[1] == "overwrite"
    assert rows(client, value)[0]["text"] == "a cat"
    assert post(client, "prompts/save", two | {"overwrite": True})["value"] == value
    assert rows(client, value)[0]["text"] == "a dog"


def test_a_set_that_a_run_still_reads_is_not_replaced(client: TestClient, store: Store) -> None:
    one = {"name": "mine", "rows": [{"text": "a cat", "tier": "basic", "split": "train"}]}
    value = post(client, "prompts/save", one)["value"]
    run_id = store.create_run(RunConfig.parse({"data": {"prompts": value}, "recording": {"name": "Busy"}}))
    assert refused(client, "prompts/save", one | {"overwrite": True})[0].startswith("Busy uses that prompt set")
    store.set_state(run_id, "stopped")
    post(client, "prompts/save", one | {"overwrite": True})


@pytest.mark.parametrize("name", ["../evil", "a/b", "", "A", ".hidden", "x" * 61, "a.b", "con\n"])
def test_names_of_sets_and_presets_are_names(client: TestClient, store: Store, name: str) -> None:
    table = {"name": name, "rows": [{"text": "a cat", "tier": "basic", "split": "train"}]}
    assert refused(client, "prompts/save", table)[1] == "name"
    assert refused(client, "presets", {**asked(), "name": name})[1] == "name"
    assert files(store.root) == set()


def test_a_table_with_faults_is_refused_with_their_rows(client: TestClient, store: Store) -> None:
    table = [{"text": text, "tier": "basic", "split": split} for text, split in
             (("a cat", "train"), ("", "train"), ("A CAT!", "test"), ("a dog", "nowhere"))]  # fmt: skip
    sentence, field = refused(client, "prompts/save", {"name": "mine", "rows": table})
    assert field == "rows"
    assert [f"line {number}:" in sentence for number in (1, 2, 3, 4)] == [False, True, True, True]
    assert files(store.root) == set()


def test_more_prompts_than_a_set_may_have_are_refused(client: TestClient) -> None:
    table = [{"text": f"p {number}", "tier": "basic", "split": "train"} for number in range(MAX_PROMPTS + 1)]
    assert "10,000 prompts" in refused(client, "prompts/save", {"name": "mine", "rows": table})[0]
    answer = post(client, "prompts/save", {"name": "mine", "rows": table[:-1]})
    assert len(rows(client, answer["value"])) == MAX_PROMPTS


def test_markup_in_prompts_stays_text(client: TestClient) -> None:
    text = "<img src=x onerror=alert(1)> & \"quotes\" 'and' </script>"
    value = upload(client, "x.txt", text.encode())["value"]
    assert rows(client, value)[0]["text"] == text


# -- presets and the command line ----------------------------------------------------------------------------


def test_a_saved_preset_holds_only_what_differs_and_loads_to_the_same_settings(
    client: TestClient, store: Store
) -> None:
    changes = {"training.learning_rate": "3e-5", "models.policy.lora.rank": "4", "recording.name": "not kept"}
    body = {"preset": "tiny", "values": changes, "name": "quick"}
    assert [preset["name"] for preset in post(client, "presets", body)["presets"]] == ["tiny", "three-gpu", "quick"]
    path = store.root / "presets" / "quick.yaml"
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert data["models"]["policy"]["lora"] == {"rank": 4}
    assert "recording" not in data
    assert "temperature" not in str(data)
    loaded = RunConfig.load(path)
    expected = RunConfig.load("tiny", ["training.learning_rate=3e-5", "models.policy.lora.rank=4"])
    assert list(loaded.differences(expected)) == ["preset"]
    assert post(client, "check", {"preset": "quick", "values": {}})["fields"] == {}


def test_a_preset_is_replaced_only_when_asked_and_a_shipped_one_never(client: TestClient) -> None:
    body = asked(training__steps="7") | {"name": "mine"}
    post(client, "presets", body)
    assert refused(client, "presets", asked(training__steps="8") | {"name": "mine"})[1] == "overwrite"
    saved = post(client, "presets", asked(training__steps="8") | {"name": "mine", "overwrite": True})["presets"][-1]
    assert saved["values"]["training.steps"] == "8"
    assert refused(client, "presets", body | {"name": "tiny", "overwrite": True})[1] == "name"


def test_settings_with_a_fault_are_not_saved(client: TestClient, store: Store) -> None:
    assert refused(client, "presets", asked(training__steps="0") | {"name": "mine"})[1] == "training.steps"
    assert files(store.root) == set()


def test_a_preset_broken_by_hand_is_listed_with_its_fault(client: TestClient, store: Store) -> None:
    (store.root / "presets").mkdir()
    (store.root / "presets" / "broken.yaml").write_text("training: {steps: [1", encoding="utf-8")
    listed = client.get("/grpo/train/form").json()["presets"][-1]
    assert (listed["name"], listed["values"]) == ("broken", None)
    assert "not valid YAML" in listed["problem"]
    refused(client, "check", {"preset": "broken", "values": {}})


@pytest.mark.parametrize("preset", ["tiny", "three-gpu", "mine"])
def test_the_command_line_starts_exactly_these_settings(
    client: TestClient, store: Store, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    post(client, "presets", asked(sampling__top_k="7") | {"name": "mine"})
    template = "Say $(it) `better`: 'quoted' \"twice\"\n{prompt} & more; #x"
    values = {"training.learning_rate": "1e-6", "recording.name": "it's a; name", "models.policy.template": template}
    words = shlex.split(post(client, "command", {"preset": preset, "values": values})["command"])
    assert words[:4] == ["python", "-m", "grpo_engine", "train"]
    assert words[-2:] == ["--db", str(store.path)]
    loaded: list[RunConfig] = []
    load = RunConfig.load

    def noted(*arguments: Any) -> RunConfig:
        loaded.append(load(*arguments))
        raise KeyboardInterrupt  # before anything is started

    monkeypatch.setattr(RunConfig, "load", noted)
    assert main(words[3:]) == INTERRUPTED
    config = loaded[0]
    assert (config.training.learning_rate, config.recording.name) == (1e-6, "it's a; name")
    assert config.models.policy.template == template
    assert config.preset == preset
    assert config.sampling.top_k == {"tiny": 0, "three-gpu": 100, "mine": 7}[preset]


def test_the_default_database_is_not_named_in_the_command(
    client: TestClient, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(store.root)
    assert post(client, "command", asked())["command"] == "python -m grpo_engine train --config tiny"
    post(client, "presets", asked(training__steps="7") | {"name": "mine"})
    command = post(client, "command", {"preset": "mine", "values": {}})["command"]
    assert command == "python -m grpo_engine train --config presets/mine.yaml"


def test_a_recorded_runs_settings_can_be_taken_up_again(client: TestClient, store: Store) -> None:
    config = RunConfig.load("tiny", ["training.learning_rate=2e-4", "recording.name=Old", "objective.clip_low=0.1"])
    found = client.get("/grpo/train/run", params={"run": store.create_run(config)}).json()
    assert found == {"preset": "tiny", "values": {"training.learning_rate": "0.0002", "objective.clip_low": "0.1"}}
    answer = client.get("/grpo/train/run", params={"run": "nothing"})
    assert (answer.status_code, "There is no run" in answer.json()["error"]) == (404, True)


# -- what a run takes ----------------------------------------------------------------------------------------


def timed_run(store: Store, *overrides: str, steps: int = 10, seconds: float = 2.0) -> str:
    """A finished run whose steps took ``seconds``, half of it rendering, and whose times are known."""
    config = RunConfig.load("tiny", ["training.steps=10", *overrides])
    run_id = store.create_run(config)
    for state in ("loading", "baseline"):
        store.set_state(run_id, state)
    began = store.run(run_id).started or 0.0
    items = [item(f"p-{number}", index=number) for number in range(20)]
    made = evaluation("baseline", 0, *items)
    parts = {"seconds": seconds, "seconds_render": seconds / 2}
    rows_of = [{"arm": i.arm, "prompt_id": i.prompt_id, "index": i.index, "prompt": i.prompt, "tier": i.tier,
                "latent_seed": "5", "rewrite": i.rewrite, "reward": 1.0, "parts": "{}", "judge": 0.5,
                "judge_parts": "{}", "image": None, "thumbnail": None} for i in items]  # fmt: skip
    store.add_evaluation(run_id, "baseline", 0, "test", rows_of, dict(made.summary), at=began + 5.0)  # 3 s loading
    store.set_state(run_id, "training")
    for step in range(1, steps + 1):
        store.add_step(run_id, step, metrics(step) | parts, [], at=began + 5.0 + step * seconds)
    store.set_state(run_id, "evaluating")
    end = began + 5.0 + steps * seconds
    store.add_evaluation(run_id, "final", steps, "test", rows_of, dict(made.summary), at=end + 2.0)  # 0.1 s a picture
    store.set_state(run_id, "finished")
    return run_id


def cost(store: Store, *overrides: str, test: int = 100) -> dict[str, Any]:
    config = RunConfig.load("tiny", overrides)
    return estimate(History(store).like(config), config, test, 10)


def test_without_a_comparable_run_the_time_is_said_to_be_unknown(store: Store, client: TestClient) -> None:
    assert post(client, "check", asked())["cost"]["total"] is None
    timed_run(store, "models.image.resolution=64")
    found = cost(store)
    assert (found["step"], found["total"]) == (None, None)
    assert "No comparable run" in found["note"]


def test_a_run_of_the_same_sizes_gives_its_own_times(store: Store) -> None:
    timed_run(store, "recording.name=Like it")
    found = cost(store, "training.steps=100", "evaluation.prompts=10", "training.learning_rate=1e-5")
    assert found["step"] == pytest.approx(2.0)
    # 5 arms of 10 prompts with 2 pictures each, 0.1 s a picture; loading 5 s - 20 pictures
    assert found["evaluating"] == pytest.approx(10.0)
    assert found["loading"] == pytest.approx(3.0)
    assert found["total"] == pytest.approx(200.0 + 10.0 + 3.0)
    assert found["note"] == "From Like it, which had the same models and sizes."


def test_fewer_test_prompts_than_asked_for_and_validation_are_counted(store: Store) -> None:
    timed_run(store)
    few = cost(store, "training.steps=100", test=4)
    assert few["evaluating"] == pytest.approx(4 * 5 * 2 * 0.1)
    validated = cost(store, "training.steps=100", "evaluation.every=40", "evaluation.validation_prompts=5", test=4)
    assert validated["evaluating"] == pytest.approx((4 + 2 * 5) * 5 * 2 * 0.1)  # after steps 40 and 80
    plain = cost(store, "training.steps=100", "evaluation.greedy=false", test=4)
    assert plain["evaluating"] == pytest.approx(4 * 3 * 2 * 0.1)


def test_other_sizes_are_scaled_and_that_is_said(store: Store) -> None:
    timed_run(store, "recording.name=Base")
    found = cost(store, "training.batch_size=8", "models.image.steps=20", "training.steps=1")
    assert found["step"] == pytest.approx(1.0 * 2 * 2 + 1.0 * 2)  # rendering by pictures x passes, the rest by pictures
    assert "Scaled from Base" in found["note"]
    assert "32 pictures x 20 passes" in found["note"]
    assert "64 pictures x 40 passes" in found["note"]
    timed_run(store, "training.batch_size=8", "models.image.steps=20", seconds=7.0)
    timed_run(store, "recording.name=Newest of other sizes", seconds=1.0)
    assert cost(store, "training.batch_size=8", "models.image.steps=20")["step"] == pytest.approx(7.0)


def test_imported_runs_and_those_of_a_few_steps_say_nothing_about_this_machine(store: Store) -> None:
    timed_run(store, steps=2)
    imported = timed_run(store)
    with store.write() as db:
        db.execute("UPDATE runs SET source = 'imported' WHERE id = ?", [imported])
    assert cost(store)["step"] is None


def test_a_run_made_here_ends_the_offer_of_a_first_run(store: Store, client: TestClient) -> None:
    run_id = store.create_run(RunConfig.load("tiny"))
    with store.write() as db:
        db.execute("UPDATE runs SET source = 'imported' WHERE id = ?", [run_id])
    assert post(client, "check", asked())["first_run"] is True
    store.create_run(RunConfig.load("tiny"))
    assert post(client, "check", asked())["first_run"] is False


# -- sweeps --------------------------------------------------------------------------------------------------

RATES = {"field": "training.learning_rate", "values": ["1e-3", "1e-4"]}
KLS = {"field": "objective.kl_coef", "values": ["0.02", "0.1"]}


def test_a_sweep_shows_its_grid_and_time_before_anything_is_queued(client: TestClient, store: Store) -> None:
    timed_run(store)
    found = post(client, "sweep", asked(training__steps="10") | {"axes": [RATES, KLS]})
    assert found["names"] == ["lr 1e-3, KL 0.02", "lr 1e-3, KL 0.1", "lr 1e-4, KL 0.02", "lr 1e-4, KL 0.1"]
    assert found["problems"] == []
    one = post(client, "check", asked(training__steps="10"))["cost"]["total"]
    assert found["total"] == pytest.approx(4 * one)
    assert len(store.runs()) == 1


def test_a_sweep_with_one_bad_value_queues_nothing(client: TestClient, store: Store) -> None:
    bad = {"field": "objective.kl_coef", "values": ["0.02", "-1"]}
    found = post(client, "sweep", asked() | {"axes": [RATES, bad]})
    assert len(found["problems"]) == 2
    assert found["problems"][0].startswith("lr 1e-3, KL -1: KL penalty: Should be greater than or equal to 0")
    refused(client, "sweep", asked() | {"axes": [RATES, bad], "token": "12345678"})
    assert store.runs() == []


# -- starting ------------------------------------------------------------------------------------------------


def test_one_token_is_one_action_however_often_and_whenever_it_comes(store: Store) -> None:
    launcher = Launcher(store, NoEngine(store))
    gate, calls = threading.Event(), []

    def action() -> dict[str, Any]:
        calls.append(1)
        gate.wait(10)
        return {"run": len(calls)}

    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(launcher.once, "same-token", action) for _ in range(8)]
        wait_until(lambda: bool(calls))
        gate.set()
        assert [future.result() for future in waiting] == [{"run": 1}] * 8
    assert launcher.once("same-token", action) == {"run": 1}
    assert launcher.once("other-token", action) == {"run": 2}


def test_what_was_refused_can_be_tried_again_with_the_same_token(store: Store) -> None:
    launcher = Launcher(store, NoEngine(store))

    def refusing() -> dict[str, Any]:
        raise Refused("not now.")

    with pytest.raises(Refused):
        launcher.once("same-token", refusing)
    assert launcher.once("same-token", lambda: {"run": 1}) == {"run": 1}


def test_old_answers_are_forgotten_but_not_the_recent_ones(store: Store) -> None:
    launcher = Launcher(store, NoEngine(store))
    for number in range(600):
        launcher.once(f"token-{number}", lambda: {"run": 1})
    assert launcher.once("token-599", lambda: {"run": 2}) == {"run": 1}
    assert launcher.once("token-0", lambda: {"run": 2}) == {"run": 2}


@pytest.fixture
def worker(store: Store) -> Iterator[Worker]:
    """The real engine."""
    worker = Worker(store)
    worker.manager()
    yield worker
    worker.close()


def test_two_starts_are_one_run_and_one_behind_it_and_the_same_start_is_one(store: Store, worker: Worker) -> None:
    client = client_of(store, worker)
    body = {"preset": "tiny", "values": SMALL_VALUES | {"training.steps": "50", "recording.name": "A <b>run</b>"}}
    with ThreadPoolExecutor(4) as pool:
        tokens = ["browser-one", "browser-one", "browser-two", "browser-one"]
        answers = list(pool.map(lambda token: post(client, "start", body | {"token": token}), tokens))
    assert len({answer["run"] for answer in answers}) == 2
    assert answers[0] == answers[1] == answers[3]
    assert len(store.runs()) == 2
    behind = [answer["behind"] for answer in (answers[0], answers[2])]
    assert sorted(behind) == ["", "A <b>run</b>"]
    queued = next(answer for answer in answers if answer["behind"])
    assert queued["message"] == "A <b>run</b> is queued behind A <b>run</b>."
    ids = {run.id for run in store.runs()}
    wait_until(lambda: {worker.status()["current"], *worker.status()["queue"]} == ids)
    for run_id in ids:
        worker.command(run_id, "stop")
    wait_until(lambda: all(not run.active for run in store.runs()), seconds=60)


def test_what_only_the_engine_can_check_is_refused_with_the_setting_and_leaves_no_run(
    store: Store, worker: Worker
) -> None:
    client = client_of(store, worker)
    body = asked(training__batch_size="4000") | {"token": "12345678"}
    sentence, field = refused(client, "start", body)
    assert (field, "240 training prompts" in sentence) == ("training.batch_size", True)
    found = post(client, "plan", asked(training__batch_size="4000"))
    assert (found["field"], found["problem"]) == ("training.batch_size", sentence)
    assert found["devices"]
    long = ["training.batch_size", "objective.kl_coef"]
    grid = [{"field": long[0], "values": ["2", "4000"]}, {"field": long[1], "values": ["0.1"]}]
    sentence, _ = refused(client, "sweep", asked() | {"axes": grid, "token": "12345678"})
    assert sentence.endswith("Nothing was queued.")
    assert store.runs() == []


def test_placement_names_each_model_its_device_and_its_memory(store: Store, worker: Worker) -> None:
    client = client_of(store, worker)
    values = {f"placement.{role}": "cpu" for role in ("policy", "image", "reward")}
    found = post(client, "plan", {"preset": "tiny", "values": values})
    assert found["state"] == "ready"
    assert [(row["model"], row["device"], row["path"]) for row in found["models"]] == [
        ("Policy", "cpu", "tiny"), ("Image model", "cpu", "tiny"), ("Reward", "cpu", "tiny"),
    ]  # fmt: skip
    assert all(row["needed"] > 2**20 for row in found["models"])
    (cpu,) = found["devices"]
    assert cpu["needed"] > sum(row["needed"] for row in found["models"])
    assert 0 < cpu["free"] <= cpu["total"]
    elsewhere = post(client, "plan", {"preset": "tiny", "values": values | {"placement.image": "cuda:7"}})
    assert elsewhere["field"] == "placement.image"
    assert {row["device"] for row in elsewhere["models"]} == {"cpu", "cuda:7"}


def test_a_sweep_is_queued_whole_under_one_tag(store: Store, worker: Worker) -> None:
    client = client_of(store, worker)
    body = {"preset": "tiny", "values": SMALL_VALUES | {"recording.tags": ["mine"]}, "axes": [RATES, KLS]}
    answer = post(client, "sweep", body | {"token": "12345678"})
    assert post(client, "sweep", body | {"token": "12345678"}) == answer
    for run_id in answer["runs"][1:]:
        worker.command(run_id, "stop")
    worker.command(answer["runs"][0], "stop")
    runs = [store.run(run_id) for run_id in answer["runs"]]
    assert [run.name for run in runs] == ["lr 1e-3, KL 0.02", "lr 1e-3, KL 0.1", "lr 1e-4, KL 0.02", "lr 1e-4, KL 0.1"]
    assert {run.tags for run in runs} == {("mine", "sweep 1")}
    assert answer["message"] == "4 runs are queued, tagged 'sweep 1'; the first has started."
    assert len(store.runs()) == 4
    wait_until(lambda: all(not run.active for run in store.runs()), seconds=60)


def test_the_first_run_is_the_tiny_preset_made_short(store: Store) -> None:
    config = RunConfig.load("tiny", train.FIRST_RUN)
    assert config.training.steps * 2 < RunConfig.load("tiny").training.steps
    assert config.recording.name == "First run"
    assert {name.split(".")[0] for name in config.differences(RunConfig.load("tiny"))} == {
        "training", "evaluation", "recording",
    }  # fmt: skip
