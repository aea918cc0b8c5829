"""Models from the hub: fetched once, with progress; what goes wrong is one sentence before any model loads.

The hub is a small server on this machine, asked by the hub's own client; its errors are that client's own.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_runs import create, small
from hub_server import HubServer, hub_server
from huggingface_hub import constants
from model_folders import write_policy

from grpo_engine import hub, loading
from grpo_engine.__main__ import main
from grpo_engine.config import ConfigError, RunConfig
from grpo_engine.control import RunControl
from grpo_engine.doctor import examine, print_findings
from grpo_engine.model_files import files_of_pipeline, files_of_policy, missing_of_pipeline, missing_of_policy
from grpo_engine.plan import Plan
from grpo_engine.session import Session
from grpo_engine.store import Store
from grpo_engine.tiny import WEIGHTS

CPU = torch.device("cpu")
POLICY, IMAGE, REWARD = "owner/policy", "owner/image", "owner/reward"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy in several files, as a repository holds it, with files that nobody needs."""
    folder = write_policy(tmp_path_factory.mktemp("hub") / "policy", "qwen3_vl", shard="100KB")
    (folder / "README.md").write_text("about")
    (folder / "model.gguf").write_bytes(b"x" * 1000)
    return folder


@pytest.fixture
def server(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The hub with a policy on it, asked by this process, whose cache is empty."""
    with hub_server() as running:
        running.repositories[POLICY] = published
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, running.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        hub._answers.clear()
        hub._silent_until.clear()
        yield running


def config(*overrides: str) -> RunConfig:
    return small(f"models.policy.path={POLICY}", *overrides)


def refused(settings: RunConfig) -> str:
    """What the plan says, one sentence, before a single file was downloaded."""
    with pytest.raises(ConfigError) as caught:
        Plan(settings)
    sentence = str(caught.value)
    assert sentence.endswith(".") and "\n" not in sentence and "Error" not in sentence
    assert not [file for file in Path(constants.HF_HUB_CACHE).rglob("*.safetensors")]
    return sentence


# -- fetching ------------------------------------------------------------------------------------------------


def test_a_model_is_fetched_once_with_progress_and_then_loads_without_a_network(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {name for name in server.files(POLICY) if name not in ("README.md", "model.gguf")}
    (download,) = Plan(config()).downloads
    assert {name for name, _ in download.files} == wanted
    assert download.bytes == sum(server.files(POLICY)[name].stat().st_size for name in wanted)
    heard: list[tuple[str, int, int]] = []
    loading.load_environment(config(), told=lambda name, done, total: heard.append((name, done, total)))
    progress = [(done, total) for name, done, total in heard if name == f"downloading {POLICY} (MB)"]
    assert len(progress) > len(wanted) and progress == sorted(progress)
    assert {total for _, total in progress} == {max(1, download.bytes // hub.MB)}
    assert [name for name, _, _ in heard if not name.startswith("downloading")] == [
        "loading policy", "loading image model", "loading reward", "models loaded",
    ]  # fmt: skip
    fetched = {path.rpartition("/")[2] for method, path in server.asked if method == "GET" and "resolve" in path}
    assert fetched == wanted

    server.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert Plan(config()).downloads == []
    loading.load_policy(config(), CPU)
    assert server.asked == []


def test_a_pipeline_is_fetched_without_variants_and_parts_that_are_not_loaded(
    server: HubServer, tmp_path: Path
) -> None:
    folder = tmp_path / "image"
    shutil.copytree(WEIGHTS / "image", folder)
    extra = (
        "transformer/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/pytorch_model.bin",
        "sd3.safetensors",
    )
    for name in extra:
        (folder / name).write_bytes(b"x")
    server.repositories[IMAGE] = folder
    settings = small(f"models.image.path={IMAGE}")
    (download,) = Plan(settings).downloads
    names = {name for name, _ in download.files}
    assert names == {str(file.relative_to(WEIGHTS / "image")) for file in (WEIGHTS / "image").rglob("*.*")} - {
        "model_index.json"  # read already, to know the others
    }
    hub.fetch(settings, lambda name, done, total: None)
    assert Plan(settings).downloads == []
    images = loading.load_images(settings, CPU)
    assert images is not None


def test_a_reward_model_is_fetched_with_its_tokenizer(server: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "reward"
    shutil.copytree(WEIGHTS / "reward", folder)
    about = json.loads((folder / "open_clip_config.json").read_text())
    about["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = REWARD  # as published: the repository itself
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    server.repositories[REWARD] = folder
    settings = small(f"models.reward.path=hf-hub:{REWARD}")
    (download,) = hub.check(settings)
    assert {name for name, _ in download.files} == {file.name for file in (WEIGHTS / "reward").iterdir()}
    assert Plan(settings).prompts.prompts  # whose length is counted by that tokenizer
    hub.fetch(settings, lambda name, done, total: None)
    assert hub.check(settings) == []


def test_weights_by_tag_and_a_head_are_single_files_of_repositories() -> None:
    settings = small(
        "models.reward.path=ViT-B-16-SigLIP",
        "models.reward.pretrained=webli",
        "models.reward.aesthetic=some/heads/a.pth",
    )
    found = [(one.setting.rpartition(".")[2], one.name, one.kind, one.file) for one in hub.repositories(settings)]
    assert found == [
        ("pretrained", "timm/ViT-B-16-SigLIP", "file", "open_clip_model.safetensors"),
        ("path", "timm/ViT-B-16-SigLIP", "tokenizer", ""),
        ("aesthetic", "some/heads", "file", "a.pth"),
    ]
    assert hub.repositories(small()) == []


def test_a_stop_ends_a_download_and_the_next_start_goes_on_from_there(server: HubServer, tmp_path: Path) -> None:
    """Through a session, whose control is asked whenever progress is told."""

    class StopInDownload(RunControl):
        def poll(self) -> None:
            if any(path.endswith(".safetensors") for method, path in server.asked if method == "GET"):
                self.command("stop")
            super().poll()

    with Store(tmp_path / "runs.db") as store:
        run_id = create(store, config())
        assert Session(store, run_id, StopInDownload()).run() == "stopped"
    before = {name for name, _ in hub.check(config())[0].files}
    assert before and len(before) < len(server.files(POLICY)) - 2, "some files are here, some are not"
    server.asked.clear()
    hub.fetch(config(), lambda name, done, total: None)
    fetched = {path.rpartition("/")[2] for method, path in server.asked if method == "GET" and "resolve" in path}
    assert fetched == before


def test_doctor_says_what_is_in_the_cache_and_what_must_be_downloaded(
    server: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.announced["model.safetensors.index.json"] = 3 * 10**9
    overrides = [f"models.policy.path={POLICY}", "placement.plan=cpu"]
    findings = examine(str(tmp_path / "runs.db"), "tiny", overrides)
    assert [(one["model"], one["where"]) for one in findings["models"]] == [
        ("policy", "hub"), ("image", "embedded"), ("reward", "embedded"),
    ]  # fmt: skip
    assert findings["models"][0]["download_gb"] == pytest.approx(3.0, abs=0.01)
    print_findings(findings)
    assert f"policy model {POLICY}: to download (3.0 GB)." in capsys.readouterr().out
    server.announced.clear()
    hub.fetch(config(), lambda name, done, total: None)
    findings = examine(str(tmp_path / "runs.db"), "tiny", overrides)
    assert findings["models"][0]["where"] == "cache" and findings["problems"] == []


# -- what can go wrong ---------------------------------------------------------------------------------------


def test_a_gated_repository_needs_a_token_with_access(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.gated.add(POLICY)
    head = "models.policy.path is 'owner/policy', a gated repository, and "
    assert refused(config()).startswith(f"{head}no token is set: accept its licence on its page, then set HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "mine")
    assert refused(config()).startswith(f"{head}the token in HF_TOKEN has no access to it: accept its licence")
    monkeypatch.setenv("HF_TOKEN", "good")
    assert Plan(config()).downloads


def test_a_wrong_name_and_a_wrong_token_are_told_apart(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = refused(small("models.policy.path=owner/polcy"))
    assert wrong.startswith(
        "models.policy.path is 'owner/polcy', but there is no such folder here and no such repository"
    )
    assert "HF_TOKEN" in wrong
    assert "no name of a hub repository" in refused(small("models.policy.path=a/b/c"))
    assert "has no model_index.json" in refused(small(f"models.image.path={POLICY}"))
    assert "which has no such file" in refused(small(f"models.reward.aesthetic={POLICY}/head.safetensors"))
    monkeypatch.setenv("HF_TOKEN", "expired")
    assert "the hub refuses the token in HF_TOKEN as invalid or expired" in refused(config())


def test_without_a_network_or_in_offline_mode_the_cache_is_named(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as changed:
        changed.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
        sentence = refused(config())
        assert hub._silent_until["http://127.0.0.1:9"] > time.monotonic()  # and left alone for a while
        assert refused(config()) == sentence
    assert f"not in the cache {constants.HF_HUB_CACHE}, and the hub can't be reached" in sentence
    with monkeypatch.context() as changed:
        changed.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "does not have it, and offline mode (HF_HUB_OFFLINE) forbids" in refused(config())
        assert server.asked == []
    hub.fetch(config(), lambda name, done, total: None)
    folder = next(Path(constants.HF_HUB_CACHE).rglob("model-00002-of-*.safetensors"))
    folder.unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=rf"lacks {folder.name}, and offline mode"):
        Plan(config())


def test_a_disk_too_small_for_the_download_is_refused_before_it_begins(server: HubServer) -> None:
    server.announced["model.safetensors.index.json"] = 10**18
    sentence = refused(config())
    assert "owner/policy must be downloaded (1000000000.0 GB)" in sentence and "set HF_HOME" in sentence


def test_an_interrupted_download_says_so_and_is_taken_up_again(server: HubServer) -> None:
    name = "model-00002-of-"
    broken = next(file for file in server.files(POLICY) if file.startswith(name))
    server.broken[broken] = 0
    with pytest.raises(ConfigError) as caught:
        hub.fetch(config(), lambda name, done, total: None)
    sentence = str(caught.value)
    assert f"broke off at {broken}" in sentence and "whole files are kept" in sentence and "\n" not in sentence
    kept = {file.name for file in Path(constants.HF_HUB_CACHE).rglob("snapshots/*/*")}
    assert broken not in kept and any(file.startswith("model-00001-of-") for file in kept)
    server.broken.clear()
    server.asked.clear()
    hub.fetch(config(), lambda name, done, total: None)
    fetched = {path.rpartition("/")[2] for method, path in server.asked if method == "GET" and "resolve" in path}
    assert broken in fetched and not fetched & kept
    loading.load_policy(config(), CPU)


def test_the_command_line_says_how_much_will_be_downloaded(
    server: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.announced["model.safetensors.index.json"] = 2 * 10**9
    settings = ["--set", f"models.policy.path={POLICY}", "--set", "placement.plan=cpu"]
    assert main(["train", "--check", "--db", str(tmp_path / "runs.db"), *settings]) == 0
    assert "note: owner/policy must be downloaded first, 2.00 GB." in capsys.readouterr().out


def test_the_command_line_refuses_before_a_run_is_made(
    server: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.gated.add(POLICY)
    db = tmp_path / "runs.db"
    code = main(["train", "--db", str(db), "--set", f"models.policy.path={POLICY}", "--set", "placement.plan=cpu"])
    assert code == 2 and not db.exists()
    assert capsys.readouterr().err.startswith("Refused: models.policy.path is 'owner/policy', a gated repository")


# -- folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["config.json", "model-00002-of-", "tokenizer.json"])
def test_an_incomplete_policy_folder_is_refused_by_the_file_it_lacks(
    published: Path, tmp_path: Path, lost: str
) -> None:
    folder = tmp_path / "policy"
    shutil.copytree(published, folder)
    assert missing_of_policy(folder) == []
    file = next(file for file in folder.iterdir() if file.name.startswith(lost))
    file.unlink()
    with pytest.raises(ConfigError, match=rf"models.policy.path is .* that folder has no {re.escape(file.name)}; copy"):
        Plan(small(f"models.policy.path={folder}"))


def test_a_shard_whose_copy_broke_off_is_noticed(published: Path, tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    shutil.copytree(published, folder)
    file = next(folder.glob("model-00003-of-*"))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ConfigError, match=rf"has no whole {file.name} \(it is cut short\)"):
        Plan(small(f"models.policy.path={folder}"))


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("model_index.json", "model_index.json"),
        ("vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"),
        ("text_encoder/config.json", "text_encoder/config.json"),
        ("scheduler", "scheduler/any file"),
        ("tokenizer_2/tokenizer_config.json", "tokenizer_2/tokenizer_config.json"),
    ],
)
def test_an_incomplete_pipeline_is_refused_by_the_file_it_lacks(tmp_path: Path, lost: str, named: str) -> None:
    folder = tmp_path / "image"
    shutil.copytree(WEIGHTS / "image", folder)
    settings = small(f"models.image.path={folder}")
    assert missing_of_pipeline(folder, settings.models.image) == []
    gone = folder / lost
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    assert missing_of_pipeline(folder, settings.models.image) == [named]
    with pytest.raises(ConfigError, match=rf"models.image.path is .* that folder has no {re.escape(named)}; copy"):
        Plan(settings)


def test_a_reward_folder_without_weights_never_scores_at_random(tmp_path: Path) -> None:
    folder = tmp_path / "reward"
    shutil.copytree(WEIGHTS / "reward", folder)
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="models.reward.path is .* has no open_clip_model.safetensors"):
        Plan(small(f"models.reward.path={folder}"))


def test_pickles_are_taken_only_where_there_is_nothing_else() -> None:
    texts = ["config.json", "tokenizer.json"]
    pickles = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"]
    safe = ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]
    others = ["original/model.safetensors", "model.fp16.safetensors", "consolidated.pth", "README.md"]
    assert set(files_of_policy([*texts, *pickles, *safe, *others])) == {*texts, *safe}
    assert set(files_of_policy([*texts, *pickles, *others])) == {*texts, *pickles}
    index = {"_class_name": "P", "vae": ["diffusers", "A"], "gone": [None, None]}
    names = ["vae/config.json", "vae/diffusion_pytorch_model.bin", "gone/config.json", "unet/config.json"]
    assert files_of_pipeline(names, index, small().models.image) == ["model_index.json", *names[:2]]
