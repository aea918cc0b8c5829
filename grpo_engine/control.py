"""What may be asked of a running trainer, and how it listens.

The trainer calls :meth:`RunControl.poll` between phases, between denoising steps and between tokens; a stop
therefore takes effect within the longest of those, and a pause holds exactly there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

COMMANDS = ("stop", "pause", "resume", "save", "evaluate")


class StopRequested(Exception):
    """Raised inside the trainer when somebody asked the run to stop; not an error."""


class RunControl:
    """Thread-safe switchboard between whoever commands a run and the trainer that obeys.

    ``on_hold(True)`` is called by the trainer's thread when a pause takes effect, ``on_hold(False)`` when it ends.
    """

    def __init__(self) -> None:
        self.on_hold: Callable[[bool], None] = lambda held: None
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._go = threading.Event()
        self._go.set()
        self._wanted: set[str] = set()
        self._lock = threading.Lock()

    def command(self, name: str) -> None:
        """Ask for one of :data:`COMMANDS`. Stopping also ends a pause."""
        if name not in COMMANDS:
            raise ValueError(f"There is no command {name!r}; use one of {', '.join(COMMANDS)}.")
        if name == "stop":
            self._stop.set()
            self._go.set()
        elif name == "pause":
            self._go.clear()
        elif name == "resume":
            self._go.set()
        else:
            with self._lock:
                self._wanted.add(name)

    def abandon(self, error: Exception) -> None:
        """Have the trainer raise ``error`` at its next poll: it could not go on. Ends a pause too."""
        self._error = error
        self._go.set()

    @property
    def paused(self) -> bool:
        """Whether the trainer is, or is about to be, held."""
        return not self._go.is_set()

    def poll(self) -> None:
        """Hold while paused; raise :class:`StopRequested` if the run shall stop, or what it was abandoned for."""
        if not self._go.is_set():
            self.on_hold(True)
            self._go.wait()
            if not self._stop.is_set():
                self.on_hold(False)
        if self._error is not None:
            raise self._error
        if self._stop.is_set():
            raise StopRequested

    def take(self, name: str) -> bool:
        """Whether ``name`` ("save" or "evaluate") was asked for since the last call."""
        with self._lock:
            wanted = name in self._wanted
            self._wanted.discard(name)
        return wanted
