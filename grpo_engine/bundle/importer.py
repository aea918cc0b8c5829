"""Taking a bundle into a database, as a run that can be looked at and never goes on.

Invariants:
    - One transaction: an import that is refused or fails leaves neither rows nor files.
    - A row names no picture that is not there.
    - The rows of a bundle are read twice: checked first, so that other programs wait only for the inserting.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from ..checkpoint_folder import STATE_FILE, CheckpointError, write_index
from ..store import Store
from ..store.files import THUMBNAIL_SIDE, save_thumbnail, write_text
from ..store.names import NAME_CHARS, NOTE_CHARS
from ..store.owner import process_token
from ..store.reader import RunReader
from ..store.writes import add_event, insert
from .archive import LOG, NUMBERS, POLICY, POLICY_FILES, Archive, BundleError
from .contents import IMPORTED, Contents
from .rows import Manifest, RunLine

Progress = Callable[[int, int], None]
"""Told how many pictures are done, and of how many."""


@dataclass(frozen=True)
class Origin:
    """Where an imported run was recorded: its id there, and when it was made, in seconds since 1970."""

    id: str
    created: float

    def __str__(self) -> str:
        day = datetime.fromtimestamp(self.created, timezone.utc).date()
        return f"Recorded elsewhere as {self.id} on {day.isoformat()}."


def origin(store: RunReader, run_id: str) -> Origin | None:
    """Where an imported run comes from; None for one that was recorded here."""
    if store.run(run_id).source != "imported":
        return None
    with store.read() as db:
        query = "SELECT data FROM events WHERE run_id = ? AND kind = ? ORDER BY id DESC LIMIT 1"
        data = json.loads(db.execute(query, [run_id, IMPORTED]).fetchone()[0])
    return Origin(data["id"], data["created"])


def inspect_bundle(file: Path | str) -> Manifest:
    """What a bundle says it is; its settings are valid then, its rows and pictures not yet checked.

    Raises:
        BundleError: it is none, or is damaged, or of a newer version.
    """
    with Archive(_absolute(file)) as archive:
        return Contents(archive).manifest


def read_bundle(
    store: Store,
    file: Path | str,
    *,
    again: bool = False,
    name_suffix: str = "",
    progress: Progress | None = None,
) -> str:
    """Import a bundle as a run of its own, with ``source`` "imported"; returns its id here.

    Its id elsewhere, and where it comes from, stand in the event "imported" (see `origin`) and atop its notes.

    Args:
        again: also where the database has the run already, recorded or imported.
        name_suffix: added to the run's name.

    Raises:
        BundleError: the file is no bundle of this program, damaged, made to do harm, or imported already.
        StoreError: the database can't be written.
    """
    path = _absolute(file)
    with Archive(path) as archive:
        contents = Contents(archive)
        contents.check()
        fingerprint = contents.fingerprint()
        with store.write(visible=False) as db:  # refused before anything is copied
            if not again:
                _refuse_known(db, path, contents.run, fingerprint)
        folder = store.root / "runs" / f".import-{secrets.token_hex(4)}-{os.getpid()}"
        try:
            small = _copy_files(contents, folder, progress)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError | CheckpointError):
                why = getattr(error, "strerror", None) or error
                raise BundleError(f"The files of {path} can't be written to {folder.parent}: {why}.") from error
            raise

        def fill(db: Database, run_id: str) -> None:
            if not again:  # once more: another process may just have done the same
                _refuse_known(db, path, contents.run, fingerprint)
            _insert_rows(db, contents, run_id, small)
            data: dict[str, Any] = {"id": contents.run.id, "created": contents.run.created}
            data |= {"fingerprint": fingerprint, "file": path.name, "unknown_metrics": sorted(contents.unknown)}
            left = f" Left out, unknown here: {', '.join(data['unknown_metrics'])}." if contents.unknown else ""
            add_event(db, run_id, IMPORTED, f"{_origin_of(contents.run)} Imported from {path.name}.{left}", data)

        return store.import_run(contents.config, _columns(contents.run, name_suffix), folder, fill)


def _absolute(file: Path | str) -> Path:
    try:
        return Path(file).expanduser().absolute()
    except RuntimeError as error:  # ~somebody
        raise BundleError(f"{str(file)!r} names no home folder; give another path.") from error


def _origin_of(run: RunLine) -> Origin:
    return Origin(run.id, run.created)


def _columns(run: RunLine, name_suffix: str) -> dict[str, Any]:
    """Columns of table ``runs``; none of the process that once owned the run."""
    columns = run.model_dump(exclude={"id"})
    columns["name"] = f"{run.name[: NAME_CHARS - len(name_suffix)]}{name_suffix}"
    for name in ("message", "error"):  # printed to a terminal, which obeys control characters
        if columns[name] is not None:
            columns[name] = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "?", columns[name])
    line = str(_origin_of(run))
    if line not in run.notes:
        columns["notes"] = f"{line}\n{run.notes}".strip()[:NOTE_CHARS]
    return columns


def _refuse_known(db: Database, path: Path, run: RunLine, fingerprint: str) -> None:
    query = "SELECT id, name FROM runs WHERE id = ? AND created = ? AND source = 'local'"
    for run_id, name in db.execute(query, [run.id, run.created]).fetchall():
        raise BundleError(
            f"{path} is a bundle of run {run_id} ({name}), which was recorded in this database; look at that one, "
            "or use --again for a copy."
        )
    query = """SELECT runs.id, runs.name, events.data FROM runs JOIN events ON events.run_id = runs.id
        WHERE runs.source = 'imported' AND events.kind = ?"""
    for run_id, name, data in db.execute(query, [IMPORTED]).fetchall():
        if json.loads(data).get("fingerprint") == fingerprint:
            raise BundleError(
                f"{path} was imported before, as run {run_id} ({name}); look at that one, or use --again for a copy."
            )


def _insert_rows(db: Database, contents: Contents, run_id: str, small: set[str]) -> None:
    """``small``: pictures that have a thumbnail of their own."""

    def placed(image: str | None) -> tuple[str | None, str | None]:
        if image is None:
            return None, None
        shown = f"runs/{run_id}/{image}"
        return shown, f"runs/{run_id}/{_thumbnail(image)}" if image in small else shown

    evaluations: list[int] = []  # ids here
    for table, row in contents.rows(placed):
        if table == "evaluation_items":
            insert(db, table, [row | {"evaluation_id": evaluations[row["evaluation_id"]]}])
            continue
        inserted = insert(db, table, [{"run_id": run_id, **row}])
        if table == "evaluations":
            evaluations.append(inserted)


def _copy_files(contents: Contents, folder: Path, progress: Progress | None) -> set[str]:
    """Write everything that is no row into ``folder``; returns which pictures got a thumbnail of their own."""
    archive = contents.archive
    _tidy(folder.parent)
    folder.mkdir(parents=True)
    write_text(folder / "config.yaml", contents.config.dump_yaml())
    if LOG in archive.names:
        write_text(folder / LOG, contents.text(LOG))
    if NUMBERS in archive.names:
        write_text(folder / NUMBERS, contents.numbers(NUMBERS))
    if contents.policy is not None:
        target = folder / "checkpoints" / f"step-{contents.policy.step:06d}"
        target.mkdir(parents=True)
        for name in (STATE_FILE, *POLICY_FILES[contents.policy.kind]):
            with (target / name).open("wb") as file:
                for block in archive.chunks(f"{POLICY}{name}"):
                    file.write(block)
        contents.verify_policy(target)
        write_index(target.parent)
    small = set()
    for done, name in enumerate(contents.pictures, start=1):
        data, image = contents.picture(name)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        if max(image.size) > THUMBNAIL_SIDE:
            path = folder / _thumbnail(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_thumbnail(image.convert("RGB"), path)
            small.add(name)
        if progress is not None:
            progress(done, len(contents.pictures))
    return small


def _thumbnail(name: str) -> str:
    """``images/a/b.png`` -> ``thumbs/a/b.webp``, where the recorder puts it."""
    return f"thumbs/{name.removeprefix('images/').rpartition('.')[0]}.webp"


def _tidy(runs: Path) -> None:
    """Remove what killed imports left behind."""
    for path in runs.glob(".import-*-*"):
        number = path.name.rpartition("-")[2]
        if number.isdecimal() and process_token(int(number)) is None:
            shutil.rmtree(path)
