"""The process's heap: large tensors go back to the system at once, whatever small things were made meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_engine.heap import KEPT

ROOT = Path(__file__).resolve().parent.parent

# Tensors of many sizes come and go, and small ones that were made while they were there stay: as a run does it.
CHURN = """
import sys
if sys.argv[1] == "prepared":
    import grpo_engine
import torch, psutil
process = psutil.Process()
kept = []
before = process.memory_info().rss
for step in range(30):
    large = [torch.full((2**18 * (3 + (5 * step + 3 * place) % 17),), 1.0) for place in range(8)]
    kept += [torch.full((2000,), 1.0) for _ in range(50)]
    large[1::2] = [tensor + 1 for tensor in large[1::2]]
    del large
print(process.memory_info().rss - before - sum(tensor.nbytes for tensor in kept))
"""


def left_over(how: str, **environment: str) -> int:
    """Bytes that a process still holds after it let go of all large tensors."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "THP_"))}
    command = [sys.executable, "-c", CHURN, how]
    done = subprocess.run(command, cwd=ROOT, env=plain | environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


def glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):
        return False


@pytest.mark.skipif(not glibc(), reason="another C library hands out memory in its own way")
def test_what_large_tensors_took_goes_back_to_the_system() -> None:
    assert left_over("prepared") < KEPT + 24 * 2**20, "the code of PyTorch's operations among it"
    assert left_over("plain") > 2 * KEPT, "else this proves nothing"


@pytest.mark.skipif(not glibc(), reason="another C library hands out memory in its own way")
def test_what_the_environment_asks_of_the_allocator_stays_as_it_is_asked() -> None:
    code = "import grpo_engine.heap as heap, os; print(heap.prepare(), os.environ['THP_MEM_ALLOC_ENABLE'])"
    for environment, said in (
        ({}, "True 1"),
        ({"MALLOC_MMAP_THRESHOLD_": "1000000"}, "False 1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1000000"}, "False 1"),
        ({"THP_MEM_ALLOC_ENABLE": "0"}, "True 0"),
    ):
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "THP_"))}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=plain | environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == said, environment
