"""Taking a trained rewriter away: as a peft adapter, a merged model, or one ``.pth`` file, with a model card.

Invariants:
    - The weights come from a verified checkpoint, never from the policy at hand, which only lends its base model
      and is not changed.
    - The target folder appears whole, by a rename.
    - What is exported can be used elsewhere: the embedded base model goes along, and no path of this machine does.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel

from .checkpoint import (
    WEIGHT_FILES,
    CheckpointError,
    CheckpointState,
    SavedPolicy,
    base_fingerprint,
    find_checkpoint,
    matched_weights,
    read_weights,
    verify_checkpoint,
)
from .checkpoint_folder import STATE_FILE, publish, writing
from .config import RunConfig, expanded
from .model_card import BASE_FOLDER, PTH_FILE, Format, base_name, card, portable
from .tiny import WEIGHTS

FORMAT = "pure-grpo-export"
VERSION = 1
METRICS_FILE = "metrics.json"


class ExportError(CheckpointError):
    """An export that was refused; the message is one plain sentence."""


def export(
    run_folder_or_checkpoint: Path | str,
    to: Path | str,
    *,
    format: Format = "peft",
    policy: SavedPolicy | None = None,
    summary: Mapping[str, Any] | None = None,
    force: bool = False,
    which: Literal["last", "best"] | int = "last",
) -> Path:
    """Write the trained policy to the folder ``to``; returns its absolute path.

    Args:
        format: ``peft``: an adapter for ``PeftModel.from_pretrained``. ``merged``: a whole model and its
            processor for the Auto classes. ``pth``: ``pure_grpo_policy.pth``, plain tensors and plain data.
        policy: needed for ``merged``: the base model is copied from it to the CPU.
        summary: the final evaluation's, as ``evaluation.summarise`` makes it, for the model card.
        force: replace an earlier export in ``to``. Any other folder that isn't empty is refused all the same.
        which: the checkpoint, when a run's folder is given.

    Raises:
        CheckpointError: no usable checkpoint, or the disk refused.
        ExportError: the target is taken, or the format does not fit the policy.
    """
    target = expanded(to).resolve()
    with writing(f"The export {target}"):
        _tidy(target)
    _check_target(target, force)
    state = _source(Path(run_folder_or_checkpoint), which)
    _check_format(state, format, policy)
    config = RunConfig.load(state.path / "config.yaml")
    embedded = state.base_model == "tiny" and format != "merged"
    if embedded and base_fingerprint(policy or _embedded_policy(config)) != state.base_fingerprint:
        raise ExportError(
            "The policy was trained on other embedded models than those that are here now; export it with the version "
            "of the program that trained it."
        )
    config = _portable_config(config)
    summary = json.loads(json.dumps(summary))
    partial = target.parent / f".partial-{target.name}-{os.getpid()}"
    try:
        with writing(f"The export {target}"):
            partial.mkdir(parents=True)
            if format == "peft":
                _write_peft(partial, state)
            elif format == "pth":
                _write_pth(partial / PTH_FILE, state, config, summary)
            elif policy is not None:
                _write_merged(partial, state, policy)
            if embedded:
                shutil.copytree(WEIGHTS / "policy", partial / BASE_FOLDER)
            (partial / "config.yaml").write_text(config.dump_yaml(), encoding="utf-8")
            numbers = _header(state, format) | {"metrics": state.metrics, "evaluation": summary}
            (partial / METRICS_FILE).write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
            (partial / "README.md").write_text(card(state, config, format, summary), encoding="utf-8")
            publish(partial, target)
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def _source(path: Path, which: Literal["last", "best"] | int) -> CheckpointState:
    if (path / STATE_FILE).is_file():
        return verify_checkpoint(path)
    found = find_checkpoint(path, which)
    if found.note:
        logging.getLogger(__name__).warning(found.note)
    return verify_checkpoint(found.path)


def _check_target(target: Path, force: bool) -> None:
    """Only an empty place, or with ``force`` an earlier export, is written to: nothing else is deleted."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not _is_export(target):
        raise ExportError(f"{target} is not empty and not an export of this program; give a new or empty folder.")
    if not force:
        raise ExportError(f"{target} already holds an export; give another folder, or --force to replace it.")


