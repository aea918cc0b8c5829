"""What the started app refuses, tried over HTTP as somebody would who means no good: ``python app.py --auth ...``."""

from __future__ import annotations

import base64
import http.client
import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from fastapi.routing import APIRoute
from served import Served
from store_samples import fill, training_run

from grpo_engine.prompts import MAX_FILE_BYTES, MAX_PROMPTS
from grpo_engine.store import Store
from ui.app import SCREENS
from ui.context import Context
from ui.guard import MOST_BYTES
from ui.microscope import routes as microscope
from ui.worker import Worker

USER, PASSWORD = "ada", "s3:cret"
SECRET = b"the weights of somebody's policy"
SCRIPT = '<script>alert(1)</script><img src=x onerror="alert(2)">'
STRANGE_RUNS = ("0099-none-abcd", "../../../etc/passwd", SCRIPT, "a" * 5000, "%00", "\N{RIGHT-TO-LEFT OVERRIDE}x", "")
FILES = ("import", "prompts/upload")  # their body is a file, not JSON
BODILESS = ("/grpo/playground/prepare", "/grpo/system/check", "/grpo/system/doctor")  # nothing in them to be wrong


class Door:
    """Requests as they are written, without a client that tidies their paths."""

    def __init__(self, served: Served, root: Path, run_id: str) -> None:
        self.served, self.root, self.run_id = served, root, run_id
        self.host = urlsplit(served.url).netloc

    def ask(
        self, method: str, path: str, body: Any = None, *, login: str | None = f"{USER}:{PASSWORD}", **headers: str
    ) -> tuple[int, bytes]:
        """Status and body. ``body``: bytes, an iterable of bytes, or data for JSON. An action's header is added."""
        sent = {"X-GRPO": "1"} if method == "POST" else {}
        if login is not None:
            sent["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
        if isinstance(body, dict | list):
            body = json.dumps(body).encode()
        if method == "POST" and "prompts/upload" not in path and "import" not in path:
            sent["Content-Type"] = "application/json"
        connection = http.client.HTTPConnection(self.host, timeout=120)
        try:
            connection.request(method, path, body, sent | {k.replace("_", "-"): v for k, v in headers.items()})
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        assert b"Traceback" not in content and b'File "' not in content, content[:500]
        assert SECRET not in content and not content.startswith(b"SQLite format")
        return answer.status, content

    def refused(self, method: str, path: str, body: Any = None, **options: Any) -> int:
        """The status of a refusal: a sentence in JSON, and nothing worse than that."""
        status, content = self.ask(method, path, body, **options)
        assert 400 <= status < 500, (method, path, str(body)[:80], status, content[:300])
        if path.startswith("/grpo/"):
            told = json.loads(content)
            assert isinstance(told.get("error", told.get("detail")), str), (path, content[:300])
        return status

    def state(self) -> tuple[str, list[str]]:
        """Everything recorded: the database's rows, and the files beside it."""
        database = sqlite3.connect(f"file:{self.root / 'runs.db'}?mode=ro", uri=True)
        try:
            rows = "\n".join(database.iterdump())
        finally:
            database.close()
        return rows, sorted(
            f"{path.relative_to(self.root)} {path.stat().st_size}"
            for path in self.root.rglob("*")
            if path.is_file() and path.name != "app.log" and not path.name.startswith("runs.db")
        )


@pytest.fixture(scope="module")
def door(serve: Callable[..., Served], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """A started app with a login and one finished run; at the end it still answers, and no request broke it."""
    root = tmp_path_factory.mktemp("closed")
    with Store(root / "runs.db") as store:
        run_id = training_run(store)
        fill(store, run_id, 2)
        (store.run_dir(run_id) / "checkpoints").mkdir(exist_ok=True)
        for name in ("adapter_model.safetensors", "picture.png"):
            (store.run_dir(run_id) / "checkpoints" / name).write_bytes(SECRET)
        store.set_state(run_id, "stopped")
    found = Door(serve(root, "--auth", f"{USER}:{PASSWORD}"), root, run_id)
    yield found
    assert found.ask("GET", "/grpo/pulse")[0] == 200
    assert "Traceback" not in found.served.log()


@pytest.fixture
def unchanged(door: Door) -> Iterator[None]:
    """Nothing is recorded, changed or left behind by what the test asks."""
    before = door.state()
    yield
    assert door.state() == before


def endpoints(tmp_path: Path, method: str) -> list[str]:
    """Paths of every route of every screen; a place for a name in one is filled with one."""
    with Store(tmp_path / "runs.db") as store:
        context = Context(store, Worker(store))
        routers = [screen.routes(context) for _, _, screen in SCREENS] + [microscope(context)]
    return [
        f"/grpo{route.path}".replace("{token}", "nothing")
        for router in routers
        for route in router.routes
        if isinstance(route, APIRoute) and method in route.methods
    ]


def test_without_the_login_nothing_is_answered_and_nothing_done(door: Door, unchanged: None, tmp_path: Path) -> None:
    pages = ["/", "/config", "/theme.css", "/grpo/pulse", "/grpo/static/app.js", "/grpo/static/plotly.min.js",
             f"/grpo/pictures/{door.run_id}", *endpoints(tmp_path, "GET")]  # fmt: skip
    assert len(pages) > 25
    for wrong in (None, f"{USER}:", f"{USER}:{PASSWORD}x", f":{PASSWORD}", f"{USER}:s3"):
        for path in pages if wrong is None else pages[:4]:
            assert door.ask("GET", path, login=wrong)[0] == 401, path
    actions = endpoints(tmp_path, "POST")
    assert len(actions) > 25
    for path in actions:
        assert door.ask("POST", path, {"run": door.run_id}, login=None)[0] == 401, path
        if path not in BODILESS:  # with the login, from another site's page
            assert door.ask("POST", path, {"run": door.run_id}, X_GRPO="0")[0] == 403, path


def test_no_path_leads_out_of_the_pictures(door: Door, unchanged: None) -> None:
    run = f"runs/{door.run_id}"
    ways_out = [
        "runs.db", "runs.db-wal", f"{run}/config.yaml", f"{run}/checkpoints/picture.png",
        f"{run}/checkpoints/adapter_model.safetensors", f"{run}/images/../checkpoints/picture.png",
        f"{run}/images/..%2fcheckpoints%2fpicture.png", f"{run}/images/%2e%2e/checkpoints/picture.png",
        f"{run}/images/step-000001/....//....//checkpoints/picture.png", "../runs.db", "..%2f..%2fetc%2fpasswd",
        "%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/etc/passwd", "C:\\windows\\win.ini", f"{run}/images/%00.png",
        f"{run}/images/a%0a.png", "%c0%ae%c0%ae/runs.db", f"{run}\\images\\..\\config.yaml", f"{run}/images/",
    ]  # fmt: skip
    ours = ["/grpo/pictures/", "/grpo/static/", "/grpo/system/download/", "/grpo/playground/picture/", "/"]
    gradios = ["/gradio_api/file=", "/file=", "/static/", "/assets/", "/svelte/", "/gradio_api/static/"]
    for prefix in ours + gradios:
        for way in ways_out:
            door.refused("GET", prefix + way)
    for name in ("/etc/passwd", str(door.root / "runs.db"), "../runs.db", "prompts/../../runs.db"):
        for question in ("prompts", "prompts/rows"):
            door.refused("GET", f"/grpo/train/{question}?value={name}")


def test_malformed_bodies_are_refused_at_every_action(door: Door, unchanged: None, tmp_path: Path) -> None:
    deep = b'{"run":' + b"[" * 20_000 + b"]" * 20_000 + b"}"
    bodies = [b"", b"{", b"[]", b"null", b"NaN", b'"x"', b"7", b"\xff\xfe\x00\x01", b'{"run": 1e999}', b'{"run": {}}',
              b'{"nobody": "asked"}', b'{"run": "\\ud800", "runs": ["\\ud800"], "name": "\\udfff"}', deep]  # fmt: skip
    for path in endpoints(tmp_path, "POST"):
        if path in BODILESS or path.endswith(FILES):
            continue
        for body in bodies:
            door.refused("POST", path, body)
            door.refused("POST", path, body, Content_Type="text/plain")


def test_runs_that_are_not_there_are_refused_at_every_question_and_action(
    door: Door, unchanged: None, tmp_path: Path
) -> None:
    gone = "0099-none-abcd"
    asked = "metrics=reward_mean&prompt=p&step=1&compare=trained_vs_untrained&kind=trained"
    screens = {
        "live": ("figures", "pictures", "state"), "train": ("run",), "system": ("export",), "microscope": ("step",),
        "compare": ("curves", "settings", "prompts", "pictures", "curves.csv"),
        "gallery": ("overview", "prompts", "agreement", "films", "film", "blind"),
    }  # fmt: skip
    for path in (f"{screen}/{name}" for screen, names in screens.items() for name in names):
        for run in STRANGE_RUNS[: -1 if path == "live/state" else None]:  # live/state takes none for the newest
            name = quote(run, safe="")
            status = door.refused("GET", f"/grpo/{path}?run={name}&runs={name}&{asked}")
            assert status == 404 or run != gone, (path, run)
    bodies: dict[str, dict[str, Any]] = {
        "live/command": {"command": "stop"}, "compare/rename": {"name": "x"}, "compare/tags": {"tags": []},
        "compare/notes": {"notes": ""}, "system/export": {"format": "bundle"}, "system/queue/remove": {},
        "system/queue/put-back": {}, "gallery/forget": {"at": 1, "compare": "trained_vs_untrained"},
    }  # fmt: skip
    for path, body in bodies.items():
        for run in STRANGE_RUNS:
            door.refused("POST", f"/grpo/{path}", {**body, "run": run})
    for run in STRANGE_RUNS:
        door.refused("POST", "/grpo/compare/delete", {"runs": [door.run_id, run]})  # all of them, or none
    column = {"kind": "checkpoint", "run": gone}
    door.refused("POST", "/grpo/playground/generate", {"prompt": "a disc", "columns": [column]})


def test_too_large_bodies_are_cut_off(door: Door, unchanged: None) -> None:
    block = b"x" * 2**20
    for path in ("live/command", "system/import", "train/prompts/upload"):
        announced = door.ask("POST", f"/grpo/{path}", b"", Content_Length=str(MOST_BYTES + 1))[0]
        assert announced == 413
        try:
            streamed = door.ask("POST", f"/grpo/{path}", iter([block] * (MOST_BYTES // len(block) + 2)))[0]
        except (BrokenPipeError, ConnectionResetError):  # it had heard enough
            continue
        assert streamed == 413
    assert door.refused("POST", "/grpo/train/prompts/upload", b"a" * (MAX_FILE_BYTES + 1)) == 413


def test_files_that_are_none_of_ours_are_refused_and_leave_nothing(door: Door, unchanged: None) -> None:
    junk = bytes(range(256)) * 64
    for name in ("x.txt", "x.csv", "x.jsonl", "x.exe", "../../x.txt", ""):
        door.refused("POST", "/grpo/train/prompts/upload", junk, X_Name=name)
    door.refused("POST", "/grpo/train/prompts/upload", b"", X_Name="x.txt")
    many = b"\n".join(b"a red disc %d" % number for number in range(MAX_PROMPTS + 1))
    assert door.refused("POST", "/grpo/train/prompts/upload", many, X_Name="many.txt") in (413, 422)
    rows = [{"id": "", "text": f"a disc {n}", "tier": "basic", "split": "train"} for n in range(MAX_PROMPTS + 1)]
    door.refused("POST", "/grpo/train/prompts/save", {"name": "many", "rows": rows})
    door.refused("POST", "/grpo/system/import", b"")
    status, content = door.ask("POST", "/grpo/system/import", junk, X_Name="..%2F..%2Fx.zip")
    assert status == 200  # a bundle is looked at after the answer
    token = json.loads(content)["job"]["token"]
    deadline = time.monotonic() + 60
    while True:
        jobs = json.loads(door.ask("GET", "/grpo/system/state")[1])["jobs"]
        (job,) = [job for job in jobs if job["token"] == token]
        if job["state"] not in ("waiting", "working"):
            break
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert job["state"] == "failed" and "bundle" in job["message"]
    assert door.ask("POST", "/grpo/system/discard", {"token": token})[0] == 200


def test_as_many_prompts_as_a_set_may_have_are_taken_whole_and_their_markup_is_text(door: Door) -> None:
    lines = [f"{SCRIPT} {number}" for number in range(MAX_PROMPTS)]
    status, content = door.ask("POST", "/grpo/train/prompts/upload", "\n".join(lines).encode(), X_Name="all.txt")
    assert status == 200
    status, content = door.ask("GET", f"/grpo/train/prompts/rows?value={json.loads(content)['value']}")
    assert status == 200
    assert sorted(row["text"] for row in json.loads(content)["rows"]) == sorted(lines)


def test_markup_in_names_is_kept_as_text_and_answered_as_data(door: Door) -> None:
    body = {"run": door.run_id, "name": SCRIPT[:60]}
    connection = http.client.HTTPConnection(door.host, timeout=60)
    login = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    headers = {"Authorization": f"Basic {login}", "X-GRPO": "1", "Content-Type": "application/json"}
    connection.request("POST", "/grpo/compare/rename", json.dumps(body), headers)
    answer = connection.getresponse()
    assert json.loads(answer.read())["run"]["name"] == body["name"]
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    connection.close()
    assert b"alert(1)" not in door.ask("GET", "/")[1]
    too_long = {"run": door.run_id, "name": "n" * 3000}
    door.refused("POST", "/grpo/compare/rename", too_long)
