"""Checkpoint folders: whole or absent, whenever the writer dies; the right one found, the right ones kept."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_policy import Trained, load_policy, new_optimizer, save, train, write_base

from grpo_engine.checkpoint import (
    CheckpointError,
    find_checkpoint,
    has_checkpoint,
    load_checkpoint,
    prune,
    verify_checkpoint,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def trained(base: Path) -> Trained:
    """A policy after two steps; tests only read it."""
    policy = load_policy(base)
    optimizer = new_optimizer(policy)
    train(policy, optimizer, range(2))
    return policy, optimizer


# -- which one, and how many ---------------------------------------------------------------------------------


def steps_of(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def test_last_and_best_are_tracked_and_pruning_keeps_them(base: Path, trained: Trained, tmp_path: Path) -> None:
    for step, reward in ((10, 20.0), (20, 31.0), (30, None), (40, 25.0), (50, 24.0)):
        save(tmp_path, base, trained, step, reward)
    index = tmp_path / "checkpoints" / "index.json"
    expected = {"last": "step-000050", "best": "step-000020", "best_metric": 31.0}
    assert json.loads(index.read_text()) == expected
    dropped = prune(tmp_path, 2)
    assert [path.name for path in dropped] == ["step-000010", "step-000030"]
    assert steps_of(tmp_path) == [20, 40, 50]
    assert json.loads(index.read_text()) == expected
    folder = tmp_path / "checkpoints"
    assert find_checkpoint(tmp_path) == (folder / "step-000050", "")
    assert find_checkpoint(tmp_path, "best") == (folder / "step-000020", "")
    assert find_checkpoint(tmp_path, 40) == (folder / "step-000040", "")
    with pytest.raises(CheckpointError, match="no checkpoint of step 30; choose one of 20, 40, 50"):
        find_checkpoint(tmp_path, 30)
    with pytest.raises(ValueError, match="keep is 0"):
        prune(tmp_path, 0)


def test_saving_a_step_again_replaces_it(base: Path, trained: Trained, tmp_path: Path) -> None:
    save(tmp_path, base, trained, 10, 5.0, extra="first")
    path = save(tmp_path, base, trained, 10, 4.0, extra="second")
    assert load_checkpoint(path, load_policy(base)).extra == "second"
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["index.json", "step-000010"]
    assert json.loads((path.parent / "index.json").read_text())["best_metric"] == 4.0


def test_a_run_resumed_from_an_earlier_step_leaves_its_old_course(base: Path, trained: Trained, tmp_path: Path) -> None:
    for step, reward in ((10, 1.0), (20, 2.0), (30, 9.0), (15, 1.5)):
        save(tmp_path, base, trained, step, reward)
    assert find_checkpoint(tmp_path).path.name == "step-000015"
    assert find_checkpoint(tmp_path, "best").path.name == "step-000015"
    prune(tmp_path, 2)
    assert steps_of(tmp_path) == [10, 15]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "state.json"])
def test_a_damaged_last_checkpoint_gives_way_to_the_newest_intact_one_and_says_so(
    base: Path, trained: Trained, tmp_path: Path, name: str
) -> None:
    for step in (10, 20, 30):
        save(tmp_path, base, trained, step, 1.0)
    (tmp_path / "checkpoints/step-000010" / name).write_bytes(b"")
    assert find_checkpoint(tmp_path).note == ""
    (tmp_path / "checkpoints/step-000030" / name).write_bytes(b"")
    found = find_checkpoint(tmp_path)
    assert found.path.name == "step-000020"
    assert "step-000030 is damaged" in found.note and found.note.endswith("That of step 20 is used instead.")
    with pytest.raises(CheckpointError, match="step-000030 is damaged"):
        find_checkpoint(tmp_path, 30)
    (tmp_path / "checkpoints/step-000020" / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no intact checkpoint left.*step-000030 is damaged"):
        find_checkpoint(tmp_path)


def test_of_the_last_checkpoints_none_is_taken_that_is_newer_than_what_was_recorded(
    base: Path, trained: Trained, tmp_path: Path
) -> None:
    for step in (10, 20, 30):
        save(tmp_path, base, trained, step, None)
    assert find_checkpoint(tmp_path, up_to=30).note == ""
    found = find_checkpoint(tmp_path, up_to=29)
    assert found.path.name == "step-000020"
    assert "step-000030" in found.note and "later step than the 29" in found.note
    with pytest.raises(CheckpointError, match="start the run again"):
        find_checkpoint(tmp_path, up_to=9)


def test_a_checkpoint_counts_even_if_its_replacement_was_cut_short(
    base: Path, trained: Trained, tmp_path: Path
) -> None:
    assert not has_checkpoint(tmp_path)
    save(tmp_path, base, trained, 10, None)
    (tmp_path / "checkpoints" / "step-000010").rename(tmp_path / "checkpoints" / ".replaced-step-000010-1")
    assert has_checkpoint(tmp_path)


def test_a_run_without_checkpoints_or_scores_is_told_apart(base: Path, trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint; start the run again"):
        find_checkpoint(tmp_path)
    save(tmp_path, base, trained, 10)
    with pytest.raises(CheckpointError, match="none is best; take the last one"):
        find_checkpoint(tmp_path, "best")


# -- killed and refused writers ------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the program catches it."""


