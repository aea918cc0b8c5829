"""The group microscope: everything GRPO saw in one step, in one answer.

Recorded steps never change, so the page asks for a step once. Numbers of tokens are rounded here: a screen
shows three digits, and a step of full size has tens of thousands of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from fastapi import Query, Response
from fastapi.routing import APIRouter

from grpo_engine.store.rows import RolloutRow, RunRow

from .charts import setting
from .context import Context, PlainRoute, Refused, answer

SHADES = (
    {
        "name": "product",
        "label": "Advantage × change",
        "signed": True,
        "says": "Change: a token's log-probability when it was sampled minus the untrained policy's, in nats.",
        "along": "Training so far agrees with this group: it made the token likelier and the rewrite is above the "
        "group's mean, or less likely and the rewrite is below.",
        "against": "It disagrees, so this step pushes back: made likelier though the rewrite is below the mean, "
        "or less likely though it is above.",
    },
    {
        "name": "shift",
        "label": "Change alone",
        "signed": True,
        "says": "Change: a token's log-probability when it was sampled minus the untrained policy's, in nats; "
        "whether the rewrite was any good plays no part.",
        "along": "Training had made this token likelier than the untrained policy has it.",
        "against": "Training had made it less likely.",
    },
    {
        "name": "entropy",
        "label": "Entropy",
        "signed": False,
        "says": "The stronger, the less sure the policy was at this place: the entropy, in nats, of the distribution "
        "the token was sampled from.",
        "along": "",
        "against": "",
    },
    {
        "name": "kl",
        "label": "KL",
        "signed": False,
        "says": "The stronger, the larger this token's estimate of the KL divergence from the untrained policy, in "
        "nats. A single token's can be far off; the mean of many estimates the divergence.",
        "along": "",
        "against": "",
    },
)
"""What tokens can be shaded by, and what the color then means."""

FLOORS = {"product": 0.05, "shift": 0.05, "entropy": 0.5, "kl": 0.02}
"""Where the strongest color of a shade begins at the least, so that rounding noise is never painted."""

PARTS = {
    "clip": "100 × cosine of picture and original prompt",
    "length": "minus the words beyond the limit",
    "format": "1 where the completion could be read, else 0",
}


def routes(context: Context) -> APIRouter:
    """The microscope's one question."""
    router = APIRouter(prefix="/microscope", route_class=PlainRoute)

    @router.get("/step")
    def step(run: str = Query(max_length=200), step: int = Query(ge=0, le=2**62)) -> Response:
        """One recorded step of a run."""
        found = context.store.run(run)
        if not 1 <= step <= found.step:
            raise Refused(_no_step(found, step), status=404)
        return answer(describe(found, step, context.store.rollouts(run, step)))

    return router


def describe(run: RunRow, step: int, rows: Sequence[RolloutRow]) -> dict[str, Any]:
    """A step as plain data: its groups, each with its rollouts as they were sampled, and what is to be said of them.

    Args:
        run: the run as it stands.
        step: from 1.
        rows: of that step, by group and within it.
    """
    every = int(setting(run.config, "recording.images_every", 1))
    weights = setting(run.config, "models.reward.weights", {})
    return {
        "run": run.id,
        "name": run.name,
        "step": step,
        "last": run.step,
        "pictures": _pictures(run, step, every, rows),
        "notes": _notes(run, step, rows),
        "advantage": _advantage(run),
        "push": _push(run),
        "parts": [{"name": n, "weight": w, "means": PARTS.get(n, "")} for n, w in weights.items()],
        "shades": SHADES,
        "scales": _scales(rows),
        "groups": [_group(run, list(members)) for _, members in groupby(rows, key=lambda row: row.g)],
    }


def _group(run: RunRow, rows: Sequence[RolloutRow]) -> dict[str, Any]:
    rewards = [row.reward for row in rows if row.reward is not None]
    spread = _spread(rewards, unbiased=bool(setting(run.config, "objective.unbiased", False)))
    texts = [row.rewrite for row in rows if row.rewrite is not None]
    first: dict[str, int] = {}
    rollouts = []
    for row in rows:
        earlier = first.setdefault(row.rewrite, row.k) if row.rewrite is not None else row.k
        rollouts.append(_rollout(row, same_as=None if earlier == row.k else earlier))
    return {
        "g": rows[0].g,
        "prompt_id": rows[0].prompt_id,
        "prompt": rows[0].prompt,
        "tier": rows[0].tier,
        "seed": str(rows[0].latent_seed),
        "mean": _round(sum(rewards) / len(rewards)) if rewards else None,
        "spread": _round(spread),
        "places": _places(spread),
        "distinct": len(set(texts)),
        "failures": len(rows) - len(texts),
        "lesson": _lesson(rows, rewards),
        "rollouts": rollouts,
    }


def _rollout(row: RolloutRow, same_as: int | None) -> dict[str, Any]:
    return {
        "k": row.k,
        "text": row.completion if row.rewrite is None else row.rewrite,
        "parsed": row.rewrite is not None,
        "finished": row.finished,
        "same_as": same_as,
        "reward": _round(row.reward),
        "parts": {name: _round(value) for name, value in row.parts.items()},
        "advantage": _round(row.advantage),
        "kl": _round(row.kl, 5),
        "count": None if row.token_ids is None else len(row.token_ids),
        "image": row.image,
        "thumbnail": row.thumbnail,
        "tokens": _tokens(row),
    }


