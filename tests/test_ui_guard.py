"""The app's door: what is refused before any screen hears of it."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from grpo_engine.config import RunConfig
from grpo_engine.store import Store
from ui.app import build_app
from ui.guard import MOST_BYTES
from ui.worker import Worker

PICTURE = b"\x89PNG not really"


class NoEngine(Worker):
    """A worker that never imports the engine: these requests must not need it."""

    def warm_up(self) -> None:
        pass


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with Store(tmp_path_factory.mktemp("guard") / "runs.db") as opened:
        yield opened


@pytest.fixture
def run_id(store: Store) -> str:
    made = store.create_run(RunConfig.load("tiny"))
    folder = store.run_dir(made) / "images" / "step-000001"
    folder.mkdir(parents=True)
    (folder / "g0-k0.png").write_bytes(PICTURE)
    (store.run_dir(made) / "checkpoints").mkdir()
    (store.run_dir(made) / "checkpoints" / "adapter_model.png").write_bytes(b"secret")
    (store.run_dir(made) / "images" / "link.png").symlink_to(store.path)
    return made


@pytest.fixture(scope="module")
def client(store: Store) -> TestClient:
    return TestClient(build_app(store, NoEngine(store)), base_url="http://127.0.0.1:7860")


def login(user: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def test_a_recorded_picture_is_served(client: TestClient, run_id: str) -> None:
    answer = client.get(f"/grpo/pictures/runs/{run_id}/images/step-000001/g0-k0.png")
    assert (answer.status_code, answer.content) == (200, PICTURE)


@pytest.mark.parametrize(
    "path",
    [
        "runs.db",
        "runs/{run}/config.yaml",
        "runs/{run}/grpo_training.log",
        "runs/{run}/checkpoints/adapter_model.png",
        "runs/{run}/images/../config.yaml",
        "runs/{run}/images/..%2f..%2f..%2fruns.db",
        "runs/{run}/images/%2e%2e/%2e%2e/%2e%2e/runs.db",
        "runs/{run}/images/step-000001/../../../../runs.db",
        "..%2f..%2fetc/passwd",
        "/etc/passwd",
        "runs/{run}/images/link.png",
        "runs/{run}/images/%00.png",
        "runs/{run}/images/" + "a" * 5000 + ".png",
        "runs\\{run}\\images\\step-000001\\g0-k0.png",
    ],
)
def test_nothing_but_pictures_in_image_folders_is_served(client: TestClient, run_id: str, path: str) -> None:
    answer = client.get(f"/grpo/pictures/{path.format(run=run_id)}")
    assert answer.status_code == 404
    assert b"secret" not in answer.content and b"SQLite" not in answer.content


@pytest.mark.parametrize(
    "path",
    [
        "/file=runs.db", "/gradio_api/file=runs.db", "/gradio_api/file=/etc/passwd", "/file/runs.db", "/runs.db",
        "/static/../../app.py", "/assets/%2e%2e/%2e%2e/app.py", "/grpo/static/..%2fapp.py", "/grpo/static/app.py",
        "/gradio_api/upload_progress", "/gradio_api/queue/data", "/gradio_api/queue/status", "/proxy=http://localhost",
        "/gradio_api/proxy=http://localhost", "/docs", "/openapi.json", "/monitoring",
        "/gradio_api/stream/a/b/c/p.m3u8",
    ],
)  # fmt: skip
def test_gradios_own_doors_are_closed(client: TestClient, run_id: str, path: str) -> None:
    assert client.get(path).status_code in (403, 404, 422)


@pytest.mark.parametrize(
    "path", ["/gradio_api/upload", "/gradio_api/run/predict", "/gradio_api/queue/join", "/gradio_api/component_server",
             "/gradio_api/call/x", "/gradio_api/reset", "/gradio_api/cancel", "/login", "/"],
)  # fmt: skip
def test_gradios_actions_are_closed(client: TestClient, path: str) -> None:
    assert client.post(path, json={}, headers={"X-GRPO": "1"}).status_code == 404


def test_an_action_without_the_pages_own_header_is_refused(client: TestClient, run_id: str, store: Store) -> None:
    answer = client.post("/grpo/live/command", json={"run": run_id, "command": "stop"})
    assert answer.status_code == 403
    assert store.run(run_id).state == "queued"


def test_a_foreign_name_for_this_machine_is_refused(client: TestClient) -> None:
    assert client.get("/grpo/pulse", headers={"Host": "evil.example:7860"}).status_code == 403
    assert client.get("/grpo/pulse", headers={"Host": "localhost:7860"}).status_code == 200


@pytest.mark.parametrize("size", [MOST_BYTES + 1, 10**15])
def test_a_body_that_is_announced_too_large_is_refused_unread(client: TestClient, size: int) -> None:
    answer = client.post("/grpo/live/command", content=b"x", headers={"X-GRPO": "1", "Content-Length": str(size)})
    assert answer.status_code == 413


def test_a_body_that_never_ends_is_cut_off(client: TestClient) -> None:
    block = b"x" * 2**20

    def endless() -> Iterator[bytes]:
        for _ in range(MOST_BYTES // len(block) + 2):
            yield block

    answer = client.post("/grpo/live/command", content=endless(), headers={"X-GRPO": "1"})
    assert answer.status_code == 413


def test_with_a_login_every_request_must_bring_it(store: Store, run_id: str) -> None:
    app = build_app(store, NoEngine(store), ("ada", "s3:cret"))
    client = TestClient(app, base_url="http://127.0.0.1:7860")
    picture = f"/grpo/pictures/runs/{run_id}/images/step-000001/g0-k0.png"
    for path in ("/", "/config", "/grpo/pulse", "/grpo/static/core.js", picture, "/gradio_api/info"):
        answer = client.get(path)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith("Basic")
    stop = {"run": run_id, "command": "stop"}
    assert client.post("/grpo/live/command", json=stop, headers={"X-GRPO": "1"}).status_code == 401
    assert store.run(run_id).state == "queued"
    for user, password in (("ada", ""), ("ada", "s3"), ("", "s3:cret"), ("ada", "s3:cret ")):
        assert client.get("/grpo/pulse", headers=login(user, password)).status_code == 401
    assert client.get("/grpo/pulse", headers={"Authorization": "Basic !!"}).status_code == 401
    assert client.get("/grpo/pulse", headers=login("ada", "s3:cret")).status_code == 200


def test_answers_forbid_what_comes_from_elsewhere(client: TestClient) -> None:
    answer = client.get("/")
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "http://" not in answer.text.replace("http://127.0.0.1", "").replace("http://www.w3.org", "")


def test_the_pulse_names_what_is_active_and_moves_with_the_database(client: TestClient, store: Store) -> None:
    first = client.get("/grpo/pulse").json()
    made = store.create_run(RunConfig.load("tiny", ["recording.name=<b>Mine</b>"]))
    second = client.get("/grpo/pulse").json()
    assert second["revision"] > first["revision"]
    assert [run["id"] for run in second["active"]] == [*(run["id"] for run in first["active"]), made]
    assert (second["active"][-1]["name"], second["active"][-1]["state"]) == ("<b>Mine</b>", "queued")
