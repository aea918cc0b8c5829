"""The process that holds the playground's models, and the line to it."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from .config import ConfigError
from .control import StopRequested
from .playground_try import PlaygroundCrowded, PlaygroundError, Try

if TYPE_CHECKING:
    from .playground_models import PlaygroundModels

log = logging.getLogger(__name__)


@dataclass
class Child:
    """The process, as its parent sees it. ``beside``: the runs that held devices when it last began something."""

    process: Any
    line: Connection
    devices: list[str] = field(default_factory=list)
    beside: frozenset[str] = frozenset()
    used: float = field(default_factory=time.monotonic)


def start() -> Child:
    """A new process, which loads nothing before the first try."""
    context = multiprocessing.get_context("spawn")  # a fork would share torch's threads and locks
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there,), name="grpo-playground", daemon=True)
    process.start()
    there.close()
    return Child(process, here)


def _serve(line: Connection) -> None:
    """Work off what comes, until the line is cut."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the app, which then ends this process
    try:
        _Server(line).serve()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


class _Server:
    """The child's side: "prepare" and "try" come in, what `Told` hears and one "end" a try go out."""

    def __init__(self, line: Connection) -> None:
        self.line = line
        self.job_id = ""
        self._models: PlaygroundModels | None = None

    def serve(self) -> None:
        """Never returns; raises `EOFError` when nobody is there any more."""
        while True:
            kind, data = self.line.recv()
            if kind == "prepare":
                self._prepare()
            elif kind == "try":  # or "cancel", of a try that had just ended
                self.job_id, asked = data
                self.line.send(("end", self._carry_out(asked)))

    def _prepare(self) -> None:
        try:
            self._engine()
        except Exception:  # an installation can be broken in any way; a try will meet it again, and say it
            log.exception("the playground's engine could not be loaded")

    def _engine(self) -> PlaygroundModels:
        if self._models is None:
            self._tell("phase", name="loading the engine", done=0, total=0)
            from .playground_models import PlaygroundModels

            self._models = PlaygroundModels()
        return self._models

    def _carry_out(self, asked: Try) -> dict[str, Any]:
        """Make a try; returns why not ("error" empty = it was made). After a "fatal" one this process shall end."""
        try:
            self._engine().carry_out(asked, self._tell, self._poll)
        except StopRequested:
            pass
        except (PlaygroundError, ConfigError) as refusal:
            # To ask a GPU for its free memory takes some of it, until this process ends.
            fatal = isinstance(refusal, PlaygroundCrowded)
            return {"error": str(refusal), "field": getattr(refusal, "field", ""), "fatal": fatal}
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except Exception as problem:  # of any library, out of memory included: say it, and start afresh
            log.exception("a try of the playground failed")
            reason = str(problem).strip().partition("\n")[0].rstrip(".")
            sentence = f"This try failed ({type(problem).__name__}: {reason}); the models are loaded anew next time."
            return {"error": sentence, "field": "", "fatal": True}
        return {"error": "", "field": "", "fatal": False}

    def _tell(self, kind: str, **data: Any) -> None:
        self.line.send((kind, data))

    def _poll(self) -> None:
        """Raises `StopRequested` when this try was cancelled, `EOFError` when nobody is there any more."""
        while self.line.poll():
            kind, data = self.line.recv()
            if kind == "cancel" and data == self.job_id:
                raise StopRequested
