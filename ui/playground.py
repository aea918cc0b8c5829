"""The playground screen: a prompt, the policies to rewrite it, and what came of it. Nothing of it is recorded."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fastapi import FastAPI, Response
from fastapi.routing import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from grpo_engine.config import DEFAULT_PRESET, ConfigError, RunConfig, expanded
from grpo_engine.playground import Playground
from grpo_engine.playground_try import (
    MOST_COLUMNS,
    MOST_PICTURES,
    Column,
    PlaygroundBusy,
    PlaygroundError,
    Saved,
    Try,
    saved_checkpoints,
    tidy_prompt,
)
from grpo_engine.prompts import Prompt, PromptError, load_prompts, normalize
from grpo_engine.store.rows import RunRow

from .context import Context, PlainRoute, Refused, answer
from .prompt_sets import SHIPPED

EXAMPLES = 60
LARGEST_SEED = 2**63 - 1


class ColumnBody(BaseModel):
    """A column as the browser names it."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["original", "untrained", "checkpoint", "edited"]
    run: str = Field("", max_length=200)
    which: str = Field("last", pattern=r"^(last|best|\d{1,12})$")
    text: str = Field("", max_length=4000)


class TryBody(BaseModel):
    """A try as the browser asks for it. ``models`` is the run whose models are used, empty for the embedded ones;
    seeds are text, since a browser's numbers end at 2**53."""

    model_config = ConfigDict(extra="forbid")
    prompt: str = Field(max_length=20_000)
    models: str = Field("", max_length=200)
    columns: list[ColumnBody] = Field(min_length=1, max_length=MOST_COLUMNS)
    latent_seed: str = Field("0", pattern=r"^\d{1,19}$")
    pictures: int = Field(1, ge=1, le=MOST_PICTURES)
    sample_seed: str = Field("0", pattern=r"^\d{1,19}$")
    greedy: bool = False
    temperature: float | None = Field(None, gt=0.0, le=10.0)


class JobBody(BaseModel):
    """A try that was begun."""

    model_config = ConfigDict(extra="forbid")
    job: str = Field(max_length=64)


def routes(context: Context) -> APIRouter:
    """The screen's questions and actions. The playground ends with the app."""
    playground = Playground(context.store)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        playground.close()

    router = APIRouter(prefix="/playground", route_class=PlainRoute, lifespan=life)

    @router.get("/choices")
    def choices() -> Response:
        """What can stand in a column, and which models there are. Runs newest first; models under
        their oldest run, but under an imported one only if need be: of those not every prompt set is read."""
        embedded = _about(RunConfig.load(DEFAULT_PRESET).model_dump_json())
        models = {embedded.key: {"id": "", "label": f"Embedded models ({embedded.label})", "policy": embedded.policy}}
        runs, known = [], context.store.runs()
        for run in sorted(known, key=lambda run: (run.source == "imported", run.number)):
            own = _about(run.config_json)
            if not own.problem:
                label = f"As in {run.name} ({own.label})"
                models.setdefault(own.key, {"id": run.id, "label": label, "policy": own.policy})
        for run in known:
            saved = saved_checkpoints(context.store.run_dir(run.id))
            if saved.steps:
                own = _about(run.config_json)
                row = {"id": run.id, "number": run.number, "name": run.name, "problem": own.problem}
                if not own.problem:
                    row |= {"models": models[own.key]["id"], "policy": own.policy}
                runs.append(row | {"checkpoints": [] if own.problem else _checkpoints(saved, run)})
        return answer({"models": list(models.values()), "runs": runs, "most_columns": MOST_COLUMNS})

    @router.get("/examples")
    def examples(models: str = "") -> Response:
        """Held-out prompts of the prompt set that goes with these models."""
        asked = _settings(context, models)
        config = asked.config
        try:
            prompts = _prompts(asked)
        except PromptError as error:
            return answer({"prompts": [], "note": f"The prompt set can't be read: {error.problems[0]}"})
        test = [prompt.text for prompt in prompts if prompt.split == "test" and prompt.tier in config.data.tiers]
        return answer({"prompts": test[:EXAMPLES], "note": ""})

    @router.post("/prepare")
    def prepare() -> Response:
        """Somebody is writing a prompt: load the libraries meanwhile."""
        playground.prepare()
        return answer({})

    @router.post("/generate")
    def generate(body: TryBody) -> Response:
        """Queue a try; returns its job."""
        models = _settings(context, body.models)
        config = models.config
        try:
            prompt = tidy_prompt(body.prompt, config.data.max_prompt_chars)
            asked = Try(
                prompt=prompt,
                settings=config.model_dump(mode="json"),
                columns=tuple(_column(context, column) for column in body.columns),
                latent_seed=_seed(body.latent_seed, "latent_seed"),
                pictures=body.pictures,
                sample_seed=_seed(body.sample_seed, "sample_seed"),
                greedy=body.greedy,
                temperature=body.temperature,
                request=_request(models, prompt),
            )
            return answer({"job": playground.submit(asked), "prompt": prompt})
        except PlaygroundBusy as error:
            raise Refused(str(error), status=429) from error
        except PlaygroundError as error:
            raise Refused(str(error), field=error.field, status=422) from error

    @router.get("/job")
    def job(id: str) -> Response:
        """How a try stands; see `Playground.job`."""
        try:
            return answer(playground.job(id))
        except PlaygroundError as error:
            raise Refused(str(error), status=404) from error

    @router.post("/cancel")
    def cancel(body: JobBody) -> Response:
        """Give a try up."""
        try:
            playground.cancel(body.job)
        except PlaygroundError as error:
            raise Refused(str(error), status=404) from error
        return answer({})

    @router.get("/picture/{token}.png")
    def picture(token: str) -> Response:
        """A picture of a try, for as long as it is kept in memory."""
        found = playground.picture(token)
        if found is None:
            raise Refused("That picture is gone; generate it again.", status=404)
        return Response(found, media_type="image/png", headers={"Cache-Control": "private, max-age=3600, immutable"})

    return router


