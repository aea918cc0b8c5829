"""The compare screen: the table of runs and what is done to it, curves, settings and pictures of chosen runs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from functools import cache
from typing import Annotated, Any

import numpy as np
from fastapi import Response
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRouter
from pydantic import BaseModel, Field

from grpo_engine.config import RunConfig, flatten
from grpo_engine.recorder import STEP_METRICS
from grpo_engine.store import Store
from grpo_engine.store.rows import RunRow

from .charts_compare import Axis, RunCurve, curve_points, metric_list, overlay_figure
from .context import Body, Context, PlainRoute, Refused, answer, column
from .run_table import RunTable, run_row
from .shared_prompts import SharedPrompts

MOST_RUNS = 100  # compared at once
MOST_METRICS = 12
BINS = 400  # points of a line: about as many as a chart has pixels to tell apart

RunId = Annotated[str, Field(min_length=1, max_length=80)]


class Rename(Body):
    """A run's new name; the store says what a name may be."""

    run: RunId
    name: str = Field(max_length=2000)


class Tags(Body):
    """A run's tags, all of them."""

    run: RunId
    tags: list[Annotated[str, Field(max_length=2000)]] = Field(max_length=50)


class Notes(Body):
    """A run's notes."""

    run: RunId
    notes: str = Field(max_length=200_000)


class Delete(Body):
    """Runs to delete: all of them, or none when one can't be."""

    runs: list[RunId] = Field(min_length=1, max_length=1000)


def routes(context: Context) -> APIRouter:
    """The screen's questions and actions."""
    router = APIRouter(prefix="/compare", route_class=PlainRoute)
    store, table, measured = context.store, RunTable(context.store), SharedPrompts(context.store)

    @router.get("/runs")
    def runs(since: str = "") -> Response:
        """Rows that changed after version ``since``."""
        return answer(table.changes(since))

    @router.get("/metrics")
    def metrics() -> Response:
        """What can be drawn, and what it means."""
        return answer({"metrics": metric_list()})

    @router.get("/curves")
    def curves(runs: str, metrics: str, axis: Axis = "step", have: str = "") -> Response:
        """Figures of ``metrics``; of runs named in ``have`` (``id:width:step``, ...) only the newest points."""
        return answer(_curves(store, _chosen(store, runs), _known(metrics), axis, _parse_have(have)))

    @router.get("/settings")
    def settings(runs: str) -> Response:
        """Settings that are not the same in all of the runs."""
        return answer(differing_settings(_chosen(store, runs)))

    @router.get("/prompts")
    def prompts(runs: str) -> Response:
        """Prompts that the final evaluations of the runs share."""
        return answer(measured.shared(_chosen(store, runs)))

    @router.get("/pictures")
    def pictures(runs: str, prompt: str) -> Response:
        """What the runs made of one prompt."""
        found = measured.pictures(_chosen(store, runs), prompt)
        if not found["runs"]:
            raise Refused("None of these runs measured that prompt.", status=404)
        return answer(found)

    @router.get("/runs.csv")
    def runs_csv() -> Response:
        """The whole table."""
        return _csv("runs.csv", _run_lines(store.runs()))

    @router.get("/curves.csv")
    def curves_csv(runs: str, metrics: str) -> Response:
        """Every step of the runs, not summed up."""
        return _csv("curves.csv", _curve_lines(store, _chosen(store, runs), _known(metrics)))

    @router.post("/rename")
    def rename(body: Rename) -> Response:
        """Give a run another name."""
        store.rename(body.run, body.name)
        return answer({"run": run_row(store.run(body.run))})

    @router.post("/tags")
    def tags(body: Tags) -> Response:
        """Replace a run's tags."""
        store.tag(body.run, body.tags)
        return answer({"run": run_row(store.run(body.run))})

    @router.post("/notes")
    def notes(body: Notes) -> Response:
        """Replace a run's notes."""
        store.note(body.run, body.notes)
        return answer({"run": run_row(store.run(body.run))})

    @router.post("/delete")
    def delete(body: Delete) -> Response:
        """Delete ended runs with all they recorded."""
        return answer({"deleted": delete_runs(store, body.runs)})

    return router


def delete_runs(store: Store, run_ids: Sequence[str]) -> list[str]:
    """Delete runs with their files; nothing is deleted when one of them is unknown or active."""
    chosen = [store.run(run_id) for run_id in dict.fromkeys(run_ids)]
    active = [run for run in chosen if run.active]
    if active:
        names = ", ".join(f"{run.name} is {run.state}" for run in active[:5])
        raise Refused(f"A run that waits or goes on can't be deleted: {names}. Stop it first.")
    for run in chosen:
        store.delete(run.id)
    return [run.id for run in chosen]


def _chosen(store: Store, text: str) -> list[RunRow]:
    """The runs an address names, in its order."""
    ids = [part for part in dict.fromkeys(text.split(",")) if part]
    if not ids:
        raise Refused("Choose at least one run.", status=422)
    if len(ids) > MOST_RUNS:
        raise Refused(f"{len(ids)} runs are too many to compare at once; choose at most {MOST_RUNS}.", status=422)
    return [store.run(run_id) for run_id in ids]


def _known(text: str) -> list[str]:
    names = [part for part in dict.fromkeys(text.split(",")) if part]
    strange = [name for name in names if name not in STEP_METRICS]
    if strange or not names:
        raise Refused(
            f"There is no metric {strange[0][:80]!r}; choose one of the list." if names else "Choose a metric.",
            status=422,
        )
    if len(names) > MOST_METRICS:
        raise Refused(f"{len(names)} charts are too many at once; choose at most {MOST_METRICS}.", status=422)
    return names


# Curves


