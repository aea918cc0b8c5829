"""Which model sits on which device, and in which number format.

A named plan (``placement.plan``) chooses devices for all three roles; ``placement.policy``, ``.image`` and
``.reward`` override its choice one by one. ``memory.py`` then says whether the models fit there.

Where several ranks of one run share a machine, each has a cell of neighbouring GPUs, and a plan's ``cuda:0`` is
the first of its cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from .config import ConfigError, PlacementConfig, RunConfig

PLANS: dict[str, dict[str, tuple[str, ...]]] = {
    "three-gpu": {"policy": ("cuda:0",), "image": ("cuda:1",), "reward": ("cuda:2",)},
    # Rendering dominates at full scale, and the reward is small: it shares a GPU with one of two image models.
    "balanced": {"policy": ("cuda:0",), "image": ("cuda:1", "cuda:2"), "reward": ("cuda:2",)},
    "two-gpu": {"policy": ("cuda:0",), "image": ("cuda:1",), "reward": ("cuda:1",)},
    "one-gpu": {"policy": ("cuda:0",), "image": ("cuda:0",), "reward": ("cuda:0",)},
    "cpu": {"policy": ("cpu",), "image": ("cpu",), "reward": ("cpu",)},
}
AUTO = ("cpu", "one-gpu", "two-gpu", "three-gpu")
"""The plan that "auto" takes, by the number of GPUs; three for more."""


@dataclass(frozen=True)
class Placement:
    """Resolved devices of the three models.

    Attributes:
        images: one image model on each of them, the primary one first; never empty, all different.
        plan: the plan these devices are, or "explicit" where they are nobody's but the user's.
    """

    policy: torch.device
    images: tuple[torch.device, ...]
    reward: torch.device
    plan: str = "explicit"

    @property
    def image(self) -> torch.device:
        """The primary image model's device."""
        return self.images[0]

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Every device that holds a model, each once."""
        return tuple(dict.fromkeys((self.policy, *self.images, self.reward)))

    def describe(self) -> str:
        """One line for the log."""
        images = f"image model{'s' if len(self.images) > 1 else ''} on {_listed([str(d) for d in self.images])}"
        return f"policy on {self.policy}, {images}, reward on {self.reward} (plan {self.plan})"


def available_devices() -> list[str]:
    """Names that a placement may use here, best first."""
    return [*(f"cuda:{index}" for index in range(torch.cuda.device_count())), "cpu"]


def resolve(config: PlacementConfig, devices: Sequence[str] | None = None) -> Placement:
    """Turn a plan and its overrides into devices.

    Args:
        devices: what there is, as :func:`available_devices` names it; None = look.

    Raises:
        ConfigError: a device of the plan or of an override is not among them.
    """
    there = available_devices() if devices is None else list(devices)
    fitting = _fitting(there)
    plan = fitting if config.plan == "auto" else config.plan
    found = _chosen(config, plan)
    for role, names in found.items():
        wanted: str = getattr(config, role)
        missing = [name for name in names if name not in there]
        if missing and wanted != "auto":
            raise ConfigError(
                f"placement.{role} is {wanted!r}, but this machine has only {_listed(there)}; name one of what it "
                "has, or 'auto'."
            )
        if missing:
            needed = sorted({name for part in PLANS[plan].values() for name in part})
            raise ConfigError(
                f"placement.plan is {plan!r}, which needs {_listed(needed)}, but this machine has {_listed(there)}; "
                f"use {fitting!r} or 'auto'."
            )
    return _placed(found)


def resolve_cell(
    config: PlacementConfig, local_rank: int, local_size: int, devices: Sequence[str] | None = None
) -> Placement:
    """What :func:`resolve` says for the cell of one of the ``local_size`` ranks of this machine.

    Raises:
        ConfigError: as :func:`resolve`, or the machine has too few GPUs for so many cells.
    """
    there = available_devices() if devices is None else list(devices)
    gpus = [name for name in there if name.startswith("cuda")]
    each = [f"cuda:{index}" for index in range(len(gpus) // local_size)]
    plan = _fitting(each) if config.plan == "auto" else config.plan
    used = [name for names in _chosen(config, plan).values() for name in names if name != "cpu"]
    needed = config.gpus_per_cell or max((int(name.rpartition(":")[2]) + 1 for name in used), default=0)
    if config.plan == "auto" and gpus and "auto" in (config.policy, config.image, config.reward):
        needed = max(needed, 1)  # with fewer GPUs than ranks: refused, not quietly run on the CPU
    if needed * local_size > len(gpus) and (gpus or used):
        raise ConfigError(
            f"{local_size} ranks on this machine with {needed} GPUs each need {needed * local_size}, but it has "
            f"{len(gpus)}; start fewer ranks, lower placement.gpus_per_cell, or choose another placement.plan."
        )
    cell = [f"cuda:{index}" for index in range(needed)] if gpus else []
    found = resolve(config, [*cell, "cpu"])
    first = local_rank * needed
    return replace(
        found,
        policy=_shifted(found.policy, first),
        images=tuple(_shifted(device, first) for device in found.images),
        reward=_shifted(found.reward, first),
    )


def _shifted(device: torch.device, by: int) -> torch.device:
    return torch.device("cuda", device.index + by) if device.type == "cuda" else device


def intended(config: PlacementConfig, devices: Sequence[str] | None = None) -> Placement:
    """What :func:`resolve` would say if every device that the settings name existed."""
    there = available_devices() if devices is None else list(devices)
    return _placed(_chosen(config, _fitting(there) if config.plan == "auto" else config.plan))


def _fitting(there: Sequence[str]) -> str:
    """The plan for as many GPUs as there are."""
    return AUTO[min(sum(name.startswith("cuda") for name in there), len(AUTO) - 1)]


def _chosen(config: PlacementConfig, plan: str) -> dict[str, tuple[str, ...]]:
    """Names of each role's devices; an explicit plan has an override for each (``PlacementConfig`` sees to it)."""
    return {
        role: PLANS[plan][role] if getattr(config, role) == "auto" else _names(getattr(config, role))
        for role in ("policy", "image", "reward")
    }


def _placed(found: dict[str, tuple[str, ...]]) -> Placement:
    return Placement(
        policy=torch.device(found["policy"][0]),
        images=tuple(torch.device(name) for name in found["image"]),
        reward=torch.device(found["reward"][0]),
        plan=next((name for name, parts in PLANS.items() if parts == found), "explicit"),
    )


def _names(text: str) -> tuple[str, ...]:
    """The devices in a setting; "cuda" is the first GPU."""
    return tuple("cuda:0" if name == "cuda" else name for name in text.replace(" ", "").split(","))


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def compute_dtype(choice: str, device: torch.device) -> torch.dtype:
    """The number format that "auto" means on ``device``: bfloat16 where the hardware computes it, else float32."""
    if choice != "auto":
        dtype: torch.dtype = getattr(torch, choice)
        return dtype
    if device.type == "cuda":
        return torch.bfloat16
    fast = device.type == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.bfloat16 if fast else torch.float32


def apply_threads(config: RunConfig) -> None:
    """Limit this process's CPU threads as configured; 0 lifts the limit of an earlier run in the same process."""
    unlimited = _unlimited_threads()
    torch.set_num_threads(config.placement.threads or unlimited)


@lru_cache
def _unlimited_threads() -> int:
    """As many as there were when this was first asked, before any run limited them."""
    return torch.get_num_threads()
