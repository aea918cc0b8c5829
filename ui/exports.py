"""What can be taken out of a run, made into one file each, in a folder beside the database.

Invariants:
    - Only files that this process made in its own folder can be downloaded; a page names them by a job's token.
    - A process's folder carries its number, and is removed by the next app that finds that process gone.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from grpo_engine.store import Store
from grpo_engine.store.rows import RunRow

from .charts import setting
from .context import Refused
from .jobs import Job, JobFailed, disk_refused

if TYPE_CHECKING:
    from grpo_engine.manager import RunManager

log = logging.getLogger(__name__)

Format = Literal["bundle", "peft", "merged", "pth"]
FORMATS: Mapping[Format, tuple[str, str]] = {
    "bundle": ("Bundle", "The whole run in one file: settings, metrics, rollouts, pictures, policy. Opens in any "
               "database, for looking at; no GPU needed."),
    "peft": ("Adapter", "The LoRA weights, for peft or vLLM's LoRA option on top of the base model. With a model card: "
             "the measured gain, the settings, and lines that put the rewriter in front of a pipeline."),
    "merged": ("Merged model", "The base model with the training merged in, for transformers alone; with the card."),
    "pth": ("PyTorch file", "The trained weights as plain tensors in pure_grpo_policy.pth, with the card."),
}  # fmt: skip
"""What there is to export: title and what it is for."""


class ExportFolder:
    """``exports/`` beside the database: a folder for each job that makes or brings a file."""

    def __init__(self, store: Store) -> None:
        self._home = store.root / "exports"
        self._tidy()

    def place(self) -> Path:
        """A new empty folder. Raises `Refused`."""
        folder = self._home / f"{os.getpid()}-{secrets.token_hex(6)}"
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise Refused(disk_refused(error)) from error
        return folder

    def _tidy(self) -> None:
        """Remove what processes left that are gone."""
        from grpo_engine.store.owner import process_token

        for path in self._home.glob("*-*"):
            match = re.fullmatch(r"(\d+)-[0-9a-f]{12}", path.name)
            if match and (int(match[1]) == os.getpid() or process_token(int(match[1])) is None):
                shutil.rmtree(path, ignore_errors=True)


def checkpoint_steps(store: Store, run_id: str) -> list[int]:
    """Steps that a run has a checkpoint of, newest first; whether they are intact is seen when one is used."""
    found = (re.fullmatch(r"step-(\d+)", path.name) for path in (store.run_dir(run_id) / "checkpoints").glob("step-*"))
    return sorted((int(match[1]) for match in found if match), reverse=True)


def choices(store: Store, run: RunRow) -> list[dict[str, Any]]:
    """Every format with the reason why it can't be had of this run, "" where it can."""
    steps = checkpoint_steps(store, run.id)
    return [
        {"format": name, "title": title, "text": text, "why": _why_not(run, name, steps)}
        for name, (title, text) in FORMATS.items()
    ]


def _why_not(run: RunRow, format: Format, steps: list[int]) -> str:
    if format == "bundle":
        return f"The run is {run.state}; wait for its end or stop it." if run.active else ""
    if not steps:
        if run.source == "imported":
            return "The bundle that this run was imported from had no policy in it."
        return "The run has saved no checkpoint yet."
    if format == "peft" and setting(run.config, "models.policy.adapter", None) == "full":
        return "All weights were trained, so there is no adapter; take the merged model or the PyTorch file."
    return ""


def bundle_work(
    store: Store,
    run_id: str,
    *,
    images: Literal["all", "evaluations", "none"],
    every: int,
    reencode: bool,
    checkpoint: Literal["last", "best", "none"],
) -> Callable[[Job], None]:
    """The job that bundles a run."""

    def work(job: Job) -> None:
        from grpo_engine.bundle import BundleError, write_bundle
        from grpo_engine.checkpoint_folder import CheckpointError

        assert job.folder is not None
        job.progress(0, 0, "Writing metrics and rollouts")

        def progress(done: int, total: int) -> None:
            job.progress(done, total, "Adding pictures", "pictures")

        try:
            job.file = write_bundle(
                store, run_id, job.folder / f"{run_id}.zip", images=images, every=every, reencode=reencode,
                checkpoint=None if checkpoint == "none" else checkpoint, progress=progress,
            )  # fmt: skip
        except (BundleError, CheckpointError) as error:
            raise JobFailed(str(error).replace(f"{job.folder}{os.sep}", "")) from error
        job.message = "Ready."

    return work


def policy_work(
    store: Store,
    manager: Callable[[], RunManager],
    run_id: str,
    format: Literal["peft", "merged", "pth"],
    which: Literal["last", "best"],
) -> Callable[[Job], None]:
    """The job that exports a run's policy into one zip file.

    Where that needs a model, to merge into or to prove that the embedded base is the right one, it is loaded in a
    process of its own: a run may train in this one.
    """

    def work(job: Job) -> None:
        assert job.folder is not None
        job.progress(0, 0, "Waiting for the engine")
        manager()
        from grpo_engine.checkpoint_folder import CheckpointError
        from grpo_engine.export import export
        from grpo_engine.export_process import export_apart

        run = store.run(run_id)
        source, folder = store.run_dir(run_id), job.folder / f"{run_id}-{format}"
        try:
            if format == "merged" or setting(run.config, "models.policy.path", None) == "tiny":
                job.progress(0, 0, "Loading the base model")
                export_apart(source, folder, format=format, config=run.config, summary=run.summary, which=which)
            else:
                job.progress(0, 0, "Writing the weights")
                export(source, folder, format=format, summary=run.summary, which=which)
        except CheckpointError as error:
            raise JobFailed(str(error)) from error
        job.file = pack(folder, job)
        shutil.rmtree(folder)
        job.message = "Ready."

    return work


def pack(folder: Path, job: Job) -> Path:
    """A folder as a zip file beside it, not compressed: weights don't shrink. Raises `OSError`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    total, done = sum(path.stat().st_size for path in files), 0
    target = folder.with_name(f"{folder.name}.zip")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for path in files:
            job.progress(done, total, "Packing", "bytes")
            archive.write(path, f"{folder.name}/{path.relative_to(folder).as_posix()}")
            done += path.stat().st_size
    return target


def import_work(store: Store, file: Path, *, again: bool) -> Callable[[Job], None]:
    """The job that takes the uploaded bundle ``file`` into the database; the upload goes in any case."""

    def work(job: Job) -> None:
        from grpo_engine.bundle import BundleError, read_bundle

        job.progress(0, 0, "Checking the bundle")

        def progress(done: int, total: int) -> None:
            job.progress(done, total, "Taking in pictures", "pictures")

        try:
            job.run_id = read_bundle(
                store, file, again=again, name_suffix=" (copy)" if again else "", progress=progress
            )
        except BundleError as error:
            # Where the upload lies is nobody's business, and a page has a box where the command line has a flag.
            sentence = str(error).replace(str(file), file.name)
            raise JobFailed(sentence.replace("use --again for a copy", "tick 'also as a copy'")) from error
        finally:
            shutil.rmtree(file.parent, ignore_errors=True)
        job.message = f"{store.run(job.run_id).name} is here now, to look at; it can't go on."

    return work


def upload_name(header: str) -> str:
    """A safe name for an uploaded file, from what the browser says it is called (percent-encoded)."""
    from urllib.parse import unquote

    name = re.sub(r"[^\w.-]+", "_", Path(unquote(header[:1000]).replace("\\", "/")).name)[-80:].strip("._-")
    return name or "bundle.zip"