def _parse_have(text: str) -> dict[str, tuple[int, int]]:
    """``id:width:step,...`` -> what a page has of each run: the width of its bins, and its last step."""
    have = {}
    for part in text.split(",") if text else []:
        run_id, *numbers = part.split(":")
        if len(numbers) != 2 or not all(number.isdecimal() and len(number) < 12 for number in numbers):
            raise Refused("The page asked for points in a way that can't be read; reload it.", status=422)
        have[run_id] = (int(numbers[0]), int(numbers[1]))
    return have


def _curves(
    store: Store, runs: Sequence[RunRow], metrics: Sequence[str], axis: Axis, have: Mapping[str, tuple[int, int]]
) -> dict[str, Any]:
    """Whole figures of the runs that the page has nothing of, and new points of the others.

    ``points[metric][run]`` replaces what a page has from its first x on; of a run whose bins grew wider all
    points travel again, and ``anew`` names it.
    """
    figures: dict[str, Any] = {}
    points: dict[str, dict[str, Any]] = {}
    state: dict[str, dict[str, int]] = {}
    anew: list[str] = []
    needed = list(dict.fromkeys([*metrics, *(["seconds"] if axis == "minutes" else [])]))
    for run in runs:
        found = store.binned_metrics(run.id, needed, stop=run.step, bins=BINS)
        for metric in metrics:
            bins = found[metric]
            x, y = curve_points(bins, found["seconds"] if axis == "minutes" else None)
            if run.id not in have:
                curve = RunCurve(run.id, run.number, run.name, column(x), column(y))
                figures.setdefault(metric, []).append(curve)
            else:
                # The last bin a page has may have been filling still: sent again, from the one before it.
                width, last = have[run.id]
                start = int(np.searchsorted(bins.first, last, side="right")) - 2 if width == bins.width else 0
                start = max(start, 0)
                points.setdefault(metric, {})[run.id] = {"x": column(x[start:]), "y": column(y[start:])}
                if width != bins.width and run.id not in anew:
                    anew.append(run.id)
            state[run.id] = {"width": bins.width, "last": run.step}
    return {
        "figures": {metric: overlay_figure(metric, found, axis) for metric, found in figures.items()},
        "points": points,
        "anew": anew,
        "state": state,
    }


# Settings


@cache
def setting_helps() -> dict[str, str]:
    """What each setting of this version means, by dotted name."""

    def walk(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
        for name, info in model.model_fields.items():
            if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
                yield from walk(info.annotation, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", info.description or ""

    return dict(walk(RunConfig, ""))


def differing_settings(runs: Sequence[RunRow]) -> dict[str, Any]:
    """Rows of the recorded settings that are not equal in all runs, and how many are.

    Settings are compared as they were recorded, so runs of other versions can take part; one that a version
    did not have counts as different. A run's name and tags are no settings of its training.
    """
    ignored = ("recording.name", "recording.tags")
    flat = [flatten(run.config) for run in runs]
    names = [name for name in dict.fromkeys(name for settings in flat for name in settings) if name not in ignored]
    helps, rows, same = setting_helps(), [], 0
    for name in names:
        texts = [_setting(settings, name) for settings in flat]
        if len(set(texts)) == 1:
            same += 1
        else:
            rows.append({"name": name, "help": helps.get(name, ""), "values": texts})
    return {"runs": [run.id for run in runs], "rows": rows, "same": same}


def _setting(settings: Mapping[str, Any], name: str) -> str:
    if name not in settings:
        return "not in its version"
    value = settings[name]
    if isinstance(value, str):
        return value or "(empty)"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value) or "(none)"
    if value is None:
        return "not set"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))  # 1 and 1.0 are one setting
    return json.dumps(value, ensure_ascii=False)


# CSV


def _csv(name: str, lines: Iterator[Sequence[Any]]) -> Response:
    def text() -> Iterator[str]:
        for line in lines:
            buffer = io.StringIO()
            csv.writer(buffer, lineterminator="\n").writerow([_cell(value) for value in line])
            yield buffer.getvalue()

    headers = {"Content-Disposition": f'attachment; filename="{name}"', "Cache-Control": "no-store"}
    return StreamingResponse(text(), media_type="text/csv; charset=utf-8", headers=headers)


def _cell(value: Any) -> Any:
    """A value as a cell; text that a spreadsheet would run as a formula gets an apostrophe before it."""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return f"'{value}"
    if isinstance(value, float) and value != value:
        return ""
    return "" if value is None else value


def _run_lines(runs: Sequence[RunRow]) -> Iterator[Sequence[Any]]:
    names = ("id", "name", "state", "preset", "prompt_set", "seed", "step", "total", "seconds")
    gains = ("mean", "low", "high", "n", "win_rate")
    measured = ["comparison", *(f"gain_{name}" for name in gains), "confidence"]
    yield [*names, "source", "created", *measured, "tags", "notes"]
    for run in runs:
        row = run_row(run)
        gain = row["gain"] or {}
        created = datetime.fromtimestamp(run.created, timezone.utc).isoformat(timespec="seconds")
        yield [
            *(row[name] for name in names), run.source, created, row["headline"], *(gain.get(name) for name in gains),
            row["confidence"], ", ".join(run.tags), run.notes,
        ]  # fmt: skip


def _curve_lines(store: Store, runs: Sequence[RunRow], metrics: Sequence[str]) -> Iterator[Sequence[Any]]:
    yield ["run", "name", "step", "minutes", *metrics]
    for run in runs:
        found = store.steps(run.id, [*metrics, "seconds"])
        minutes = np.cumsum(np.nan_to_num(found["seconds"])) / 60.0
        for index, step in enumerate(found["step"].tolist()):
            numbers = [float(found[metric][index]) for metric in metrics]
            yield [run.id, run.name, step, round(float(minutes[index]), 4), *numbers]
