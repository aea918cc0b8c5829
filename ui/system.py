"""The screen of runs and system: exports, imports, disk use, the queue, devices, versions, checks."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil
from fastapi import Request, Response
from fastapi.responses import FileResponse
from fastapi.routing import APIRouter
from pydantic import Field
from starlette.requests import ClientDisconnect

from grpo_engine.store import Store
from grpo_engine.store.rows import RunRow

from .context import Body, Context, PlainRoute, Refused, answer
from .disk import DiskUse, database_bytes
from .exports import (
    FORMATS,
    ExportFolder,
    bundle_work,
    checkpoint_steps,
    choices,
    import_work,
    policy_work,
    upload_name,
)
from .guard import MOST_BYTES
from .jobs import Job, Jobs, disk_refused
from .run_table import RunTable
from .worker import Worker

FORGOTTEN_S = 5.0  # seconds after which a queued run that nobody holds counts as forgotten

RunId = Annotated[str, Field(min_length=1, max_length=80)]


class OneRun(Body):
    """The run something is asked of."""

    run: RunId


class Token(Body):
    """A job."""

    token: str = Field(min_length=1, max_length=80)


class Export(Body):
    """What to take out of a run. ``images``, ``every`` and ``reencode`` are for a bundle."""

    run: RunId
    format: Literal["bundle", "peft", "merged", "pth"]
    checkpoint: Literal["last", "best", "none"] = "last"
    images: Literal["all", "evaluations", "none"] = "all"
    every: int = Field(1, ge=1, le=1_000_000)
    reencode: bool = False


def routes(context: Context) -> APIRouter:
    """The screen's questions and actions."""
    router = APIRouter(prefix="/system", route_class=PlainRoute)
    store, worker = context.store, context.worker
    table, disk, jobs, folder = RunTable(store), DiskUse(store), Jobs(), ExportFolder(store)

    @router.get("/state")
    def state(since: str = "") -> Response:
        """What moves: rows of runs that changed after version ``since``, the queue, the jobs."""
        return answer({"table": table.changes(since), "queue": queue(store, worker), "jobs": jobs.rows()})

    @router.get("/disk")
    def disk_use() -> Response:
        """Bytes by run, as far as they are known."""
        return answer(disk.look())

    @router.get("/machine")
    def machine() -> Response:
        """This machine, the versions of what runs here, and the database."""
        here = {"path": str(store.path), "bytes": database_bytes(store.path)}
        return answer(describe_machine(worker) | {"database": here, "upload_limit": MOST_BYTES})

    @router.get("/export")
    def export_choices(run: str) -> Response:
        """What can be taken out of a run."""
        row = store.run(run)
        return answer({"formats": choices(store, row), "checkpoints": checkpoint_steps(store, row.id)})

    @router.post("/export")
    def export(body: Export) -> Response:
        """Begin to make a file of a run."""
        run = store.run(body.run)
        why = next(choice["why"] for choice in choices(store, run) if choice["format"] == body.format)
        if why:
            raise Refused(why)
        if body.format == "bundle":
            work = bundle_work(
                store, run.id, images=body.images, every=body.every, reencode=body.reencode, checkpoint=body.checkpoint
            )
        elif body.checkpoint == "none":
            raise Refused("A policy is exported from a checkpoint; choose the last or the best.", status=422)
        else:
            work = policy_work(store, worker.manager, run.id, body.format, body.checkpoint)
        job = Job("export", f"{FORMATS[body.format][0]} of {run.name}", run.id, folder.place())
        return answer({"job": jobs.start(job, work).row()})

    @router.get("/download/{token}")
    def download(token: str) -> Response:
        """A file that a job has made."""
        job = jobs.get(token)
        if job.state != "done" or job.file is None or not job.file.is_file():
            raise Refused("That file is not there; export the run again.", status=404)
        headers = {"Cache-Control": "private, no-store"}
        return FileResponse(job.file, filename=job.file.name, media_type="application/zip", headers=headers)

    @router.post("/discard")
    def discard(body: Token) -> Response:
        """Forget a job and delete the file it made."""
        jobs.discard(body.token)
        return answer({})

    @router.post("/import")
    async def import_bundle(request: Request, again: bool = False) -> Response:
        """Take in a bundle: the body is the file."""
        name = upload_name(request.headers.get("x-name", ""))
        job = Job("import", f"Import of {name}", folder=(place := folder.place()))
        try:
            await _receive(request, place / name)
            jobs.start(job, import_work(store, place / name, again=again))
        except BaseException:  # whatever it is: nothing of a broken upload stays
            shutil.rmtree(place, ignore_errors=True)
            raise
        return answer({"job": job.row()})

    @router.post("/check")
    def check() -> Response:
        """Begin to look for damage in the database."""

        def work(job: Job) -> None:
            job.message = "Reading the whole database"
            job.result = {"problems": store.check()}
            job.message = "Nothing is wrong with it." if not job.result["problems"] else ""

        return answer({"job": jobs.start(Job("check", "Check of the database"), work, alone=False).row()})

    @router.post("/doctor")
    def doctor() -> Response:
        """Begin to look at what this machine has and lacks."""

        def work(job: Job) -> None:
            job.message = "Waiting for the engine"
            worker.manager()
            from grpo_engine.config import DEFAULT_PRESET
            from grpo_engine.doctor import examine

            job.message = "Looking at packages, devices, models and the database"
            job.result = examine(str(store.path), DEFAULT_PRESET, ())
            job.message = "Nothing is missing." if not job.result["problems"] else ""

        return answer({"job": jobs.start(Job("doctor", "Check of this machine"), work, alone=False).row()})

    @router.post("/queue/remove")
    def remove(body: OneRun) -> Response:
        """Take a waiting run out of the queue."""
        run = store.run(body.run)
        if run.state != "queued":
            raise Refused(f"{run.name} does not wait any more: it is {run.state}.")
        worker.command(run.id, "stop")
        return answer({})

    @router.post("/queue/put-back")
    def put_back(body: OneRun) -> Response:
        """Put a queued run that was left behind at the end of the queue."""
        run = store.run(body.run)
        if run.state != "queued":
            raise Refused(f"{run.name} is not waiting: it is {run.state}.")
        worker.resume(run.id)
        return answer({})

    return router


