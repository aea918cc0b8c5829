"""The files beside ``runs.db``: pictures and their thumbnails, and small text files, under ``runs/<id>/``.

A picture is written before the row that names it, so a row never names a picture that is missing; a picture
without a row, left by a crash, is overwritten when its step is done again.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..rollout import Picture

THUMBNAIL_SIDE = 256  # pixels; a picture no larger is its own thumbnail

_PLAIN = re.compile(r"[a-z0-9_][a-z0-9_-]{0,59}")
_STEP_FOLDER = re.compile(r"(?:step-|eval-.*-)(\d+)")


def file_name(text: str) -> str:
    """A name for ``text`` that is safe on every file system, and differs from that of every other text.

    Short lower-case names stand for themselves; others get a dot, which those never have, and a hash, so that
    neither case nor what was replaced makes two of them one. Never empty, "." or "..", never a path.
    """
    if _PLAIN.fullmatch(text):
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    readable = re.sub(r"[^a-z0-9_-]+", "_", text.lower())[:40].strip("_-")
    return f"{readable or 'id'}.{digest}"


def step_stem(step: int, g: int, k: int) -> str:
    """Where the picture of a rollout stands, without folder and extension: ``step-000012/g0-k3``."""
    return f"step-{step:06d}/g{g}-k{k}"


def evaluation_stem(kind: str, step: int, prompt_id: str, arm: str, index: int) -> str:
    """Where the picture of an evaluation stands, without folder and extension."""
    return f"eval-{file_name(kind)}-{step:06d}/{file_name(prompt_id)}/{file_name(arm)}-{index}"


class PictureFiles:
    """Writes the pictures of one run; gives paths relative to ``root``, with ``/``.

    ``png`` keeps every pixel; ``webp`` (quality 90) is lossy and several times smaller.
    """

    def __init__(self, root: Path, folder: Path, image_format: Literal["png", "webp"]) -> None:
        self.root = root
        self.folder = folder
        self.image_format = image_format

    def save(self, picture: Picture, stem: str) -> tuple[str, str]:
        """Write an RGB picture, uint8 (H, W, 3); returns (picture, thumbnail). Raises `OSError`."""
        from PIL.Image import fromarray  # late: readers of the database never need it

        image = fromarray(picture)
        path = self._file("images", f"{stem}.{self.image_format}")
        if self.image_format == "webp":
            image.save(path, quality=90)
        else:
            image.save(path)
        if max(image.size) <= THUMBNAIL_SIDE:
            return self._relative(path), self._relative(path)
        small = self._file("thumbs", f"{stem}.webp")
        save_thumbnail(image, small)
        return self._relative(path), self._relative(small)

    def _file(self, kind: str, name: str) -> Path:
        path = self.folder / kind / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def save_thumbnail(image: Image, file: Path) -> None:
    """Write the small copy of a larger picture, which becomes small itself. Raises `OSError`."""
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    image.save(file, quality=80)


def remove_pictures_after(folder: Path, step: int) -> None:
    """Remove the pictures of all steps and evaluations later than ``step``. Raises `OSError`."""
    for kind in ("images", "thumbs"):
        for entry in _entries(folder / kind):
            match = _STEP_FOLDER.fullmatch(entry.name)
            if match and int(match[1]) > step:
                shutil.rmtree(entry)


def remove_folder(folder: Path) -> None:
    """Remove a run's folder, or the link that stands for it, if there is one. Raises `OSError`."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def write_text(path: Path, text: str) -> None:
    """Replace a file's content at once: a reader, or a crash, finds the old or the new. Raises `OSError`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _entries(folder: Path) -> Iterable[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
