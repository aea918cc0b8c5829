"""Records a run into ``runs.db`` and its folder, without the trainer waiting for any of it.

Calls put work into a short queue, and one background thread does it in order; when the queue is full, the
call waits, so nothing is ever dropped. A step's pictures are written first, then its metrics, rollouts and
the run's step count in one transaction: whatever kills the process, a step is there completely or not at all.
What the thread runs into ends the recording, and every later call raises it.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..recorder import STEP_METRICS
from .connection import StoreError
from .files import PictureFiles, evaluation_stem, step_stem, write_text
from .owner import carried_here
from .reader import fetch_run
from .rollouts import TokenText, rollout_rows
from .rows import number, storable, to_json
from .store import Store
from .writes import add_event, level_of

if TYPE_CHECKING:
    from ..config import RecordingConfig
    from ..recorder import Evaluation
    from ..rollout import Group, Picture

CAPACITY = 4  # jobs that may wait: a full-scale step holds tens of megabytes of pictures
PHASE_S = 0.2  # seconds between two writes of the phase
HEARTBEAT_S = 10.0

_ENGINE_LOG = logging.getLogger("grpo_engine")


class StoreRecorder:
    """The `recorder.Recorder` of a run in a `Store`; close it, or use it as a context manager.

    Attributes:
        token_text: how to write token ids as text, set once there is a tokenizer; None = not recorded.
    """

    def __init__(self, store: Store, run_id: str, recording: RecordingConfig) -> None:
        self.store = store
        self.run_id = run_id
        self.token_text: TokenText | None = None
        self._recording = recording
        self._folder = store.run_dir(run_id)
        store.heartbeat(run_id)  # refused here and now where the database can't be written
        self._total_steps = store.run(run_id).total_steps
        self._pictures = PictureFiles(store.root, self._folder, recording.image_format)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._log_file = _LogFile(self._folder / "grpo_training.log", encoding="utf-8")
        except OSError as error:
            raise StoreError(self._sentence(error)) from error
        self._log_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
        # The run's lines come through a logger of its own, outside the tree, so that no other run's file gets
        # them; what the engine's modules log meanwhile (warnings, tracebacks) is added to them.
        self._log = logging.Logger(f"run {run_id}", logging.INFO)
        self._log.addHandler(self._log_file)
        _ENGINE_LOG.addHandler(self._log_file)

        self._wake = threading.Condition()
        self._jobs: deque[Callable[[], None]] = deque()
        self._submitted = self._done = 0
        self._phase: tuple[str, int, int] | None = None  # the newest one that is not stored yet
        self._phase_due = self._heartbeat_due = 0.0  # by time.monotonic()
        self._written_up_to = 0  # last step in metrics.json
        self._failure: StoreError | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"recorder-{run_id}", daemon=True)
        self._thread.start()

    def __enter__(self) -> StoreRecorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except StoreError:
            if error is None:  # else what went wrong first is the news
                raise

    # What the trainer calls

    def state(self, state: str, message: str = "") -> None:
        """The run moved to ``state``; a change that is not possible is raised by a later call."""

        def job() -> None:
            self.store.set_state(self.run_id, state, message)
            self._say(logging.INFO, f"{state}: {message}" if message else state)

        self._submit(job, new_state=True)

    def phase(self, name: str, done: int = 0, total: int = 0) -> None:
        """Progress inside a state. Stored at most five times a second, the newest always."""
        with self._wake:
            self._raise_failure()
            self._phase = (name, done, total)
            self._wake.notify_all()

    def step(self, step: int, metrics: Mapping[str, float | None], groups: Sequence[Group]) -> None:
        """Step ``step`` is complete. Tensors are copied here; the pictures must not change any more."""
        values = {name: number(value) for name, value in metrics.items()}
        tokens, text = self._recording.tokens, self.token_text
        rows = []
        for g, group in enumerate(groups):
            rows += rollout_rows(g, group, tokens=tokens, token_text=text)
        every = self._recording.images_every
        pictured = every > 0 and (step == 1 or step % every == 0)
        shown = [(list(group.pictures), group.rewrites) for group in groups] if pictured else []

        def job() -> None:
            paths: dict[tuple[int, int], tuple[str, str]] = {}
            for g, (pictures, rewrites) in enumerate(shown):
                paths |= self._save_group(step, g, pictures, rewrites)
            for row in rows:
                row["image"], row["thumbnail"] = paths.get((row["g"], row["k"]), (None, None))
            with self.store.write() as db:
                run = fetch_run(db, self.run_id)
                if not carried_here(run):
                    raise StoreError(
                        f"Run {self.run_id} is {run.state} or was taken over by another process; "
                        "this process no longer records it."
                    )
                self.store.add_step(self.run_id, step, values, rows)
            self._say(logging.INFO, _step_line(step, self._total_steps, values))

        self._submit(job)

    def evaluation(self, evaluation: Evaluation) -> None:
        """An evaluation is complete."""

        def job() -> None:
            kind, step = evaluation.kind, evaluation.step
            saved: dict[int, tuple[str, str]] = {}  # by identity of the picture
            rows = []
            for item in evaluation.items:
                image, thumbnail = None, None
                if item.picture is not None:
                    if id(item.picture) not in saved:
                        self._beat()
                        stem = evaluation_stem(kind, step, item.prompt_id, item.arm, item.index)
                        saved[id(item.picture)] = self._pictures.save(item.picture, stem)
                    image, thumbnail = saved[id(item.picture)]
                row = {
                    "arm": item.arm,
                    "prompt_id": item.prompt_id,
                    "index": item.index,
                    "prompt": item.prompt,
                }
                row |= {"tier": item.tier, "latent_seed": str(item.latent_seed), "rewrite": item.rewrite}
                row |= {"reward": number(item.score.total), "parts": to_json(item.score.parts)}
                row |= {"judge": number(item.judge), "judge_parts": to_json(item.judge_parts)}
                row |= {"cut_tokens": item.cut_tokens, "read_chars": item.read_chars}
                rows.append(row | {"image": image, "thumbnail": thumbnail})
            text = f"{kind} evaluation at step {step} on split {evaluation.split}: {len(rows)} pictures"
            with self.store.write() as db:
                self.store.add_evaluation(self.run_id, kind, step, evaluation.split, rows, evaluation.summary)
                add_event(db, self.run_id, "evaluation", text, {"kind": kind, "step": step})
            self._say(logging.INFO, text)

        self._submit(job)

    def event(self, kind: str, message: str, **data: Any) -> None:
        """A line for the run's history and its log."""
        kept = json.loads(to_json(data))  # as it is now, whatever becomes of the objects

        def job() -> None:
            with self.store.write() as db:
                add_event(db, self.run_id, kind, message, kept)
            self._say(logging.getLevelName(level_of(kind).upper()), f"{kind}: {message}")

        self._submit(job)

    def flush(self) -> None:
        """Return once everything recorded so far is stored, the log is on the disk and metrics.json renewed.

        Of a long run metrics.json is renewed only when it has grown by a twentieth, and at the end.
        """
        self._wait(self._submit(self._store_all))

    def close(self) -> None:
        """Store what is left, then end the thread. Idempotent. Raises what the recording ran into."""
        with self._wake:
            if self._closed:
                return
        try:
            self._wait(self._submit(lambda: self._store_all(final=True)))
        finally:
            with self._wake:
                self._closed = True
                self._wake.notify_all()
            self._thread.join()
            _ENGINE_LOG.removeHandler(self._log_file)
            self._log_file.close()

    # The queue

    def _submit(self, job: Callable[[], None], *, new_state: bool = False) -> int:
        """Queue a job, waiting for room; returns its number."""
        with self._wake:
            while True:
                self._raise_failure()
                if self._closed:
                    raise StoreError(f"The recording of run {self.run_id} is closed; open another to go on.")
                if len(self._jobs) < CAPACITY:
                    break
                self._wake.wait()
            if new_state:
                self._phase = None  # it belonged to the state before
            self._jobs.append(job)
            self._submitted += 1
            self._wake.notify_all()
            return self._submitted

    def _wait(self, ticket: int) -> None:
        with self._wake:
            self._wake.wait_for(lambda: self._done >= ticket or self._failure is not None)
            self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise StoreError(str(self._failure)) from self._failure

    def _work(self) -> None:
        """The background thread: until closed, or until something goes wrong."""
        while True:
            job, queued = self._next()
            if job is None:
                return
            try:
                job()
            except Exception as error:  # whatever it is, the trainer must hear of it
                with self._wake:
                    self._failure = error if isinstance(error, StoreError) else StoreError(self._sentence(error))
                    self._failure.__cause__ = error.__cause__ if error is self._failure else error
                    self._jobs.clear()
                    self._wake.notify_all()
                return
            with self._wake:
                self._done += queued
                self._wake.notify_all()

    def _next(self) -> tuple[Callable[[], None] | None, int]:
        """The next thing to do (None = stop), and how many queued jobs it is; waits for it."""
        with self._wake:
            while True:
                if self._jobs:
                    self._wake.notify_all()
                    return self._jobs.popleft(), 1
                if self._closed:
                    return None, 0
                now = time.monotonic()
                if self._phase is not None and now >= self._phase_due:
                    return self._store_phase, 0
                if now >= self._heartbeat_due:
                    return self._beat, 0
                due = self._heartbeat_due if self._phase is None else min(self._phase_due, self._heartbeat_due)
                self._wake.wait(due - now)

    # What the thread does

    def _beat(self) -> None:
        """The heartbeat in the midst of a long job, if it is due: large pictures by the hundred take minutes."""
        now = time.monotonic()
        if now >= self._heartbeat_due:
            self._heartbeat_due = now + HEARTBEAT_S
            self.store.heartbeat(self.run_id)

    def _store_phase(self) -> None:
        with self._wake:
            phase, self._phase = self._phase, None
            self._phase_due = time.monotonic() + PHASE_S
        if phase is not None:
            self.store.set_phase(self.run_id, *phase)

    def _store_all(self, *, final: bool = False) -> None:
        self._store_phase()
        self.store.connections.checkpoint()
        self._log_file.flush()
        self._write_metrics(final=final)

    def _write_metrics(self, *, final: bool) -> None:
        run = self.store.run(self.run_id)
        if not final and 0 <= (run.step - self._written_up_to) * 20 < run.step:
            return  # a long run is flushed far more often than its history is worth rewriting
        # From the database, so finite or NaN.
        columns = {
            name: [None if value != value else value for value in values.tolist()]
            for name, values in self.store.steps(self.run_id).items()
        }
        evaluations = [
            {"kind": found.kind, "step": found.step, "split": found.split, "summary": found.summary}
            for found in self.store.evaluations(self.run_id)
        ]
        content = {
            "run": run.id,
            "name": run.name,
            "preset": run.preset,
            "seed": run.seed,
            "state": run.state,
        }
        content |= {"total_steps": run.total_steps, "evaluations": evaluations}
        content |= {"units": STEP_METRICS, "metrics": columns}
        write_text(self._folder / "metrics.json", json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")
        self._written_up_to = run.step

    def _save_group(
        self, step: int, g: int, pictures: Sequence[Picture | None], rewrites: Sequence[str | None]
    ) -> dict[tuple[int, int], tuple[str, str]]:
        """Write a group's pictures, each once: equal rewrites on one group's latents are one picture."""
        paths: dict[tuple[int, int], tuple[str, str]] = {}
        if not pictures:
            return paths
        saved: dict[int | str, tuple[str, str]] = {}
        for k, (picture, rewrite) in enumerate(zip(pictures, rewrites, strict=True)):
            if picture is None:
                continue
            self._beat()
            keys: list[int | str] = [id(picture), *([] if rewrite is None else [rewrite])]
            known = next((saved[key] for key in keys if key in saved), None)
            paths[g, k] = known or self._pictures.save(picture, step_stem(step, g, k))
            saved |= dict.fromkeys(keys, paths[g, k])
        return paths

    def _say(self, level: int, message: str) -> None:
        self._log.log(level, "%s", storable(" ".join(message.split())))

    def _sentence(self, error: Exception) -> str:
        if isinstance(error, OSError):
            return (
                f"The files of run {self.run_id} can't be written to {self._folder}: "
                f"{error.strerror or error}; make room there, then resume the run."
            )
        return f"Run {self.run_id} could not be recorded ({type(error).__name__}: {error}); see its log."


class _LogFile(logging.FileHandler):
    """A log that does not swallow a full disk, unless the line comes from elsewhere in the engine."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        if record.name.startswith(_ENGINE_LOG.name):
            super().handleError(record)
        else:
            raise  # logging calls this while it handles the error


def _step_line(step: int, total: int, metrics: Mapping[str, float | None]) -> str:
    shown = [f"step {step}/{total}"]
    for name, title in (
        ("reward_mean", "reward"),
        ("reward_std", "spread"),
        ("kl_penalty", "KL"),
        ("entropy", "entropy"),
        ("grad_norm", "gradient"),
        ("seconds", "seconds"),
    ):
        value = metrics.get(name)
        if value is not None:
            shown.append(f"{title} {value:.4g}")
    return "  ".join(shown)