async def _receive(request: Request, path: Path) -> None:
    """Write a request's body to a file, piece by piece. Raises `Refused`."""
    size = 0
    try:
        with path.open("wb") as file:
            async for block in request.stream():
                size += len(block)
                if size > MOST_BYTES:
                    raise Refused(_too_large(), status=413)
                file.write(block)
    except ClientDisconnect:
        raise Refused("The upload was broken off; send the file again.", status=400) from None
    except OSError as error:
        raise Refused(disk_refused(error)) from error
    if not size:
        raise Refused("The file is empty; choose a bundle that Export has written.", status=422)


def _too_large() -> str:
    return (
        f"The file is larger than {MOST_BYTES // 2**20} MiB, the most that can be sent through a browser; import it "
        "with 'python -m grpo_engine import', or export it with fewer or smaller pictures."
    )


def queue(store: Store, worker: Worker) -> dict[str, Any]:
    """Who is worked on, who waits and in which order, and who waits for nobody.

    A run is forgotten when it is queued but in no queue: the app that had it was closed, or it was queued by
    another program that is gone.
    """
    status = worker.status()
    waiting: dict[str, RunRow] = {run.id: run for run in store.active_runs() if run.state == "queued"}
    held = [run_id for run_id in status["queue"] if run_id in waiting]
    now = time.time()
    forgotten = [
        run_id
        for run_id, run in waiting.items()
        if run_id not in held and run_id != status["current"] and now - run.updated > FORGOTTEN_S
    ]

    def row(run_id: str) -> dict[str, Any]:
        run = waiting[run_id]
        return {"id": run.id, "name": run.name, "number": run.number, "total": run.total_steps}

    return {"current": status["current"], "waiting": [row(i) for i in held], "forgotten": [row(i) for i in forgotten]}


def describe_machine(worker: Worker) -> dict[str, Any]:
    """Processor, memory, devices and versions. Packages and GPUs only once the engine is imported."""
    memory = psutil.virtual_memory()
    devices: list[dict[str, Any]] = [
        {"name": "cpu", "label": f"{os.cpu_count()} cores", "free": memory.available, "total": memory.total}
    ]
    versions: dict[str, str | None] = {}
    engine = worker.status()["engine"]
    if engine == "ready":
        devices = [*_gpus(), *devices]
        versions = _versions()
    return {
        "engine": engine,
        "python": platform.python_version(),
        "system": platform.platform(),
        "process": psutil.Process().memory_info().rss,
        "devices": devices,
        "versions": versions,
    }


def _gpus() -> list[dict[str, Any]]:
    """GPUs with their memory in bytes, None where this process has not used the GPU.

    Asking a GPU for its memory takes some hundred MiB of it, which a page that only looks must not.
    """
    cuda = sys.modules["torch"].cuda
    found: list[dict[str, Any]] = []
    for index in range(cuda.device_count()):
        gpu: dict[str, Any] = {"name": f"cuda:{index}", "label": "not used by this app yet", "free": None}
        if cuda.is_initialized() and cuda.memory_reserved(index):
            free, total = cuda.mem_get_info(index)
            gpu |= {"label": cuda.get_device_name(index), "free": free, "total": total}
        found.append(gpu)
    return found


def _versions() -> dict[str, str | None]:
    import importlib.metadata

    from grpo_engine.doctor import PACKAGES

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in PACKAGES}
