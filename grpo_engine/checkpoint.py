"""Checkpoints of a run: saved atomically and loaded back bit for bit.

A checkpoint is the folder ``<run>/checkpoints/step-000020``: a peft adapter (``adapter_config.json`` and
``adapter_model.safetensors``; with full fine-tuning ``trainable.safetensors``), ``optimizer.safetensors``,
``config.yaml``, with ``training.async_steps`` the ``rollouts.safetensors`` of the step ahead, and ``state.json``, which
holds everything else. ``PeftModel.from_pretrained(base, folder)``
reads it as it is. ``checkpoint_folder.py`` keeps the folders whole.

Loading validates everything first: a refused checkpoint leaves policy and optimizer as they were.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import peft
import safetensors
import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter

from .checkpoint_folder import (
    FORMAT,
    STATE_FILE,
    VERSION,
    CheckpointError,
    CheckpointState,
    Found,
    find_checkpoint,
    fsync,
    has_checkpoint,
    next_serial,
    prune,
    publish,
    seal,
    sha256,
    tidy,
    verify_checkpoint,
    write_index,
    writing,
)
from .config import ROOT, RunConfig
from .rollout import Completions

__all__ = [
    "CheckpointError",
    "CheckpointState",
    "Found",
    "SavedPolicy",
    "Snapshot",
    "find_checkpoint",
    "has_checkpoint",
    "load_checkpoint",
    "prune",
    "read_rollouts",
    "save_checkpoint",
    "take_snapshot",
    "verify_checkpoint",
    "write_checkpoint",
]

ADAPTER = "default"
WEIGHT_FILES = {"lora": "adapter_model.safetensors", "full": "trainable.safetensors"}
OPTIMIZER_FILE = "optimizer.safetensors"
ROLLOUTS_FILE = "rollouts.safetensors"
# What two adapters of equal shapes can still differ in, so that the same weights mean something else.
ADAPTER_SETTINGS = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
SAMPLED_VALUES = 4096
ROLLOUT_TENSORS = ("prompt_ids", "token_ids", "mask", "logprobs", "entropies", "kept", "finished")


class SavedPolicy(Protocol):
    """What a checkpoint needs of the policy."""

    @property
    def model(self) -> Any:
        """The transformers model; a ``PeftModel`` around it when an adapter is trained."""

    @property
    def processor_path(self) -> Path | str:
        """Folder or hub id that the base model was loaded from."""

    @property
    def processor(self) -> Any:
        """Its processor or tokenizer."""

    def trainable(self) -> dict[str, Parameter]:
        """The weights being trained, by stable names."""


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds, copied to the CPU at one moment: whatever training does next, it stays as it was."""

    model: Any  # only for the adapter's configuration, which training never changes
    base_source: str
    base_fingerprint: str
    step: int
    config: RunConfig
    metrics: Mapping[str, float | None]
    extra: Any
    rollouts: tuple[Completions, ...]
    best_by: str
    trained: dict[str, Tensor]  # by the policy's own names
    weights: dict[str, Tensor]  # the same by their names in the weight file
    optimizer: str
    moments: dict[str, Tensor]
    groups: list[dict[str, Any]]


def take_snapshot(
    *,
    policy: SavedPolicy,
    optimizer: torch.optim.Optimizer,
    step: int,
    config: RunConfig,
    metrics: Mapping[str, float | None],
    extra: Any = None,
    rollouts: Sequence[Completions] = (),
    best_by: str = "reward_mean",
    together: Mapping[int, Tensor] | None = None,
) -> Snapshot:
    """Copy what a checkpoint needs.

    Args:
        extra: anything JSON can hold; comes back from :func:`load_checkpoint`.
        rollouts: what was sampled already for the step after; comes back from :func:`read_rollouts`.
        best_by: name of the metric by which the best checkpoint is chosen, higher is better.
        together: copies that stand for weights and moments of which this rank has a share only, by ``id`` of the share.

    Raises:
        CheckpointError: weights are trained that a checkpoint has no place for.
    """
    together = together or {}
    copies = {id(p): _copied(p, together) for p in policy.trainable().values()}
    moments, groups = _optimizer_state(policy, optimizer, together)
    return Snapshot(
        model=policy.model,
        base_source=_base_source(policy, config.models.policy.path),
        base_fingerprint=base_fingerprint(policy),
        step=step,
        config=config,
        metrics=dict(metrics),
        extra=extra,
        rollouts=tuple(rollouts),
        best_by=best_by,
        trained={name: copies[id(p)] for name, p in policy.trainable().items()},
        weights={name: copies[id(p)] for name, p in _weight_parameters(policy).items()},
        optimizer=type(optimizer).__name__,
        moments=moments,
        groups=groups,
    )


