"""Writing a bundle.

Invariants:
    - It appears whole, by a rename, and only after it was read back the way an import reads it.
    - A row names no picture that is not there: one left out of a bundle is missing in its rows, too.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import yaml

from ..checkpoint_folder import STATE_FILE, find_checkpoint, fsync, seal, verify_checkpoint
from ..config import expanded
from ..recorder import STEP_METRICS
from ..store.owner import process_token
from ..store.reader import RunReader
from ..store.rows import RunRow
from .archive import (
    CONFIG,
    FILE_BYTES,
    LOG,
    MANIFEST,
    MEMBERS,
    NUMBERS,
    POLICY,
    POLICY_FILES,
    ROWS_BYTES,
    TABLES,
    Archive,
    BundleError,
    most_bytes,
)
from .contents import FORMAT, VERSION, Contents, open_picture
from .importer import Progress, origin
from .rows import RunLine, evaluation_line, event_line, item_line, rollout_line, step_lines

Images = Literal["all", "evaluations", "none"]
CONTENTS = {
    MANIFEST: "what this file is: the run, the units of its metrics, and this list",
    CONFIG: "all settings of the run",
    "steps.jsonl": "one line a step: its metrics",
    "rollouts.jsonl": "one line a rewrite: text, reward, advantage, numbers of every token, picture",
    "evaluations.jsonl": "one line a measurement: its summary",
    "items.jsonl": "one line a picture of a measurement",
    "events.jsonl": "one line for everything that happened to the run",
    NUMBERS: "the metrics of all steps and the summaries, for other programs",
    LOG: "the log",
    "images/": "the pictures that rollouts.jsonl and items.jsonl name",
    POLICY: "the trained policy: a peft adapter, or all weights that were trained",
}
QUALITY = 80  # of re-encoded pictures: a tenth of a small picture's PNG
LESS = "take fewer pictures (of the evaluations alone, or of every n-th step), re-encode them, or leave out the policy"


def write_bundle(
    store: RunReader,
    run_id: str,
    target: Path | str,
    *,
    images: Images = "all",
    every: int = 1,
    reencode: bool = False,
    checkpoint: Literal["last", "best"] | int | None = "last",
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a run that has ended to the file ``target``; returns its absolute path.

    Args:
        images: ``all`` pictures, those of the ``evaluations`` alone, or ``none``.
        every: of the steps' pictures, those of step 1 and every n-th step.
        reencode: make pictures that are not WebP yet WebP, which is lossy and about ten times smaller.
        checkpoint: the policy to take along, None = without. A run that has saved none is bundled without.
        force: replace an earlier bundle.

    Raises:
        BundleError: the run goes on, the target is taken, the run is too large, or the disk refused.
        CheckpointError: that checkpoint is missing or damaged.
    """
    run = store.run(run_id)
    if run.active:
        raise BundleError(f"Run {run_id} is {run.state}; wait for its end or stop it, then bundle it.")
    if every < 1:
        raise BundleError(f"every is {every}; give 1 for the pictures of all steps, or a larger number.")
    path = expanded(target).resolve()
    _check_target(path, force)
    partial = path.parent / f".bundle-{path.name}-{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _tidy(path.parent, f".bundle-{path.name}-")
        with zipfile.ZipFile(partial, "x", zipfile.ZIP_DEFLATED, allowZip64=False, compresslevel=9) as file:
            writer = _Writer(store, run, file, _Pictures(store, run_id, images, every, reencode))
            writer.write(checkpoint, progress)
        fsync(partial)
        _check_readable(run_id, partial)
        now = store.run(run_id)
        if (now.state, now.step, now.resumed_count) != (run.state, run.step, run.resumed_count):
            raise BundleError(f"Run {run_id} went on while it was being bundled; try again when it has ended.")
        os.replace(partial, path)
        fsync(path.parent)
    except OSError as error:
        raise BundleError(
            f"{path} can't be written ({error.strerror or error}: {error.filename}); choose another place."
        ) from error
    finally:
        with suppress(OSError):  # what went wrong before is the news
            partial.unlink()
    return path


