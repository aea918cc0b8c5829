"""Which journal keeps ``runs.db`` whole: SQLite's write-ahead log, or its rollback journal.

The log is the faster one, and lets readers go on while somebody writes, but it is shared memory: on a file system
that several machines see, a process on another one would corrupt the database. The rollback journal needs
nothing but file locks. There readers and the writer wait for each other, for as long as one transaction takes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, cast, get_args

Journal = Literal["wal", "rollback"]

VARIABLE = "GRPO_JOURNAL"
"""The environment variable that chooses: ``wal``, ``rollback``, or ``auto`` (by the file system; the default)."""

# fmt: off
NETWORK = frozenset({
    "9p", "acfs", "afs", "beegfs", "ceph", "cifs", "davfs", "fhgfs", "gfs", "gfs2", "glusterfs", "gpfs",
    "juicefs", "lustre", "mfs", "ncpfs", "nfs", "nfs4", "ocfs2", "orangefs", "panfs", "pvfs2", "s3fs", "smb3",
    "smbfs", "sshfs", "virtiofs", "webdav", "wekafs",
})
# fmt: on


class JournalError(ValueError):
    """The environment variable names no journal; the message is one plain sentence."""


def journal_for(path: Path, mounts: Iterable[tuple[str, str]] | None = None) -> Journal:
    """The journal for a database at ``path``, by what the environment says or else by the file system.

    Args:
        mounts: (mount point, kind of file system) of all there are; None = ask the system.

    Raises:
        JournalError: see there.
    """
    chosen = os.environ.get(VARIABLE, "auto")
    if chosen not in ("auto", *get_args(Journal)):
        raise JournalError(f"{VARIABLE} is {chosen!r}; set it to auto, wal or rollback.")
    if chosen == "auto":
        return "rollback" if is_network(filesystem(path, mounts)) else "wal"
    return cast(Journal, chosen)


def is_network(kind: str) -> bool:
    """Whether machines can share a file system of this kind."""
    return kind.removeprefix("fuse.") in NETWORK


def filesystem(path: Path, mounts: Iterable[tuple[str, str]] | None = None) -> str:
    """The kind of file system that holds ``path``, or will: "ext4", "nfs4"...; empty where that is not known."""
    if mounts is None:
        import psutil

        mounts = [(part.mountpoint, part.fstype) for part in psutil.disk_partitions(all=True)]
    place = Path(os.path.realpath(path))
    # Of mounts on one place the last covers the others.
    holding = [(len(Path(point).parts), kind) for point, kind in mounts if place.is_relative_to(point)]
    return max(reversed(holding), key=lambda found: found[0])[1].lower() if holding else ""
