"""Checkpoint folders on the disk: appearing and disappearing whole, verified byte by byte, found and pruned.

Invariants:
    - A folder called ``step-*`` is complete: it appears and disappears by a rename. What a killed writer
      leaves behind starts with a dot and is cleaned at the next save. One writer a run, many readers.
    - Every byte of every file counts: ``state.json`` holds the checksums of the others and covers itself.
    - Which checkpoint is the last is read from the folders themselves (their ``serial``). ``index.json``
      repeats it, with the best one, for other programs; nothing depends on it here.

What stands in the files is the business of ``checkpoint.py``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from safetensors import SafetensorError

FORMAT = "pure-grpo-checkpoint"
VERSION = 1
STATE_FILE = "state.json"


class CheckpointError(ValueError):
    """A checkpoint that can't be written, found or used; the message says so in plain words."""


@dataclass(frozen=True)
class CheckpointState:
    """What ``state.json`` says about the checkpoint in ``path``.

    Attributes:
        step: optimizer steps done.
        serial: counts the saves of a run; the highest is the last, whatever its step.
        kind: whether the weights are those of an adapter or of the model itself.
        metrics: of that step; a value that was not finite is None.
        score: the metric that decides which checkpoint is best, higher is better; None if not measured.
        extra: the trainer's own JSON.
        base_model: ``models.policy.path`` of the configuration.
        base_source: the same, but for a model inside the program's own folder its path from there.
        base_fingerprint: see ``checkpoint.base_fingerprint``.
        config_fingerprint: see ``checkpoint.config_fingerprint``.
        optimizer: ``class``, and ``groups`` of ``parameters`` (names) and ``options``.
        versions: of the libraries that wrote it.
        files: file name -> SHA-256.
    """

    path: Path
    step: int
    serial: int
    kind: Literal["lora", "full"]
    metrics: dict[str, float | None]
    score: float | None
    extra: Any
    base_model: str
    base_source: str
    base_fingerprint: str
    config_fingerprint: str
    optimizer: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, str]


class Found(NamedTuple):
    """A verified checkpoint, and what to tell the user about the choice (empty: nothing)."""

    path: Path
    note: str


def has_checkpoint(run_folder: Path | str) -> bool:
    """Whether a checkpoint was ever saved there, intact or not."""
    return bool(_step_folders(Path(run_folder) / "checkpoints"))


def find_checkpoint(
    run_folder: Path | str, which: Literal["last", "best"] | int = "last", *, up_to: int | None = None
) -> Found:
    """The intact checkpoint to use: the last, the best, or that of a step.

    When the last is damaged, the newest intact one before it is taken and ``note`` says so.

    Args:
        up_to: of the last ones, none of a later step than this: as far as the run was recorded.

    Raises:
        CheckpointError: there is none, or (for ``best`` and a step) it is damaged.
    """
    folder = Path(run_folder) / "checkpoints"
    paths = _step_folders(folder)
    if not paths:
        raise CheckpointError(f"{run_folder} has no checkpoint; start the run again, or give another run.")
    if isinstance(which, int):
        if which not in paths:
            steps = ", ".join(map(str, sorted(paths)))
            raise CheckpointError(f"{run_folder} has no checkpoint of step {which}; choose one of {steps}.")
        return Found(verify_checkpoint(paths[which]).path, "")
    states, problems = _survey(folder)
    course = _course(states)
    if which == "best":
        best = _best(course)
        if best is None:
            raise CheckpointError(f"No checkpoint of {run_folder} has a score, so none is best; take the last one.")
        return Found(verify_checkpoint(best.path).path, "")
    for state in course:
        if up_to is not None and state.step > up_to:
            problems[state.step] = f"The checkpoint {state.path} is of a later step than the {up_to} that are recorded."
            continue
        try:
            verify_checkpoint(state.path)
        except CheckpointError as error:
            problems[state.step] = str(error)
            continue
        newer = [problem for step, problem in sorted(problems.items()) if step > state.step]
        return Found(state.path, f"{newer[-1]} That of step {state.step} is used instead." if newer else "")
    raise CheckpointError(
        f"{run_folder} has no intact checkpoint left, so it can't be continued; start the run again. "
        f"{problems[max(problems)]}"
    )


