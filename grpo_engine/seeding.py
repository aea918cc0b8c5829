"""Random numbers from explicit seeds, one per purpose.

Every random number of a run comes from a hash of (run seed, purpose, step, prompt, k...). Nothing is drawn
from a global generator, so the order in which things happen never matters and a resumed run is the same run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def derive_seed(run_seed: int, purpose: str, *parts: str | int) -> int:
    """A 63-bit seed that depends on all arguments and on nothing else."""
    text = "\x1f".join(map(str, (run_seed, purpose, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def numpy_generator(run_seed: int, purpose: str, *parts: str | int) -> np.random.Generator:
    """A numpy generator seeded by :func:`derive_seed`."""
    return np.random.default_rng(derive_seed(run_seed, purpose, *parts))


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """``count`` numbers in [0, 1) for each seed: float64 (len(seeds), count), always drawn on the CPU."""
    rows = [torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows)


def normals(seed: int, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers, float32 of ``shape``, always drawn on the CPU: the same on every device."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


@contextmanager
def seeded_initialization(seed: int) -> Iterator[None]:
    """Library code that draws initial weights from torch's global generator draws them from ``seed`` here."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
