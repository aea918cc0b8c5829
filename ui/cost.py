"""What a run will take, judged by the last run made on this machine that is like it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grpo_engine.config import RunConfig, flatten
from grpo_engine.store import Store, StoreError
from grpo_engine.store.owner import this_process
from grpo_engine.store.rows import RunRow

STEPS = 50  # of the last ones: early steps draw more different pictures, so they take longer
LEAST_STEPS = 3
RUNS = 200  # looked through, the newest first

# A run that differs in one of these says nothing about another's time.
_SAME = (
    *(f"models.{part}.{key}" for part in ("policy", "image", "reward") for key in ("path", "dtype")),
    "models.policy.adapter", "models.policy.quantize", "models.policy.gradient_checkpointing",
    "models.reward.weights.vqa", "models.image.resolution", "models.image.use_t5", "models.image.max_sequence_length",
    "models.image.t5_on_cpu", "models.image.compile", "sampling.max_new_tokens",
    "training.inner_epochs", "training.minibatches",
    "placement.plan", "placement.policy", "placement.image", "placement.reward", "placement.threads",
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """What one run took. Seconds; ``picture`` is that of one picture of an evaluation, None when it made none.

    ``loading`` is None when it is part of ``picture``, as in a run that is not through.
    """

    run_id: str
    name: str
    step: float
    render: float
    loading: float | None
    picture: float | None
    sizes: Mapping[str, float]


class History:
    """The runs made on this machine, as the database has them now; looked through for one estimate or for many."""

    def __init__(self, store: Store) -> None:
        self.store = store
        host = this_process().host
        runs = (run for run in store.runs() if run.source == "local" and run.host == host and run.step >= LEAST_STEPS)
        self._runs = [(run, flatten(run.config)) for run in itertools.islice(runs, RUNS)]
        self._measured: dict[str, Measured | None] = {}

    def like(self, config: RunConfig) -> Measured | None:
        """The newest run that is comparable with ``config``; one of the same sizes before others."""
        wanted = flatten(config.model_dump(mode="json"))
        # A setting that a run's version did not have yet does not tell them apart.
        alike = [pair for pair in self._runs if all(pair[1].get(name, wanted[name]) == wanted[name] for name in _SAME)]
        same = [pair for pair in alike if sizes(pair[1]) == sizes(wanted)]
        return next((found for run, _ in same + alike if (found := self._measure(run)) is not None), None)

    def _measure(self, run: RunRow) -> Measured | None:
        if run.id not in self._measured:
            self._measured[run.id] = measure(self.store, run)
        return self._measured[run.id]


def sizes(settings: Mapping[str, Any]) -> dict[str, float]:
    """What a step's time grows with: its pictures, and the image model's passes for each."""
    passes = settings["models.image.steps"] * (2 if settings["models.image.guidance"] > 1 else 1)
    return {"pictures": settings["training.batch_size"] * settings["sampling.num_rollouts"], "passes": passes}


def measure(store: Store, run: RunRow) -> Measured | None:
    """What a run of at least 2 steps took; None if it was deleted meanwhile or its times are unknown."""
    try:
        columns = store.steps(run.id, ["time", "seconds", "seconds_render"], max(1, run.step - STEPS))
        evaluations = store.evaluations(run.id)
    except StoreError:  # deleted since
        return None
    step, render = _mean(columns["seconds"]), _mean(columns["seconds_render"])
    if not step:
        return None
    render = min(render, step)  # several image models beside each other render longer than the step takes
    loading = picture = None
    made = {row.kind: row for row in evaluations if row.items}
    if "baseline" in made and run.started is not None and not run.resumed_count:
        before = made["baseline"].time - run.started
        picture = before / made["baseline"].items
        if "final" in made:
            picture = (made["final"].time - float(columns["time"][-1])) / made["final"].items
            loading = max(0.0, before - picture * made["baseline"].items)
    return Measured(run.id, run.name, step, render, loading, picture, sizes(flatten(run.config)))


def _mean(column: NDArray[np.float64]) -> float:
    """Mean of the values there are; 0 if there are none."""
    return float(np.nanmean(column)) if np.isfinite(column).any() else 0.0


def estimate(found: Measured | None, config: RunConfig, test: int, validation: int) -> dict[str, Any]:
    """Seconds a step and in all, and a sentence on where they come from.

    ``test`` and ``validation`` are the prompts that there are. Rendering is taken to grow with pictures times passes
    of the image model, the rest of a step with pictures; an evaluation likewise.
    """
    if found is None:
        return {"step": None, "total": None, "note": "No comparable run here yet: the time is known once one has made "
                f"{LEAST_STEPS} steps."}  # fmt: skip
    now = sizes(flatten(config.model_dump(mode="json")))
    pictures = now["pictures"] / found.sizes["pictures"]
    passes = now["passes"] / found.sizes["passes"]
    step = found.render * pictures * passes + max(0.0, found.step - found.render) * pictures
    training = step * config.training.steps
    answer: dict[str, Any] = {"step": step, "training": training, "run": found.run_id, "name": found.name}
    if pictures == passes == 1:
        note = f"From {found.name}, which had the same models and sizes."
    else:
        before, after = (f"{size['pictures']:,} pictures x {size['passes']:,} passes" for size in (found.sizes, now))
        note = f"Scaled from {found.name} in proportion ({before} a step there, {after} here): a rough guide."
    if found.picture is None:
        return answer | {"total": None, "note": f"{note} How long its evaluations take is not known."}
    evaluating = _evaluated(config, test, validation) * found.picture * passes
    loading = found.loading or 0.0
    total = training + evaluating + loading
    return answer | {"loading": loading, "evaluating": evaluating, "total": total, "note": note}


def _evaluated(config: RunConfig, test: int, validation: int) -> int:
    """Pictures of all evaluations of a run."""
    settings = config.evaluation
    policies = (settings.samples > 0) + settings.greedy
    arms = 1 + 2 * policies
    measured = min(settings.prompts, test) * arms
    if settings.every:
        times = (config.training.steps - 1) // settings.every
        measured += times * min(settings.validation_prompts, validation or test) * arms
    return measured * settings.images_per_prompt
