"""How many numbers a model's weights are, from its files or its configuration, without loading or downloading it."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from .loading import model_folder

Source = Literal["files", "configuration", "published"]
FORMATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class UnknownSize(Exception):
    """A model's size can't be known here; the message is one plain sentence."""


@dataclass(frozen=True)
class Weights:
    """Parameters and saved buffers of a model or of one part of a pipeline.

    Attributes:
        elements: how many numbers.
        source: where that is known from.
        wide: how many of them stay in float32 when the rest is float16 (T5 overflows otherwise).
        stored: number format of most of the files; None = not known.
    """

    elements: int
    source: Source
    wide: int = 0
    stored: torch.dtype | None = None

    def bytes(self, dtype: torch.dtype) -> int:
        """Size in memory when loaded as ``dtype``."""
        wide = self.wide if dtype == torch.float16 else 0
        return (self.elements - wide) * dtype.itemsize + wide * 4

    def converted(self, dtype: torch.dtype) -> int:
        """Bytes of the host's memory that loading as ``dtype`` takes.

        0 where the files hold that format, for the weights are then mapped from there; and where it is not known.
        """
        return 0 if self.stored in (None, dtype) else self.bytes(dtype)


def local_folder(path: str, part: str) -> Path | None:
    """The model's folder on this disk (embedded, given, or in the hub's cache), or None. Nothing is downloaded."""
    local = Path(model_folder(path, part)).expanduser()
    if local.is_dir():
        return local
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def not_here(role: str, path: str) -> UnknownSize:
    return UnknownSize(
        f"How much memory models.{role}.path {path!r} needs is unknown until its configuration is on this machine."
    )


def read_json(path: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnknownSize(f"How much memory is needed is unknown: {path} could not be read as JSON.") from error
    return data


def stored_tensors(folder: Path, stem: str) -> tuple[dict[str, int], torch.dtype | None] | None:
    """Name -> elements of every tensor in the weight files that would be loaded, sharded or not; their main format.

    None where they are not all there, or are no safetensors files.
    """
    from safetensors import SafetensorError, safe_open

    index = folder / f"{stem}.safetensors.index.json"
    if (folder / f"{stem}.safetensors").is_file():
        files = {f"{stem}.safetensors"}
    elif index.is_file():
        files = set(read_json(index)["weight_map"].values())
    else:
        return None
    tensors: dict[str, int] = {}
    formats: Counter[str] = Counter()
    try:
        for file in sorted(files):
            with safe_open(folder / file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    tensor = opened.get_slice(name)
                    tensors[name] = math.prod(tensor.get_shape())
                    formats[tensor.get_dtype()] += tensors[name]
    except (OSError, SafetensorError):  # a download that has not ended
        return None
    return tensors, FORMATS.get(max(formats, key=lambda name: formats[name], default=""))


def elements_of(model: torch.nn.Module) -> dict[str, int]:
    """Name -> elements of parameters (shared ones once) and of the buffers that are saved with them."""
    shared = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return found | {name: tensor.numel() for name, tensor in model.state_dict().items() if name not in shared}


def first_line(error: Exception) -> str:
    return f"{str(error).splitlines()[0] if str(error) else type(error).__name__}".rstrip(".") + "."
