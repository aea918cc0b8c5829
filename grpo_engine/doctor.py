"""What this machine has, and what a run with given settings would miss."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from . import hub
from .config import ConfigError, RunConfig
from .memory import GIB, MemoryPlan, MemoryRefusal, device_memory, plan_memory
from .placement import Placement, available_devices, compute_dtype, intended
from .store.journal import JournalError, filesystem, journal_for
from .tiny import WEIGHTS

PACKAGES = (
    "torch", "torchvision", "transformers", "diffusers", "open_clip_torch", "peft", "accelerate",
    "gradio", "plotly", "sqlite-utils", "pydantic",
)  # fmt: skip


def examine(db: str, preset: str, overrides: Iterable[str]) -> dict[str, Any]:
    """Devices, memory, versions and problems, as plain data. Nothing is loaded or changed."""
    problems: list[str] = []
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
            problems.append(f"The package {name} is not installed; run 'pip install -r requirements.txt'.")
    devices = {name: _memory(name) for name in available_devices()}
    for part in ("policy", "image", "reward"):
        if not (WEIGHTS / part).is_dir():
            problems.append(f"The embedded {part} model is missing; run 'python -m grpo_engine.tiny.build'.")
    problems += _database_problems(db)
    journal = None
    try:
        journal = journal_for(Path(db))
    except JournalError as error:
        problems.append(str(error))
    placement, memory, found = _planned(preset, overrides)
    problems += found
    folder = next(folder for folder in Path(db).resolve().parents if folder.exists())
    disk = shutil.disk_usage(folder)
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": versions,
        "devices": devices,
        "cpu_threads": torch.get_num_threads(),
        "cpu_bfloat16": compute_dtype("auto", torch.device("cpu")) == torch.bfloat16,
        "disk_free_gib": round(disk.free / GIB, 1),
        "database": db,
        "database_filesystem": filesystem(Path(db)),
        "database_journal": journal,
        "settings": preset,
        "placement": None if placement is None else placement.describe(),
        "models": _models(preset, overrides),
        "memory": None if memory is None else memory.as_data() | {"text": memory.as_text()},
        "problems": problems,
    }


def _memory(device: str) -> dict[str, float]:
    """Free and total memory of a device in GiB."""
    memory = device_memory(device)
    return {"free_gib": round(memory.free / GIB, 1), "total_gib": round(memory.total / GIB, 1)}


def _planned(preset: str, overrides: Iterable[str]) -> tuple[Placement | None, MemoryPlan | None, list[str]]:
    """Where the models would go, what they would need there even if it is not here, and what prevents the run."""
    try:
        config = RunConfig.load(preset, overrides)
    except ConfigError as error:
        return None, None, [str(error)]
    from .plan import Plan

    placement = intended(config.placement)
    try:
        return placement, Plan(config).memory, []
    except MemoryRefusal as refusal:
        return placement, refusal.plan, [str(refusal)]
    except ConfigError as error:
        problem = str(error)
    try:
        return placement, plan_memory(config, placement), [problem]
    except ConfigError:  # a model's path names nothing, which is the problem already found
        return placement, None, [problem]


def _models(preset: str, overrides: Iterable[str]) -> list[dict[str, Any]]:
    """Where each configured model is: "embedded", "folder", "cache", or "hub" with GB to download (None = unknown)."""
    try:
        config = RunConfig.load(preset, overrides)
        wanted = hub.repositories(config)
    except ConfigError:  # which is among the problems
        return []
    found: list[dict[str, Any]] = []
    for section in ("policy", "image", "reward"):
        path: str = getattr(config.models, section).path
        own = [one for one in wanted if one.setting.startswith(f"models.{section}.")]
        where = "embedded" if path == "tiny" else "folder"
        if not own:
            found.append({"model": section, "name": path, "where": where, "download_gb": 0.0})
        for repository in own:
            size: float | None = 0.0
            if repository.missing:
                try:
                    size = round(hub.look_up(repository).bytes / hub.GB, 2)
                except ConfigError:  # which is among the problems
                    size = None
            state = "hub" if repository.missing else "cache"
            found.append({"model": section, "name": repository.name, "where": state, "download_gb": size})
    return found


def _model_line(model: dict[str, Any]) -> str:
    places = {"embedded": "comes with the program", "folder": "in its folder", "cache": "in the cache"}
    amount = "how much is not known here" if model["download_gb"] is None else f"{model['download_gb']} GB"
    return f"{model['model']} model {model['name']}: {places.get(model['where'], f'to download ({amount})')}."


def _database_problems(db: str) -> list[str]:
    from .store import Store, StoreError

    if not Path(db).exists():
        return []
    try:
        with Store(db, read_only=True) as store:
            return store.check()
    except StoreError as error:
        return [str(error)]


def print_findings(findings: dict[str, Any]) -> None:
    """For people."""
    print(f"Python {findings['python']} on {findings['system']}")
    print("  " + ", ".join(f"{name} {version or 'MISSING'}" for name, version in findings["packages"].items()))
    for name, memory in findings["devices"].items():
        print(f"{name}: {memory['free_gib']} of {memory['total_gib']} GiB free")
    bf16 = "in hardware" if findings["cpu_bfloat16"] else "not in hardware, float32 is used"
    print(f"CPU threads: {findings['cpu_threads']}; bfloat16 {bf16}. Disk: {findings['disk_free_gib']} GiB free.")
    if findings["database_journal"]:
        journal = {"wal": "write-ahead log", "rollback": "rollback journal"}[findings["database_journal"]]
        place = findings["database_filesystem"] or "an unknown file system"
        print(f"Database {findings['database']} on {place}: {journal}.")
    if findings["placement"]:
        print(f"With {findings['settings']}: {findings['placement']}.")
    for model in findings["models"]:
        print(_model_line(model))
    if findings["memory"]:
        print("\n".join(findings["memory"]["text"]))
    for problem in findings["problems"]:
        print(f"Problem: {problem}")
    if not findings["problems"]:
        print("Nothing is missing.")
