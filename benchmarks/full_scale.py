"""A GRPO step at full size on one GPU: Qwen2-VL-7B (LoRA), Stable Diffusion 3 Medium and ViT-B/32, random weights.

The batch of the design (4 prompts x 5 rollouts, 20 new tokens). Prints, for each number of denoising steps:
seconds by phase, what the phase reached in TFLOP/s against this card's measured matrix rate, peak memory by phase
(with all three models' weights, as they share the card) and weights by model.

    PYTHONPATH=. python benchmarks/full_scale.py                          the whole thing; one GPU with 48 GB
    PYTHONPATH=. python benchmarks/full_scale.py --policy 2B --t5
    PYTHONPATH=. python benchmarks/full_scale.py --small --device cpu     tries the program itself, not the speed
"""

from __future__ import annotations

import argparse
import gc
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from common import bars, machine, median, table
from full_scale_models import Sizes, build_images, build_policy, build_reward, published, small
from torch.utils.flop_counter import FlopCounterMode

from grpo_engine.config import RunConfig
from grpo_engine.control import RunControl
from grpo_engine.environment import PureGRPOPromptEnvironment
from grpo_engine.loading import read_prompts
from grpo_engine.recorder import Unrecorded
from grpo_engine.trainer import PureGRPOTrainer

GIB = 2**30
PHASES = ("sample", "render", "score", "update")


class Meter:
    """Wraps the four phases of a step: seconds, peak memory, and, while ``counting``, floating-point operations."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.counting = device, False
        self.seconds: dict[str, float] = defaultdict(float)
        self.peak: dict[str, int] = defaultdict(int)
        self.flops: dict[str, int] = defaultdict(int)

    def around(self, phase: str, action: Callable[..., Any]) -> Callable[..., Any]:
        """``action``, measured as a part of ``phase``."""

        def measured(*arguments: Any, **named: Any) -> Any:
            if self.counting:
                with FlopCounterMode(display=False) as counter:
                    result = action(*arguments, **named)
                self.flops[phase] += counter.get_total_flops()
                return result
            self._wait()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            begun = time.perf_counter()
            result = action(*arguments, **named)
            self._wait()
            self.seconds[phase] += time.perf_counter() - begun
            if self.device.type == "cuda":
                self.peak[phase] = max(self.peak[phase], torch.cuda.max_memory_allocated(self.device))
            return result

        return measured

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """TFLOP/s of a square matrix product on this device: the bound that the phases are held against."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    times = []
    for _ in range(8):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return 2 * size**3 / median(times[2:]) / 1e12


def configured(arguments: argparse.Namespace, denoising: int) -> RunConfig:
    """The three-gpu preset on one device, in the design's batch."""
    resolution = 64 if arguments.small else arguments.resolution
    return RunConfig.load(
        "three-gpu",
        [
            "placement.plan=explicit",
            *(f"placement.{part}={arguments.device}" for part in ("policy", "image", "reward")),
            f"models.image.steps={denoising}",
            f"models.image.resolution={resolution}",
            f"models.image.use_t5={str(arguments.t5).lower()}",
            f"models.image.max_sequence_length={256 if arguments.t5 else 0}",
            "objective.min_std=0",  # random weights give rewards that hardly differ; the work must be done all the same
            *arguments.set,
        ],
    )


def built(
    sizes: Sizes, config: RunConfig, device: torch.device, dtype: torch.dtype
) -> tuple[PureGRPOPromptEnvironment, dict[str, int]]:
    """The environment, and bytes of each model as allocated on the device."""
    held: dict[str, int] = {}

    def counted(name: str, build: Callable[[], Any]) -> Any:
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        model = build()
        held[name] = (torch.cuda.memory_allocated(device) if device.type == "cuda" else 0) - before
        return model

    policy = counted("policy", lambda: build_policy(sizes, config, device, dtype))
    images = counted("image", lambda: build_images(sizes, config, device, dtype))
    reward = counted("reward", lambda: build_reward(sizes, config, device, torch.float32))
    return PureGRPOPromptEnvironment(policy, images, reward, config), held


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--policy", choices=("7B", "2B"), default="7B")
    parser.add_argument("--t5", action="store_true", help="with the T5 text encoder (9 GB more)")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--denoising", type=int, nargs="+", default=[10, 28])
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each; the median is shown")
    parser.add_argument("--small", action="store_true", help="small models: tries this file out on a CPU")
    parser.add_argument("--set", action="append", default=[], metavar="SETTING=VALUE", help="as in train")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device is {arguments.device}, but there is no GPU here; --small --device cpu tries the file.")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rate = matrix_rate(device, dtype, 8192 if device.type == "cuda" else 1024)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else machine()
    print(f"{where}, PyTorch {torch.__version__}; matrix products {rate:.1f} TFLOP/s ({str(dtype)[6:]})\n")
    sizes = small() if arguments.small else published(arguments.policy)
    rows, shares = [], []
    for denoising in arguments.denoising:
        config = configured(arguments, denoising)
        environment, held = built(sizes, config, device, dtype)
        meter = Meter(device)
        environment.policy.sample = meter.around("sample", environment.policy.sample)  # type: ignore[method-assign]
        environment.images.render = meter.around("render", environment.images.render)  # type: ignore[method-assign]
        object.__setattr__(environment.reward, "score", meter.around("score", environment.reward.score))
        prompts = [prompt for prompt in read_prompts(RunConfig.load("tiny")).prompts if prompt.split == "train"]
        trainer = PureGRPOTrainer(config, environment, prompts, Unrecorded(), RunControl())
        trainer.update = meter.around("update", trainer.update)  # type: ignore[method-assign]
        seconds: dict[str, list[float]] = defaultdict(list)
        for number in range(arguments.steps + 2):  # one to warm up, one to count operations
            meter.counting, meter.seconds = number == 1, defaultdict(float)
            groups, _ = trainer.collect(number + 1)
            trainer.assign_advantages(groups)
            trainer.update(groups, number + 1)
            if number > 1:
                for phase in PHASES:
                    seconds[phase].append(meter.seconds[phase])
        for phase in PHASES:
            took = median(seconds[phase])
            reached = meter.flops[phase] / took / 1e12
            peak = f"{meter.peak[phase] / GIB:.1f}" if device.type == "cuda" else "not measured"
            rows.append([f"{denoising} steps", phase, took, reached, 100 * reached / rate, peak])
            shares.append((f"{denoising} steps, {phase}", took))
        total = sum(median(seconds[phase]) for phase in PHASES)
        reached = sum(meter.flops.values()) / total / 1e12
        rows.append([f"{denoising} steps", "whole step", total, reached, 100 * reached / rate, ""])
        if device.type == "cuda":
            print("weights: " + ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in held.items()))
        del environment, trainer, groups
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    table(["image model", "phase", "seconds", "TFLOP/s", "% of matrix rate", "peak GiB"], rows)
    print()
    bars(shares, "s")


if __name__ == "__main__":
    main()
