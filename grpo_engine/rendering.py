"""Which pictures are rendered together, and which need not be rendered again.

How the last bits of a picture round depends on the batch it was rendered in. So batches are cut by rules that know
nothing of time, and the cache remembers whole batches: a picture that it gives back is the very one that rendering
would make, and a resumed run, which begins with an empty cache, is the same run.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence

from .image_model import ImageModel
from .pipeline import Pipeline, Stage, Work
from .policy import Poll, no_poll
from .rollout import Picture, RenderJob


def batch_limit(total: int, replicas: int, most: int) -> int:
    """Pictures a batch when at most ``total`` are to be made: as many rounds as ``most`` a batch takes, shared evenly.

    One replica gets full batches, several get equal shares: 32 pictures on 4 replicas are 8 each, not 32 for one.
    """
    if replicas == 1:
        return most
    rounds = max(1, -(-total // (replicas * most)))
    return max(1, -(-total // (replicas * rounds)))


def evenly(jobs: Sequence[RenderJob], limit: int) -> list[list[RenderJob]]:
    """Consecutive parts of at most ``limit`` jobs, as few as possible, their sizes differing by at most 1."""
    count = -(-len(jobs) // limit)
    bounds = [len(jobs) * part // count for part in range(count + 1)] if count else []
    return [list(jobs[start:stop]) for start, stop in zip(bounds, bounds[1:], strict=False)]


def tapered(jobs: Sequence[RenderJob], left: int, replicas: int, limit: int) -> list[list[RenderJob]]:
    """Like :func:`evenly`, but several replicas get ever smaller batches in the last round of a step.

    So its groups are whole one after the other, and not all when the last replica is done: what comes after rendering
    can keep up. Guided self-scheduling (Polychronopoulos and Kuck, 1987) with half a replica's share a batch.

    Args:
        left: pictures that the step still needs at most, ``jobs`` among them.
    """
    if not last_round(left, replicas, limit):
        return evenly(jobs, limit)
    parts, start = [], 0
    while start < len(jobs):
        size = max(1, -(-(left - start) // (2 * replicas)))
        parts.append(list(jobs[start : start + size]))
        start += size
    return parts


def last_round(left: int, replicas: int, limit: int) -> bool:
    """Whether several replicas are about to take their last batches of a step."""
    return replicas > 1 and left <= replicas * limit


class RenderCache:
    """Pictures of whole batches, the least recently used forgotten beyond ``limit`` bytes. Safe from any thread.

    Attributes:
        hits: pictures that were given back instead of rendered.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.hits = limit, 0
        self._batches: OrderedDict[tuple[RenderJob, ...], list[Picture]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, jobs: Sequence[RenderJob]) -> list[Picture] | None:
        """The pictures of exactly this batch, if it was rendered lately."""
        with self._lock:
            found = self._batches.get(tuple(jobs))
            if found is not None:
                self._batches.move_to_end(tuple(jobs))
                self.hits += len(found)
            return found

    def put(self, jobs: Sequence[RenderJob], pictures: list[Picture]) -> None:
        """Remember a batch, if it fits at all."""
        size = sum(picture.nbytes for picture in pictures)
        with self._lock:
            if size > self.limit or tuple(jobs) in self._batches:
                return
            self._batches[tuple(jobs)] = pictures
            self._bytes += size
            while self._bytes > self.limit:
                _, forgotten = self._batches.popitem(last=False)
                self._bytes -= sum(picture.nbytes for picture in forgotten)


def render_all(
    jobs: Sequence[RenderJob],
    models: Sequence[tuple[Hashable, ImageModel]],
    most: int,
    cache: RenderCache,
    *,
    poll: Poll = no_poll,
) -> list[Picture]:
    """One picture for each job, in order; each distinct one is made once, by whichever model is free.

    Args:
        models: (lane, model) of each replica, see ``pipeline.py``.
        most: pictures that one of them renders at once.
    """
    made: dict[RenderJob, Picture] = {}

    def renderer(model: ImageModel) -> Work:
        def render(batch: list[RenderJob], poll: Poll) -> Iterable[list[RenderJob]]:
            pictures = model.render(batch, poll=poll)
            cache.put(batch, pictures)
            made.update(zip(batch, pictures, strict=True))
            return ()

        return render

    distinct = list(dict.fromkeys(jobs))
    batches = evenly(distinct, batch_limit(len(distinct), len(models), most))
    stage = Stage("render", [(lane, renderer(model)) for lane, model in models], capacity=max(1, len(batches)))
    with Pipeline([stage], poll=poll) as pipeline:
        for batch in batches:
            if (known := cache.get(batch)) is not None:
                made.update(zip(batch, known, strict=True))
            else:
                pipeline.put(batch)
        pipeline.settle()
    return [made[job] for job in jobs]
