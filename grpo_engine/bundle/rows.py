"""The lines of a bundle's tables: how recorded rows are written as plain JSON, and checked and read back.

A line is one JSON object; what is missing there is null. Every number is finite. Per-token lists are over
real tokens only and have one length; a number that was not finite is null in them and comes back as NaN.
Times are seconds since 1970. The classes are the documentation: a line has exactly their fields.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from ..recorder import STEP_METRICS
from ..store.names import NAME_CHARS, NOTE_CHARS, TAG_CHARS
from ..store.rows import EvaluationRow, EventRow, ItemRow, RolloutRow, to_json

Placed = Callable[[str | None], tuple[str | None, str | None]]
"""Of a line's ``image``: the paths of picture and thumbnail to record."""

PER_TOKEN = ("token_ids", "logprobs", "entropies", "token_kl", "shift")
_WHOLE = 2**64  # whole numbers stay below: latent seeds have 64 bits, and no text of digits goes on for ever
_F32 = 3.4028235e38  # the largest float32, as its shortest text says it

Time = Annotated[float, Field(ge=0, lt=32503680000)]  # until the year 3000: every calendar can show it
Step = Annotated[int, Field(ge=1, le=10_000_000)]
Count = Annotated[int, Field(ge=0, le=10_000_000)]
Seed = Annotated[int, Field(ge=0, lt=_WHOLE)]
Label = Annotated[str, Field(max_length=4000, pattern=r"^[^\x00-\x1f\x7f\u2028\u2029]*$")]
Name = Annotated[str, Field(min_length=1, max_length=80, pattern=r"^[A-Za-z0-9_. -]+$")]
Token = Annotated[int, Field(ge=0, lt=2**31)]
PerToken = list[Annotated[float, Field(ge=-_F32, le=_F32)] | None]
Parts = dict[Name, float | None]


class Line(BaseModel):
    """One line: nothing is converted, nothing unknown let through."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class RunLine(Line):
    """The run, in ``bundle.json``. Its settings stand in ``config.yaml``, its summary in the final evaluation."""

    id: Annotated[str, Field(max_length=80, pattern=r"^[0-9]{4,}-[a-z0-9][a-z0-9-]*$")]
    name: Annotated[Label, Field(min_length=1, max_length=NAME_CHARS)]
    state: Literal["finished", "stopped", "failed", "interrupted"]
    prompt_set: Label
    prompt_fingerprint: Label
    tags: list[Annotated[Label, Field(max_length=TAG_CHARS)]]
    notes: Annotated[str, Field(max_length=NOTE_CHARS)]
    created: Time
    started: Time | None = None
    finished: Time | None = None
    updated: Time
    step: Count
    total_steps: Count
    message: str
    error: str | None = None
    resumed_count: Count


class Pictures(Line):
    """Which pictures the bundle was given, in ``bundle.json``."""

    choice: Literal["all", "evaluations", "none"]
    every: Step
    reencoded: bool
    count: Count


class Manifest(Line):
    """``bundle.json``."""

    format: str
    version: int
    exported: Time
    run: RunLine
    pictures: Pictures
    checkpoint: Count | None = None  # its step
    metrics: dict[Name, str]  # units
    contents: dict[str, str]  # what each file is, for people


class StepLine(Line):
    """One optimiser step; metrics as in ``recorder.STEP_METRICS``, those without a value left out."""

    step: Step
    time: Time
    metrics: dict[Name, float]

    def row(self) -> dict[str, Any]:
        return {"step": self.step, "time": self.time} | {name: self.metrics.get(name) for name in STEP_METRICS}


class RolloutLine(Line):
    """One rewrite; see `store.rows.RolloutRow`. Lines are in the order of step, g, k."""

    step: Step
    g: Count
    k: Count
    prompt_id: str
    prompt: str
    tier: Label
    completion: str
    rewrite: str | None = None
    finished: bool
    reward: float | None = None
    advantage: float | None = None
    kl: float | None = None
    parts: Parts
    latent_seed: Seed
    token_ids: list[Token] | None = None
    tokens: list[str] | None = None
    logprobs: PerToken | None = None
    entropies: PerToken | None = None
    token_kl: PerToken | None = None
    shift: PerToken | None = None
    image: str | None = None

    @model_validator(mode="after")
    def _one_length(self) -> RolloutLine:
        lists = [getattr(self, name) for name in (*PER_TOKEN, "tokens")]
        if len({len(values) for values in lists if values is not None}) > 1:
            raise ValueError("its per-token lists differ in length")
        return self

    def row(self, placed: Placed) -> dict[str, Any]:
        row = dict(self) | {"finished": int(self.finished), "latent_seed": str(self.latent_seed)}
        row |= {"parts": to_json(self.parts), "tokens": None if self.tokens is None else to_json(self.tokens)}
        for name in PER_TOKEN:
            kind = "<i4" if name == "token_ids" else "<f4"
            if row[name] is not None:
                row[name] = np.array(row[name], dtype=kind).tobytes()
        row["image"], row["thumbnail"] = placed(self.image)
        return row


class Gain(BaseModel):
    """What every reader of a summary needs of a gain; a summary may say more."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    mean: float
    low: float
    high: float
    n: Count
    win_rate: float
    before: float
    after: float
    percent: float | None
    distinguishable: bool
    judge_gain: Gain | None = None


