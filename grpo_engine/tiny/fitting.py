"""One training loop for all embedded models: AdamW, warm-up and decay, averaged weights, resumable.

Stages differ only in their model and in ``loss(step) -> scalar``. Everything random in ``loss`` must come
from the step number, so that a stage that was interrupted goes on exactly as if it had not been.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

SAVE_EVERY_SECONDS = 120.0


@dataclass(frozen=True)
class Recipe:
    """How long and how fast one model is trained."""

    steps: int
    batch: int
    learning_rate: float
    weight_decay: float = 0.01
    warmup: int = 100
    decay_share: float = 0.35  # the last part of the steps, over which the rate falls to zero
    ema: float = 0.995  # of the averaged weights, which are the ones kept
    clip_norm: float = 1.0

    def rate(self, step: int) -> float:
        """Learning rate at ``step``: linear warm-up, plateau, cosine to zero."""
        start = self.steps * (1 - self.decay_share)
        rise = min(1.0, (step + 1) / self.warmup)
        fall = 1.0 if step < start else 0.5 * (1 + math.cos(math.pi * (step - start) / (self.steps - start)))
        return self.learning_rate * rise * fall


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 compute where the device has it in hardware, plain float32 elsewhere."""
    fast = device.type == "cuda" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """A terminal progress bar; yields ``update(done, note)``."""
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, refresh_per_second=2) as progress:
        task = progress.add_task(label, total=total, note="")

        def update(done: int, note: str) -> None:
            progress.update(task, completed=done, note=note)

        yield update


@contextmanager
def plain_attention(device: torch.device) -> Iterator[None]:
    """On a CPU, attention by plain products: on sequences this short the fused backward takes half of a step."""
    fused = torch.backends.cuda.flash_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(fused and device.type != "cpu")
    try:
        yield
    finally:
        torch.backends.cuda.enable_flash_sdp(fused)


def fit(
    name: str,
    model: nn.Module,
    loss: Callable[[int], Tensor | dict[str, Tensor]],
    recipe: Recipe,
    folder: Path,
    *,
    log: Callable[[str], None] = print,
) -> nn.Module:
    """Train ``model`` in place by ``recipe`` and leave it with its averaged weights, in eval mode.

    ``loss(step)`` returns the scalar to minimise, or a dict of scalars whose sum it is. Progress is saved
    under ``folder / name.pt`` every two minutes and at the end; a finished stage is loaded, not repeated.

    Raises:
        ValueError: the saved progress belongs to another recipe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.pt"
    params = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in params if p.ndim >= 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)
    average = [p.detach().clone() for p in params]
    start = 0
    if path.exists():
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["recipe"] != vars(recipe):
            raise ValueError(f"{path} was begun with another recipe ({state['recipe']}); delete it, or use --fresh.")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for kept, value in zip(average, state["average"], strict=True):
            kept.copy_(value)
        start = state["step"]

    def save(step: int) -> None:
        state: dict[str, Any] = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "average": average,
            "step": step,
            "recipe": vars(recipe),
        }
        torch.save(state, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)

    model.train()
    saved, shown = time.monotonic(), 0.0
    with plain_attention(next(model.parameters()).device), progress_bar(name, recipe.steps) as update:
        for step in range(start, recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step)
            parts = loss(step)
            total = sum(parts.values()) if isinstance(parts, dict) else parts
            optimizer.zero_grad(set_to_none=True)
            assert isinstance(total, Tensor)
            total.backward()
            norm = nn.utils.clip_grad_norm_(params, recipe.clip_norm)
            if torch.isfinite(norm):
                optimizer.step()
            decay = min(recipe.ema, (step + 1) / (step + 10))
            torch._foreach_lerp_(average, [p.detach() for p in params], 1 - decay)
            value = total.item()
            if math.isfinite(value):
                shown = value if shown == 0.0 else 0.98 * shown + 0.02 * value
            update(step + 1, f"loss {shown:.4f}")
            if step % 50 == 0:
                detail = {k: round(v.item(), 4) for k, v in parts.items()} if isinstance(parts, dict) else ""
                log(f"{name} step {step} loss {shown:.4f} norm {float(norm):.2f} {detail} {time.strftime('%H:%M:%S')}")
            if time.monotonic() - saved > SAVE_EVERY_SECONDS:
                save(step + 1)
                saved = time.monotonic()
    if start < recipe.steps:
        save(recipe.steps)
    with torch.no_grad():
        for param, value in zip(params, average, strict=True):
            param.copy_(value)
    return model.eval()
