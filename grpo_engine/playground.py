"""The playground: one prompt, several policies, their pictures side by side. It never touches a run.

The models live in a process of their own, started when they are first needed and ended when nobody asks any more.
That is what keeps a run that trains meanwhile bit for bit what it would have been: loading a model changes what
all threads of a process share (torch's default number format and global random generator, the initialisers that
the libraries switch off for as long as they load), and ending a process gives all of its memory back. The process
has no database, and reads nothing of a run but its checkpoint.

Nothing here imports torch; ``playground_models.py`` does the work, in the process of ``playground_process.py``.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .playground_process import Child, start
from .playground_try import PlaygroundBusy, PlaygroundError, Try
from .store import Store, StoreError
from .store.rows import RunRow

log = logging.getLogger(__name__)

MOST_WAITING = 4  # tries behind the one at work
IDLE_SECONDS = 600.0  # after which the models are given up
PICTURE_BYTES = 64 * 2**20  # of all pictures kept to be fetched; the oldest go first
KEPT_JOBS = 32
WATCH_SECONDS = 1.0  # how often the process is looked after


@dataclass
class _Job:
    """A try on its way. ``state``: waiting, working, done, failed or cancelled."""

    id: str
    asked: Try
    columns: list[dict[str, Any]]
    state: str = "waiting"
    phase: str = ""
    done: int = 0
    total: int = 0
    error: str = ""
    about: str = ""  # the field of `Try` that the error is about
    facts: dict[str, Any] = field(default_factory=dict)


class Playground:
    """Takes tries, works them off one at a time, and keeps their pictures in memory for a while.

    Usable from any thread. Nothing is started before the first try.

    Args:
        store: asked which runs go on; never written to.
        idle_seconds: without a try, after which the models' process ends.
    """

    def __init__(self, store: Store, *, idle_seconds: float = IDLE_SECONDS) -> None:
        self.store, self.idle_seconds = store, idle_seconds
        self._jobs: OrderedDict[str, _Job] = OrderedDict()
        self._queue: deque[_Job] = deque()
        self._pictures: OrderedDict[str, bytes] = OrderedDict()
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._current: _Job | None = None
        self._child: Child | None = None
        self._thread: threading.Thread | None = None
        self._expected = False
        self._closing = False

    # -- for whoever asks --------------------------------------------------------------------------------

    def submit(self, asked: Try) -> str:
        """Put a try at the end of the queue; returns its id.

        Raises:
            PlaygroundBusy: `MOST_WAITING` others wait already.
            PlaygroundError: too many or no columns or pictures, or the playground is closed.
        """
        asked.check()
        with self._changed:
            if self._closing:
                raise PlaygroundError("The app is being closed.")
            if len(self._queue) >= MOST_WAITING:
                raise PlaygroundBusy(f"{MOST_WAITING} tries wait already; wait for one of them, or cancel it.")
            columns = [{"pictures": [None] * asked.pictures} for _ in asked.columns]
            job = _Job(secrets.token_urlsafe(12), asked, columns)
            self._jobs[job.id] = job
            self._queue.append(job)
            while len(self._jobs) > KEPT_JOBS:
                self._jobs.popitem(last=False)
            self._wake()
        return job.id

    def prepare(self) -> None:
        """Begin to load the libraries, no model yet: somebody seems about to ask. Idempotent."""
        with self._changed:
            if not self._closing and self._child is None:
                self._expected = True
                self._wake()

    def job(self, job_id: str) -> dict[str, Any]:
        """How a try stands, as plain data. ``position``: how many come before it; pictures by their token.

        Raises:
            PlaygroundError: there is no such try, or not any more.
        """
        with self._changed:
            job = self._find(job_id)
            position = self._queue.index(job) + (self._current is not None) if job in self._queue else 0
            columns = [
                {**column, "pictures": [picture and dict(picture) for picture in column["pictures"]]}
                for column in job.columns
            ]
            return {
                "id": job.id, "state": job.state, "position": position, "phase": job.phase, "done": job.done,
                "total": job.total, "error": job.error, "field": job.about, **job.facts, "columns": columns,
            }  # fmt: skip

    def cancel(self, job_id: str) -> None:
        """Take a try out of the queue, or stop it between two tokens or denoising steps. One that ended stays so.

        Raises:
            PlaygroundError: there is no such try.
        """
        with self._changed:
            job = self._find(job_id)
            if job.state == "waiting":
                self._queue.remove(job)
            elif job.state != "working":
                return
            job.state, child = "cancelled", self._child
        if child is not None:
            self._send(child, ("cancel", job_id))

    def picture(self, token: str) -> bytes | None:
        """A picture as PNG; None when it is gone."""
        with self._changed:
            return self._pictures.get(token)

    @property
    def loaded(self) -> bool:
        """Whether the models' process is there."""
        return self._child is not None

    def close(self) -> None:
        """Drop all tries, end the process, and wait for it. Idempotent."""
        with self._changed:
            self._closing = True
            for job in [*self._queue, *([self._current] if self._current else [])]:
                job.state = "cancelled"
            self._queue.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(30.0)

    def _wake(self) -> None:
        """Let the one thread look; the lock is held."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="grpo-playground", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _find(self, job_id: str) -> _Job:
        job = self._jobs.get(job_id)
        if job is None:
            raise PlaygroundError("That try is no longer known; generate it again.")
        return job

    # -- the one thread that works -----------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                wait = WATCH_SECONDS if self._child else None
                self._changed.wait_for(lambda: bool(self._queue) or self._expected or self._closing, wait)
                if self._closing:
                    break
                job = self._queue.popleft() if self._queue else None
                expected, self._expected = self._expected, False
                self._current = job
                if job is not None:
                    job.state = "working"
            try:
                if job is not None:
                    self._carry_out(job)
                elif expected:
                    self._child = self._child or start()
                    self._send(self._child, ("prepare", None))
                elif self._idle() or self._in_the_way():
                    self._end_child()
            except Exception:  # above all the line being cut; whatever it was, the next try must find a thread here
                log.exception("the playground's process is gone")
                self._end_child()
                if job is not None:
                    self._settle(job, "The playground's process ended, out of memory perhaps; generate again.")
            finally:
                with self._changed:
                    self._current = None
        self._end_child()

    def _carry_out(self, job: _Job) -> None:
        """Hand the try over and listen until it ended. Raises `OSError` or `EOFError` when the process dies."""
        if self._child is not None and (self._in_the_way() or not self._child.process.is_alive()):
            self._end_child()
        child = self._child = self._child or start()
        beside = {run.id: (f"{run.name} is {run.state}", run.config) for run in self._runs()}
        child.beside, child.used = frozenset(beside), time.monotonic()
        self._send(child, ("try", (job.id, replace(job.asked, beside=tuple(beside.values())))))
        looked = time.monotonic()
        while True:
            heard = child.line.poll(WATCH_SECONDS)
            if self._closing:
                return
            if time.monotonic() - looked >= WATCH_SECONDS:
                looked = time.monotonic()
                if self._in_the_way():
                    self._settle(job, "A run began that may need the same GPU; the models were given up for it.")
                    self._end_child()
                    return
            if not heard:
                continue
            kind, data = child.line.recv()
            child.used = time.monotonic()
            if kind == "devices":
                child.devices = data["names"]
            elif kind == "end":
                self._settle(job, data["error"], data["field"])
                if data["fatal"]:
                    self._end_child()
                return
            else:
                with self._changed:
                    self._hear(job, kind, data)

    def _hear(self, job: _Job, kind: str, data: dict[str, Any]) -> None:
        """Note what the process tells about ``job``; the lock is held."""
        if kind == "phase":
            job.phase, job.done, job.total = data["name"], data["done"], data["total"]
        elif kind == "facts":
            job.facts |= data
        elif kind == "column":
            job.columns[data.pop("index")] |= data
        else:
            index, k, token = data.pop("index"), data.pop("k"), secrets.token_urlsafe(16)
            self._pictures[token] = data.pop("png")
            while sum(map(len, self._pictures.values())) > PICTURE_BYTES and len(self._pictures) > 1:
                self._pictures.popitem(last=False)
            job.columns[index]["pictures"][k] = {"token": token, **data}

    def _settle(self, job: _Job, error: str, field: str = "") -> None:
        with self._changed:
            if job.state == "working":  # not cancelled meanwhile
                job.state = "failed" if error else "done"
                job.error, job.about = error, field

    def _runs(self) -> list[RunRow]:
        """The runs that hold their devices now."""
        try:
            return [run for run in self.store.active_runs() if run.state != "queued"]
        except StoreError:  # closed, or out of reach for the moment
            log.exception("the playground can't see which runs go on")
            return []

    def _idle(self) -> bool:
        return self._child is not None and time.monotonic() - self._child.used > self.idle_seconds

    def _in_the_way(self) -> bool:
        """Whether a run began since that could want the GPU memory the playground holds."""
        child = self._child
        if child is None or not any(name.startswith("cuda") for name in child.devices):
            return False
        return any(run.id not in child.beside and _may_use_gpu(run.config) for run in self._runs())

    def _send(self, child: Child, message: tuple[str, Any]) -> None:
        with self._sending:
            try:
                child.line.send(message)
            except (OSError, ValueError):  # it ended; whoever listens to it finds out
                log.info("the playground's process no longer listens")

    def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            with self._sending:
                child.line.close()  # it ends by itself when it next listens
            child.process.join(0.5)
            if child.process.is_alive():
                child.process.kill()
                child.process.join()


def _may_use_gpu(settings: Mapping[str, Any]) -> bool:
    """Whether a run with these settings may use a GPU. Old or foreign settings may."""
    placement = settings.get("placement", {})
    devices = [placement.get(role, "auto") for role in ("policy", "image", "reward")]
    return any(name != "cpu" and (name != "auto" or placement.get("plan") != "cpu") for name in devices)
