"""What a run needs, as the engine plans it: devices, memory, and what only it can check. Imports the engine."""

from __future__ import annotations

from typing import Any

from grpo_engine.config import ConfigError, RunConfig
from grpo_engine.memory import MemoryPlan, MemoryRefusal, plan_memory
from grpo_engine.placement import intended
from grpo_engine.plan import Plan

from .form import named_in

ROLES = (("policy", "policy", "Policy"), ("image", "image model", "Image model"), ("reward", "reward", "Reward"))
"""(section of the settings, what the memory plan calls it, what people read)."""


def needs(config: RunConfig) -> dict[str, Any]:
    """The three models with their devices, memory needed against memory there, and why the run can't start.

    Sizes in bytes; None = not known. ``problem`` is empty when the run can start; ``field`` is the setting it names.
    """
    problem, to_come = "", []
    memory: MemoryPlan | None
    try:
        plan = Plan(config)
        memory = plan.memory
        to_come = [download.sentence for download in plan.downloads]
    except MemoryRefusal as error:
        problem, memory = str(error), error.plan
    except ConfigError as error:
        problem = str(error)
        memory = _if_it_were_there(config)
    return {
        "problem": problem,
        "field": named_in(problem),
        "models": [] if memory is None else [row for role in ROLES for row in _models(config, memory, *role)],
        "devices": [] if memory is None else [_device(device) for device in memory.devices],
        "notes": to_come + ([] if memory is None else list(memory.notes)),
    }


def _if_it_were_there(config: RunConfig) -> MemoryPlan | None:
    """The memory of a run that can't start for another reason, on devices that may not exist here."""
    try:
        return plan_memory(config, intended(config.placement))
    except ConfigError:
        return None


def _models(config: RunConfig, memory: MemoryPlan, section: str, part: str, label: str) -> list[dict[str, Any]]:
    rows = []
    for device in memory.devices:
        items = [
            item for item in device.items if item.part == part and not item.what.startswith("weights on their way")
        ]
        if items:
            unknown = any(item.bytes is None for item in items)
            needed = None if unknown else sum(item.bytes or 0 for item in items if item.counted)
            path: str = getattr(config.models, section).path
            rows.append({"model": label, "path": path, "device": device.device, "needed": needed})
    return rows


def _device(device: Any) -> dict[str, Any]:
    return {
        "device": device.device,
        "needed": device.needed,
        "at_least": device.unknown,
        "free": device.memory.free if device.memory else None,
        "total": device.memory.total if device.memory else None,
        "fits": device.fits,
    }
