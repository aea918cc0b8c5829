"""Which model sits on which device, and in which number format."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .config import ConfigError, PlacementConfig, RunConfig


@dataclass(frozen=True)
class Placement:
    """Resolved devices of the three models."""

    policy: torch.device
    image: torch.device
    reward: torch.device

    def describe(self) -> str:
        """One line for the log."""
        return f"policy on {self.policy}, image model on {self.image}, reward on {self.reward}"


def available_devices() -> list[str]:
    """Names that a placement may use here, best first."""
    return [*(f"cuda:{index}" for index in range(torch.cuda.device_count())), "cpu"]


def resolve(config: PlacementConfig) -> Placement:
    """Turn "auto" into devices: three GPUs hold one model each, fewer are shared from the front, else the CPU.

    Raises:
        ConfigError: a named device does not exist here.
    """
    there = available_devices()
    gpus = [name for name in there if name.startswith("cuda")]
    order = {"policy": 0, "image": 1, "reward": 2}
    found: dict[str, torch.device] = {}
    for role, rank in order.items():
        wanted: str = getattr(config, role)
        if wanted == "auto":
            wanted = gpus[min(rank, len(gpus) - 1)] if gpus else there[0]
        elif wanted == "cuda":
            wanted = "cuda:0"
        if wanted not in there:
            raise ConfigError(
                f"placement.{role} is {wanted!r}, but this machine has {', '.join(there)}; "
                "choose one of those or 'auto'."
            )
        found[role] = torch.device(wanted)
    return Placement(**found)


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
    """Limit this process's CPU threads as configured."""
    if config.placement.threads:
        torch.set_num_threads(config.placement.threads)