def _copied(tensor: Tensor, together: Mapping[int, Tensor]) -> Tensor:
    whole = together.get(id(tensor))
    return (tensor.detach().to("cpu", copy=True) if whole is None else whole).contiguous()


def save_checkpoint(run_folder: Path | str, **what: Any) -> Path:
    """:func:`take_snapshot` of ``what``, and :func:`write_checkpoint`."""
    return write_checkpoint(run_folder, take_snapshot(**what))


def write_checkpoint(run_folder: Path | str, snapshot: Snapshot) -> Path:
    """Write ``checkpoints/step-<step>`` in ``run_folder``, replacing an earlier one of the same step.

    Raises:
        CheckpointError: the disk refused.
        TypeError, ValueError: JSON can't hold ``extra``.
    """
    folder = Path(run_folder) / "checkpoints"
    target = folder / f"step-{snapshot.step:06d}"
    partial = folder / f".partial-{target.name}-{os.getpid()}"
    config = snapshot.config
    try:
        with writing(f"The checkpoint {target}"):
            tidy(folder)
            serial = next_serial(folder)
            partial.mkdir(parents=True)
            fsync(folder.parent)
            kind = _write_weights(partial, snapshot)
            save_file(snapshot.moments, partial / OPTIMIZER_FILE)
            if snapshot.rollouts:
                _write_rollouts(partial / ROLLOUTS_FILE, snapshot.rollouts)
            (partial / "config.yaml").write_text(config.dump_yaml(), encoding="utf-8")
            finite = {name: _finite(value) for name, value in snapshot.metrics.items()}
            state = {
                "format": FORMAT,
                "version": VERSION,
                "step": snapshot.step,
                "serial": serial,
                "kind": kind,
                "metrics": finite,
                "score": finite.get(snapshot.best_by),
                "extra": snapshot.extra,
                "base_model": config.models.policy.path,
                "base_source": snapshot.base_source,
                "base_fingerprint": snapshot.base_fingerprint,
                "config_fingerprint": config_fingerprint(config),
                "optimizer": {"class": snapshot.optimizer, "groups": snapshot.groups},
                "versions": versions(),
                "files": {file.name: sha256(file) for file in sorted(partial.iterdir())},
            }
            (partial / STATE_FILE).write_bytes(seal(state))
            publish(partial, target)
            write_index(folder)
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def load_checkpoint(
    path: Path | str,
    policy: SavedPolicy,
    optimizer: torch.optim.Optimizer | None = None,
    put: Callable[[Parameter, Tensor], object] = lambda parameter, saved: parameter.copy_(saved),
) -> CheckpointState:
    """Copy the checkpoint's weights into ``policy`` and its state into ``optimizer``, bit for bit.

    ``put`` does so with one weight.

    Raises:
        CheckpointError: damaged, foreign or newer; ``policy`` and ``optimizer`` are then untouched.
    """
    state = verify_checkpoint(path)
    pairs = matched_weights(state, policy)
    if optimizer is not None:
        optimizer.load_state_dict(_torch_optimizer_state(state, policy, optimizer))
    with torch.no_grad():
        for parameter, saved in pairs:
            put(parameter, saved)
    return state


