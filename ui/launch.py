"""Starting runs: each request is carried out once, however often a browser sends it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from grpo_engine.config import ConfigError, RunConfig
from grpo_engine.store import Store, StoreError

from .context import Refused
from .form import named_in
from .sweep import next_tag
from .worker import Worker

_REMEMBERED = 500  # answers kept for requests that come again


class Launcher:
    """Hands runs to the worker and says what became of them. Usable from any thread."""

    def __init__(self, store: Store, worker: Worker) -> None:
        self.store, self.worker = store, worker
        self._answers: dict[str, Future[dict[str, Any]]] = {}
        self._lock = threading.Lock()
        self._queueing = threading.Lock()

    def once(self, token: str, action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """``action``'s answer. A second call with the same token waits for it and gets the same one.

        What was refused is forgotten, so that it can be tried again with the same token.
        """
        with self._lock:
            earlier = self._answers.get(token)
            if earlier is None:
                mine = self._answers[token] = Future()
                done = [key for key, future in self._answers.items() if future.done()]
                for key in done[: max(0, len(self._answers) - _REMEMBERED)]:
                    del self._answers[key]
        if earlier is not None:
            return earlier.result()
        try:
            mine.set_result(action())
        except BaseException as error:
            with self._lock:
                del self._answers[token]
            mine.set_exception(error)
            raise
        return mine.result()

    def start(self, config: RunConfig) -> dict[str, Any]:
        """Submit one run; waits for the engine. Raises `Refused` with the setting that stands in the way."""
        try:
            run_id = self.worker.submit(config)
        except ConfigError as error:
            raise Refused(str(error), field=named_in(str(error)), status=422) from error
        run = self.store.run(run_id)
        ahead = self._ahead_of(run_id)
        others = [other.name for other in self.store.active_runs()
                  if other.id not in (run_id, *self.worker.status()["queue"]) and other.state != "queued"]  # fmt: skip
        if ahead:
            message = f"{run.name} is queued behind {ahead}."
        elif others:
            message = f"{run.name} has started. {others[0]} goes on in another process and shares this machine with it."
        else:
            message = f"{run.name} has started."
        return {"run": run_id, "name": run.name, "behind": ahead, "message": message}

    def queue(self, configs: Sequence[RunConfig]) -> dict[str, Any]:
        """Submit a sweep, tagged as one: every run is checked before the first is queued. Raises `Refused`."""
        from grpo_engine.plan import Plan

        manager = self.worker.manager()
        for config in configs:
            try:
                Plan(config)
            except ConfigError as error:
                sentence = f"{config.recording.name}: {error} Nothing was queued."
                raise Refused(sentence, field=named_in(str(error)) or "sweep", status=422) from error
        ids: list[str] = []
        with self._queueing:  # two sweeps at once are queued one after the other, each with a tag of its own
            tag = next_tag([tag for run in self.store.runs() for tag in run.tags])
            try:
                for config in configs:
                    ids.append(manager.submit(_tagged(config, tag)))
            except (ConfigError, StoreError) as error:  # a full disk, a prompt set deleted since
                done = f"Only {len(ids)} of {len(configs)} runs were queued, tagged '{tag}': "
                raise Refused(f"{done if ids else ''}{error}", field="sweep") from error
        ahead = self._ahead_of(ids[0])
        begun = f"the first waits behind {ahead}" if ahead else "the first has started"
        message = f"{len(ids)} runs are queued, tagged '{tag}'; {begun}."
        return {"runs": ids, "tag": tag, "behind": ahead, "message": message}

    def _ahead_of(self, run_id: str) -> str:
        """Name of the run that must end before this one begins, or empty. Of this process's runs."""
        status = self.worker.status()
        queue = status["queue"]
        before = queue[: queue.index(run_id)] if run_id in queue else []
        if not before and status["current"] not in (None, run_id) and run_id in queue:
            before = [status["current"]]
        return self.store.run(before[-1]).name if before else ""


def _tagged(config: RunConfig, tag: str) -> RunConfig:
    """The same settings with one more tag."""
    data = config.model_dump(mode="json")
    data["recording"]["tags"] = [*data["recording"]["tags"], tag]
    return RunConfig.parse(data)