@pytest.fixture
def kill_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Die at the n-th rename, flush or deletion from now on."""
    left = [10**9]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return real(*args, **kwargs)

        return call

    for owner, name in ((os, "rename"), (os, "replace"), (os, "fsync"), (shutil, "rmtree"), (os, "mkdir")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    yield lambda count: left.__setitem__(0, count)


def test_a_writer_killed_between_any_two_steps_loses_nothing(
    base: Path, trained: Trained, tmp_path: Path, kill_after: Callable[[int], None]
) -> None:
    before = save(tmp_path / "before", base, trained, 20, 1.0, extra="before").parent
    finished, first = False, 0
    while not finished:
        for second in range(8):  # the next writer, which finds what the first left, dies early as well
            run = tmp_path / f"{first}-{second}"
            shutil.copytree(before, run / "checkpoints")
            for deaths, extra in ((first, "first"), (second, "second")):
                kill_after(deaths)
                try:
                    save(run, base, trained, 20, 1.0, extra=extra)
                    finished |= extra == "first"
                except Killed:
                    pass
                kill_after(10**9)
                # The only checkpoint there is stays, as the old one or the new one.
                assert verify_checkpoint(find_checkpoint(run).path).extra in ("before", extra, "first")
            path = save(run, base, trained, 20, 1.0, extra="third")
            assert verify_checkpoint(path).extra == "third"
            assert sorted(entry.name for entry in path.parent.iterdir()) == ["index.json", "step-000020"]
            shutil.rmtree(run)
        first += 1
    assert first > 10


def test_pruning_killed_between_any_two_steps_leaves_only_whole_checkpoints(
    base: Path,
    trained: Trained,
    tmp_path: Path,
    kill_after: Callable[[int], None],
) -> None:
    for step, reward in ((10, 9.0), (20, 1.0), (30, 1.0), (40, 1.0)):
        save(tmp_path, base, trained, step, reward)
    deaths, finished = 0, False
    while not finished:
        kill_after(deaths)
        try:
            prune(tmp_path, 1)
            finished = True
        except Killed:
            pass
        kill_after(10**9)
        assert all(verify_checkpoint(path) for path in (tmp_path / "checkpoints").glob("step-*"))
        assert find_checkpoint(tmp_path).path.name == "step-000040"
        deaths += 1
    assert deaths > 3
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == [
        "index.json",
        "step-000010",
        "step-000040",
    ]


def _save_forever(run: Path, base: Path, trained: Trained) -> None:
    parameter = next(iter(trained[0].trainable().values()))
    for serial in range(10**9):
        with torch.no_grad():
            parameter.fill_(serial)
        save(run, base, trained, 10 * (1 + serial % 3), float(serial % 5), extra=serial)
        prune(run, 2)


def test_a_process_killed_while_saving_never_leaves_a_checkpoint_that_fails_to_load(
    base: Path, trained: Trained, tmp_path: Path
) -> None:
    random_delay = random.Random(0)
    leftovers = 0
    save(tmp_path, base, trained, 10, 0.0)
    name = next(iter(trained[0].trainable()))
    for _ in range(12):
        process = multiprocessing.get_context("fork").Process(target=_save_forever, args=(tmp_path, base, trained))
        process.start()
        time.sleep(random_delay.uniform(0.05, 0.35))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        leftovers += any(path.name.startswith(".") for path in (tmp_path / "checkpoints").iterdir())
        for path in (tmp_path / "checkpoints").glob("step-*"):
            policy = load_policy(base, seed=3)
            state = load_checkpoint(path, policy, new_optimizer(policy))
            if state.extra is not None:
                assert torch.all(policy.trainable()[name] == state.extra)
        assert find_checkpoint(tmp_path).note == ""
    assert leftovers > 0  # the kills did land inside a save
    save(tmp_path, base, trained, 10, 0.0)
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")]


def test_a_disk_that_fills_up_leaves_the_earlier_checkpoints_and_no_rubbish(
    base: Path, trained: Trained, tmp_path: Path
) -> None:
    path = save(tmp_path, base, trained, 10, 1.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(CheckpointError, match="step-000020 could not be written"):
            save(tmp_path, base, trained, 20, 1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert find_checkpoint(tmp_path) == (path, "")
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["index.json", "step-000010"]


def test_a_disk_that_refuses_is_reported_in_a_sentence(base: Path, trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="could not be written .*check the disk's space and permissions"):
        save(tmp_path, base, trained, 1)
