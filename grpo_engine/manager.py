"""Runs in the background: a queue, one worker, and commands that arrive through the database.

A run is commanded by rows in ``runs.db``, so the command line, the app and a second browser all use the same
way in, and a run started by another process can be stopped like one's own. Nothing here depends on anybody
watching.
"""

from __future__ import annotations

import logging
import threading
from collections import deque

from .config import RunConfig
from .control import RunControl
from .distributed import ALONE, World
from .loading import release_memory
from .plan import Plan
from .session import Session
from .store import Store, StoreError

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2  # how often a running session looks for commands


def execute(store: Store, run_id: str, control: RunControl | None = None, world: World = ALONE) -> str:
    """Carry a run to its end in this thread, listening for commands beside it; returns the final state.

    With several ranks, on the first one.
    """
    control = control or RunControl()
    done = threading.Event()
    listener = threading.Thread(target=_listen, args=(store, run_id, control, done), daemon=True)
    listener.start()
    try:
        return Session(store, run_id, control, world=world).run()
    finally:
        done.set()
        listener.join()


def _listen(store: Store, run_id: str, control: RunControl, done: threading.Event) -> None:
    """Pass commands from the database on until ``done``."""
    while not done.wait(POLL_SECONDS):
        try:
            for row in store.take_commands(run_id):
                control.command(row.command)
                store.answer_command(row.id, "passed on")
        except StoreError:
            log.exception("could not read commands for run %s", run_id)


class RunManager:
    """A queue of runs and the one thread that works it off."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._queue: deque[str] = deque()
        self._changed = threading.Condition()
        self._current: tuple[str, RunControl] | None = None
        self._closing = False
        self._thread: threading.Thread | None = None

    def submit(self, config: RunConfig) -> str:
        """Check ``config``, record a queued run and work on it as soon as the runs before it are done.

        Raises:
            ConfigError: the run could not work; nothing was recorded.
        """
        plan = Plan(config)
        run_id = self.store.create_run(
            config, prompt_set=plan.prompts.name, prompt_fingerprint=plan.prompts.fingerprint()
        )
        self.enqueue(run_id)
        return run_id

    def enqueue(self, run_id: str) -> None:
        """Put an existing run (queued, or ended and to be resumed) at the end of the queue.

        Raises:
            StoreError: there is no such run, or it was imported.
        """
        self.store.require_local(run_id)
        with self._changed:
            self._queue.append(run_id)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="grpo-runs", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    @property
    def current(self) -> str | None:
        """The run being worked on in this process."""
        return self._current[0] if self._current else None

    @property
    def queued(self) -> list[str]:
        """The runs that wait in this process, the next one first."""
        with self._changed:
            return list(self._queue)

    def command(self, run_id: str, name: str) -> None:
        """Ask something of an active run, in whatever process it lives. A run still waiting is simply taken out."""
        with self._changed:
            if name == "stop" and run_id in self._queue:
                self._queue.remove(run_id)
                if self.store.run(run_id).state == "queued":  # one that waits to be resumed has its ending already
                    self.store.set_state(run_id, "stopped", "Taken out of the queue.")
                return
        self.store.post_command(run_id, name)

    def wait(self, timeout: float | None = None) -> bool:
        """Until nothing is queued or running; False if ``timeout`` seconds pass first."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and self._current is None, timeout)

    def close(self, timeout: float = 10.0) -> None:
        """Stop the current run, drop the queue, and wait for the thread."""
        with self._changed:
            self._closing = True
            self._queue.clear()
            if self._current:
                self._current[1].command("stop")
            self._changed.notify_all()
        if self._thread:
            self._thread.join(timeout)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._queue) or self._closing)
                if self._closing:
                    return
                run_id = self._queue.popleft()
                control = RunControl()
                self._current = (run_id, control)
            try:
                execute(self.store, run_id, control)
            except StoreError:
                log.exception("run %s could not be recorded", run_id)
            finally:
                release_memory()
                with self._changed:
                    self._current = None
                    self._changed.notify_all()
