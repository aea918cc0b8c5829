"""Which process a run belongs to, and whether that process still lives."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .rows import RunRow

SILENCE_S = 120.0
"""A run on another host counts as dead when its heartbeat is older than this, in seconds."""


@dataclass(frozen=True)
class Owner:
    """A process: its host, its number, and a token that a later process of the same number does not have."""

    host: str
    pid: int
    token: str


def owner_of(run: RunRow) -> Owner:
    """The process that carries ``run``, or carried it last."""
    return Owner(run.host or "", run.pid or 0, run.process_token or "")


def this_process() -> Owner:
    """The process that asks."""
    pid = os.getpid()
    return Owner(socket.gethostname(), pid, process_token(pid) or "")


def carried_here(run: RunRow) -> bool:
    """Whether the process that asks carries ``run``, which goes on."""
    return run.active and owner_of(run) == this_process()


def process_token(pid: int) -> str | None:
    """When process ``pid`` of this host was started, as text; None when there is none (or only a zombie).

    On Linux the boot's id and the start in clock ticks since then, which no correction of the clock moves.
    """
    if Path("/proc/self/stat").exists():
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        except (FileNotFoundError, ProcessLookupError):
            return None
        # proc(5): the second field is the program's name in brackets and may itself hold spaces and brackets.
        fields = stat.rpartition(")")[2].split()
        state, start = fields[0], fields[19]
        return None if state in "ZXx" else f"{boot}:{start}"
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.0f}"
    except psutil.NoSuchProcess:
        return None


def is_alive(owner: Owner, heartbeat: float, now: float) -> bool:
    """Whether a run's process lives; ``heartbeat`` and ``now`` in seconds since 1970.

    On this host by its number and token; on another only its heartbeat can be seen.
    """
    if owner.host == socket.gethostname():
        return process_token(owner.pid) == owner.token
    return now - heartbeat <= SILENCE_S
