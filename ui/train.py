"""The train screen: choose settings and prompts, see what a run needs and takes, start one or queue many."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote

from fastapi import Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRouter
from pydantic import Field

from grpo_engine.config import DEFAULT_PRESET, RunConfig, preset_names
from grpo_engine.prompts import MAX_FILE_BYTES, MAX_PROMPTS

from . import form
from .context import Body, Context, PlainRoute, Refused, answer
from .cost import History, estimate
from .launch import Launcher
from .presets import Presets
from .prompt_sets import PromptSets, too_large
from .sweep import axes, grid

FIRST_RUN = ("training.steps=20", "evaluation.prompts=12", "recording.name=First run")
"""A guided first run: about a minute on two cores (2 s a step, 0.08 s a picture of an evaluation), which is enough
for a gain that its interval tells from zero."""

Text = Annotated[str, Field(max_length=20_000)]
Value = bool | int | float | None | Text | Annotated[list[Annotated[str, Field(max_length=200)]], Field(max_length=200)]
Token = Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{8,64}$")]
Name = Annotated[str, Field(max_length=120)]
Chars = Annotated[int, Query(ge=8, le=20_000)]


class Asked(Body):
    """Settings as the form has them: a preset, and what was typed in place of its values."""

    preset: Annotated[str, Field(max_length=80)]
    values: Annotated[dict[Name, Value], Field(max_length=400)] = {}


class Start(Asked):
    """One run. ``token`` is made by the browser: what comes twice with the same one is done once."""

    token: Token


class First(Body):
    """The guided first run."""

    token: Token


class SweptSetting(Body):
    """A setting and its values, as typed."""

    field: Name
    values: Annotated[list[Annotated[str, Field(max_length=400)]], Field(max_length=200)]


class Sweep(Asked):
    """A grid of runs; with a token it is queued, without one only looked at."""

    axes: Annotated[list[SweptSetting], Field(max_length=8)]
    token: Token | None = None


class Saved(Asked):
    """A preset to save."""

    name: Name
    overwrite: bool = False


class PromptRow(Body):
    """One row of the prompt table; ``id`` is empty for a new one."""

    id: Name = ""
    text: Text
    tier: Annotated[str, Field(max_length=20)]
    split: Annotated[str, Field(max_length=20)]


class Table(Body):
    """An edited prompt set."""

    name: Name
    base: Annotated[str, Field(max_length=4096)] = ""
    rows: list[PromptRow]
    max_chars: Annotated[int, Field(ge=8, le=20_000)] = 400
    overwrite: bool = False


class Bench:
    """What the routes work with: presets and prompt sets beside the database, and the form's reading of settings."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.presets = Presets(context.store.root / "presets")
        self.sets = PromptSets(context.store.root / "prompts")
        self.launcher = Launcher(context.store, context.worker)

    def judge(self, base: RunConfig, typed: Mapping[str, Any]) -> tuple[RunConfig | None, dict[str, Any]]:
        """The settings, or None and what is wrong with them (see `form.problems`). Imports nothing heavy."""
        data = form.settings(base, {name: value for name, value in typed.items() if name != "preset"})
        wrong = form.problems(data)
        prompts = data["data"].get("prompts") if isinstance(data["data"], dict) else None
        if prompts != base.data.prompts and not (isinstance(prompts, str) and self.sets.path(prompts)):
            wrong["fields"].setdefault("data.prompts", "Choose one of the prompt sets, or upload the file.")
        fine = not wrong["fields"] and not wrong["top"]
        return (RunConfig.parse(data) if fine else None), wrong

    def config(self, asked: Asked) -> RunConfig:
        """The settings. Raises `Refused` with the first thing that is wrong."""
        config, wrong = self.judge(self.presets.load(asked.preset), asked.values)
        if config is None:
            raise _first(wrong)
        return config

    def estimate(self, history: History, config: RunConfig) -> dict[str, Any]:
        """What a run will take (see `cost.estimate`)."""
        try:
            counts = self.sets.described(config.data.prompts)["counts"]
        except Refused:  # a preset's own file, which this screen does not read
            wanted = config.evaluation
            return estimate(history.like(config), config, wanted.prompts, wanted.validation_prompts)
        there = {split: sum(counts[split][tier] for tier in config.data.tiers) for split in counts}
        return estimate(history.like(config), config, there["test"], there["validation"])

    def command(self, asked: Asked) -> str:
        """The exact command line of these settings, quoted for a POSIX shell."""
        config, base = self.config(asked), self.presets.load(asked.preset)
        name = asked.preset if asked.preset in preset_names() else _near(self.presets.path(asked.preset))
        parts = ["python", "-m", "grpo_engine", "train", "--config", name]
        for override in config.as_overrides(base):
            parts += ["--set", override]
        if self.context.store.path != Path.cwd() / "runs.db":
            parts += ["--db", str(self.context.store.path)]
        return shlex.join(parts)

    def grid(self, asked: Sweep) -> tuple[list[RunConfig], list[str], list[str]]:
        """(settings, names, problems) of a sweep; all settings are valid if there are no problems."""
        base = self.presets.load(asked.preset)
        prefix = str(asked.values.get("recording.name") or "").strip()
        configs, names, wrongs = [], [], []
        for name, typed in grid(axes([(axis.field, axis.values) for axis in asked.axes]), prefix):
            config, wrong = self.judge(base, {**asked.values, **typed, "recording.name": name})
            names.append(name)
            if config is None:
                wrongs.append(f"{name}: {_first(wrong)}")
            else:
                configs.append(config)
        return configs, names, wrongs

    def listed(self) -> list[dict[str, Any]]:
        """The presets with all their values, for the form."""
        return [
            {"name": name, "saved": saved, "problem": problem, "values": form.shown_values(config) if config else None}
            for name, saved, config, problem in self.presets.listed()
        ]

    def first_run(self) -> bool:
        """Whether nobody has made a run here yet; recorded examples do not count."""
        return not any(run.source == "local" for run in self.context.store.runs())


