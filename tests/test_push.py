"""Pushing an export: through the hub's real client to a small hub on this machine, and never unasked."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import saved_policy
from store_samples import training_run
from test_cli import call

from grpo_engine.config import ConfigError
from grpo_engine.push import PushFailed, check_repository, push
from grpo_engine.store import Store

TOKEN = "hf_of_a_test"


@dataclass
class Hub:
    """What the small hub holds and was asked; ``answers`` are statuses it gives instead of an answer, by path."""

    url: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    answers: dict[str, tuple[int, str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def reply(self, status: int, data: Any, **headers: str) -> None:
            body = json.dumps(data).encode()
            self.send_response(status)
            headers |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.partition("?")[0]
            if not path.startswith(("/api/models/", "/api/repos/", "/api/validate-yaml")):
                return self.reply(404, {})  # what the client wants to know besides
            hub.asked.append(f"{self.command} {path}")
            if path != "/api/validate-yaml":  # which the client asks without one
                hub.tokens.add(self.headers.get("Authorization"))
            for part, (status, told) in hub.answers.items():
                if part in path:
                    return self.reply(status, {"error": told})
            if path == "/api/validate-yaml":
                return self.reply(200, {"errors": [], "warnings": []})
            if path == "/api/repos/create":
                data = json.loads(body)
                name = f"{data['organization']}/{data['name']}"
                if name in hub.files:
                    return self.reply(409, {"error": "You already created it", "url": f"{hub.url}/{name}"})
                hub.files[name] = {".gitattributes": b""}
                hub.private[name] = data.get("visibility") == "private"
                return self.reply(200, {"url": f"{hub.url}/{name}"})
            match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/main)?", path)
            assert match is not None, path
            name, what = match[1], match[2]
            if name not in hub.files:
                return self.reply(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            files = hub.files[name]
            if what is None:
                siblings = [{"rfilename": file} for file in files]
                return self.reply(200, {"id": name, "private": hub.private[name], "siblings": siblings, "tags": []})
            if what == "tree":
                return self.reply(200, [{"type": "file", "path": file, "oid": "0", "size": 1} for file in files])
            if what == "preupload":
                paths = [file["path"] for file in json.loads(body)["files"]]
                modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
                return self.reply(200, {"files": modes})
            assert what == "commit"
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del files[line["value"]["path"]]
            return self.reply(200, {"commitUrl": f"{hub.url}/{name}/commit/1", "commitOid": "1"})

        do_GET = do_POST = do_PUT = do_HEAD = answer  # noqa: N815 (http.server's names)

    return Handler


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), handler(hub)) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield hub
        server.shutdown()


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with one run that has a checkpoint."""
    folder = tmp_path_factory.mktemp("push")
    base = saved_policy.write_base(folder / "base")
    policy = saved_policy.load_policy(base)
    with Store(folder / "runs.db") as store:
        run_id = training_run(store)
        trained = (policy, saved_policy.new_optimizer(policy))
        saved_policy.save(store.run_dir(run_id), base, trained, 2)
        store.set_state(run_id, "stopped")
    return folder / "runs.db"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_an_export_is_pushed_and_a_newer_one_takes_its_place(hub: Hub, db: Path, tmp_path: Path) -> None:
    outcome = call("export", "last", "--db", db, "--to", tmp_path / "out", "--push", "me/rewriter", "--private")
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[-1] == f"Pushed to {hub.url}/me/rewriter"
    assert hub.private == {"me/rewriter": True} and hub.tokens == {f"Bearer {TOKEN}"}
    files = hub.files["me/rewriter"]
    assert files == contents(tmp_path / "out") | {".gitattributes": b""}
    outcome = call("export", "last", "--db", db, "--format", "pth", "--push", "me/rewriter")
    assert outcome.code == 0, outcome.err
    assert sorted(files) == [".gitattributes", "README.md", "config.yaml", "metrics.json", "pure_grpo_policy.pth"]


def test_nothing_is_sent_without_the_flag(hub: Hub, db: Path, tmp_path: Path) -> None:
    assert call("export", "last", "--db", db, "--to", tmp_path / "out").code == 0
    assert hub.asked == []


def test_a_repository_of_something_else_is_left_alone(hub: Hub, db: Path, tmp_path: Path) -> None:
    hub.files["me/thesis"], hub.private["me/thesis"] = {"thesis.txt": b"work"}, False
    outcome = call("export", "last", "--db", db, "--to", tmp_path / "out", "--push", "me/thesis")
    assert outcome.code == 1 and "me/thesis holds something else than an export" in outcome.err
    assert f"The export is in {tmp_path / 'out'}" in outcome.err and (tmp_path / "out" / "README.md").exists()
    assert hub.files["me/thesis"] == {"thesis.txt": b"work"}


def test_a_private_export_never_goes_into_a_public_repository(hub: Hub, tmp_path: Path) -> None:
    hub.files["me/open"], hub.private["me/open"] = {}, False
    with pytest.raises(PushFailed, match="public already; make it private on the hub first"):
        push(tmp_path, "me/open", private=True, message="m")
    assert all(line.startswith("GET") for line in hub.asked)


@pytest.mark.parametrize(
    ("path", "status", "told", "words"),
    [
        ("/api/repos/create", 401, "Invalid username or password.", "does not accept the token"),
        ("/api/repos/create", 403, "no rights", "may not write to me/rewriter .* me or a member"),
        ("/api/repos/create", 402, "Private repository\nlimit reached", r"refused .* \(402: Private repository limit"),
        ("/api/models/me/rewriter", 500, "oops", "has trouble just now .500."),
        ("/commit/", 403, "no rights", "may not write to me/rewriter"),
    ],
)
def test_what_the_hub_refuses_is_said_in_a_sentence(
    hub: Hub, tmp_path: Path, path: str, status: int, told: str, words: str
) -> None:
    (tmp_path / "README.md").write_text("x")
    hub.answers[path] = (status, told)
    with pytest.raises(PushFailed, match=words) as refused:
        push(tmp_path, "me/rewriter", private=False, message="m")
    assert "\n" not in str(refused.value) and TOKEN not in str(refused.value)
    assert set(hub.files.get("me/rewriter", ())) <= {".gitattributes"}


def test_a_hub_that_is_not_there_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(PushFailed, match=r"The hub at http://127.0.0.1:9 can't be reached .*; check the network"):
        push(tmp_path, "me/rewriter", private=False, message="m")


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def logged_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nowhere/token")


@pytest.mark.parametrize(
    ("repository", "change", "words"),
    [
        ("rewriter", None, "it should be owner/name"),
        ("me/../x", None, "it should be owner/name"),
        ("me/a--b", None, "it should be owner/name"),
        ("me/" + "x" * 97, None, "at most 96"),
        ("me/rewriter", offline, "HF_HUB_OFFLINE is set"),
        ("me/rewriter", logged_out, "Nobody is logged in"),
    ],
)
def test_what_can_not_be_pushed_is_refused_before_anything_is_exported(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, repository: str, change: Callable[..., None] | None, words: str
) -> None:
    if change is not None:
        change(monkeypatch)
    with pytest.raises(ConfigError, match=words):
        check_repository(repository)
    assert hub.asked == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--to names a folder, --push a repository"),
        (["--private", "--to", "x"], "--private is for --push"),
        (["--format", "bundle", "--push", "me/x"], "not for a bundle"),
        (["--format", "bundle"], "--to must name"),
    ],
)
def test_options_that_do_not_go_together_are_refused(db: Path, arguments: list[str], words: str) -> None:
    outcome = call("export", "last", "--db", db, *arguments)
    assert outcome.code == 2 and words in outcome.err
