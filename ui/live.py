"""The live screen: one run's state, curves, newest pictures and log, whoever runs it, while it goes on and after.

A page asks for the figures once and then, when the database moved, for the state and what is new in one question;
it says up to which step it knows the curves, and is told to ask for figures anew when those no longer hold.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from itertools import groupby
from typing import Any, Literal

import numpy as np
from fastapi import Query, Response
from fastapi.routing import APIRouter
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from grpo_engine.store import Store
from grpo_engine.store.bins import bin_width
from grpo_engine.store.owner import is_alive, owner_of, process_token
from grpo_engine.store.rows import EventRow, RolloutRow, RunRow

from .charts import BINS, ChartSpec, chart_specs, columns, figure, setting, shape, wanted_metrics
from .context import Context, PlainRoute, Refused, answer
from .run_status import (
    EVENT_LABELS,
    PACE_STEPS,
    RECENT_EVENTS,
    SILENCE_S,
    actions,
    asked,
    pace,
    patience,
    phases,
    remark,
)

LOG_LINES = 200
MOST_NEW_STEPS = 2000  # a page that is further behind is quicker given all figures
SHOWN_GROUPS = 4  # of the newest pictures; the microscope below shows them all

RunId = Query("", max_length=200)


class Command(BaseModel):
    """What a button asks of a run."""

    model_config = ConfigDict(extra="forbid")

    run: str = Field(min_length=1, max_length=200)
    command: Literal["stop", "pause", "resume", "save", "evaluate"]


def routes(context: Context) -> APIRouter:
    """The screen's questions and actions."""
    router = APIRouter(prefix="/live", route_class=PlainRoute)
    store = context.store

    @router.get("/runs")
    def runs() -> Response:
        """Every run, the newest first, for the picker."""
        names = ("id", "name", "number", "state", "source")
        return answer({"runs": [{name: getattr(run, name) for name in names} for run in store.runs()]})

    @router.get("/state")
    def state(
        run: str = RunId,
        step: int = Query(-1, ge=-1, le=2**53),
        at: float = 0.0,
        shape: str = Query("", max_length=20),
        event: int = Query(0, ge=0, le=2**53),
    ) -> Response:
        """How a run stands (the default one without an id), log lines after ``event``, and new points.

        A page that has curves says so: ``step`` is the last it has, ``at`` when that was recorded, ``shape`` what
        the figures came with. The answer has ``points`` for it, or ``reload`` true.
        """
        found = _chosen(store, run)
        if found is None:
            return answer({"run": None})
        return answer(describe(context, found, event) | new_points(store, found, step, at, shape))

    @router.get("/figures")
    def figures(run: str = RunId) -> Response:
        """All charts of a run as it stands."""
        found = store.run(run)
        evaluations = store.evaluations(run)
        specs = chart_specs(found.config)
        bins = store.binned_metrics(run, wanted_metrics(specs), stop=found.step, bins=BINS)
        width = bins["reward_mean"].width
        made = [_chart(spec) | {"figure": figure(spec, bins, evaluations, revision=run)} for spec in specs]
        measured = next((row for row in reversed(evaluations) if "sentence" in row.summary), None)
        headline = measured and {"text": measured.summary["sentence"], "kind": measured.kind, "step": measured.step}
        reached = {"run": run, "step": found.step, "at": _recorded_at(store, run, found.step)}
        return answer(reached | {"shape": _shape(width, found.step), "charts": made, "headline": headline})

    @router.get("/pictures")
    def pictures(run: str = RunId, step: int = Query(0, ge=0, le=2**53)) -> Response:
        """The best and the worst picture of some groups of a step; without one, of the newest with pictures."""
        found = store.run(run)
        every = int(setting(found.config, "recording.images_every", 1))
        if every == 0:
            return answer(
                {"step": 0, "groups": [], "note": "This run keeps no pictures (recording.images_every is 0)."}
            )
        newest = found.step // every * every or min(found.step, 1)
        if not newest:
            return answer({"step": 0, "groups": [], "more": 0, "note": "The first pictures come with the first step."})
        step = step or newest
        groups = best_and_worst(store.rollouts(run, step))
        note = "" if groups else f"No pictures were kept of step {step}."
        return answer({"step": step, "groups": groups[:SHOWN_GROUPS], "more": max(0, len(groups) - SHOWN_GROUPS),
                       "note": note})  # fmt: skip

    @router.post("/command")
    def command(body: Command) -> Response:
        """Ask something of a run; refused with the reason where it is not possible now."""
        run = store.run(body.run)
        alive = _alive(run)
        why_not = actions(run, context.worker.status(), alive=alive)[body.command]
        if why_not:
            raise Refused(why_not, field=body.command)
        if not alive:
            store.interrupt_stale()
            if body.command == "stop":
                return answer({})
        if body.command == "resume" and run.state != "paused":
            context.worker.resume(run.id)
        else:
            context.worker.command(run.id, body.command)
        return answer({})

    return router


def _chosen(store: Store, run_id: str) -> RunRow | None:
    """The run asked for; without one that which goes on, else the newest; None where there are no runs."""
    if run_id:
        return store.run(run_id)
    going = [run for run in store.active_runs() if run.state != "queued"]
    return going[0] if going else next(iter(store.runs()), None)


