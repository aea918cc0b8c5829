"""Which files a model consists of: what a folder lacks, and which files of a repository are worth downloading.

Names and headers only; nothing is loaded, and nothing here knows of a network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .config import ImageModelConfig

TEXTS = (".json", ".txt", ".jinja", ".model")
WEIGHTS = re.compile(r"(.*/)?(model|pytorch_model|diffusion_pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.model")
OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
BARE_PARTS = ("Processor", "Extractor")  # parts of a pipeline without a file that all of them have


def left_out(index: Mapping[str, Any], settings: ImageModelConfig) -> frozenset[str]:
    """The parts of a pipeline (by its ``model_index.json``) that are not loaded, and so not needed on the disk."""
    from .image_families import family_of

    return frozenset(family_of(str(index.get("_class_name", ""))).left_out(settings))


# -- what a folder lacks -------------------------------------------------------------------------------------


def missing_of_policy(folder: Path) -> list[str]:
    """Files that a ``transformers`` model in ``folder`` lacks; empty = complete. Weights may be in shards."""
    if not (folder / "config.json").is_file():
        return ["config.json"]
    lacks = missing_weights(folder, ("model", "pytorch_model"))
    if not any((folder / name).is_file() for name in TOKENIZERS):
        lacks.append("tokenizer.json")
    return lacks


def missing_of_pipeline(folder: Path, settings: ImageModelConfig) -> list[str]:
    """Files that a ``diffusers`` pipeline in ``folder`` lacks, but for the parts that are not loaded."""
    try:
        index: dict[str, Any] = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ["model_index.json"]
    lacks, dropped = [], left_out(index, settings)
    for name, entry in index.items():
        if not (isinstance(entry, list) and len(entry) == 2 and entry[0]) or name in dropped:
            continue
        kind = str(entry[1])
        if not (folder / name).is_dir():
            found = ["any file"]
        elif kind.endswith("Scheduler"):
            found = _absent(folder / name, "scheduler_config.json")
        elif "Tokenizer" in kind:
            found = _absent(folder / name, "tokenizer_config.json")
        elif kind.endswith(BARE_PARTS):
            found = []
        else:
            found = _absent(folder / name, "config.json")
            found += missing_weights(folder / name, ("diffusion_pytorch_model", "model", "pytorch_model"))
        lacks += [f"{name}/{file}" for file in found]
    return lacks


def missing_of_reward(folder: Path) -> list[str]:
    """Files that an ``open_clip`` model in ``folder`` lacks; without weights it would score at random."""
    lacks = _absent(folder, "open_clip_config.json")
    weights = [file for suffix in ("safetensors", "bin", "pth") for file in folder.glob(f"*.{suffix}")]
    return lacks + ([] if weights else [OPEN_CLIP_WEIGHTS[0]]) + [name for file in weights for name in _broken(file)]


def missing_weights(folder: Path, stems: Iterable[str]) -> list[str]:
    """What lacks of the weights called by the first of ``stems`` that is there, in one file or in shards."""
    stems = tuple(stems)
    for stem in stems:
        for suffix in ("safetensors", "bin"):
            one, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
            if one.is_file():
                return _broken(one)
            if index.is_file():
                try:
                    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
                except (OSError, ValueError, KeyError, AttributeError):
                    return [f"readable {index.name}"]
                return [found for name in names for found in _absent(folder, name) or _broken(folder / name)]
    return [f"{stems[0]}.safetensors"]


def _absent(folder: Path, name: str) -> list[str]:
    return [] if (folder / name).is_file() else [name]


def _broken(file: Path) -> list[str]:
    """A safetensors file whose length is not what its header says: a copy that broke off."""
    if file.suffix != ".safetensors":
        return []
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):
            return []
    except (OSError, SafetensorError):
        return [f"whole {file.name} (it is cut short)"]


# -- what of a repository is wanted --------------------------------------------------------------------------


def files_of_policy(names: Iterable[str]) -> list[str]:
    """Of a repository's file names, those that a ``transformers`` model needs: nothing in subfolders."""
    return _texts_and_weights([name for name in names if "/" not in name])


def files_of_pipeline(names: Iterable[str], index: Mapping[str, Any], settings: ImageModelConfig) -> list[str]:
    """Of a repository's file names, those of the parts in its ``model_index.json``; no half-precision variants."""
    names, chosen, dropped = list(names), ["model_index.json"], left_out(index, settings)
    for part, entry in index.items():
        if isinstance(entry, list) and entry and entry[0] and part not in dropped:
            chosen += _texts_and_weights([name for name in names if name.startswith(f"{part}/")])
    return chosen


def files_of_reward(names: Iterable[str]) -> list[str]:
    """Of a repository's file names, those that an ``open_clip`` model needs, its tokenizer included."""
    names = [name for name in names if "/" not in name]
    weights = next(([name] for name in OPEN_CLIP_WEIGHTS if name in names), [])
    return [name for name in names if name.endswith(TEXTS)] + weights


def files_of_tokenizer(names: Iterable[str]) -> list[str]:
    """Of a repository's file names, those that a tokenizer needs."""
    return [name for name in names if "/" not in name and name.endswith(TEXTS)]


def _texts_and_weights(names: list[str]) -> list[str]:
    weights = [name for name in names if WEIGHTS.fullmatch(name)]
    safe = [name for name in weights if name.endswith(".safetensors")]
    texts = [name for name in names if name.endswith(TEXTS)]
    return [name for name in texts if not (safe and ".bin.index" in name)] + (safe or weights)
