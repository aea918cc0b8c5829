"""Work that outlasts a request: exports, imports, checks. A page asks how far it is, and finds it after a reload.

Jobs live as long as the app. What moves much data takes turns; a quick check does not wait behind it.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_engine.config import ConfigError
from grpo_engine.store import StoreError

from .context import Refused
from .worker import EngineUnavailable

log = logging.getLogger(__name__)

MOST_WAITING = 10
KEPT = 20  # finished jobs that are remembered, with the files they made


class JobFailed(Exception):
    """A job came to nothing; one sentence."""


@dataclass
class Job:
    """A piece of work and how far it is.

    Attributes:
        token: names the job to a browser; can't be guessed.
        kind: "export", "import", "check" or "doctor".
        title: what it is, for a person.
        folder: what the job may fill and what goes with it; None = it makes no files.
        state: "waiting", "working", "done" or "failed".
        message: what it does now, or in the end what came of it, a sentence.
        done, total: progress in whatever ``unit`` says ("bytes", "files"...); total 0 = unknown.
        file: what can be downloaded once it is done.
        result: plain data for the page.
    """

    kind: str
    title: str
    run_id: str = ""
    folder: Path | None = None
    token: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    state: str = "waiting"
    message: str = ""
    done: int = 0
    total: int = 0
    unit: str = ""
    file: Path | None = None
    result: Any = None
    created: float = field(default_factory=time.time)
    finished: float | None = None

    def progress(self, done: int, total: int, message: str = "", unit: str = "") -> None:
        """Say how far the work is."""
        self.done, self.total = done, total
        self.message, self.unit = message or self.message, unit or self.unit

    @property
    def over(self) -> bool:
        """Whether it ended, well or not."""
        return self.state in ("done", "failed")

    def row(self) -> dict[str, Any]:
        """The job as plain data. The file's place on the disk stays here."""
        made = self.file if self.state == "done" else None
        return {
            "token": self.token, "kind": self.kind, "title": self.title, "run": self.run_id, "state": self.state,
            "message": self.message, "done": self.done, "total": self.total, "unit": self.unit,
            "file": made.name if made else None, "size": _size(made) if made else None, "result": self.result,
            "created": self.created, "finished": self.finished,
        }  # fmt: skip


class Jobs:
    """The app's jobs; safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._jobs: dict[str, Job] = {}

    def start(self, job: Job, work: Callable[[Job], None], *, alone: bool = True) -> Job:
        """Begin ``work`` in the background; with ``alone`` after the jobs of that kind before it.

        Raises:
            Refused: too many wait already; the job's folder is removed.
        """
        with self._lock:
            if sum(not other.over for other in self._jobs.values()) >= MOST_WAITING:
                _remove(job)
                raise Refused(f"{MOST_WAITING} jobs wait already; start this one when some are done.", status=429)
            self._jobs[job.token] = job
            ended = [other for other in self._jobs.values() if other.over]
            old = ended[: max(0, len(ended) - KEPT)]
            for other in old:
                del self._jobs[other.token]
        for other in old:
            _remove(other)
        threading.Thread(target=self._work, args=(job, work, alone), name=f"job-{job.kind}", daemon=True).start()
        return job

    def get(self, token: str) -> Job:
        """A job by its token. Raises `Refused`."""
        with self._lock:
            if token not in self._jobs:
                raise Refused("That is not there any more; make it again.", status=404)
            return self._jobs[token]

    def rows(self) -> list[dict[str, Any]]:
        """All jobs, the newest first."""
        with self._lock:
            return [job.row() for job in reversed(self._jobs.values())]

    def discard(self, token: str) -> None:
        """Forget an ended job, and delete what it made."""
        job = self.get(token)
        if not job.over:
            raise Refused("It is still being worked on; wait until it is done.")
        with self._lock:
            self._jobs.pop(token, None)
        _remove(job)

    def _work(self, job: Job, work: Callable[[Job], None], alone: bool) -> None:
        if alone:
            self._turn.acquire()
        state, sentence = "failed", ""
        try:
            job.state = "working"
            work(job)
            state = "done"
        except (JobFailed, StoreError, ConfigError, EngineUnavailable, Refused) as error:
            sentence = str(error)
        except OSError as error:
            sentence = disk_refused(error)
        except Exception:  # a bug: the person is told, the log has the details
            log.exception("%s failed", job.title)
            sentence = "Something went wrong inside the app; the details are in its log."
        finally:
            if alone:
                self._turn.release()
            job.message = sentence or job.message
            if state == "failed":
                _remove(job)
            job.finished = time.time()
            job.state = state  # the last thing to change: whoever sees it sees the rest


def disk_refused(error: OSError) -> str:
    """What a person is told where a file could not be written, and what can be done."""
    why = error.strerror or error
    return f"The disk refused: {why}. Free some space, or make the folder of the database writable, and try again."


def _remove(job: Job) -> None:
    if job.folder is not None:
        shutil.rmtree(job.folder, ignore_errors=True)


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:
        return None
