"""What the browser tests know of a running app."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from grpo_engine.store import Store


@dataclass
class Served:
    """A running app: its address, and its database as another process sees it."""

    url: str
    db: Path
    store: Store
    process: subprocess.Popen[bytes]

    def log(self) -> str:
        """What the app's process has printed so far."""
        return (self.db.parent / "app.log").read_text(encoding="utf-8", errors="replace")