def describe(context: Context, run: RunRow, after_event: int = 0) -> dict[str, Any]:
    """A run's state as plain data for the top of the screen, and the log's lines after ``after_event``."""
    store, status, alive = context.store, context.worker.status(), _alive(run)
    times = store.steps(run.id, ["time"], since_step=max(0, run.step - PACE_STEPS - 1))["time"]
    speed = pace(run, times)
    commands = store.commands(run.id) if run.active else []
    pending = asked(commands, store.events(run.id, limit=RECENT_EVENTS)) if commands else []
    return {
        "run": {name: getattr(run, name) for name in ("id", "name", "number", "state", "step", "source", "active")}
        | {"total": run.total_steps, "preset": run.preset, "seed": run.seed},
        "now": time.time(),
        "times": {"started": run.started, "finished": run.finished, "updated": run.updated, "heartbeat": run.heartbeat},
        "limits": {"silence": SILENCE_S, "patience": patience(run, speed["interval"])},
        "busy": run.active and alive and run.state not in ("queued", "paused"),
        "watched": run.active and alive and run.state != "queued",
        "pace": speed,
        "phases": phases(run),
        "remark": remark(run, status, alive=alive),
        "actions": actions(run, status, alive=alive),
        "asked": pending,
        "memory": memory(run),
        "events": [_line(row) for row in store.events(run.id, after_event, LOG_LINES)],
    }


def _alive(run: RunRow) -> bool:
    """False only for a run that goes on by its state, but whose process has ended."""
    if not run.active or run.state == "queued":
        return True
    return is_alive(owner_of(run), run.heartbeat or 0.0, time.time())


def _line(event: EventRow) -> dict[str, Any]:
    label = EVENT_LABELS.get(event.kind, event.kind.replace("_", " "))
    return {"id": event.id, "time": event.time, "kind": event.kind, "label": label, "level": event.level,
            "message": event.message}  # fmt: skip


# -- curves ----------------------------------------------------------------------------------------------------------


def _chart(spec: ChartSpec) -> dict[str, str]:
    return {"name": spec.name, "title": spec.title, "unit": spec.unit, "note": spec.note}


def _shape(width: int, step: int) -> str:
    return shape(width, (step - 1) // width + 1)


def _recorded_at(store: Store, run_id: str, step: int) -> float:
    """When a step was recorded, seconds since 1970; 0 for none."""
    return _at(store.steps(run_id, ["time"], since_step=step - 1)["time"]) if step else 0.0


def _at(times: NDArray[np.float64]) -> float:
    return float(times[0]) if len(times) else 0.0


def new_points(store: Store, run: RunRow, step: int, at: float, known_shape: str) -> dict[str, Any]:
    """What a page needs whose curves end at ``step``, recorded at ``at``: nothing, points, or all figures anew.

    A run that was resumed from an earlier checkpoint has another step of that number, or none.
    """
    if step < 0:
        return {}
    width = bin_width(1, max(run.step, 1), BINS)
    if _shape(width, run.step) != known_shape or step > run.step or run.step - step > MOST_NEW_STEPS:
        return {"reload": True}
    if step and _recorded_at(store, run.id, step) != at:
        return {"reload": True}
    if step == run.step:
        return {}
    specs = chart_specs(run.config)
    bins = store.binned_metrics(run.id, wanted_metrics(specs), step + 1, run.step, width=width)
    points = {key: trace for spec in specs for key, trace in columns(spec, bins).items()}
    return {"points": points, "step": run.step, "at": _recorded_at(store, run.id, run.step)}


# -- pictures --------------------------------------------------------------------------------------------------------


def best_and_worst(rows: list[RolloutRow]) -> list[dict[str, Any]]:
    """Of each group with pictures, the prompt and the rewrites whose pictures have the highest and lowest reward."""
    groups = []
    for g, members in groupby(rows, key=lambda row: row.g):
        drawn = [row for row in members if row.thumbnail and row.reward is not None]
        if drawn:
            best, worst = max(drawn, key=_reward), min(drawn, key=_reward)
            shown = {"best": best} if best is worst else {"best": best, "worst": worst}
            groups.append({"g": g, "prompt": drawn[0].prompt, **{name: _shown(row) for name, row in shown.items()}})
    return groups


def _reward(row: RolloutRow) -> float:
    assert row.reward is not None
    return row.reward


def _shown(row: RolloutRow) -> dict[str, Any]:
    return {"picture": row.thumbnail, "rewrite": row.rewrite, "reward": row.reward}


# -- memory ----------------------------------------------------------------------------------------------------------


def memory(run: RunRow) -> list[dict[str, Any]]:
    """What the run's process holds, per device: label, bytes used, bytes there. Empty where it can't be known.

    CUDA devices are asked only where the run goes on in this process, and never woken for it.
    """
    if not run.active or run.pid is None or run.host != socket.gethostname():
        return []
    if process_token(run.pid) != run.process_token:
        return []
    import psutil

    here = run.pid == os.getpid()
    try:
        used = psutil.Process(run.pid).memory_info().rss
    except psutil.Error:  # it ended this moment, or is another user's
        return []
    name = "RAM, this app" if here else f"RAM, process {run.pid}"
    found = [{"label": name, "used": used, "total": psutil.virtual_memory().total}]
    torch = sys.modules.get("torch")
    if here and torch is not None and hasattr(torch, "cuda") and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            held = torch.cuda.memory_reserved(index)
            if held:
                whole = torch.cuda.get_device_properties(index).total_memory
                found.insert(-1, {"label": f"cuda:{index}", "used": held, "total": whole})
    return found
