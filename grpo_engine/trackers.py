"""A run's numbers in TensorBoard, Weights & Biases, MLflow or trackio too, through accelerate's trackers.

Invariants:
    - ``runs.db`` comes first and is complete without them; what a tracker gets was handed to the store before.
    - Each tracker works in a thread of its own, so the slowest network never holds up a step. What goes wrong
      there ends that tracker with one warning, never the run.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from accelerate.utils import (
    is_mlflow_available,
    is_tensorboard_available,
    is_trackio_available,
    is_wandb_available,
)

from .config import ConfigError, RunConfig, flatten
from .recorder import FINAL_STATES
from .store import Store
from .store.recorder import StoreRecorder

if TYPE_CHECKING:
    from .recorder import Evaluation
    from .rollout import Group

CLOSE_S = 30.0  # seconds that all trackers together get at the end to send what is left
AVAILABLE: dict[str, Callable[[], bool]] = {
    "tensorboard": is_tensorboard_available,
    "wandb": is_wandb_available,
    "mlflow": is_mlflow_available,
    "trackio": is_trackio_available,
}

log = logging.getLogger(__name__)


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose package is missing. Raises `ConfigError`."""
    missing = [name for name in dict.fromkeys(names) if not AVAILABLE[name]()]
    if missing:
        raise ConfigError(
            f"recording.trackers has {', '.join(missing)}, but that is not installed; run 'pip install "
            f"{' '.join(missing)}', or leave it out."
        )


class Tracker:
    """One of accelerate's trackers in a thread of its own.

    Args:
        name: accelerate's name of it.
        make: builds it, from the first step it will hear of.
        settings: of the run, as flat plain values.
    """

    def __init__(self, name: str, make: Callable[[int], Any], settings: Mapping[str, Any]) -> None:
        self.name = name
        self._make, self._settings = make, dict(settings)
        self._queue: queue.SimpleQueue[tuple[int, dict[str, float]] | None] = queue.SimpleQueue()
        self._failure = ""
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand over numbers; returns at once."""
        if self._thread.is_alive():
            self._queue.put((step, dict(values)))

    def close(self, deadline: float) -> None:
        """Let it send what is left, until ``deadline`` of ``time.monotonic()``."""
        self._queue.put(None)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._failure = "it had not sent everything when the run ended"

    def failure(self) -> str:
        """What went wrong since this was last asked; "" = nothing."""
        found, self._failure = self._failure, ""
        return found

    def _work(self) -> None:
        tracker: Any = None
        try:
            while (item := self._queue.get()) is not None:
                step, values = item
                if tracker is None:
                    tracker = self._make(step)
                    tracker.start()
                    tracker.store_init_configuration(dict(self._settings))
                tracker.log(values, step=step)
            if tracker is not None:
                tracker.finish()
        except Exception as error:  # of a library, of its server or of the network: the run goes on
            log.exception("tracker %s failed", self.name)
            self._failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            with suppress(Exception):  # so that the next run in this process does not end up in this one's record
                tracker.finish()


class TrackedRecorder(StoreRecorder):
    """Records into the store, and tells the trackers that the run's settings name."""

    def __init__(self, store: Store, run_id: str, config: RunConfig) -> None:
        super().__init__(store, run_id, config.recording)
        settings = {
            name: ", ".join(map(str, value)) if isinstance(value, list) else value
            for name, value in flatten(config.model_dump(mode="json")).items()
        }
        self._trackers = [
            Tracker(name, self._maker(name, config, settings), settings)
            for name in dict.fromkeys(config.recording.trackers)
        ]

    def state(self, state: str, message: str = "") -> None:
        """The run moved to ``state``. A final one ends the trackers first."""
        if state in FINAL_STATES:
            self._end_trackers()
        super().state(state, message)

    def step(self, step: int, metrics: Mapping[str, float | None], groups: Sequence[Group]) -> None:
        """Step ``step`` is complete; trackers get its metrics under their names in ``STEP_METRICS``."""
        super().step(step, metrics, groups)
        self._tell(step, metrics)

    def evaluation(self, evaluation: Evaluation) -> None:
        """An evaluation is complete; trackers get its summary as ``final/trained_vs_untrained/gain`` and the like."""
        super().evaluation(evaluation)
        self._tell(evaluation.step, summary_metrics(evaluation.kind, evaluation.summary))

    def close(self) -> None:
        """End the trackers, then the recording."""
        try:
            self._end_trackers()
        finally:
            super().close()

    def _maker(self, name: str, config: RunConfig, settings: Mapping[str, Any]) -> Callable[[int], Any]:
        run, project, folder = self.store.run(self.run_id), config.recording.project, self.store.run_dir(self.run_id)
        tags = list(config.recording.tags)
        # A resumed run goes on in its old record where the tracker can do that; MLflow shows it as a second run.
        options: dict[str, Callable[[int], dict[str, Any]]] = {
            "tensorboard": lambda first: {"run_name": "tensorboard", "logging_dir": folder, "purge_step": first},
            "wandb": lambda first: {
                "run_name": project, "name": run.name, "id": run.id, "resume": "allow", "tags": tags,
                "dir": str(folder), "reinit": "finish_previous",
            },
            "mlflow": lambda first: {"experiment_name": project, "run_name": run.name, "description": run.id},
            "trackio": lambda first: {
                "run_name": project, "name": f"{run.name} ({run.id})", "resume": "allow", "config": dict(settings),
            },
        }  # fmt: skip

        def make(first: int) -> Any:
            from accelerate.tracking import LOGGER_TYPE_TO_CLASS

            return LOGGER_TYPE_TO_CLASS[name](**options[name](first))

        return make

    def _tell(self, step: int, values: Mapping[str, float | None]) -> None:
        finite = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        for tracker in self._trackers:
            tracker.log(step, finite)
        self._warn()

    def _warn(self) -> None:
        for tracker in self._trackers:
            if failure := tracker.failure():
                super().event("warning", f"The tracker {tracker.name} stopped ({failure}); the run goes on without it.")

    def _end_trackers(self) -> None:
        deadline = time.monotonic() + CLOSE_S
        for tracker in self._trackers:
            tracker.close(deadline)
        self._warn()
        self._trackers = []


def summary_metrics(kind: str, summary: Mapping[str, Any]) -> dict[str, float | None]:
    """The numbers of ``evaluation.summarise`` by name: rewards and judge of each arm, each gain with its interval."""
    found: dict[str, float | None] = {}
    for arm, of_arm in summary.get("arms", {}).items():
        found[f"{kind}/{arm}/reward"] = of_arm["reward"]
        found[f"{kind}/{arm}/judge"] = of_arm["judge"]
    for comparison, gain in summary.get("gains", {}).items():
        found[f"{kind}/{comparison}/gain"] = gain["mean"]
        found[f"{kind}/{comparison}/gain_low"] = gain["low"]
        found[f"{kind}/{comparison}/gain_high"] = gain["high"]
    return found
