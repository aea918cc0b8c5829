"""What stands in a bundle, checked while it is read: the manifest, the settings, the rows, policy and pictures."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open

from ..checkpoint_folder import STATE_FILE, CheckpointError, verify_checkpoint
from ..config import ConfigError, RunConfig
from ..recorder import STEP_METRICS
from .archive import CONFIG, MANIFEST, POLICY, POLICY_FILES, TABLES, Archive, BundleError
from .rows import (
    CheckpointForm,
    EvaluationLine,
    EventLine,
    ItemLine,
    Manifest,
    Placed,
    RolloutLine,
    StepLine,
    strict_json,
)

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = "pure-grpo-run"
VERSION = 1
IMPORTED = "imported"  # kind of the event that says where a run comes from
SIDE = 4096  # pixels, of a picture
FORMATS = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG"}

M = TypeVar("M", bound=BaseModel)


class Contents:
    """The contents of an open bundle. Every method raises `BundleError` at the first thing that is wrong.

    Attributes:
        unknown: metrics that this version does not know, filled by `rows`, which leaves them out.
    """

    def __init__(self, archive: Archive) -> None:
        self.archive = archive
        data = self._json(MANIFEST, archive.read(MANIFEST))
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise archive.bad(f"its {MANIFEST} is not of this program")
        version = data.get("version")
        if isinstance(version, int) and version > VERSION:
            raise BundleError(
                f"{archive.path} was written by a newer version of this program (format {version}, this one reads "
                f"up to {VERSION}); update the program."
            )
        self.manifest = self._checked(Manifest, data, MANIFEST)
        self.run = self.manifest.run
        self.config = self._config(CONFIG)
        self.pictures = sorted(name for name in archive.names if name.startswith("images/"))
        self.policy = self._policy()
        self.unknown: set[str] = set()

    def check(self) -> None:
        """Read all rows; each picture must be there and belong to one."""
        present, named = set(self.pictures), set()

        def placed(image: str | None) -> tuple[str | None, str | None]:
            if image is not None:
                if image not in present:
                    raise self.archive.bad(f"a row names the picture {image[:200]!r}, which is missing")
                named.add(image)
            return image, image

        for _ in self.rows(placed):
            pass
        if spare := sorted(present - named):
            raise self.archive.bad(f"no row names its picture {spare[0]}")

    def rows(self, placed: Placed) -> Iterator[tuple[str, dict[str, Any]]]:
        """(table, row) in an order that can be inserted, without ``run_id``.

        A row of ``evaluation_items`` has for ``evaluation_id`` the number of its evaluation, from 0.
        """
        bad = self.archive.bad
        last = 0
        for where, step in self._lines(TABLES[0], StepLine):
            if step.step != last + 1:
                raise bad(f"{where}: step {step.step} follows step {last}")
            last = step.step
            self.unknown |= step.metrics.keys() - STEP_METRICS.keys()
            yield "steps", step.row()
        if last != self.run.step:
            raise bad(f"it has {last} steps of {self.run.step}")

        place = (0, 0, 0)
        for where, rollout in self._lines(TABLES[1], RolloutLine):
            before, place = place, (rollout.step, rollout.g, rollout.k)
            if place <= before or rollout.step > last:
                raise bad(f"{where} is out of order")
            yield "rollouts", rollout.row(placed)

        counts: dict[tuple[str, int], int] = {}
        for where, evaluation in self._lines(TABLES[2], EvaluationLine):
            key = (evaluation.kind, evaluation.step)
            if key in counts or evaluation.step > last:
                raise bad(f"{where} is there twice, or of a step that is not")
            counts[key] = evaluation.items
            yield "evaluations", evaluation.row()
        order = {key: number for number, key in enumerate(counts)}
        reached: tuple[int, str, str, int] = (-1, "", "", 0)
        for where, item in self._lines(TABLES[3], ItemLine):
            number = order.get((item.kind, item.step), -1)
            behind, reached = reached, (number, item.prompt_id, item.arm, item.index)
            if number < 0 or reached <= behind:
                raise bad(f"{where} is out of order, or of no evaluation")
            counts[item.kind, item.step] -= 1
            yield "evaluation_items", item.row(placed) | {"evaluation_id": number}
        if any(counts.values()):
            raise bad("an evaluation has more or fewer pictures than it says")

        for _, event in self._lines(TABLES[4], EventLine):
            if event.kind != IMPORTED:  # says so of the database the run was exported from
                yield "events", event.row()

    def fingerprint(self) -> str:
        """SHA-256 of what was recorded: the same for every bundle of one run, whatever pictures it has."""
        digest = hashlib.sha256(f"{self.run.id} {self.run.created!r}\n".encode())
        for name in ("steps.jsonl", "evaluations.jsonl"):
            for block in self.archive.chunks(name):
                digest.update(block)
        return digest.hexdigest()

    def picture(self, name: str) -> tuple[bytes, Image]:
        """A picture's bytes and what they show."""
        data = self.archive.read(name)
        try:
            return data, open_picture(data, Path(name).suffix)
        except ValueError as error:
            raise self.archive.bad(f"{name} {error}") from error

    def text(self, name: str) -> str:
        """A member that is text."""
        try:
            text = self.archive.read(name).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.archive.bad(f"{name} is not text") from error
        if "\0" in text:
            raise self.archive.bad(f"{name} is not text")
        return text

    def numbers(self, name: str) -> str:
        """A member that is JSON, as it stands there."""
        self._json(name, self.archive.read(name))
        return self.text(name)

    def verify_policy(self, folder: Path) -> None:
        """Whether the checkpoint, copied to ``folder``, is whole and its weights can be read."""
        try:
            state = verify_checkpoint(folder)
            with safe_open(folder / POLICY_FILES[state.kind][0], framework="numpy") as weights:
                if not weights.keys():
                    raise self.archive.bad("its policy has no weights")
        except (CheckpointError, SafetensorError) as error:
            raise self.archive.bad("its policy is damaged") from error

    def _policy(self) -> CheckpointForm | None:
        """What ``checkpoint/state.json`` says, if there is one; checks all but the checksums."""
        bad, step = self.archive.bad, self.manifest.checkpoint
        files = {name.removeprefix(POLICY) for name in self.archive.names if name.startswith(POLICY)}
        if (step is not None) != (STATE_FILE in files) or (files and step is None):
            raise bad("its policy is incomplete")
        if step is None:
            return None
        name = f"{POLICY}{STATE_FILE}"
        form = self._checked(CheckpointForm, self._json(name, self.archive.read(name)), name)
        wanted = set(POLICY_FILES[form.kind])
        if files != wanted | {STATE_FILE} or form.files.keys() != wanted or form.step != step or step > self.run.step:
            raise bad("its policy is not the one it says")
        if form.kind == "lora":
            name = f"{POLICY}adapter_config.json"
            adapter = self._json(name, self.archive.read(name))
            if not isinstance(adapter, dict) or adapter.get("peft_type") != "LORA":
                raise bad(f"{name} describes no LoRA adapter")
        self._config(f"{POLICY}{CONFIG}")
        return form

    def _config(self, name: str) -> RunConfig:
        text = self.text(name)
        try:
            events = yaml.parse(text, Loader=yaml.SafeLoader)
            if any(isinstance(event, yaml.AliasEvent) for event in events):  # a few lines can stand for gigabytes
                raise self.archive.bad(f"{name} has references, which settings never have")
            data = yaml.safe_load(text)
            return RunConfig.parse(data if isinstance(data, dict) else {"config": data})
        except ConfigError as error:
            raise BundleError(
                f"{self.archive.path} has settings that this version of the program does not take "
                f"({str(error).splitlines()[0][:300]}); open it with the version that wrote it."
            ) from error
        except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
            raise self.archive.bad(f"{name} is not YAML") from error

    def _lines(self, name: str, form: type[M]) -> Iterator[tuple[str, M]]:
        for number, line in self.archive.lines(name):
            where = f"{name}, line {number}"
            yield where, self._checked(form, self._json(where, line), where)

    def _json(self, where: str, data: bytes) -> Any:
        try:
            return strict_json(data)
        except (ValueError, RecursionError) as error:
            raise self.archive.bad(f"{where} is not valid JSON ({str(error)[:200]})") from error

    def _checked(self, form: type[M], data: Any, where: str) -> M:
        try:
            return form.model_validate(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            field = ".".join(str(part)[:80] for part in first["loc"][:6])
            raise self.archive.bad(f"{where}: {field + ': ' if field else ''}{first['msg'][:200]}") from error


def open_picture(data: bytes, suffix: str) -> Image:
    """The picture, decoded. Raises `ValueError`: why it is not one still picture of the suffix's format."""
    from PIL import Image  # late: a bundle without pictures needs it not

    try:
        image = Image.open(io.BytesIO(data), formats=[FORMATS[suffix]])
        if max(image.size) <= SIDE and getattr(image, "n_frames", 1) == 1:
            image.load()
            return image
    except (
        # What Pillow raises at bytes that are no picture depends on the format.
        *(OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, TypeError, OverflowError),
        *(KeyError, IndexError, Image.DecompressionBombError),
    ) as error:
        raise ValueError(f"is not a picture ({str(error)[:100]})") from error
    raise ValueError(f"is no still picture of at most {SIDE} x {SIDE} pixels")