def routes(context: Context) -> APIRouter:
    """The screen's questions and actions."""
    router = APIRouter(prefix="/train", route_class=PlainRoute)
    bench = Bench(context)
    store, launcher = context.store, bench.launcher

    @router.get("/form")
    def the_form() -> Response:
        """Everything the screen is built from."""
        return answer({"fields": form.as_data(), "methods": form.methods(), "presets": bench.listed(),
                       "sets": bench.sets.listed(), "default": DEFAULT_PRESET, "first_run": bench.first_run(),
                       "most_prompts": MAX_PROMPTS, "most_bytes": MAX_FILE_BYTES})  # fmt: skip

    @router.get("/run")
    def settings_of(run: Annotated[str, Query(max_length=80)]) -> Response:
        """The settings of a recorded run, for another one like it."""
        config = RunConfig.parse(store.run(run).config)
        known = [name for name, _, loaded, _ in bench.presets.listed() if loaded]
        preset = config.preset if config.preset in known else DEFAULT_PRESET
        changed = config.differences(bench.presets.load(preset))
        left_out = ("preset", "recording.name")
        values = {name: form.shown(mine) for name, (mine, _) in changed.items() if name not in left_out}
        return answer({"preset": preset, "values": values})

    @router.post("/check")
    def check(asked: Asked) -> Response:
        """What is wrong with the settings, and what a run with them will take."""
        config, wrong = bench.judge(bench.presets.load(asked.preset), asked.values)
        cost = bench.estimate(History(store), config) if config else None
        return answer({**wrong, "cost": cost, "first_run": bench.first_run()})

    @router.post("/plan")
    def plan(asked: Asked) -> Response:
        """Devices and memory, and what only the engine can check; asked once the engine is there."""
        config = bench.config(asked)
        if context.worker.status()["engine"] != "ready":
            return answer({"state": "loading"})
        from .needs import needs

        return answer({"state": "ready", **needs(config)})

    @router.post("/command")
    def command(asked: Asked) -> Response:
        """The command line that starts the same run."""
        return answer({"command": bench.command(asked)})

    @router.post("/start")
    def start(asked: Start) -> Response:
        """Start a run, or put it behind the one that goes on."""
        config = bench.config(asked)
        return answer(launcher.once(asked.token, lambda: launcher.start(config)))

    @router.post("/first")
    def first(asked: First) -> Response:
        """The guided first run."""
        config = RunConfig.load(DEFAULT_PRESET, FIRST_RUN)
        return answer(launcher.once(asked.token, lambda: launcher.start(config)))

    @router.post("/sweep")
    def sweep(asked: Sweep) -> Response:
        """Look at the grid of a sweep, or queue it."""
        configs, names, wrongs = bench.grid(asked)
        if asked.token is None:
            history = History(store)
            times = [bench.estimate(history, config)["total"] for config in configs]
            known = len(times) == len(names) and None not in times
            return answer({"names": names, "problems": wrongs, "total": sum(times) if known else None})
        if wrongs:
            raise Refused(wrongs[0], field="sweep", status=422)
        return answer(launcher.once(asked.token, lambda: launcher.queue(configs)))

    @router.post("/presets")
    def save_preset(asked: Saved) -> Response:
        """Save the settings under a name."""
        bench.presets.save(asked.name, bench.config(asked), overwrite=asked.overwrite)
        return answer({"name": asked.name, "presets": bench.listed()})

    @router.get("/prompts")
    def prompts(value: Annotated[str, Query(max_length=4096)]) -> Response:
        """How many prompts a set has of what kind."""
        return answer(bench.sets.described(value))

    @router.get("/prompts/rows")
    def prompt_rows(value: Annotated[str, Query(max_length=4096)]) -> Response:
        """All prompts of a set."""
        return answer({"rows": bench.sets.rows(value)})

    @router.post("/prompts/save")
    def save_prompts(asked: Table) -> Response:
        """Keep an edited prompt set under a name."""
        if len(asked.rows) > MAX_PROMPTS:
            raise too_large()
        if asked.overwrite:
            _not_in_use(context, str(bench.sets.folder / f"{asked.name}.jsonl"))
        rows = [row.model_dump() for row in asked.rows]
        value = bench.sets.save(asked.name, asked.base, rows, max_chars=asked.max_chars, overwrite=asked.overwrite)
        return answer({"value": value, "sets": bench.sets.listed()})

    @router.post("/prompts/upload")
    async def upload(request: Request, max_chars: Chars = 400) -> Response:
        """Keep an uploaded file (JSONL, TXT, CSV) as a prompt set."""
        data = bytearray()
        async for part in request.stream():
            data += part
            if len(data) > MAX_FILE_BYTES:
                raise too_large()
        name = unquote(request.headers.get("x-name", ""))[-200:]
        value = await run_in_threadpool(bench.sets.upload, name, bytes(data), max_chars)
        return answer({"value": value, "sets": bench.sets.listed()})

    return router


def _first(wrong: Mapping[str, Any]) -> Refused:
    """The first problem as a refusal."""
    labels = {field.name: field.label for field in form.form_fields()}
    for name, sentence in wrong["fields"].items():
        return Refused(f"{labels[name]}: {sentence}", field=name, status=422)
    return Refused(wrong["top"][0]["sentence"], field=wrong["top"][0]["field"], status=422)


def _near(path: Path) -> str:
    """A path as one would type it here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _not_in_use(context: Context, value: str) -> None:
    """Refuse to change a set that a run still reads: what it was trained on would no longer be what it says."""
    for run in context.store.active_runs():
        if run.config.get("data", {}).get("prompts") == value:
            raise Refused(f"{run.name} uses that prompt set; choose another name, or wait until it has ended.")