class _Pictures:
    """Chooses the pictures to take along and gives them their names in the bundle."""

    def __init__(self, store: RunReader, run_id: str, choice: Images, every: int, reencode: bool) -> None:
        self.store, self.prefix = store, f"runs/{run_id}/"
        self.choice, self.every, self.reencode = choice, every, reencode
        self.files: dict[str, Path] = {}  # by name in the bundle

    def name(self, recorded: str | None, step: int | None = None) -> str | None:
        """The name of a recorded picture, of a step or of an evaluation; None when it stays behind."""
        if recorded is None or self.choice == "none" or not recorded.startswith(self.prefix):
            return None
        if step is not None and (self.choice != "all" or not (step == 1 or step % self.every == 0)):
            return None
        name = recorded.removeprefix(self.prefix)
        if self.reencode:
            name = f"{name.rpartition('.')[0]}.webp"
        if name not in self.files:
            file = self.store.file(recorded)
            if not file.is_file():  # deleted by hand
                return None
            self.files[name] = file
        return name

    def content(self, name: str) -> bytes:
        """What to store under a name."""
        file = self.files[name]
        data = file.read_bytes()
        try:
            image = open_picture(data, file.suffix)
        except ValueError as error:
            raise BundleError(f"The picture {file} {error}; delete it to bundle the run without it.") from error
        if self.reencode and file.suffix != ".webp":
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "WEBP", quality=QUALITY, method=6)
            return buffer.getvalue()
        return data


