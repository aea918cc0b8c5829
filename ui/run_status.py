"""What the live screen says about a run besides its curves: phases, pace, what is possible now, and in words why.

Everything follows from rows of the database and from the worker's status, so that every page says the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grpo_engine.store.rows import COMMANDS, ENDINGS, CommandRow, EventRow, RunRow

from .charts import setting

LOADED = ("policy", "image model", "reward")  # in the order of loading.load_environment
TRAINING = {"sampling": " prompts", "rendering": " groups", "scoring": " groups", "updating": None}  # what is counted
ARMS = {
    "original": "original prompts",
    "untrained": "untrained, sampled",
    "untrained_greedy": "untrained, greedy",
    "trained": "trained, sampled",
    "trained_greedy": "trained, greedy",
}
PACE_STEPS = 20
"""The pace is that of the last so many steps."""

SILENCE_S = 35.0
"""A living process says so every 10 seconds; after this long without a word something is wrong."""
PATIENCE_S = 120.0
LOADING_PATIENCE_S = 900.0  # a full-scale model may take minutes to load, or a batch of its pictures to render

EVENT_LABELS = {
    "state": "state",
    "placement": "devices",
    "image_batch": "batch",
    "fidelity": "fidelity",
    "adapter": "adapter",
    "ratio_check": "check",
    "checkpoint": "saved",
    "evaluation": "measured",
    "report": "result",
    "resumed": "resumed",
    "truncated": "set aside",
    "skipped_step": "skipped",
    "warning": "warning",
    "error": "error",
}
RECENT_EVENTS = 50


# -- phases ----------------------------------------------------------------------------------------------------------


def phases(run: RunRow) -> list[dict[str, Any]]:
    """The parts of what the run is doing now, in order: name, state (done, now, later), share (0..1), note."""
    if run.state == "loading":
        if run.phase.startswith("downloading "):  # counted in MB
            part = _part(run.phase.removesuffix(" (MB)"), 0, 0)
            part["share"] = min(1.0, run.phase_done / max(1, run.phase_total))
            part["note"] = f"{run.phase_done:,} of {run.phase_total:,} MB"
            return [part, *(_part(name, 1, 0) for name in LOADED)]
        loaded = len(LOADED) if run.phase == "models loaded" else run.phase_done
        return [_part(name, index, loaded if run.phase else -1) for index, name in enumerate(LOADED)]
    if run.state == "training":
        return _parts(list(TRAINING), list(TRAINING), run, TRAINING.get(run.phase))
    if run.state in ("baseline", "evaluating"):
        arms = _arms(run)
        return _parts(arms, [ARMS[arm] for arm in arms], run, "")
    return []


def _arms(run: RunRow) -> list[str]:
    """The arms that are measured now, in their order; see `Evaluator.arms`."""
    wanted = list(ARMS)
    if run.state == "baseline":
        wanted = wanted[:3]
    elif run.step >= run.total_steps and run.phase not in wanted[:3]:
        wanted = wanted[3:]  # the final evaluation; a validation measures all of them
    greedy = setting(run.config, "evaluation.greedy", True)
    sampled = setting(run.config, "evaluation.samples", 1) > 0
    return [arm for arm in wanted if arm == "original" or (greedy if arm.endswith("_greedy") else sampled)]


def _parts(keys: Sequence[str], names: Sequence[str], run: RunRow, unit: str | None) -> list[dict[str, Any]]:
    now = keys.index(run.phase) if run.phase in keys else -1
    parts = [_part(name, index, now) for index, name in enumerate(names)]
    if now >= 0 and unit is not None and run.phase_total:
        parts[now]["share"] = min(1.0, run.phase_done / run.phase_total)
        parts[now]["note"] = f"{run.phase_done} of {run.phase_total}{unit}"
    return parts


def _part(name: str, index: int, now: int) -> dict[str, Any]:
    state = "now" if index == now else "done" if index < now else "later"
    return {"name": name, "state": state, "share": float(state == "done"), "note": ""}


# -- pace ------------------------------------------------------------------------------------------------------------


def pace(run: RunRow, times: NDArray[np.float64]) -> dict[str, float | None]:
    """Steps a minute, and the seconds of training that are left, from the times of the last recorded steps (S,).

    The median of the intervals, so that an evaluation or a pause between two steps does not count.
    """
    times = times[-PACE_STEPS - 1 :]
    interval = float(np.median(np.diff(times))) if len(times) > 1 else None
    if interval is None or interval <= 0:
        return {"per_minute": None, "left": None, "interval": None}
    going = run.state in ("training", "paused") or (run.state == "evaluating" and run.step < run.total_steps)
    left = interval * (run.total_steps - run.step) if going else None
    return {"per_minute": 60.0 / interval, "left": left, "interval": interval}


def patience(run: RunRow, interval: float | None) -> float:
    """Seconds without progress after which a page may wonder; ``interval`` is that of the steps."""
    if run.state == "training" and interval is not None:
        return max(PATIENCE_S, 5.0 * interval)
    return LOADING_PATIENCE_S


# -- what is possible ------------------------------------------------------------------------------------------------


def actions(run: RunRow, status: Mapping[str, Any], *, alive: bool) -> dict[str, str]:
    """For each of `COMMANDS` "" if it is possible now, else why it is not.

    Args:
        run: as it stands.
        status: the worker's (see `Worker.status`).
        alive: whether the run's process lives; True for one that has none.
    """
    if run.source == "imported":
        return dict.fromkeys(COMMANDS, "This run was imported: it can be looked at, not continued.")
    if run.state == "finished":
        return dict.fromkeys(COMMANDS, "The run is finished.")
    if run.state in ENDINGS:
        ended = dict.fromkeys(COMMANDS, f"The run is {run.state}; resume it first.")
        if status["current"] == run.id:
            return ended | {"resume": "The run is just ending; try again in a moment."}
        return ended | {"resume": "The run is waiting for its turn." if run.id in status["queue"] else ""}
    if not alive:
        dead = dict.fromkeys(COMMANDS, "The run's process has ended; resume the run first.")
        return dead | {"resume": "", "stop": ""}
    if run.state == "queued":
        waiting = dict.fromkeys(COMMANDS, "The run waits for its turn.")
        return waiting | {"stop": ""} | ({"resume": ""} if forgotten(run, status) else {})
    possible = {"stop": ""}
    if run.state == "paused":
        possible |= {"resume": "", "pause": "The run is paused already."}
        possible |= dict.fromkeys(("save", "evaluate"), "Resume the run first: this happens after its next step.")
        return possible
    possible["resume"] = "The run is not paused."
    if run.state == "loading":
        return possible | dict.fromkeys(("pause", "save", "evaluate"), "Wait until the models are loaded.")
    if run.state == "training":
        return possible | dict.fromkeys(("pause", "save", "evaluate"), "")
    before = "Wait for the training: there is nothing trained yet."
    during = "Wait until this evaluation is done." if run.step else before
    return possible | {"pause": ""} | dict.fromkeys(("save", "evaluate"), before if run.state == "baseline" else during)


def forgotten(run: RunRow, status: Mapping[str, Any]) -> bool:
    """Whether a queued run waits in no queue of this app: whoever queued it has ended, or is another process."""
    return run.state == "queued" and run.id not in status["queue"] and status["current"] != run.id


def asked(commands: Iterable[CommandRow], events: Sequence[EventRow]) -> list[str]:
    """What was asked of a run and has not happened yet, from its commands and its newest events, the oldest first."""
    oldest = events[0].time if events else 0.0
    happened = dict.fromkeys(COMMANDS, oldest)
    for event in events:
        state = event.data.get("state") if event.kind == "state" else None
        if state:
            happened["pause"] = happened["resume"] = event.time
        if state == "loading":
            happened["stop"] = event.time
        if state == "evaluating":
            happened["evaluate"] = event.time
        if event.kind == "checkpoint":
            happened["save"] = event.time
    waiting = [row for row in commands if row.created > happened[row.command]]
    newest = {row.command: row.created for row in waiting}
    if "pause" in newest and "resume" in newest:  # the later of the two is what holds
        newest.pop(min("pause", "resume", key=lambda name: newest[name]))
    return list(newest)


# -- in words --------------------------------------------------------------------------------------------------------


def remark(run: RunRow, status: Mapping[str, Any], *, alive: bool) -> dict[str, str]:
    """One or two sentences on the run's state and the way forward: kind (info, warn, bad) and text."""
    said = (run.error or run.message).strip()
    if run.state in ENDINGS and run.id in status["queue"]:
        return {"kind": "info", "text": f"To be resumed. {_waiting(run, status)}"}
    onward = "" if run.source == "imported" else " Resume goes on from the last saved step."
    if run.state == "failed":
        return {"kind": "bad", "text": _sentence(said or "The run failed without saying why") + onward}
    if run.state == "interrupted":
        return {"kind": "warn", "text": _sentence(said or "its process ended") + onward}
    if run.state == "stopped":
        return {"kind": "info", "text": _sentence(said or "stopped")}
    if run.active and not alive:
        text = f"The run's process ({run.pid} on {run.host}) has ended without a word." + onward
        return {"kind": "warn", "text": text}
    if run.state == "queued":
        return {"kind": "info", "text": _waiting(run, status)}
    text = {
        "loading": "Loading the three models.",
        "baseline": "Measuring the untrained policy, to compare with later; training follows.",
        "paused": "Paused where it was; the models stay loaded.",
        "evaluating": "Measuring the policy as it is now on held-out prompts; training goes on afterwards."
        if run.step < run.total_steps
        else "Measuring the trained policy on the test prompts.",
    }.get(run.state, "")
    if not text and run.source == "imported":
        text = "This run was imported: it can be looked at, not continued."
    return {"kind": "info", "text": text}


def _waiting(run: RunRow, status: Mapping[str, Any]) -> str:
    if forgotten(run, status):
        return "Left in the queue by another process; Resume puts it in this app's queue, Stop takes it out."
    if status["engine"] == "failed":
        return _sentence(status["problem"])
    if status["engine"] == "loading":
        return f"Loading the engine, {status['imported']} of {status['imports']} parts."
    place = status["queue"].index(run.id) + 1 if run.id in status["queue"] else 0
    ahead = place - 1 + (status["current"] is not None)
    if not place or ahead == 0:
        return "Next in line; starting."
    return f"Waiting for {ahead} run{'s' if ahead > 1 else ''} before it."


def _sentence(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."