def _is_export(folder: Path) -> bool:
    try:
        data = json.loads((folder / METRICS_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and data.get("format") == FORMAT


def _check_format(state: CheckpointState, format: Format, policy: SavedPolicy | None) -> None:
    if format == "peft" and state.kind != "lora":
        raise ExportError("All weights were trained, so there is no adapter to export; use the format merged or pth.")
    if format == "merged":
        if policy is None:
            raise ExportError("The format merged needs the policy's base model; load it first, or use peft or pth.")
        model = policy.model.get_base_model() if isinstance(policy.model, PeftModel) else policy.model
        if getattr(model, "hf_quantizer", None) is not None:
            raise ExportError("A quantized base model can't be merged without loss; load it in bfloat16, or use peft.")


def _tidy(target: Path) -> None:
    """Undo what a killed export to the same target left behind."""
    for path in sorted(target.parent.glob(".*")):
        match = re.fullmatch(r"\.(partial|replaced)-(.*)-\d+", path.name)
        if match and match.group(2) == target.name:
            if match.group(1) == "replaced" and not target.exists():
                os.rename(path, target)
            else:
                shutil.rmtree(path)


def _header(state: CheckpointState, format: Format) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "kind": format,
        "step": state.step,
        "base_model": base_name(state),
        "versions": state.versions,
    }


def _embedded_policy(config: RunConfig) -> SavedPolicy:
    from .loading import load_policy

    return load_policy(config, torch.device("cpu"))


def _portable_config(config: RunConfig) -> RunConfig:
    """The settings with names in the place of this machine's folders."""
    data = config.model_dump(mode="json")
    for part in data["models"].values():
        part["path"] = portable(part["path"])
    reward, prompts = data["models"]["reward"], data["data"]
    for section, name in ((prompts, "prompts"), (reward, "pretrained"), (reward, "aesthetic")):
        section[name] = portable(section[name])
    return RunConfig.parse(data)


def _adapter_config(state: CheckpointState) -> dict[str, Any]:
    """peft's settings of the adapter, which name the base model as others know it."""
    content = json.loads((state.path / "adapter_config.json").read_text(encoding="utf-8"))
    return content | {"base_model_name_or_path": base_name(state)}


def _write_peft(folder: Path, state: CheckpointState) -> None:
    shutil.copyfile(state.path / WEIGHT_FILES["lora"], folder / WEIGHT_FILES["lora"])
    text = json.dumps(_adapter_config(state), indent=2, sort_keys=True) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def _write_pth(file: Path, state: CheckpointState, config: RunConfig, summary: Mapping[str, Any] | None) -> None:
    metadata = _header(state, "pth") | {
        "adapter": _adapter_config(state) if state.kind == "lora" else None,
        "config": config.model_dump(mode="json"),
        "metrics": state.metrics,
        "evaluation": summary,
    }
    weights = {name: tensor.clone() for name, tensor in read_weights(state).items()}
    torch.save({"metadata": metadata, "weights": weights}, file)


def _write_merged(folder: Path, state: CheckpointState, policy: SavedPolicy) -> None:
    pairs = matched_weights(state, policy)
    # The copy's tensors are made on the CPU first and handed to deepcopy as already copied, so that the
    # model's structure is duplicated and the accelerator's memory is not.
    copies: dict[int, Any] = {}
    for parameter in policy.model.parameters():
        data = parameter.detach().to("cpu", copy=True)
        copies[id(parameter)] = torch.nn.Parameter(data, requires_grad=False)
    for buffer in policy.model.buffers():
        copies[id(buffer)] = buffer.detach().to("cpu", copy=True)
    model = copy.deepcopy(policy.model, copies)
    with torch.no_grad():
        for parameter, saved in pairs:
            copies[id(parameter)].copy_(saved)
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    model.save_pretrained(str(folder))
    policy.processor.save_pretrained(str(folder))
