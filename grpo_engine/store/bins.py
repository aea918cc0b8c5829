"""Steps summed up in bins, so that a chart of a long run needs few points: how wide, and from which sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .rows import Bins


def bin_width(start: int, stop: int, most: int) -> int:
    """The narrowest width, a power of two, at which steps start..stop touch at most ``most`` bins."""
    width = 1
    while (stop - 1) // width - (start - 1) // width >= most:
        width *= 2
    return width


def merge_bins(
    metrics: Sequence[str],
    blocks: Sequence[Sequence[Any]],
    rest: Sequence[Sequence[Any]],
    width: int,
    last: int,
) -> dict[str, Bins]:
    """Bins of each metric from sums over whole blocks and over the steps that are in none.

    Args:
        metrics: the names, in the order of the columns of ``rest``.
        blocks: rows (metric, bin, count, low, total, high).
        rest: rows (bin, then count, low, total, high of each metric); without a value, low and high are None.
        width: steps in a bin; bin b begins at step b * width + 1.
        last: the run's last step, where its last bin ends.
    """
    numbers = sorted({row[1] for row in blocks} | {row[0] for row in rest})
    place = {number: index for index, number in enumerate(numbers)}
    shape = (len(metrics), len(numbers))
    count, total = np.zeros(shape, dtype=np.int64), np.zeros(shape)
    low, high = np.full(shape, np.inf), np.full(shape, -np.inf)
    if rest:
        table = np.array(rest, dtype=np.float64)
        at = [place[number] for number in table[:, 0].astype(np.int64).tolist()]
        count[:, at], total[:, at] = table[:, 1::4].T, table[:, 3::4].T
        low[:, at], high[:, at] = np.fmin(low[:, at], table[:, 2::4].T), np.fmax(high[:, at], table[:, 4::4].T)
    row_of = {name: index for index, name in enumerate(metrics)}
    for name, number, counted, lowest, summed, highest in blocks:
        here = row_of[name], place[number]
        count[here] += counted
        total[here] += summed
        low[here], high[here] = min(low[here], lowest), max(high[here], highest)
    first = np.array(numbers, dtype=np.int64) * width + 1
    found = {}
    for row, name in enumerate(metrics):
        has = count[row] > 0
        begin, n = first[has], count[row][has]
        end = np.minimum(begin + width - 1, last)
        found[name] = Bins(width, begin, end, n, low[row][has], total[row][has] / n, high[row][has])
    return found
