"""How this process gets memory from the system: large blocks one by one, given back as soon as they are free.

Left alone, glibc learns from the first tensor that is freed to cut all blocks of up to 32 MiB out of one heap. Small
things that stay (compiled kernels, pictures, rows to record) pin the holes that tensors leave, aligned blocks of older
glibc don't fit into holes of their own size, and a run of the embedded models, which needs 1.2 GiB, grew to 1.9 GiB in
25 steps. With a threshold of our own, what a process holds is what its tensors need, and a plan can be true.

Blocks that come from the system are zeroed page by page, which costs time: with a threshold of 2 MiB a tenth of a step,
with this one about 3 % of a run's processor time. In pages of 4 KiB it would be more, so PyTorch is asked to mark its
large tensors for pages of 2 MiB (``THP_MEM_ALLOC_ENABLE``, which it looks up once, when it makes its first tensor).
Without glibc nothing here has an effect.
"""

from __future__ import annotations

import ctypes
import os

LARGE = 8 * 2**20  # bytes
KEPT = 64 * 2**20  # bytes that may stay free at the heap's end, else it would shrink and grow all the time
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h


def prepare() -> bool:
    """Set this process's allocator up; the sooner the better. Returns whether large blocks are given back at once.

    What the environment asks of glibc, or of PyTorch, stays as it is asked.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "GLIBC_TUNABLES" in os.environ:
        return False
    try:
        if not (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"):
            return False
    except (AttributeError, ValueError, OSError):  # Windows, macOS, musl
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_THRESHOLD, LARGE) and mallopt(_TRIM_THRESHOLD, KEPT))