def read_rollouts(state: CheckpointState) -> list[Completions]:
    """What was sampled for the step after the checkpoint's; empty where nothing was."""
    if ROLLOUTS_FILE not in state.files:
        return []
    with safe_open(state.path / ROLLOUTS_FILE, "pt") as file:
        texts = json.loads(file.metadata()["texts"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dictionary)
    found = []
    for index, own in enumerate(texts):
        fields: dict[str, Any] = {name: tensors.get(f"{index}.{name}") for name in ROLLOUT_TENSORS}
        found.append(Completions(texts=tuple(own), **fields))
    return found


def _write_rollouts(file: Path, rollouts: Sequence[Completions]) -> None:
    tensors = {
        f"{index}.{name}": tensor.contiguous()
        for index, completions in enumerate(rollouts)
        for name in ROLLOUT_TENSORS
        if (tensor := getattr(completions, name)) is not None
    }
    save_file(tensors, file, metadata={"texts": json.dumps([completions.texts for completions in rollouts])})


def read_weights(state: CheckpointState) -> dict[str, Tensor]:
    """The checkpoint's weights, on the CPU: peft's adapter keys, or parameter names of the plain model."""
    return load_file(state.path / WEIGHT_FILES[state.kind])


def matched_weights(state: CheckpointState, policy: SavedPolicy) -> list[tuple[Parameter, Tensor]]:
    """Each trained parameter of ``policy`` with its saved value, on the CPU. Changes nothing.

    Raises:
        CheckpointError: the checkpoint is of another model, adapter or number format.
    """
    _check_adapter(state, policy)
    weights, parameters = read_weights(state), _weight_parameters(policy)
    if odd := sorted(weights.keys() ^ parameters.keys()):
        owner = "checkpoint" if odd[0] in weights else "policy"
        raise _foreign(state, f"{len(odd)} weights differ, such as {odd[0]}, which only the {owner} has")
    for name, parameter in parameters.items():
        if weights[name].shape != parameter.shape:
            sizes = f"{tuple(weights[name].shape)} there and {tuple(parameter.shape)} here"
            raise _foreign(state, f"{name} has the shape {sizes}")
        if weights[name].dtype != parameter.dtype:
            raise _foreign(state, f"its weights are {weights[name].dtype}, the policy's {parameter.dtype}")
    if state.base_fingerprint != base_fingerprint(policy):
        raise _foreign(state, f"it was trained on {state.base_source}, but {policy.processor_path} holds another model")
    return [(parameter, weights[name]) for name, parameter in parameters.items()]


def _weight_parameters(policy: SavedPolicy) -> dict[str, Parameter]:
    """The policy's trained parameters under the names they have in a checkpoint's weight file."""
    trained = list(policy.trainable().values())
    if not isinstance(policy.model, PeftModel):
        ids = {id(parameter) for parameter in trained}
        return {name: p for name, p in policy.model.named_parameters() if id(p) in ids}
    # peft hands out views; its key belongs to the parameter that lies at the same address.
    by_address = {parameter.data_ptr(): parameter for parameter in trained}
    views = get_peft_model_state_dict(policy.model, adapter_name=ADAPTER, save_embedding_layers=False)
    found = {key: by_address.pop(view.data_ptr(), None) for key, view in views.items()}
    if by_address or None in found.values():
        raise CheckpointError(
            "The weights being trained are not exactly the adapter's, so a checkpoint can't hold them; "
            "train the adapter alone, or set models.policy.adapter to full."
        )
    return {key: parameter for key, parameter in found.items() if parameter is not None}


def base_fingerprint(policy: SavedPolicy) -> str:
    """SHA-256 that tells base models under equal adapters apart, from any folder and in any number format.

    Covers the frozen weights that quantization leaves alone (vectors, and the token embedding), each by name,
    shape and up to 4096 evenly spaced values rounded to bfloat16.
    """
    trained = {id(parameter) for parameter in policy.trainable().values()}
    embedding = policy.model.get_input_embeddings().weight
    digest = hashlib.sha256()
    for name, parameter in policy.model.named_parameters():
        if id(parameter) in trained or not parameter.is_floating_point():
            continue
        if parameter.ndim == 1 or parameter is embedding:
            digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
            flat = parameter.detach().reshape(-1)
            values = flat[:: max(1, flat.numel() // SAMPLED_VALUES)].to(torch.bfloat16)
            digest.update(values.view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()


def config_fingerprint(config: RunConfig) -> str:
    """SHA-256 of all settings."""
    return hashlib.sha256(json.dumps(config.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    libraries = (torch, transformers, peft, safetensors)
    return {"python": platform.python_version()} | {lib.__name__: str(lib.__version__) for lib in libraries}


def _write_weights(folder: Path, snapshot: Snapshot) -> str:
    model = snapshot.model
    if not isinstance(model, PeftModel):
        save_file(snapshot.weights, folder / WEIGHT_FILES["full"])
        return "full"
    model.save_pretrained(
        str(folder), selected_adapters=[ADAPTER], save_embedding_layers=False, state_dict=snapshot.trained
    )
    (folder / "README.md").unlink()  # names the folder the base was loaded from
    file = folder / "adapter_config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["base_model_name_or_path"] = snapshot.config.models.policy.path
    if isinstance(content["target_modules"], list):
        content["target_modules"].sort()  # a set, in an order that changes from process to process
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return "lora"


def _check_adapter(state: CheckpointState, policy: SavedPolicy) -> None:
    """Refuse a checkpoint whose adapter is of another kind than the policy's."""
    kind = "lora" if isinstance(policy.model, PeftModel) else "full"
    if state.kind != kind:
        raise _foreign(state, f"it was trained with models.policy.adapter={state.kind}, the policy is {kind}")
    if kind == "lora":
        saved = json.loads((state.path / "adapter_config.json").read_text(encoding="utf-8"))
        settings = policy.model.peft_config[ADAPTER].to_dict()
        for name in ADAPTER_SETTINGS:
            there, here = saved.get(name), settings.get(name)
            if there != here:
                raise _foreign(state, f"its adapter has {name} = {there}, the policy's has {here}")


def _optimizer_names(policy: SavedPolicy, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Parameter names of each of the optimizer's groups."""
    names = {id(parameter): name for name, parameter in policy.trainable().items()}
    groups = [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]
    if any(name is None for group in groups for name in group):
        raise CheckpointError("The optimizer updates a weight that the policy does not train; build it anew.")
    return [[name for name in group if name is not None] for group in groups]


def _optimizer_state(
    policy: SavedPolicy, optimizer: torch.optim.Optimizer, together: Mapping[int, Tensor]
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The state as flat tensors ``<field>:<parameter name>``, and the groups as plain data."""
    tensors: dict[str, Tensor] = {}
    groups: list[dict[str, Any]] = []
    for group, names in zip(optimizer.param_groups, _optimizer_names(policy, optimizer), strict=True):
        options = {key: value for key, value in group.items() if key != "params"}
        groups.append({"parameters": names, "options": options})
        for parameter, name in zip(group["params"], names, strict=True):
            for field, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{field}:{name}"] = _copied(value, together)
    return tensors, groups


def _torch_optimizer_state(
    state: CheckpointState, policy: SavedPolicy, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """The saved state in the layout of ``Optimizer.state_dict``, for the optimizer at hand."""
    saved = state.optimizer["groups"]
    names = _optimizer_names(policy, optimizer)
    if state.optimizer["class"] != type(optimizer).__name__:
        here = type(optimizer).__name__
        raise _foreign(state, f"its optimizer is {state.optimizer['class']}, here it is {here}")
    if [sorted(group["parameters"]) for group in saved] != [sorted(group) for group in names]:
        raise _foreign(state, "its optimizer groups other weights")
    index = {name: i for i, name in enumerate(name for group in names for name in group)}
    fields: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_file(state.path / OPTIMIZER_FILE).items():
        field, _, name = key.partition(":")
        # A copy, since the loaded tensor is a view of the file, which may go while the optimizer lives.
        fields.setdefault(index[name], {})[field] = tensor.clone()
    groups = []
    for group, own in zip(saved, names, strict=True):
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in group["options"].items()}
        groups.append(options | {"params": [index[name] for name in own]})
    return {"state": fields, "param_groups": groups}


def _base_source(policy: SavedPolicy, configured: str) -> str:
    """The base's folder relative to the program's own when it lies inside, else its configured name."""
    for source in (policy.processor_path, policy.model.name_or_path):
        path = Path(source).resolve()
        if source and path.is_dir() and path != ROOT and path.is_relative_to(ROOT):
            return path.relative_to(ROOT).as_posix()
    return configured


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _foreign(state: CheckpointState, why: str) -> CheckpointError:
    return CheckpointError(f"The checkpoint {state.path} does not belong to this policy: {why}.")
