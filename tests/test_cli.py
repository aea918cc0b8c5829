"""The command line: what it does, prints and refuses, and the exit codes that say so."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import flags, small, wait_until
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer

from grpo_engine.__main__ import main
from grpo_engine.checkpoint import verify_checkpoint
from grpo_engine.config import ROOT, RunConfig
from grpo_engine.store import Store, StoreError
from grpo_engine.tiny import WEIGHTS


@dataclass
class Outcome:
    """Of one command."""

    code: int
    out: str
    err: str


def call(*arguments: object) -> Outcome:
    """The command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as leave:  # argparse
            code = int(leave.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


@dataclass
class Finished:
    """A run that ``train`` has carried to its end."""

    db: Path
    run: str
    outcome: Outcome


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    db = tmp_path_factory.mktemp("cli") / "runs.db"
    outcome = call("train", "--db", db, *flags("recording.name=the first", "recording.tags=[a, b]"))
    with Store(db, read_only=True) as store:
        (run,) = store.runs()
    return Finished(db, run.id, outcome)


# -- training ------------------------------------------------------------------------------------------------


def test_train_follows_a_run_to_its_report(finished: Finished) -> None:
    outcome = finished.outcome
    assert outcome.code == 0, outcome.err
    assert outcome.err == ""
    assert outcome.out.splitlines()[0] == f"run {finished.run}"
    with Store(finished.db, read_only=True) as store:
        run = store.run(finished.run)
        folder = store.run_dir(finished.run)
    assert run.state == "finished"
    assert run.summary is not None
    words = " ".join(outcome.out.split())
    assert run.summary["sentence"] in words
    assert str(folder) in words.replace(" ", "") or str(folder) in outcome.out
    assert all(text in words for text in ("original prompt", "trained rewrite, sampled", "paired gain"))
    assert folder.parent.parent == finished.db.parent, "run folders stand beside the database"


def test_train_shows_that_it_goes_on_without_a_terminal(finished: Finished) -> None:
    states = [line.split()[0] for line in finished.outcome.out.splitlines() if line.strip()]
    shown = [state for state in states if state in {"queued", "loading", "baseline", "training", "evaluating"}]
    assert len(set(shown)) >= 2


def test_train_with_check_starts_nothing(tmp_path: Path) -> None:
    outcome = call("train", "--check", "--db", tmp_path / "runs.db", *flags())
    assert outcome.code == 0
    assert "The settings are fine" in outcome.out
    assert "policy on cpu" in outcome.out
    assert list(tmp_path.iterdir()) == []


def test_train_takes_a_file_of_settings(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(small().dump_yaml(), encoding="utf-8")
    assert call("train", "--check", "--config", path, "--db", tmp_path / "runs.db").code == 0
    path.write_text("training: {steps: none}\n", encoding="utf-8")
    outcome = call("train", "--check", "--config", path)
    assert outcome.code == 2
    assert "training.steps is 'none'" in outcome.err


def test_a_run_that_fails_exits_with_one_and_the_reason(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()  # passes every check before loading: a pipeline without its parts
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}', encoding="utf-8")
    outcome = call("train", "--db", tmp_path / "runs.db", *flags(f"models.image.path={folder}"))
    assert outcome.code == 1
    assert outcome.err.startswith("Failed: ")
    assert "StableDiffusion3Pipeline" in outcome.err
    assert "Traceback" not in outcome.err.partition("Failed: ")[2]
    with Store(tmp_path / "runs.db") as store:
        assert [run.state for run in store.runs()] == ["failed"]


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.fixture
def unloadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if any model is loaded."""

    def load(*args: object, **named: object) -> None:
        raise AssertionError("a model was loaded")

    for name in ("load_policy", "load_images", "load_reward"):
        monkeypatch.setattr(f"grpo_engine.loading.{name}", load)


@pytest.mark.usefixtures("unloadable")
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["sampling.num_rollouts=1"], "sampling.num_rollouts is 1"),
        (["training.rate=1"], "There is no setting 'training.rate'"),
        (["training.steps=ten"], "training.steps is 'ten'"),
        (["objective.clip_ratio=2"], "objective.clip_ratio is 2"),
        (["placement.reward=cuda:99"], "placement.reward is 'cuda:99'"),
        (["data.prompts=nowhere.jsonl"], "data.prompts is 'nowhere.jsonl'"),
        (["training"], "--set takes section.field=value"),
        (["recording.name='open"], "can't be read"),
        (["data.tiers=[complex]", "data.max_train_prompts=1"], "training.batch_size is 2"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_happens(
    tmp_path: Path, settings: list[str], named: str
) -> None:
    outcome = call("train", "--db", tmp_path / "runs.db", *flags(*settings))
    assert outcome.code == 2
    assert outcome.err.startswith("Refused: ")
    assert named in outcome.err
    assert len(outcome.err.splitlines()) == 1, "one sentence"
    assert "Traceback" not in outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("unloadable")
def test_an_empty_or_overlong_prompt_set_is_refused_with_its_file_and_line(tmp_path: Path) -> None:
    for content, words in (("", ["mine.txt"]), ("short one\n" + 401 * "x" + "\n", ["mine.txt", "2", "400"])):
        (tmp_path / "mine.txt").write_text(content, encoding="utf-8")
        outcome = call("train", "--db", tmp_path / "runs.db", *flags(f"data.prompts={tmp_path / 'mine.txt'}"))
        assert outcome.code == 2
        assert all(word in outcome.err for word in words), outcome.err
        assert not (tmp_path / "runs.db").exists()


@pytest.mark.usefixtures("unloadable")
@pytest.mark.parametrize("command", ["train", "resume", "evaluate", "runs", "show", "export"])
def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path, command: str) -> None:
    db = tmp_path / "runs.db"
    db.write_text("just some text that is no database\n" * 50, encoding="utf-8")
    before = db.read_bytes()
    more: dict[str, Sequence[object]] = {
        "train": flags(),
        "runs": [],
        "export": ["last", "--to", tmp_path / "out"],
    }
    outcome = call(command, "--db", db, *more.get(command, ["last"]))
    assert outcome.code == 2
    assert f"{db} is not a database" in outcome.err
    assert db.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["runs.db"]


@pytest.mark.parametrize("command", ["resume", "evaluate", "runs", "show", "export"])
def test_a_database_that_is_missing_is_refused_and_not_made(tmp_path: Path, command: str) -> None:
    more: dict[str, Sequence[object]] = {"runs": [], "export": ["last", "--to", tmp_path / "out"]}
    outcome = call(command, "--db", tmp_path / "typo.db", *more.get(command, ["last"]))
    assert outcome.code == 2
    assert "typo.db" in outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [["fly"], ["resume"], ["train", "--steps", "5"], ["export", "x", "--format", "zip"]],
)
def test_arguments_that_do_not_exist_are_refused(arguments: list[str]) -> None:
    outcome = call(*arguments)
    assert outcome.code == 2
    assert "usage:" in outcome.err


def test_without_a_command_the_help_is_shown() -> None:
    outcome = call()
    assert outcome.code == 2
    assert all(name in outcome.out for name in ("train", "resume", "evaluate", "runs", "show", "export", "doctor"))


def test_a_run_that_does_not_exist_is_refused(finished: Finished, tmp_path: Path) -> None:
    for command in ("resume", "evaluate", "show", "export"):
        more = ["--to", str(tmp_path / "out")] if command == "export" else []
        outcome = call(command, "9999-none", "--db", finished.db, *more)
        assert outcome.code == 2
        assert "There is no run '9999-none'" in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_finished_run_is_not_resumed(finished: Finished) -> None:
    outcome = call("resume", finished.run, "--db", finished.db)
    assert outcome.code == 2
    assert "is finished; there is nothing to resume" in outcome.err


# -- looking -------------------------------------------------------------------------------------------------


def test_runs_lists_them_for_people_and_for_programs(finished: Finished) -> None:
    text = call("runs", "--db", finished.db)
    assert text.code == 0
    assert finished.run in text.out
    listed = call("runs", "--json", "--db", finished.db)
    assert listed.code == 0
    (run,) = json.loads(listed.out)
    assert (run["id"], run["name"], run["state"], run["tags"]) == (finished.run, "the first", "finished", ["a", "b"])
    assert (run["step"], run["total_steps"]) == (3, 3)
    assert RunConfig.parse(run["config"]).training.steps == 3
    assert "process_token" not in run


def test_a_database_without_runs_lists_none(tmp_path: Path) -> None:
    Store(tmp_path / "runs.db").close()
    assert "No runs yet" in call("runs", "--db", tmp_path / "runs.db").out
    assert json.loads(call("runs", "--json", "--db", tmp_path / "runs.db").out) == []


@pytest.mark.parametrize("name", ["[/x]", "[bold]loud", "[link=file:///etc/passwd]here"])
def test_a_name_that_looks_like_markup_is_shown_as_it_is(tmp_path: Path, name: str) -> None:
    with Store(tmp_path / "runs.db") as store:
        store.create_run(small(f"recording.name='{name}'"))
    outcome = call("runs", "--db", tmp_path / "runs.db")
    assert outcome.code == 0
    assert name[:8] in outcome.out  # a narrow terminal may fold the rest


@pytest.mark.parametrize("name", ["last", "the first", "1", "0001-tiny"])
def test_show_finds_a_run_by_any_of_its_names(finished: Finished, name: str) -> None:
    text = call("show", name, "--db", finished.db)
    assert text.code == 0
    assert f"Run {finished.run} (the first): finished, step 3 of 3" in text.out
    shown = json.loads(call("show", name, "--json", "--db", finished.db).out)
    assert shown["id"] == finished.run
    assert shown["summary"]["sentence"] in " ".join(text.out.split())


def test_a_run_whose_process_died_is_shown_as_interrupted(tmp_path: Path) -> None:
    db = tmp_path / "runs.db"
    with Store(db) as store:
        run_id = store.create_run(small())
        store.set_state(run_id, "loading")
        with store.write() as inner:  # an owner that can't be alive
            inner.execute("UPDATE runs SET pid = 2000000000, process_token = 'gone' WHERE id = ?", [run_id])
    (run,) = json.loads(call("runs", "--json", "--db", db).out)
    assert run["state"] == "interrupted"


def test_doctor_reports_the_machine_for_people_and_for_programs(finished: Finished) -> None:
    found = call("doctor", "--json", "--db", finished.db)
    findings = json.loads(found.out)
    assert findings["problems"] == []
    assert found.code == 0
    assert "cpu" in findings["devices"]
    assert findings["devices"]["cpu"]["total_gib"] > 0
    assert findings["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert findings["disk_free_gib"] > 0
    text = call("doctor", "--db", finished.db)
    assert text.code == 0
    assert "Nothing is missing" in text.out


def test_doctor_finds_what_is_wrong_and_changes_nothing(tmp_path: Path) -> None:
    db = tmp_path / "runs.db"
    db.write_text("no database " * 100, encoding="utf-8")
    found = call("doctor", "--json", "--db", db, "--set", "placement.policy=cuda:99")
    assert found.code == 1
    problems = " ".join(json.loads(found.out)["problems"])
    assert "is not a database" in problems
    assert "placement.policy is 'cuda:99'" in problems
    assert [path.name for path in tmp_path.iterdir()] == ["runs.db"]


def test_doctor_works_where_there_is_no_folder_yet(tmp_path: Path) -> None:
    found = call("doctor", "--json", "--db", tmp_path / "not" / "yet" / "runs.db")
    assert found.code == 0
    assert json.loads(found.out)["problems"] == []
    assert list(tmp_path.iterdir()) == []


# -- measuring and exporting ---------------------------------------------------------------------------------


def test_evaluate_measures_the_saved_policy_again(finished: Finished) -> None:
    found = call("evaluate", "last", "--json", "--db", finished.db)
    assert found.code == 0, found.err
    summary = json.loads(found.out)
    with Store(finished.db, read_only=True) as store:
        assert summary == store.run(finished.run).summary
    text = call("evaluate", "last", "--checkpoint", "2", "--db", finished.db)
    assert text.code == 0
    assert "trained rewrite, greedy" in text.out


@pytest.mark.parametrize(("checkpoint", "words"), [("99", "no checkpoint of step 99"), ("newest", "--checkpoint is")])
def test_a_checkpoint_that_does_not_exist_is_refused(finished: Finished, checkpoint: str, words: str) -> None:
    outcome = call("evaluate", "last", "--checkpoint", checkpoint, "--db", finished.db)
    assert outcome.code == 2
    assert words in outcome.err


@torch.no_grad()
def logits(model: Any, tokenizer: Any) -> Tensor:
    """float32 (1, T, V) on a fixed text."""
    ids = tokenizer("rewrite: a small red circle", return_tensors="pt").input_ids
    return model.float().eval()(input_ids=ids).logits


def test_the_three_exports_load_back_to_one_policy(finished: Finished, tmp_path: Path) -> None:
    for kind in ("peft", "merged", "pth"):
        outcome = call("export", "last", "--db", finished.db, "--to", tmp_path / kind, "--format", kind)
        assert outcome.code == 0, outcome.err
        assert str(tmp_path / kind) in outcome.out
    base = WEIGHTS / "policy"
    tokenizer = AutoTokenizer.from_pretrained(base)

    def fresh() -> Any:
        return AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)

    untrained = logits(fresh(), tokenizer)
    adapted = logits(PeftModel.from_pretrained(fresh(), tmp_path / "peft"), tokenizer)
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not torch.equal(adapted, untrained), "the run has trained something"
    torch.testing.assert_close(
        logits(merged, AutoTokenizer.from_pretrained(tmp_path / "merged")), adapted, rtol=1e-4, atol=1e-4
    )
    plain = torch.load(tmp_path / "pth" / "pure_grpo_policy.pth", weights_only=True)
    with Store(finished.db, read_only=True) as store:
        state = verify_checkpoint(store.run_dir(finished.run) / "checkpoints" / "step-000003")
    assert plain["metadata"]["step"] == state.step == 3
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert plain["weights"].keys() == weights.keys()
    assert all(torch.equal(plain["weights"][name], weights[name]) for name in weights)


def test_an_export_is_replaced_only_when_forced(finished: Finished, tmp_path: Path) -> None:
    arguments = ["export", "last", "--db", finished.db, "--to", tmp_path / "out"]
    assert call(*arguments).code == 0
    refused = call(*arguments)
    assert refused.code == 2
    assert "--force" in refused.err
    assert call(*arguments, "--force").code == 0


# -- Ctrl-C --------------------------------------------------------------------------------------------------


def test_an_interrupted_run_saves_itself_exits_with_130_and_can_be_resumed(tmp_path: Path) -> None:
    db = tmp_path / "runs.db"
    command = [sys.executable, "-m", "grpo_engine", "train", "--db", str(db), *flags("training.steps=500")]
    # A shell that starts this test in the background would have its children ignore Ctrl-C.
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )

    def steps() -> int:
        if not db.exists():
            return 0
        try:
            with Store(db, read_only=True) as store:
                return max((run.step for run in store.runs()), default=0)
        except StoreError:  # not there yet
            return 0

    try:
        wait_until(lambda: steps() >= 2 or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "Traceback" not in err
    with Store(db) as store:
        (run,) = store.runs()
        assert run.state == "stopped"
        assert f"Continue with: python -m grpo_engine resume {run.id}" in " ".join(out.split())
        assert verify_checkpoint(store.run_dir(run.id) / "checkpoints" / f"step-{run.step:06d}").step == run.step
        with store.write() as inner:  # so that going on takes one more step and not five hundred
            settings = run.config | {"training": run.config["training"] | {"steps": run.step + 1}}
            inner.execute("UPDATE runs SET config = ? WHERE id = ?", [json.dumps(settings), run.id])
    resumed = call("resume", "last", "--db", db)
    assert resumed.code == 0, resumed.err
    with Store(db) as store:
        assert (store.run(run.id).state, store.run(run.id).step) == ("finished", run.step + 1)
        assert store.check() == []


# -- what is refused, and what nobody foresaw ----------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--check", "--config", "~nobody-of-that-name/x.yaml"),
        ("train", "--check", "--set", "data.prompts=~nobody-of-that-name/x.jsonl"),
        ("train", "--check", "--set", "models.policy.path=~nobody-of-that-name/model"),
        ("runs", "--db=~nobody-of-that-name/runs.db"),
    ],
)
def test_a_home_folder_that_does_not_exist_is_refused_in_a_sentence(arguments: tuple[str, ...]) -> None:
    outcome = call(*arguments)
    assert outcome.code == 2
    assert "names no home folder; write the folder out" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_database_below_the_home_folder_is_found(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(finished.db.parent))
    outcome = call("runs", "--db=~/runs.db")
    assert outcome.code == 0 and "the first" in outcome.out


def test_what_nobody_foresaw_is_a_sentence_and_its_traceback_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("grpo_engine.doctor.examine", broken)
    outcome = call("doctor")
    assert outcome.code == 1
    assert outcome.err.startswith("Failed: ZeroDivisionError: a bug. The full traceback is in ")
    file = Path(outcome.err.partition("traceback is in ")[2].partition(";")[0])
    assert "Traceback (most recent call last)" in file.read_text(encoding="utf-8")
    file.unlink()