class Arm(BaseModel):
    """The same of an arm."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    reward: float
    parts: Parts
    judge: float | None
    kinds: dict[Name, float]
    tiers: dict[Name, float]
    failures: Count
    pictures: Count


class Summary(BaseModel):
    """The same of a summary (see ``evaluation.summarise``)."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    arms: dict[Name, Arm]
    gains: dict[Name, Gain]
    confidence: Annotated[float, Field(gt=0, lt=1)]
    headline: Name | None = None
    sentence: Annotated[str, Field(max_length=2000, pattern=r"^[^\x00-\x1f\x7f]*$")] | None = None

    @model_validator(mode="after")
    def _headline_is_measured(self) -> Summary:
        if self.headline is not None and self.headline not in self.gains:
            raise ValueError("its headline is not among its gains")
        return self


class EvaluationLine(Line):
    """One measurement; no two have the same kind and step."""

    kind: Name
    step: Count
    split: Name
    time: Time
    items: Count
    summary: dict[str, JsonValue]

    @model_validator(mode="after")
    def _summary_is_one(self) -> EvaluationLine:
        Summary.model_validate(self.summary)
        return self

    def row(self) -> dict[str, Any]:
        return dict(self) | {"summary": to_json(self.summary)}


class ItemLine(Line):
    """One picture of a measurement; see `recorder.EvaluationItem`. In the measurements' order, then by prompt_id,
    arm, index."""

    kind: Name
    step: Count
    arm: Name
    prompt_id: str
    index: Count
    prompt: str
    tier: Label
    latent_seed: Seed
    rewrite: str | None = None
    reward: float | None = None
    parts: Parts
    judge: float | None = None
    judge_parts: dict[Name, Annotated[list[Count], Field(min_length=2, max_length=2)]]
    image: str | None = None
    cut_tokens: Count | None = None
    read_chars: Count | None = None

    def row(self, placed: Placed) -> dict[str, Any]:
        row = {name: value for name, value in self if name not in ("kind", "step")}
        row |= {"latent_seed": str(self.latent_seed), "parts": to_json(self.parts)}
        row["judge_parts"] = to_json(self.judge_parts)
        row["image"], row["thumbnail"] = placed(self.image)
        return row


class EventLine(Line):
    """One line of the run's history."""

    time: Time
    kind: Name
    level: Literal["info", "warning", "error"]
    message: str
    data: dict[str, JsonValue]

    def row(self) -> dict[str, Any]:
        return dict(self) | {"data": to_json(self.data)}


class CheckpointForm(Line):
    """``checkpoint/state.json``, as ``checkpoint_folder.CheckpointState`` has it. Its base's name gets into the
    Python text of an exported model card, so it has no quotes."""

    format: str
    version: int
    step: Count
    serial: Count
    kind: Literal["lora", "full"]
    metrics: dict[str, float | None]
    score: float | None
    extra: JsonValue
    base_model: Label
    base_source: Annotated[Label, Field(pattern=r'^[^"]*$')]
    base_fingerprint: Label
    config_fingerprint: Label
    optimizer: dict[str, JsonValue]
    versions: dict[Label, Label]
    files: dict[str, str]
    checksum: str


def step_lines(steps: Mapping[str, NDArray[Any]]) -> list[dict[str, Any]]:
    """The lines of all steps, from ``RunReader.steps``."""
    columns = {name: values.tolist() for name, values in steps.items() if name not in ("step", "time")}
    return [
        {"step": step, "time": time}
        | {"metrics": {name: values[i] for name, values in columns.items() if not math.isnan(values[i])}}
        for i, (step, time) in enumerate(zip(steps["step"].tolist(), steps["time"].tolist(), strict=True))
    ]


def rollout_line(row: RolloutRow, image: str | None) -> dict[str, Any]:
    line = _without(row, "thumbnail") | {"image": image}
    for name in PER_TOKEN:
        if line[name] is not None:
            line[name] = line[name].tolist() if name == "token_ids" else _shortest(line[name])
    return _compact(line)


def evaluation_line(row: EvaluationRow) -> dict[str, Any]:
    return _without(row, "id", "run_id")


def item_line(row: ItemRow, evaluation: EvaluationRow, image: str | None) -> dict[str, Any]:
    line = {"kind": evaluation.kind, "step": evaluation.step}
    return _compact(line | _without(row, "evaluation_id", "thumbnail") | {"image": image})


def event_line(row: EventRow) -> dict[str, Any]:
    return _without(row, "id", "run_id")


def strict_json(data: bytes) -> Any:
    """JSON as the standard has it: UTF-8, no NaN, no number too large to be stored.

    Raises:
        ValueError, RecursionError: anything else.
    """
    return json.loads(data.decode("utf-8"), parse_constant=_refused, parse_float=_finite, parse_int=_bounded)


def _refused(text: str) -> float:
    raise ValueError(f"{text} is not a finite number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refused(text[:40])


def _bounded(text: str) -> int:
    value = int(text) if len(text) <= 20 else _WHOLE
    if abs(value) >= _WHOLE:
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _without(row: Any, *names: str) -> dict[str, Any]:
    return {name: value for name, value in vars(row).items() if name not in names}


def _compact(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if value is not None}


def _shortest(values: NDArray[np.float32]) -> list[float | None]:
    """The numbers with as few digits as bring each float32 back: half the text of all their digits."""
    numbers = [float(str(value)) for value in values]
    if not np.array_equal(np.array(numbers, dtype=np.float32), values, equal_nan=True):  # rounded twice
        numbers = values.astype(np.float64).tolist()
    return [number if math.isfinite(number) else None for number in numbers]
