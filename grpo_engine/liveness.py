"""Signs of life between ranks: who died, who was told to stop, when it is all over.

Nothing that ranks do together has a time limit, because a pause or an evaluation may take hours. Instead every
rank counts up a number in the launcher's key-value store once a second, from a thread of its own, and the first
rank looks whether all of them still count. So a slow rank is told from a dead one.

A launcher ends the other ranks with a signal when one dies, and passes on Ctrl-C in the same way. The difference:
ranks that live say in the store that they were signalled.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

BEAT_S = 1.0  # seconds between two signs of life
SILENCE_S = 40.0  # without one for so long, a rank is dead
ALARM_S = 10.0  # the same once there is a reason to suspect it: a signal, or a connection that broke
GRACE_S = 10.0  # for the trainer to notice a loss by itself before the process is ended over its head
FAREWELL_S = 5.0  # how long the first rank waits for the others to hear that it is over


class RankLost(RuntimeError):
    """Another rank died or failed, so the run can't go on; the message is one plain sentence."""


class Watch:
    """One rank's thread that gives signs of life and looks for those of others.

    Args:
        store: a connection of its own to the key-value store that all ranks share (``torch.distributed.Store``).
        rank: of this process; the first one, 0, watches all others, they watch it.
        size: how many ranks there are.
        silence: seconds without a sign of life after which a rank counts as dead.

    Attributes:
        on_stop: called once, on the first rank, when any rank was signalled and none is dead.
        on_loss: called once, on the first rank, when another is lost, with the error for the trainer to raise.
        on_stuck: called on the first rank if the process still stands ``GRACE_S`` later; then it is ended.
    """

    def __init__(self, store: Any, rank: int, size: int, *, silence: float = SILENCE_S) -> None:
        self.rank, self.size, self.silence = rank, size, silence
        self.on_stop: Callable[[], None] = lambda: None
        self.on_loss: Callable[[RankLost], None] = lambda error: None
        self.on_stuck: Callable[[str], None] = lambda sentence: None
        self.lost: RankLost | None = None
        self._store = store
        self._alarmed = threading.Event()
        self._told = threading.Event()  # a verdict stands: `lost`, or the end
        self._left = threading.Event()
        self._signalled_at: float | None = None
        self._stop_passed_on = False
        self._seen: dict[int, tuple[int, float]] = {}  # rank -> its count, and when it last grew
        self._handlers: dict[int, Any] = {}
        store.set(f"who/{rank}", f"process {os.getpid()} on {socket.gethostname()}")
        self._beat()
        self._thread = threading.Thread(target=self._work, name="liveness", daemon=True)
        self._thread.start()

    # -- what this rank does -----------------------------------------------------------------------------

    def catch_signals(self) -> None:
        """From now on Ctrl-C and TERM ask the whole run to stop; only from the main thread."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._signalled)

    def fail(self, sentence: str) -> None:
        """Tell the first rank that this one can't go on, and why."""
        self._store.set(f"failed/{self.rank}", sentence)

    def verdict(self, error: Exception) -> RankLost:
        """Why something between the ranks went wrong with ``error``; waits until it is known."""
        self._alarmed.set()
        self._told.wait(self.silence + ALARM_S)
        if self._told.is_set() and self.lost is None:
            threading.Event().wait()  # the run is over, and the watch about to end this process
        return self.lost or RankLost(f"The ranks lost each other ({_short(error)}); resume the run.")

    def leave(self) -> None:
        """The end: the first rank tells the others, they wait to be told. No signal is caught afterwards."""
        if self.rank == 0:
            self._left.set()
            self._thread.join()
            with suppress(RuntimeError):  # the store may be gone, and with it everybody who could be told
                self._bid_farewell()
        else:
            self._told.wait()
            self._left.set()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _bid_farewell(self) -> None:
        self._store.set("ended", "")
        deadline = time.monotonic() + FAREWELL_S
        waiting = [f"heard/{rank}" for rank in range(1, self.size)]
        while time.monotonic() < deadline and not self._store.check(waiting):
            time.sleep(0.05)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        self._signalled_at = self._signalled_at or time.monotonic()

    # -- the thread --------------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._left.wait(BEAT_S):
            try:
                self._beat()
                self._look_at_others() if self.rank == 0 else self._look_at_first()
            except RuntimeError as error:  # torch's network errors: the store's host is gone for good
                self.lost = RankLost(
                    f"The launcher that holds the ranks together can't be reached any more ({_short(error)}); "
                    "resume the run."
                )
            if self.lost is not None:
                self._end_lost(self.lost)
                return

    def _beat(self) -> None:
        self._store.add(f"beat/{self.rank}", 1)

    def _silent_for(self, rank: int) -> float:
        """Seconds since ``rank`` last gave a sign of life."""
        count, now = self._store.add(f"beat/{rank}", 0), time.monotonic()
        if rank not in self._seen or self._seen[rank][0] != count:
            self._seen[rank] = (count, now)
        return now - self._seen[rank][1]

    def _look_at_others(self) -> None:
        others = range(1, self.size)
        alarmed = self._alarmed.is_set() or self._signalled_at is not None
        limit = min(ALARM_S, self.silence) if alarmed else self.silence
        for rank in others:
            silent = self._silent_for(rank)
            if self._store.check([f"failed/{rank}"]):
                self.lost = RankLost(f"{self._name(rank)} failed: {self._read(f'failed/{rank}').rstrip('.')}.")
            elif silent > limit:
                self.lost = RankLost(
                    f"{self._name(rank)} died: no sign of life for {silent:.0f} seconds; resume the run."
                )
            if self.lost is not None:
                return
        signalled = [rank for rank in others if self._store.check([f"signalled/{rank}"])]
        if signalled and self._signalled_at is None:
            self._signalled_at = time.monotonic()
        if self._signalled_at is None or self._stop_passed_on:
            return
        if len(signalled) == len(others) or time.monotonic() - self._signalled_at > ALARM_S + 2 * BEAT_S:
            self._stop_passed_on = True
            self.on_stop()

    def _look_at_first(self) -> None:
        if self._signalled_at is not None:
            self._store.set(f"signalled/{self.rank}", "")
        if self._store.check(["ended"]):
            self._store.set(f"heard/{self.rank}", "")
            self._told.set()
            if not self._left.wait(BEAT_S):  # in the middle of something that the first rank needs no more
                _exit(0)
        elif self._silent_for(0) > self.silence:
            self.lost = RankLost(f"{self._name(0)}, which records the run, died; resume the run.")

    def _end_lost(self, error: RankLost) -> None:
        self._told.set()
        self.on_loss(error)
        if self.rank:
            print(f"Rank {self.rank} ends: {error}", file=sys.stderr)
            _exit(1)
        if not self._left.wait(GRACE_S):
            print(f"Failed: {error}", file=sys.stderr)
            try:
                self.on_stuck(str(error))
            finally:
                _exit(1)

    def _name(self, rank: int) -> str:
        return f"Rank {rank} of {self.size} ({self._read(f'who/{rank}')})"

    def _read(self, key: str) -> str:
        text: str = self._store.get(key).decode()
        return text


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:120]


def _exit(code: int) -> None:
    """End the process now, whatever its other threads wait for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
