"""Work that flows through stages, on lanes that work side by side.

A stage turns each of its items into any number of items of the next stage. Its workers share one queue, and each
worker belongs to a lane, which is a device: what is on one lane happens one after the other, what is on different
lanes happens at the same time. The lane :data:`HERE` is the thread that made the pipeline: its work is done while that
thread waits. A pipeline with no other lane, or one that was not entered, has no threads: it is the plain order.

What holds, whatever the lanes do and however long a worker takes:

- Items are taken from a queue in the order they came, later stages first: what was begun is finished before more is.
- A queue never holds more than its capacity and what was under way when it filled up: who would add more waits.
- What a worker raises ends all lanes, and the next call of the pipeline raises it.
- Leaving the ``with`` block, by whatever exception, ends every thread: a worker stops at its next ``poll``.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from .policy import Poll, no_poll

HERE: Hashable = None
"""The lane of the thread that owns the pipeline."""

Work = Callable[[Any, Poll], Iterable[Any]]
"""Takes (item, poll) and returns the items that are now ready for the next stage; ``poll`` raises to stop it."""

POLL_S = 0.05  # seconds between two polls of a thread that waits


@dataclass(frozen=True)
class Stage:
    """One kind of work.

    Attributes:
        workers: (lane, work) of each; they share the stage's queue.
        capacity: items that may wait for this stage.
    """

    name: str
    workers: Sequence[tuple[Hashable, Work]]
    capacity: int


class _Closed(Exception):
    """Ends what a lane is working on."""


class Pipeline:
    """Stages in a row, and the threads of their lanes while inside ``with``.

    Args:
        stages: in the order in which items go through them.
        poll: called by the owning thread while it waits or works; raises to stop everything.
        held: whether a pause is on; the other lanes then wait at their next poll.

    Attributes:
        idle_seconds: how long the owning thread has waited with nothing to do.
    """

    def __init__(
        self, stages: Sequence[Stage], *, poll: Poll = no_poll, held: Callable[[], bool] = lambda: False
    ) -> None:
        self.idle_seconds = 0.0
        self._stages, self._poll, self._held = stages, poll, held
        self._queues: list[deque[Any]] = [deque() for _ in stages]
        self._changed = threading.Condition()
        self._under_way = 0  # items that wait or are worked on, in all stages
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._failure: BaseException | None = None

    @property
    def lanes(self) -> list[Hashable]:
        """All lanes but :data:`HERE`, each once: the threads that entering starts."""
        found = dict.fromkeys(lane for stage in self._stages for lane, _ in stage.workers)
        return [lane for lane in found if lane is not HERE]

    def __enter__(self) -> Pipeline:
        self._closed, self._failure = False, None
        self._threads = [
            threading.Thread(target=self._serve, args=(lane,), name=f"lane-{lane}", daemon=True) for lane in self.lanes
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads = []
        for queue in self._queues:
            queue.clear()
        self._under_way = 0

    # -- what the owning thread calls ----------------------------------------------------------------------

    def put(self, item: Any) -> None:
        """Hand an item to the first stage; waits, and works, while its queue is full."""
        self.until(lambda: self._room(0))
        with self._changed:
            self._queues[0].append(item)
            self._under_way += 1
            self._changed.notify_all()

    def until(self, reached: Callable[[], bool]) -> None:
        """Work on this thread's lane, else wait, until ``reached()``: a quick look at what workers have changed.

        Raises:
            RuntimeError: everything is done and it is still not reached.
        """
        while True:
            with self._changed:
                self._raise_failure()
                if reached():
                    return
                job = self._take(self._workers(HERE) if self._threads else self._all_workers())
                if job is None:
                    if self._under_way == 0:
                        raise RuntimeError("All work is done, and what is waited for has not happened.")
                    begun = time.perf_counter()
                    self._changed.wait(POLL_S)
                    self.idle_seconds += time.perf_counter() - begun
            if job is None:
                self._poll()
            else:
                self._run(*job, self.poll)

    def settle(self) -> None:
        """Wait until every item has gone through every stage."""
        self.until(lambda: self._under_way == 0)

    def poll(self) -> None:
        """For the owning thread's own long work: raises what a lane ran into, or what stops everything."""
        with self._changed:
            self._raise_failure()
        self._poll()

    # -- what the lanes do ---------------------------------------------------------------------------------

    def _serve(self, lane: Hashable) -> None:
        """A thread: until closed, or until something goes wrong."""
        workers = self._workers(lane)
        try:
            while (job := self._next(workers)) is not None:
                self._run(*job, self._beside)
        except _Closed:
            pass
        except BaseException as error:  # whatever it is, the owning thread must hear of it
            with self._changed:
                if self._failure is None:
                    self._failure = error
                self._closed = True
                self._changed.notify_all()

    def _next(self, workers: Sequence[tuple[int, Work]]) -> tuple[int, Work, Any] | None:
        with self._changed:
            while not self._closed:
                if (job := self._take(workers)) is not None:
                    return job
                self._changed.wait()
        return None

    def _run(self, stage: int, work: Work, item: Any, poll: Poll) -> None:
        ready = list(work(item, poll))
        with self._changed:
            if stage + 1 < len(self._stages):
                self._queues[stage + 1].extend(ready)
                self._under_way += len(ready)
            self._under_way -= 1
            self._changed.notify_all()

    def _beside(self) -> None:
        """The poll of a lane: holds through a pause, and ends the work once the pipeline is closed."""
        with self._changed:
            while self._held() and not self._closed:
                self._changed.wait(POLL_S)
            if self._closed:
                raise _Closed

    def _take(self, workers: Sequence[tuple[int, Work]]) -> tuple[int, Work, Any] | None:
        for stage, work in workers:
            if self._queues[stage] and self._room(stage + 1):
                item = self._queues[stage].popleft()
                self._changed.notify_all()  # there is room now, for a lane that waits for it
                return stage, work, item
        return None

    def _room(self, stage: int) -> bool:
        return stage == len(self._stages) or len(self._queues[stage]) < self._stages[stage].capacity

    def _workers(self, lane: Hashable) -> list[tuple[int, Work]]:
        """(stage, work) of a lane, later stages first."""
        return [
            (index, work)
            for index, stage in reversed(list(enumerate(self._stages)))
            for own, work in stage.workers
            if own == lane
        ]

    def _all_workers(self) -> list[tuple[int, Work]]:
        """Without threads, one worker of each stage does for all."""
        return [(index, stage.workers[0][1]) for index, stage in reversed(list(enumerate(self._stages)))]

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