class _Models(NamedTuple):
    """The settings whose models are used. Those of an imported run are somebody else's: they may name any file."""

    config: RunConfig
    imported: bool = False


def _settings(context: Context, models: str) -> _Models:
    """The settings of the run named, or of the embedded models. Raises `StoreError` or `ConfigError`."""
    if not models:
        return _Models(RunConfig.load(DEFAULT_PRESET))
    run = context.store.run(models)
    return _Models(RunConfig.parse(run.config), run.source == "imported")


class _About(NamedTuple):
    """What a run's settings mean here. ``key`` is equal for settings with equal pictures, CLIP scores, judge,
    untrained rewrites and examples; ``problem`` says why the settings can't be read."""

    key: str = ""
    label: str = ""
    policy: str = ""
    problem: str = ""


@lru_cache(maxsize=1024)  # of runs that never change, asked about every few seconds
def _about(config_json: str) -> _About:
    try:
        config = RunConfig.parse(json.loads(config_json))
    except ConfigError as error:  # recorded by another version
        return _About(problem=str(error))
    policy, image, reward, sampling = config.models.policy, config.models.image, config.models.reward, config.sampling
    parts = (
        (policy.path, policy.dtype, policy.system, policy.template, policy.question, image),
        (reward.path, reward.pretrained, reward.dtype, config.placement, config.evaluation.judge, config.data),
        (sampling.max_new_tokens, sampling.temperature, sampling.top_k, sampling.top_p),
    )
    name = "" if image.path == "tiny" else f"{Path(image.path).name}, "
    label = f"{name}{image.steps} steps, guidance {image.guidance:g}, {image.resolution} px"
    return _About(repr(parts), label, f"{policy.path} {policy.dtype}")


def _checkpoints(saved: Saved, run: RunRow) -> list[dict[str, Any]]:
    """What a run offers, the last first; a run that goes on saves a new last one now and then."""
    steps = [{"which": str(step), "label": f"step {step}"} for step in reversed(saved.steps)]
    named = []
    if saved.last is not None:
        now = " so far" if run.active else ""
        named.append({"which": "last", "label": f"last{now}, step {saved.last}"})
    if saved.best is not None:
        named.append({"which": "best", "label": f"best, step {saved.best}"})
    return [*named, *steps]


def _column(context: Context, body: ColumnBody) -> Column:
    """The column, with what the models' process needs to know of its run. Raises `StoreError`, `PlaygroundError`."""
    if body.kind == "edited":
        text = " ".join(body.text.split())
        if not text:
            raise PlaygroundError("Write something to draw first.", "text")
        return Column("edited", text=text)
    if body.kind != "checkpoint":
        return Column(body.kind)
    run = context.store.run(body.run)
    which: Any = int(body.which) if body.which.isdecimal() else body.which
    return Column("checkpoint", settings=run.config, folder=str(context.store.run_dir(run.id)), which=which)


def _seed(text: str, field: str) -> int:
    seed = int(text)
    if seed > LARGEST_SEED:
        raise PlaygroundError(f"A seed is a whole number up to {LARGEST_SEED}, not {text}.", field)
    return seed


def _request(models: _Models, prompt: str) -> dict[str, Any] | None:
    """What the checker needs to know, if this is one of the prompts that come with it."""
    try:
        prompts = _prompts(models)
    except PromptError:
        return None
    same = normalize(prompt)
    found = next((known for known in prompts if normalize(known.text) == same), None)
    request = found.meta.get("request") if found else None
    return request if isinstance(request, dict) else None


def _prompts(models: _Models) -> tuple[Prompt, ...]:
    """The prompt set of these settings, read anew when its file has changed. Raises `PromptError` or `ConfigError`.

    Of an imported run only a set that comes with the program is read: its bundle could name any file of this machine.
    """
    config, imported = models
    shipped = SHIPPED / f"{config.data.prompts}.jsonl"
    if imported and not (shipped.parent == SHIPPED and shipped.is_file()):  # a path in the name leads elsewhere
        raise PromptError(
            "it is a file of the machine that this run was recorded on; write a prompt of your own instead."
        )
    path = shipped if shipped.is_file() else expanded(config.data.prompts)
    try:
        changed = path.stat().st_mtime_ns
    except OSError as error:
        raise PromptError(f"{path} is not there any more.") from error
    return _read(path, changed, config.data.max_prompt_chars)


@lru_cache(maxsize=4)
def _read(path: Path, changed: int, max_chars: int) -> tuple[Prompt, ...]:
    return load_prompts(path, max_chars=max_chars).prompts
