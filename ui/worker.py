"""The engine behind the screens: heavy imports in the background, one queue of runs, the playground's models.

The first page is served before torch is imported. Whoever needs the engine earlier waits for it here.
"""

from __future__ import annotations

import importlib
import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from grpo_engine.store import Store, StoreError

if TYPE_CHECKING:
    from grpo_engine.config import RunConfig
    from grpo_engine.manager import RunManager

log = logging.getLogger(__name__)

HEAVY = ("torch", "open_clip", "transformers", "diffusers", "peft", "grpo_engine.manager")
"""Imported in this order, one by one, so that progress can be shown."""


class EngineUnavailable(Exception):
    """The engine could not be imported; one sentence."""


class Worker:
    """Starts and commands runs. Usable from any thread.

    Args:
        store: open for writing.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._ready = threading.Event()
        self._problem = ""
        self._imported: list[str] = []
        self._manager: RunManager | None = None
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def warm_up(self) -> None:
        """Begin the heavy imports in the background. Idempotent."""
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._import, name="grpo-imports", daemon=True)
                self._thread.start()

    def _import(self) -> None:
        begun = time.perf_counter()
        try:
            for name in HEAVY:
                importlib.import_module(name)
                self._imported.append(name)
            from grpo_engine.loading import quiet_libraries
            from grpo_engine.manager import RunManager

            quiet_libraries()
            self._manager = RunManager(self.store)
            log.info("engine ready after %.1f s", time.perf_counter() - begun)
        except Exception as error:  # an installation can be broken in any way; the screens must still say so
            log.exception("the engine could not be imported")
            self._problem = (
                f"The engine can't start ({type(error).__name__}: {error}); "
                "run 'python -m grpo_engine doctor', then start the app again."
            )
        finally:
            self._ready.set()

    def status(self) -> dict[str, Any]:
        """For every page: whether the engine is there, what it works on, what waits."""
        manager = self._manager
        return {
            "engine": "failed" if self._problem else "ready" if self._ready.is_set() else "loading",
            "imported": len(self._imported),
            "imports": len(HEAVY),
            "problem": self._problem,
            "current": manager.current if manager else None,
            "queue": manager.queued if manager else [],
        }

    def manager(self) -> RunManager:
        """The run manager, once the engine is imported.

        Raises:
            EngineUnavailable: it can't be.
        """
        self.warm_up()
        self._ready.wait()
        if self._manager is None:
            raise EngineUnavailable(self._problem)
        return self._manager

    def submit(self, config: RunConfig) -> str:
        """Check a run, record it as queued and work on it in its turn; returns its id. Raises `ConfigError`."""
        return self.manager().submit(config)

    def resume(self, run_id: str) -> None:
        """Put an ended or a forgotten queued run at the end of the queue. Raises `StoreError`."""
        manager = self.manager()
        run = self.store.run(run_id)
        if run.state == "finished":
            raise StoreError(f"Run {run_id} is finished; there is nothing to resume.")
        if run_id in manager.queued or run_id == manager.current:
            raise StoreError(f"Run {run_id} is already {run.state}.")
        if run.active and run.state != "queued":
            raise StoreError(f"Run {run_id} is {run.state} in another process; stop it first.")
        manager.enqueue(run_id)

    def command(self, run_id: str, name: str) -> None:
        """Ask something of a run, wherever it runs; see `RunManager.command`."""
        run = self.store.run(run_id)
        if run.state == "queued" and name == "stop":
            manager = self._manager
            # In neither place it was left behind by another process. Asked in this order: a run leaves the queue and
            # becomes the current one in one go, and is "queued" a moment longer; by then it has to be asked to stop.
            if manager is None or (run_id not in manager.queued and run_id != manager.current):
                self.store.set_state(run_id, "stopped", "Taken out of the queue.")
                return
        if self._manager is not None:
            self._manager.command(run_id, name)
        else:
            self.store.post_command(run_id, name)

    def close(self) -> None:
        """Stop the current run, keeping its work, and wait for it."""
        if self._manager is not None:
            self._manager.close(timeout=30.0)