def prune(run_folder: Path | str, keep: int) -> list[Path]:
    """Delete all but the last ``keep`` checkpoints and the best; returns what was deleted.

    Those beyond the last one's step belong to a course the run has left (it was resumed from an earlier step)
    and go too. A folder whose state can't be read is left alone: it may be a newer program's.

    Raises:
        ValueError: ``keep`` below 1.
        CheckpointError: the disk refused.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}, but at least the last checkpoint must stay; give 1 or more")
    folder = Path(run_folder) / "checkpoints"
    with writing(f"The checkpoints in {folder}"):
        tidy(folder)
        states, _ = _survey(folder)
        course = _course(states)
        best = _best(course)
        kept = {state.path for state in course[:keep]} | ({best.path} if best else set())
        dropped = sorted(state.path for state in states if state.path not in kept)
        doomed = [folder / f".deleted-{path.name}-{os.getpid()}" for path in dropped]
        for path, hidden in zip(dropped, doomed, strict=True):
            os.rename(path, hidden)
        if dropped:
            fsync(folder)
            write_index(folder)
        for hidden in doomed:
            shutil.rmtree(hidden)
    return dropped


def verify_checkpoint(path: Path | str) -> CheckpointState:
    """Read ``state.json`` and compare every file with its checksum.

    Raises:
        CheckpointError: not a checkpoint, damaged, or of a newer format.
    """
    state = _read_state(Path(path))
    for name, expected in state.files.items():
        file = state.path / name
        try:
            actual = sha256(file)
        except FileNotFoundError as error:
            raise _damaged(state.path, f"{name} is missing") from error
        except OSError as error:
            raise CheckpointError(f"{file} can't be read ({error.strerror}); correct that and try again.") from error
        if actual != expected:
            raise _damaged(state.path, f"{name} does not match its checksum")
    return state


def next_serial(folder: Path) -> int:
    """The serial of the next save into ``folder``, above every earlier one."""
    return 1 + max((state.serial for state in _survey(folder)[0]), default=0)


def seal(state: Mapping[str, Any]) -> bytes:
    """``state`` as the only bytes accepted for it: one canonical text, ending with its own checksum.

    Raises:
        TypeError, ValueError: JSON can't hold it (objects, numbers that are not finite).
    """
    plain = json.loads(json.dumps(state, allow_nan=False))
    digest = hashlib.sha256(json.dumps(plain).encode()).hexdigest()
    return (json.dumps(plain | {"checksum": digest}, indent=1) + "\n").encode()


def publish(partial: Path, target: Path) -> None:
    """Make the finished folder ``partial`` appear as ``target``, on disk and all at once.

    A folder already there is first renamed to ``.replaced-<name>-<pid>`` beside it, and deleted at the end.
    """
    for path in sorted(partial.rglob("*")):
        fsync(path)
    fsync(partial)
    replaced = target.parent / f".replaced-{target.name}-{os.getpid()}"
    if target.exists():
        os.rename(target, replaced)
    os.rename(partial, target)
    fsync(target.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def write_index(folder: Path) -> None:
    """Write ``index.json``: folder names of the last and the best checkpoint, and the best one's score."""
    course = _course(_survey(folder)[0])
    best = _best(course)
    index = {
        "last": course[0].path.name,
        "best": best.path.name if best else None,
        "best_metric": best.score if best else None,
    }
    partial = folder / f".partial-index-{os.getpid()}"
    partial.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    fsync(partial)
    os.replace(partial, folder / "index.json")
    fsync(folder)


def tidy(folder: Path) -> None:
    """Undo what a killed writer left behind."""
    for step, path in _step_folders(folder).items():
        if path.name.startswith("."):
            os.rename(path, folder / f"step-{step:06d}")
    for path in folder.glob(".*"):
        if path.name.startswith((".partial-", ".replaced-", ".deleted-")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Turn what the disk says against writing ``what`` into a :class:`CheckpointError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{what} could not be written ({error}); check the disk's space and permissions. "
            "What was saved before is untouched."
        ) from error


def sha256(file: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_state(path: Path) -> CheckpointState:
    """``state.json`` alone: its format, its version and its own checksum."""
    try:
        content = (path / STATE_FILE).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of this program: it has no {STATE_FILE}.") from error
    except OSError as error:
        raise CheckpointError(f"{path / STATE_FILE} can't be read ({error.strerror}).") from error
    try:
        data = json.loads(content)
    except ValueError as error:
        raise _damaged(path, f"{STATE_FILE} is not valid JSON") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this program: its {STATE_FILE} has another format.")
    version = data.get("version")
    if isinstance(version, int) and version > VERSION:
        raise CheckpointError(
            f"{path} was written by a newer version of this program (format {version}, this one reads up to "
            f"{VERSION}); update the program."
        )
    data.pop("checksum", None)
    try:
        intact = content == seal(data)
    except ValueError:  # a changed digit made a number too large for JSON
        intact = False
    if not intact:
        raise _damaged(path, f"{STATE_FILE} does not match its checksum")
    del data["format"], data["version"]
    return CheckpointState(path=path, **data)


def _step_folders(folder: Path) -> dict[int, Path]:
    """Step -> folder. One whose replacement was cut short between two renames counts as still in place."""
    found: dict[int, Path] = {}
    for path in sorted(folder.glob("*step-*")):  # names with a dot come first, so the real folder wins
        if match := re.fullmatch(r"step-(\d{6,})|\.replaced-step-(\d{6,})-\d+", path.name):
            found[int(match.group(1) or match.group(2))] = path
    return found


def _survey(folder: Path) -> tuple[list[CheckpointState], dict[int, str]]:
    """The checkpoints whose ``state.json`` is whole (no other file is read), and why the rest are not."""
    states: list[CheckpointState] = []
    problems: dict[int, str] = {}
    for step, path in _step_folders(folder).items():
        try:
            states.append(_read_state(path))
        except CheckpointError as error:
            problems[step] = str(error)
    return states, problems


def _course(states: list[CheckpointState]) -> list[CheckpointState]:
    """The checkpoints that led up to the last one saved, newest first."""
    ordered = sorted(states, key=lambda state: -state.serial)
    return [state for state in ordered if state.step <= ordered[0].step]


def _best(course: list[CheckpointState]) -> CheckpointState | None:
    """The highest score; of equal ones, the latest."""
    scored = [(state.score, state.step, state) for state in course if state.score is not None]
    return max(scored, key=lambda item: item[:2])[2] if scored else None


def _damaged(path: Path, how: str) -> CheckpointError:
    return CheckpointError(f"The checkpoint {path} is damaged: {how}; use an earlier one.")
