"""The memory plan against reality: what a run's process needs at its peak, planned and measured.

A short run of the embedded models (its own process, on the CPU); the peak is the operating system's. Goal:
within 15 %. On a GPU, ``full_scale.py`` shows the same of the full-size models.

    python benchmarks/memory.py
"""

from __future__ import annotations

import argparse
import json
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
    "32 rollouts a prompt": ["sampling.num_rollouts=32"],
    "128 pictures at once": ["models.image.batch_size=128", "sampling.num_rollouts=32"],
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
    parser.add_argument("--repeat", type=int, default=1)
    repeat: int = parser.parse_args().repeat
    print(machine(), "\n")
    rows: list[list[object]] = []
    for name, own in RUNS.items():
        need = planned([*CHEAP, *own]) / MIB
        peak = median([measured([*CHEAP, *own]) / MIB for _ in range(repeat)])
        rows.append([name, round(need), round(peak), need / peak])
    table(["run", "planned MiB", "measured MiB", "planned / measured"], rows)
    print()
    bars([(str(row[0]), float(str(row[3]))) for row in rows], "x measured")


if __name__ == "__main__":
    main()
