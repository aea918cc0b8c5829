"""Prompt sets: those that come with the program, and uploaded or edited ones in ``prompts/`` beside the database."""

from __future__ import annotations

import json
import re
import threading
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_engine.config import PRESETS
from grpo_engine.prompts import (
    MAX_FILE_BYTES,
    MAX_PROMPTS,
    SPLITS,
    TIERS,
    PromptError,
    PromptSet,
    kind_of,
    load_prompts,
    parse_prompts,
    save_prompts,
)

from .context import Refused

SHIPPED = PRESETS / "prompts"
MAX_CHARS = 20_000  # of a text in a set that is read: how many a run accepts is its own setting
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,59}")
NAME_RULE = "use up to 60 lower-case letters, digits, - and _, the first a letter or a digit"
_KEPT = 4  # sets kept in memory


class PromptSets:
    """Sets by the value that ``data.prompts`` has for them: a shipped set's name, a saved set's path.

    Nothing else is ever read: whoever may use the app does not thereby read the disk.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[Path, tuple[tuple[int, int], PromptSet]] = {}
        self._lock = threading.Lock()

    def listed(self) -> list[dict[str, Any]]:
        """Every set there is: value, name, shipped; the shipped ones first."""
        shipped = [{"value": path.stem, "name": path.stem, "shipped": True} for path in sorted(SHIPPED.glob("*.jsonl"))]
        saved = [{"value": str(path), "name": path.stem, "shipped": False} for path in self._saved()]
        return shipped + saved

    def path(self, value: str) -> Path | None:
        """The file of a set, or None if ``value`` names none of them."""
        known = {path.stem: path for path in SHIPPED.glob("*.jsonl")} | {str(path): path for path in self._saved()}
        return known.get(value)

    def read(self, value: str) -> PromptSet:
        """A set's prompts. Raises `Refused` when there is no such set or its file is broken."""
        path = self.path(value)
        if path is None:
            raise Refused("There is no such prompt set; choose one from the list.", field="data.prompts", status=404)
        try:
            entry = path.stat()
            stamp = (entry.st_mtime_ns, entry.st_size)
            with self._lock:
                if path in self._read and self._read[path][0] == stamp:
                    return self._read[path][1]
            found = load_prompts(path, max_chars=MAX_CHARS)
        except (PromptError, OSError) as error:
            raise Refused(str(error), field="data.prompts") from error
        with self._lock:
            self._read[path] = (stamp, found)
            while len(self._read) > _KEPT:
                del self._read[next(iter(self._read))]
        return found

    def described(self, value: str) -> dict[str, Any]:
        """A set without its prompts: how many of which split and tier, and what looks doubtful."""
        found = self.read(value)
        report = [note.replace(str(found.path), found.name) for note in found.report]
        return {"value": value, "name": found.name, "total": len(found), "counts": found.counts(), "tiers": TIERS,
                "splits": SPLITS, "report": report}  # fmt: skip

    def rows(self, value: str) -> list[dict[str, str]]:
        """All prompts of a set, for the table. What a prompt has beside its four fields stays here."""
        return [{"id": p.id, "text": p.text, "tier": p.tier, "split": p.split} for p in self.read(value).prompts]

    def upload(self, file_name: str, data: bytes, max_chars: int) -> str:
        """Keep an uploaded file as a set of its own and return its value. Raises `Refused` with file and line.

        The same content under the same name is the same set; other content gets a number behind the name.
        """
        file_name = re.split(r"[\\/]", file_name)[-1] or "prompts.txt"
        try:
            parsed = parse_prompts(data, name=file_name, kind=kind_of(file_name), max_chars=max_chars)
        except PromptError as error:
            raise Refused(str(error), field="data.prompts", status=422) from error
        stem = _plain_name(file_name.rpartition(".")[0])
        number = 1
        while True:
            path = self._file(stem if number == 1 else f"{stem[:54]}-{number}")
            if path.stem not in {shipped.stem for shipped in SHIPPED.glob("*.jsonl")}:
                if not path.exists():
                    self._write(path, parsed)
                    return str(path)
                try:
                    if load_prompts(path, max_chars=MAX_CHARS).fingerprint() == parsed.fingerprint():
                        return str(path)
                except PromptError:
                    pass  # broken by hand; it is not ours to replace
            number += 1

    def save(self, name: str, base: str, rows: Sequence[dict[str, str]], *, max_chars: int, overwrite: bool) -> str:
        """Keep an edited table as a set and return its value; ``base`` is the set it was made from.

        A prompt whose text is unchanged keeps its id and what else its record holds; a changed text is a new prompt.
        Raises `Refused` with the line, which is the row's number in the table.
        """
        if not NAME.fullmatch(name):
            raise Refused(f"{name!r} can't be a prompt set's name: {NAME_RULE}.", field="name", status=422)
        if (SHIPPED / f"{name}.jsonl").exists():
            raise Refused(f"{name!r} comes with the program and stays as it is; choose another name.", field="name")
        path = self._file(name)
        if path.exists() and not overwrite:
            raise Refused(f"There is a prompt set {name!r} already.", field="overwrite")
        earlier = {prompt.id: prompt for prompt in self.read(base).prompts} if base else {}
        lines = []
        for row in rows:
            text = row["text"].strip()
            before = earlier.get(row.get("id", ""))
            kept = dict(before.record()) if before and before.text == text else {}
            lines.append(json.dumps(kept | {"text": text, "tier": row["tier"], "split": row["split"]}))
        try:
            parsed = parse_prompts("\n".join(lines).encode(), name=name, kind="jsonl", max_chars=max_chars)
        except PromptError as error:
            raise Refused(str(error), field="rows", status=422) from error
        self._write(path, parsed)
        return str(path)

    def _saved(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("*.jsonl") if NAME.fullmatch(path.stem) and path.is_file())

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    def _write(self, path: Path, prompts: PromptSet) -> None:
        try:
            self.folder.mkdir(exist_ok=True)
            save_prompts(prompts, path)
        except (PromptError, OSError) as error:
            raise Refused(f"The prompt set can't be kept: {error}") from error


def too_large() -> Refused:
    """The refusal of a body beyond what a prompt file may have."""
    most = MAX_FILE_BYTES // 2**20
    return Refused(f"A prompt set has at most {most} MB and {MAX_PROMPTS:,} prompts; divide the file.", status=413)


def _plain_name(text: str) -> str:
    """A set's name for an uploaded file's."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9_]+", "-", plain).strip("-_")[:56] or "prompts"
