"""The film strip: one prompt's pictures over the steps of a run."""

from __future__ import annotations

from typing import Any

from grpo_engine.store import Store
from grpo_engine.store.measured import measurements, prompt_means
from grpo_engine.store.rows import PromptVisit

from .context import Refused
from .gallery_view import picture

OFFERED = 60  # prompts listed at once
FRAMES = 48  # of a prompt that was trained on more often, this many are shown


def films(store: Store, run_id: str, search: str) -> dict[str, Any]:
    """Prompts that can be followed: those of the validation measurements, and those that were trained on."""
    run = store.run(run_id)
    terms = search.casefold().split()
    rounds = [row for row in measurements(store, run_id) if row.kind == "validation"]
    texts = {row.prompt_id: row.prompt for row in prompt_means(store, rounds[-1].id)} if rounds else {}
    evaluation = run.config.get("evaluation")
    return {
        "every": evaluation.get("every") if isinstance(evaluation, dict) else None,
        "measured": _offered([(key, text, len(rounds)) for key, text in texts.items()], terms),
        "trained": _offered(store.visited_prompts(run_id), terms),
    }


def _offered(prompts: list[tuple[str, str, int]], terms: list[str]) -> dict[str, Any]:
    found = [row for row in prompts if all(term in row[1].casefold() for term in terms)]
    shown = [{"id": key, "text": text, "count": count} for key, text, count in found[:OFFERED]]
    return {"total": len(prompts), "found": len(found), "prompts": shown}


def measured_film(store: Store, run_id: str, prompt_id: str, *, greedy: bool) -> dict[str, Any]:
    """The prompt at every measurement that has it: untrained once, then trained, all on the same latents.

    Raises:
        Refused: no measurement has it.
    """
    suffix = "_greedy" if greedy else ""
    frames: list[dict[str, Any]] = []
    text = tier = ""
    for row in measurements(store, run_id):
        items = store.evaluation_items(row.id, prompt_id=prompt_id)
        for arm, step in ((f"untrained{suffix}", 0), (f"trained{suffix}", row.step)):
            shown = [item for item in items if item.arm == arm]
            if not shown or (step == 0 and frames):
                continue
            text, tier = shown[0].prompt, shown[0].tier
            where = "untrained" if step == 0 else "final" if row.kind == "final" else "validation"
            frames.append({"step": step, "where": where, "pictures": [picture(item) for item in shown]})
    if not frames:
        raise Refused(f"No measurement of run {run_id} has the prompt {prompt_id!r}.", status=404)
    note = "The same latents at every step: what changes is the rewrite."
    return {"text": text, "tier": tier, "frames": frames, "note": note}


def trained_film(store: Store, run_id: str, prompt_id: str) -> dict[str, Any]:
    """The prompt's groups over the steps, by the best rewrite of each.

    Raises:
        Refused: it was never trained on.
    """
    visits = store.prompt_visits(run_id, prompt_id)
    if not visits:
        raise Refused(f"Run {run_id} never trained on the prompt {prompt_id!r}.", status=404)
    kept = thinned(visits)
    size = max(visit.rollouts for visit in visits)
    note = (
        f"The best of {size} rewrites by reward at each visit. Every visit draws new latents, so pictures differ "
        "for that reason too; the group's mean reward is the fairer number."
    )
    if len(kept) < len(visits):
        note += f" {len(kept)} of {len(visits):,} visits are shown."
    if all(visit.image is None for visit in kept):
        note += " No pictures were kept of these steps (recording.images_every)."
    frames = [
        {
            "step": visit.step,
            "where": "training",
            "mean": visit.reward_mean,
            "pictures": [
                {
                    "index": 0,
                    "rewrite": visit.rewrite,
                    "reward": visit.reward_best,
                    "image": visit.image,
                    "thumbnail": visit.thumbnail,
                }
            ],
        }
        for visit in kept
    ]
    return {"text": visits[0].prompt, "tier": visits[0].tier, "frames": frames, "note": note}


def thinned(visits: list[PromptVisit], most: int = FRAMES) -> list[PromptVisit]:
    """At most ``most`` visits, evenly spread, the first and the last among them."""
    if len(visits) <= most:
        return visits
    return [visits[round(place * (len(visits) - 1) / (most - 1))] for place in range(most)]
