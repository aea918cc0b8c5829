"""A sweep: several values for one or two settings, and the grid of runs they make. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .context import Refused
from .form import SHORT, FormField, form_fields, number

MOST_RUNS = 100
NAME_CHARS = 120
_KINDS = ("integer", "number", "choice", "switch", "text")


@dataclass(frozen=True)
class Axis:
    """A setting and the values it takes, as typed."""

    field: FormField
    values: tuple[str, ...]

    @property
    def short(self) -> str:
        """What the setting is called in run names."""
        label = self.field.label
        return SHORT.get(self.field.name, label if label[1:2].isupper() else label[:1].lower() + label[1:])


def axes(asked: Sequence[tuple[str, Sequence[str]]]) -> list[Axis]:
    """The axes of a sweep, checked: one or two different settings, at least one value each, at most 100 runs.

    A value given twice counts once (``1e-3`` and ``0.001`` are the same). Raises `Refused`.
    """
    known = {field.name: field for field in form_fields()}
    found: list[Axis] = []
    for name, values in asked:
        field = known.get(name)
        if field is None or field.kind not in _KINDS or name in ("preset", "recording.name"):
            raise Refused(f"{name!r} can't be swept; choose a setting with one value.", field="sweep", status=422)
        if name in (axis.field.name for axis in found):
            raise Refused(f"{field.label} stands in the sweep twice; choose two settings.", field="sweep", status=422)
        distinct: dict[Any, str] = {}
        for value in (value.strip() for value in values):
            if value:
                distinct.setdefault(number(value, field.kind) if field.kind in ("integer", "number") else value, value)
        if not distinct:
            raise Refused(f"Give {field.label} some values, with commas between them.", field="sweep", status=422)
        found.append(Axis(field, tuple(distinct.values())))
    if not 1 <= len(found) <= 2:
        raise Refused("A sweep changes one or two settings; choose them.", field="sweep", status=422)
    count = _count(found)
    if count > MOST_RUNS:
        raise Refused(f"That would be {count:,} runs; a sweep has at most {MOST_RUNS}.", field="sweep", status=422)
    return found


def grid(found: Sequence[Axis], prefix: str = "") -> list[tuple[str, dict[str, Any]]]:
    """(name, typed values) of every run, the last axis changing fastest. Names are like ``lr 1e-3, KL 0.02``."""
    runs = []
    for values in itertools.product(*(axis.values for axis in found)):
        name = ", ".join(f"{axis.short} {value}" for axis, value in zip(found, values, strict=True))
        typed: dict[str, Any] = {
            axis.field.name: _value(axis.field, value) for axis, value in zip(found, values, strict=True)
        }
        runs.append((_fitting(f"{prefix}: {name}" if prefix else name), typed))
    return runs


def next_tag(tags: Sequence[str]) -> str:
    """A tag that no sweep has had: ``sweep 1``, ``sweep 2``, ..."""
    numbers = [int(tag[6:]) for tag in tags if tag.startswith("sweep ") and tag[6:].isdecimal() and len(tag) < 16]
    return f"sweep {max(numbers, default=0) + 1}"


def _value(field: FormField, value: str) -> Any:
    if field.kind == "switch":
        return {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}.get(value, value)
    return value


def _count(found: Sequence[Axis]) -> int:
    count = 1
    for axis in found:
        count *= len(axis.values)
    return count


def _fitting(name: str) -> str:
    return name if len(name) <= NAME_CHARS else name[: NAME_CHARS - 3] + "..."
