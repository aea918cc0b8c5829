"""The Before / after screen's questions and actions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Query as Parameter
from fastapi import Response
from fastapi.routing import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from grpo_engine.store.choices import Choice, Side, add_choice, choices, forget_choices
from grpo_engine.store.measured import Measurement, Pair, measurements

from .context import Context, PlainRoute, Refused, answer
from .gallery_blind import clip_side, tally
from .gallery_film import films, measured_film, trained_film
from .gallery_table import CHANGES, LABELS, MOST_POINTS, SORTS, Query, agreement, agreement_figure
from .gallery_view import View, Views, label, note, picture

PAGE, MOST = 24, 60  # prompts sent at once, and at most
AHEAD = 3  # pairs of the blind test sent at once, so that the next pictures are there when they are needed

RunId = Annotated[str, Parameter(max_length=80)]
At = Annotated[int | None, Parameter(ge=0, lt=2**63)]
Compare = Annotated[str, Parameter(max_length=60)]
Words = Annotated[str, Parameter(max_length=200)]
PromptId = Annotated[str, Parameter(max_length=200)]
Name = Annotated[str, Parameter(max_length=40)]


class Asked(BaseModel):
    """Which two arms of which measurement an action is about."""

    model_config = ConfigDict(extra="forbid")

    run: Annotated[str, Field(max_length=80)]
    at: Annotated[int, Field(ge=0, lt=2**63)]
    compare: Annotated[str, Field(max_length=60)]


class Answered(Asked):
    """A choice between the two pictures of a pair."""

    prompt: Annotated[str, Field(max_length=200)]
    index: Annotated[int, Field(ge=0, le=10_000)]
    choice: Side


class Forgotten(Asked):
    """Which choices to delete."""

    which: Literal["last", "all"]


def routes(context: Context) -> APIRouter:
    """The screen's questions and actions."""
    router = APIRouter(prefix="/gallery", route_class=PlainRoute)
    store = context.store
    views = Views(store)

    @router.get("/runs")
    def runs() -> Response:
        """Every run with its measurements: all that a watching page asks for when something changed."""
        measured: dict[str, list[Measurement]] = {}
        for row in measurements(store):
            measured.setdefault(row.run_id, []).append(row)
        listed: list[dict[str, Any]] = [
            {"id": run.id, "name": run.name, "state": run.state, "source": run.source,
             "measured": [label(row) for row in measured.get(run.id, [])]}
            for run in store.runs()
        ]  # fmt: skip
        final = next((run["id"] for run in listed if any(row["kind"] == "final" for row in run["measured"])), None)
        return answer({"runs": listed, "newest": final or next((run["id"] for run in listed if run["measured"]), None)})

    @router.get("/overview")
    def overview(run: RunId, at: At = None) -> Response:
        """The headline of a measurement, and which arms and comparisons it has."""
        view = views.find(run, at)
        found = view.run if view else store.run(run)
        named = {"id": found.id, "name": found.name, "state": found.state}
        told = {"run": named, "at": None, "note": note(found, view)}
        return answer(told | (views.headline(view) if view else {}))

    @router.get("/prompts")
    def prompts(
        run: RunId,
        compare: Compare,
        at: At = None,
        sort: Name = "gain",
        tier: Name = "",
        change: Name = "",
        search: Words = "",
        start: Annotated[int, Parameter(ge=0, lt=2**31)] = 0,
        count: Annotated[int, Parameter(ge=0, le=MOST)] = PAGE,
        prompt: PromptId = "",
    ) -> Response:
        """A page of prompts with their pictures; with ``prompt``, the page that begins with that one."""
        if sort not in SORTS:
            raise Refused(f"There is no order {sort!r}; use one of {', '.join(SORTS)}.", field="sort", status=422)
        if change and change not in CHANGES:
            raise Refused(f"There is no change {change!r}; use {', '.join(CHANGES)}.", field="change", status=422)
        view = views.require(run, at)
        table = views.columns(view).table
        query = Query(*views.arms(view, compare), sort, tier, change, search)
        order, counts = table.select(query)
        told: dict[str, Any] = {"start": start, "total": len(order), "counts": counts, "tiers": table.tier_names}
        told["scale"] = table.largest_gain(query)
        if prompt:
            there = [place for place, row in enumerate(order.tolist()) if table.ids[row] == prompt]
            if not there:
                return answer(told | {"start": None, "rows": []})
            told["start"] = start = there[0]
        return answer(told | {"rows": views.rows(view, order[start : start + count].tolist(), query)})

    @router.get("/agreement")
    def judged(run: RunId, compare: Compare, at: At = None) -> Response:
        """The judge beside CLIP: a figure, counts and a sentence."""
        view = views.require(run, at)
        table = views.columns(view).table
        query = Query(*views.arms(view, compare))
        told = agreement(table.gain(query, table.clip), table.gain(query, table.judge))
        return answer(told | {"figure": agreement_figure(table, query), "most": MOST_POINTS})

    @router.get("/films")
    def offered(run: RunId, search: Words = "") -> Response:
        """Prompts whose pictures can be followed over the steps."""
        return answer(films(store, run, search))

    @router.get("/film")
    def film(run: RunId, prompt: PromptId, kind: Literal["measured", "trained"], greedy: bool = False) -> Response:
        """One prompt's pictures over the steps."""
        if kind == "trained":
            return answer(trained_film(store, run, prompt))
        return answer(measured_film(store, run, prompt, greedy=greedy))

    @router.get("/blind")
    def blind(run: RunId, compare: Compare, at: At = None) -> Response:
        """The next pairs of the blind test, without what would give them away, and what the answers say so far."""
        view = views.require(run, at)
        return answer(_blind(views, view, *views.arms(view, compare)))

    @router.post("/choose")
    def choose(body: Answered) -> Response:
        """Keep a choice; says which side was which, and what comes next."""
        view = views.require(body.run, body.at)
        after, before = views.arms(view, body.compare)
        showings, _ = views.showings(view, after, before)
        shown = next((item for item in showings if item.pair == Pair(body.prompt, body.index)), None)
        if shown is None:
            raise Refused("That pair of pictures is not part of this measurement; reload the page.", status=404)
        pictures = views.pictures(view, body.prompt)
        left, right = (
            next(item for item in pictures[arm] if item.index == body.index) for arm in (shown.left, shown.right)
        )
        prefers = clip_side(left.parts.get("clip"), right.parts.get("clip"))
        home = views.columns(view).homes[after]
        add_choice(
            store,
            Choice(body.run, home, body.prompt, body.index, shown.left, shown.right, body.choice, prefers, 0.0),
        )
        reveal: dict[str, Any] = {"choice": body.choice, "clip_prefers": prefers, "after": after}
        for side, item in (("left", left), ("right", right)):
            reveal[side] = picture(item) | {"arm": item.arm, "label": LABELS[item.arm]}
        return answer(_blind(views, view, after, before) | {"reveal": reveal})

    @router.post("/forget")
    def forget(body: Forgotten) -> Response:
        """Delete the last choice, or all of them, between two arms."""
        view = views.require(body.run, body.at)
        after, before = views.arms(view, body.compare)
        forget_choices(store, views.columns(view).homes[after], (after, before), last_only=body.which == "last")
        return answer(_blind(views, view, after, before))

    return router


def _blind(views: Views, view: View, after: str, before: str) -> dict[str, Any]:
    """Where the blind test between two arms stands."""
    showings, total = views.showings(view, after, before)
    made = choices(views.store, views.columns(view).homes[after], (after, before))
    done = {Pair(choice.prompt_id, choice.index) for choice in made}
    waiting = (shown for shown in showings if shown.pair not in done)
    table = views.columns(view).table
    pairs = []
    for shown, _ in zip(waiting, range(AHEAD), strict=False):
        pictures = views.pictures(view, shown.pair.prompt_id)
        files = {
            side: next(item.image for item in pictures[arm] if item.index == shown.pair.index)
            for side, arm in (("left", shown.left), ("right", shown.right))
        }
        text = table.texts[table.place(shown.pair.prompt_id)]
        pairs.append({"prompt": shown.pair.prompt_id, "index": shown.pair.index, "text": text} | files)
    return {
        "pairs": pairs,
        "total": len(showings),
        "equal": total - len(showings),
        "answers": len(done),
        "tally": tally(made, after, LABELS[after].lower()),
    }