class _Writer:
    """Writes one run into a zip file, within the limits that a reader sets."""

    def __init__(self, store: RunReader, run: RunRow, file: zipfile.ZipFile, pictures: _Pictures) -> None:
        self.store, self.run, self.file, self.pictures = store, run, file, pictures
        self.folder = store.run_dir(run.id)
        self.rows = self.total = 0  # bytes

    def write(self, checkpoint: Literal["last", "best"] | int | None, progress: Progress | None) -> None:
        tables = (self._steps, self._rollouts, self._evaluations, self._items, self._events)
        for name, lines in zip(TABLES, tables, strict=True):
            with self.file.open(name, "w") as stream:
                for line in lines():
                    data = _dump(line) + b"\n"
                    self._count(name, len(data))
                    stream.write(data)
        # JSON objects only, so no two of them are one and YAML has nothing to refer to.
        self._put(CONFIG, yaml.safe_dump(self.run.config, sort_keys=False, allow_unicode=True).encode())
        for name in (NUMBERS, LOG):
            if (self.folder / name).is_file():
                text = (self.folder / name).read_text(encoding="utf-8", errors="replace")
                self._put(name, text.replace("\0", "\ufffd").encode())
        step = self._put_policy(checkpoint)
        names = sorted(self.pictures.files)
        if len(names) + 20 > MEMBERS:
            raise BundleError(f"Run {self.run.id} has {len(names):,} pictures, too many for a bundle; {LESS}.")
        for done, name in enumerate(names, start=1):
            self._put(name, self.pictures.content(name), packed=True)
            if progress is not None:
                progress(done, len(names))
        self._put(MANIFEST, json.dumps(self._manifest(step), ensure_ascii=False, indent=1).encode() + b"\n")

    def _manifest(self, step: int | None) -> dict[str, Any]:
        run = {name: getattr(self.run, name) for name in RunLine.model_fields} | {"tags": list(self.run.tags)}
        if found := origin(self.store, self.run.id):  # the first place it was recorded, however often it moved on
            run["id"] = found.id
        chosen = self.pictures
        pictures = {"choice": chosen.choice, "every": chosen.every, "reencoded": chosen.reencode}
        pictures["count"] = len(chosen.files)
        head = {"format": FORMAT, "version": VERSION, "exported": time.time(), "run": run, "pictures": pictures}
        return head | {"checkpoint": step, "metrics": STEP_METRICS, "contents": CONTENTS}

    def _steps(self) -> Iterable[Mapping[str, Any]]:
        return step_lines(self.store.steps(self.run.id))

    def _rollouts(self) -> Iterator[Mapping[str, Any]]:
        for step in range(1, self.run.step + 1):
            for row in self.store.rollouts(self.run.id, step):
                yield rollout_line(row, self.pictures.name(row.image, step))

    def _evaluations(self) -> Iterator[Mapping[str, Any]]:
        yield from map(evaluation_line, self.store.evaluations(self.run.id))

    def _items(self) -> Iterator[Mapping[str, Any]]:
        for evaluation in self.store.evaluations(self.run.id):
            for row in self.store.evaluation_items(evaluation.id):
                yield item_line(row, evaluation, self.pictures.name(row.image))

    def _events(self) -> Iterator[Mapping[str, Any]]:
        yield from map(event_line, self.store.events(self.run.id, limit=None))

    def _put_policy(self, which: Literal["last", "best"] | int | None) -> int | None:
        """Add the checkpoint, without the optimizer's state, which only a run that goes on needs."""
        if which is None or (which == "last" and not any((self.folder / "checkpoints").glob("step-*"))):
            return None
        found = find_checkpoint(self.folder, which)
        if found.note:
            logging.getLogger(__name__).warning(found.note)
        state = verify_checkpoint(found.path)
        content = json.loads((state.path / STATE_FILE).read_bytes())
        del content["checksum"]
        content["files"] = {name: content["files"][name] for name in POLICY_FILES[state.kind]}
        self._put(f"{POLICY}{STATE_FILE}", seal(content))
        for name in POLICY_FILES[state.kind]:
            file = state.path / name
            self._count(f"{POLICY}{name}", file.stat().st_size)
            with file.open("rb") as source, self.file.open(f"{POLICY}{name}", "w") as stream:
                shutil.copyfileobj(source, stream, 1 << 20)
        return state.step

    def _put(self, name: str, data: bytes, *, packed: bool = False) -> None:
        self._count(name, len(data))
        info = zipfile.ZipInfo(name)  # of a fixed date: equal runs make equal files
        info.compress_type = zipfile.ZIP_STORED if packed else zipfile.ZIP_DEFLATED
        self.file.writestr(info, data, compresslevel=9)

    def _count(self, name: str, size: int) -> None:
        most = most_bytes(name)
        if most is None or size > most:
            raise BundleError(f"Run {self.run.id} has a file {name} of {size:,} bytes, which no bundle can hold.")
        self.total += size
        self.rows += size if name in TABLES else 0
        if self.rows > ROWS_BYTES:
            what = f"more than {ROWS_BYTES:,} bytes of rows; copy the database and its folder instead"
            raise BundleError(f"Run {self.run.id} has {what}.")
        if self.total > FILE_BYTES - (1 << 20) * 16:  # what the directory of the zip may need
            raise BundleError(f"Run {self.run.id} is larger than a bundle may be, {FILE_BYTES:,} bytes; {LESS}.")


def _check_target(path: Path, force: bool) -> None:
    """Only a free place, or with ``force`` an earlier bundle, is written to: nothing else is deleted."""
    if path.is_dir():
        raise BundleError(f"{path} is a folder; name a file in it, such as {path / 'run.zip'}.")
    if not path.exists():
        return
    if not force:
        raise BundleError(f"{path} is there already; give another file, or --force to replace an earlier bundle.")
    try:
        Archive(path).close()
    except BundleError as error:
        raise BundleError(f"{path} is there already and is no bundle; give another file.") from error


def _check_readable(run_id: str, file: Path) -> None:
    try:
        with Archive(file) as archive:
            Contents(archive).check()
    except BundleError as error:
        raise BundleError(f"Run {run_id} can't be bundled, since nobody could open the bundle: {error}") from error


def _dump(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _tidy(folder: Path, prefix: str) -> None:
    """Remove what a killed writer left in ``folder`` under names of ``prefix`` and its process number."""
    for path in list(folder.iterdir()):
        match = re.fullmatch(re.escape(prefix) + r"(\d+)", path.name)
        if match and process_token(int(match[1])) is None:
            path.unlink()
