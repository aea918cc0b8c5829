"""Rows of ``runs.db`` as values, and back: what a reader gets, and how numbers, text and JSON are stored."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..recorder import FINAL_STATES

ENDINGS = frozenset({"stopped", "failed", "interrupted"})
"""Final states that a run can leave again, by being resumed."""

TRANSITIONS: Mapping[str, frozenset[str]] = {
    # From loading straight to training or evaluating: a run that is resumed.
    "queued": frozenset({"loading"}) | ENDINGS,
    "loading": frozenset({"baseline", "training", "evaluating"}) | ENDINGS,
    "baseline": frozenset({"training", "paused"}) | ENDINGS,
    "training": frozenset({"evaluating", "paused"}) | ENDINGS,
    "evaluating": frozenset({"training", "paused", "finished"}) | ENDINGS,
    "paused": frozenset({"baseline", "training", "evaluating"}) | ENDINGS,
    "finished": frozenset(),
    "stopped": frozenset({"queued", "loading"}),
    "failed": frozenset({"queued", "loading"}),
    "interrupted": frozenset({"queued", "loading"}),
}
"""Every change of a run's state that is possible: from -> to. A state never changes to itself, so of two
processes that take up one queued run, the second is refused."""

COMMANDS = ("stop", "pause", "resume", "save", "evaluate")
"""What another process may ask of a run that goes on."""


@dataclass(frozen=True)
class RunRow:
    """A run as it stands. Times in seconds since 1970; ``config`` is plain data, valid for the version that
    wrote it; ``message`` says what the run is doing or why it ended, ``error`` why it failed."""

    number: int
    id: str
    name: str
    state: str
    preset: str
    config_json: str
    seed: int
    prompt_set: str
    prompt_fingerprint: str
    tags: tuple[str, ...]
    notes: str
    source: str
    created: float
    started: float | None
    finished: float | None
    updated: float
    heartbeat: float | None
    pid: int | None
    host: str | None
    process_token: str | None
    step: int
    total_steps: int
    phase: str
    phase_done: int
    phase_total: int
    message: str
    error: str | None
    resumed_count: int
    summary: Mapping[str, Any] | None

    @cached_property
    def config(self) -> dict[str, Any]:
        """The settings, parsed when first asked for: a list of many runs rarely needs them."""
        return dict(json.loads(self.config_json))

    @property
    def active(self) -> bool:
        """Whether the run waits or goes on."""
        return self.state not in FINAL_STATES


@dataclass(frozen=True, eq=False)
class RolloutRow:
    """One rewrite of a group. Arrays are (T,), over real tokens only; None where tokens were not recorded.

    ``kl`` is the mean of ``token_kl``, nats a token; ``shift`` is a token's log-probability when sampled minus the
    untrained policy's, nats (None in rows of before it was recorded); ``image``, ``thumbnail`` are paths below
    `Store.root`.
    """

    step: int
    g: int  # which of the step's groups
    k: int  # which of the group's rewrites
    prompt_id: str
    prompt: str
    tier: str
    completion: str
    rewrite: str | None
    finished: bool
    reward: float | None
    advantage: float | None
    kl: float | None
    parts: Mapping[str, float | None]
    latent_seed: int
    token_ids: NDArray[np.int32] | None
    tokens: tuple[str, ...] | None
    logprobs: NDArray[np.float32] | None
    entropies: NDArray[np.float32] | None
    token_kl: NDArray[np.float32] | None
    shift: NDArray[np.float32] | None
    image: str | None
    thumbnail: str | None


@dataclass(frozen=True)
class PromptVisit:
    """One group of a training prompt, by the best of its rewrites; all of its pictures are on the same latents."""

    step: int
    g: int
    prompt: str
    tier: str
    rollouts: int
    reward_mean: float | None
    reward_best: float | None
    rewrite: str | None
    image: str | None
    thumbnail: str | None


@dataclass(frozen=True)
class EvaluationRow:
    """A measurement; ``items`` says how many pictures it has."""

    id: int
    run_id: str
    kind: str
    step: int
    split: str
    time: float
    items: int
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class ItemRow:
    """One picture of a measurement (see `recorder.EvaluationItem`)."""

    evaluation_id: int
    arm: str
    prompt_id: str
    index: int
    prompt: str
    tier: str
    latent_seed: int
    rewrite: str | None
    reward: float | None
    parts: Mapping[str, float | None]
    judge: float | None
    judge_parts: Mapping[str, Sequence[int]]
    image: str | None
    thumbnail: str | None
    cut_tokens: int | None  # None in rows of before it was recorded
    read_chars: int | None

    @property
    def unread(self) -> str:
        """The end of the rewrite that the image model did not read; empty where it read all, or that is not known."""
        return "" if self.rewrite is None or not self.cut_tokens else self.rewrite[self.read_chars :]


@dataclass(frozen=True)
class EventRow:
    """One line of a run's history; ``level`` is "info", "warning" or "error"."""

    id: int
    run_id: str
    time: float
    kind: str
    level: str
    message: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class CommandRow:
    """Something asked of a run; ``outcome`` once it was dealt with."""

    id: int
    run_id: str
    command: str
    created: float
    taken: float | None
    outcome: str | None


@dataclass(frozen=True, eq=False)
class Bins:
    """One metric summed up over bins of ``width`` steps: arrays (B,), bins without a value left out.

    Bin b covers steps ``first[b]`` .. ``last[b]``; ``count`` of them have a value.
    """

    width: int
    first: NDArray[np.int64]
    last: NDArray[np.int64]
    count: NDArray[np.int64]
    low: NDArray[np.float64]
    mean: NDArray[np.float64]
    high: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.first)


def run_row(row: Mapping[str, Any]) -> RunRow:
    """A row of table ``runs``."""
    data = dict(row)
    data["config_json"] = data.pop("config")
    data["tags"] = tuple(json.loads(data["tags"]))
    data["summary"] = None if data["summary"] is None else json.loads(data["summary"])
    return RunRow(**data)


def rollout_row(row: Mapping[str, Any]) -> RolloutRow:
    """A row of table ``rollouts``."""
    data = {key: value for key, value in row.items() if key not in ("id", "run_id")}
    data["finished"] = bool(data["finished"])
    data["parts"] = json.loads(data["parts"])
    data["latent_seed"] = int(data["latent_seed"])
    data["tokens"] = None if data["tokens"] is None else tuple(json.loads(data["tokens"]))
    for key in ("token_ids", "logprobs", "entropies", "token_kl", "shift"):
        kind = "<i4" if key == "token_ids" else "<f4"
        data[key] = None if data[key] is None else np.frombuffer(data[key], dtype=kind)
    return RolloutRow(**data)


def item_row(row: Mapping[str, Any]) -> ItemRow:
    """A row of table ``evaluation_items``."""
    data = dict(row)
    data["latent_seed"] = int(data["latent_seed"])
    for key in ("parts", "judge_parts"):
        data[key] = json.loads(data[key])
    return ItemRow(**data)


def number(value: Any) -> float | None:
    """A number as it is stored: None when it is missing, NaN or infinite."""
    if value is None:
        return None
    value = float(value)
    return value if math.isfinite(value) else None


def storable(text: str) -> str:
    """The text with a "?" for what UTF-8 can't hold: half of a surrogate pair, as in odd file names."""
    return text.encode("utf-8", "replace").decode("utf-8")


def to_json(value: Any) -> str:
    """JSON text; what is NaN or infinite becomes null, what JSON has no form for becomes its text."""
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return number(value)
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, Mapping):
        return {_plain(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(_plain(item) for item in value)
    return _plain(str(value))
