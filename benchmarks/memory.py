"""The memory plan against reality: what a run's process needs at its peak, planned and measured.

Short runs of the embedded models (each its own process, on the CPU); the peak is the operating system's. Goal:
within 15 % for every one; they differ in what takes the memory, so that no single figure can be tuned to them. The
median of the repeats is compared, and their range shown. On a GPU, ``full_scale.py`` shows the same of the full-size
models.

What a process holds depends on the allocator too (``grpo_engine/heap.py``): these figures are of glibc.

    PYTHONPATH=. python benchmarks/memory.py --repeat 3
    PYTHONPATH=. python benchmarks/memory.py --only rollouts          # those whose name has this in it
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, bars, machine, median, table

from grpo_engine.config import RunConfig
from grpo_engine.loading import read_prompts
from grpo_engine.memory import plan_memory
from grpo_engine.placement import resolve

MIB = 2**20
CHEAP = ["placement.plan=cpu", "training.steps=2", "evaluation.prompts=8", "models.image.steps=4"]
RUNS = {
    "the tiny preset": [],
    "the tiny preset, 25 steps": ["training.steps=25"],  # batches of ever other sizes, each with kernels of its own
    "32 rollouts a prompt": ["sampling.num_rollouts=32"],
    "128 pictures at once": ["models.image.batch_size=128", "sampling.num_rollouts=32"],
    "16 prompts a step": ["training.batch_size=16", "models.image.batch_size=64"],
    "long rewrites, few rows": [
        "sampling.max_new_tokens=96",
        "sampling.num_rollouts=16",
        "sampling.temperature=2.0",  # so that they are long
        "training.update_rows=8",
    ],
    "bfloat16 policy, float32 pictures": [
        "models.policy.dtype=bfloat16",
        "models.image.dtype=float32",
        "training.steps=4",
    ],
    "many pictures measured": [  # 1440 at once, until they are recorded
        "models.image.batch_size=16",
        "models.image.cache_mb=0",
        "models.image.steps=1",
        "evaluation.prompts=60",
        "evaluation.images_per_prompt=8",
    ],
}

CHILD = """
import json, resource, subprocess, sys
done = subprocess.run(json.loads(sys.argv[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(json.dumps([done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))
"""


def planned(overrides: list[str]) -> int:
    """Bytes the plan says the CPU needs."""
    config = RunConfig.load("tiny", overrides)
    prompts = [prompt.text for prompt in read_prompts(config).prompts]
    plan = plan_memory(config, resolve(config.placement), prompts=prompts)
    return next(device.needed for device in plan.devices if device.device == "cpu")


def measured(overrides: list[str]) -> int:
    """Peak resident bytes of such a run's process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "grpo_engine", "train", "--config", "tiny", "--db", f"{folder}/runs.db"]
        for override in overrides:
            command += ["--set", override]
        out = subprocess.run(
            [sys.executable, "-c", CHILD, json.dumps(command)], capture_output=True, text=True, cwd=ROOT, check=True
        )
        code, kilobytes = json.loads(out.stdout)
        if code:
            raise SystemExit(f"The run ended with exit code {code}; see {Path(folder)}.")
        return int(kilobytes) * 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=1, help="runs of each, of which the median counts (1)")
    parser.add_argument("--only", default="", metavar="WORDS", help="only what has these words in its name")
    arguments = parser.parse_args()
    print(f"{machine()}, {' '.join(platform.libc_ver()) or 'no glibc'}\n")
    rows: list[list[object]] = []
    for name, own in RUNS.items():
        if arguments.only in name:
            need = planned([*CHEAP, *own]) / MIB
            peaks = [measured([*CHEAP, *own]) / MIB for _ in range(arguments.repeat)]
            spread = f"{min(peaks):.0f} to {max(peaks):.0f}"
            rows.append([name, round(need), round(median(peaks)), spread, need / median(peaks)])
    table(["run", "planned MiB", "measured MiB", "from, to", "planned / measured"], rows)
    print()
    bars([(str(row[0]), float(str(row[4]))) for row in rows], "x measured")


if __name__ == "__main__":
    main()