def _tokens(row: RolloutRow) -> dict[str, Any] | None:
    """A rollout's tokens as columns; a column that was not recorded is None."""
    if row.token_ids is None:
        return None
    columns = {"logprob": row.logprobs, "entropy": row.entropies, "kl": row.token_kl, "shift": row.shift}
    rounded = {
        name: None if values is None else values.astype(np.float64).round(4).tolist()
        for name, values in columns.items()
    }
    texts = row.tokens if row.tokens is not None else [f"[{token}]" for token in row.token_ids.tolist()]
    return {"text": texts, **rounded}


def _scales(rows: Sequence[RolloutRow]) -> dict[str, float]:
    """Where each shade's color is strongest: what 95 % of the step's tokens stay within; the largest |advantage|."""
    columns: dict[str, list[Any]] = {
        "shift": [row.shift for row in rows if row.shift is not None],
        "product": [row.shift * row.advantage for row in rows if row.shift is not None and row.advantage is not None],
        "entropy": [row.entropies for row in rows if row.entropies is not None],
        "kl": [row.token_kl for row in rows if row.token_kl is not None],
    }
    scales = {}
    for name, parts in columns.items():
        values = np.abs(np.concatenate(parts)) if parts else np.empty(0)
        values = values[np.isfinite(values)]
        scales[name] = max(FLOORS[name], float(f"{np.percentile(values, 95):.2g}") if values.size else 0.0)
    advantages = [abs(row.advantage) for row in rows if row.advantage is not None]
    return scales | {"advantage": max(1e-9, *advantages, 0.0)}


# -- sentences ---------------------------------------------------------------------------------------------------


def _no_step(run: RunRow, step: int) -> str:
    if run.step == 0:
        return f"Run {run.name} has no step yet; the first one can be looked at as soon as it is recorded."
    return f"Run {run.name} has no step {step}; it has steps 1 to {run.step}."


def _pictures(run: RunRow, step: int, every: int, rows: Iterable[RolloutRow]) -> dict[str, Any]:
    """Whether the step's pictures were kept, and the nearest steps before and after whose were."""
    if any(row.image for row in rows) or _kept(step, every):
        return {"kept": True, "any": True, "note": "", "before": None, "after": None}
    if every <= 0:
        note = "Pictures of this step were not kept: recording.images_every = 0 keeps none of this run's."
        return {"kept": False, "any": False, "note": note, "before": None, "after": None}
    before = step // every * every or 1
    after = (step // every + 1) * every
    note = (
        "Pictures of this step were not kept: "
        f"recording.images_every = {every} keeps those of step 1 and of the multiples of {every}."
    )
    return {"kept": False, "any": True, "note": note, "before": before, "after": after if after <= run.step else None}


def _kept(step: int, every: int) -> bool:
    return every > 0 and (step == 1 or step % every == 0)


def _notes(run: RunRow, step: int, rows: Sequence[RolloutRow]) -> list[str]:
    """What must be known to read the step rightly."""
    notes = []
    if not rows:
        notes.append("The rewrites of this step were not recorded.")
    elif all(row.token_ids is None for row in rows):
        notes.append("Numbers of single tokens were not recorded: recording.tokens is off in this run.")
    elif all(row.shift is None for row in rows):
        notes.append("The change of each token since training began was not recorded in this run.")
    elif step == 1:
        notes.append("Nothing has been trained before step 1, so the change of every token is 0.")
    if setting(run.config, "models.reward.debug", "none") == "shuffle":
        notes.append(
            "A negative control: each group's rewards were dealt out at random among its rewrites, "
            "so a reward here says nothing about its picture."
        )
    return notes


def _advantage(run: RunRow) -> str:
    """What an advantage of this run is."""
    mean = {"mean": "its group's mean", "leave_one_out": "the mean of the others in its group"}
    divisor = {
        "group": ", divided by the group's spread",
        "batch": ", divided by the spread of the whole step's rewards",
    }
    baseline = mean.get(setting(run.config, "objective.baseline", "mean"), "its group's baseline")
    return f"Advantage: reward minus {baseline}{divisor.get(setting(run.config, 'objective.scale', 'group'), '')}."


def _push(run: RunRow) -> str:
    """What the step itself does to the tokens of a rewrite."""
    several = max(setting(run.config, f"training.{name}", 1) for name in ("inner_epochs", "minibatches")) > 1
    return (
        "What this step itself pushes: all tokens of a rewrite alike, in proportion to its advantage - up above 0, "
        f"down below{', at the first update on it' if several else ''}; a KL penalty or an entropy bonus comes on top."
    )


def _lesson(rows: Sequence[RolloutRow], rewards: Sequence[float]) -> str:
    """Why a group taught nothing; empty where it did teach."""
    if any(row.advantage for row in rows):
        return ""
    if len(rewards) < 2:
        return "Fewer than two rewards: there is nothing to compare, so this group taught nothing."
    return "No spread: the rewards do not differ, so no rewrite is better than another and this group taught nothing."


# -- small things ------------------------------------------------------------------------------------------------


def _spread(rewards: Sequence[float], *, unbiased: bool) -> float | None:
    """Standard deviation, with n - 1 where ``unbiased``, else with n; None of fewer than two."""
    if len(rewards) < 2:
        return None
    mean = sum(rewards) / len(rewards)
    return math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - (1 if unbiased else 0)))


def _places(spread: float | None) -> int:
    """Decimal places at which rewards of this spread can be told apart: 1 to 4."""
    return 1 if not spread else min(4, max(1, 1 - math.floor(math.log10(spread))))


def _round(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else round(value, digits)
