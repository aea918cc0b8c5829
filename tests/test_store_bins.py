"""Several metrics in bins at once: the same as each by itself, from blocks, from steps, and where the two meet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from store_samples import metrics, training_run

from grpo_engine.store import Store, StoreError
from grpo_engine.store.bins import bin_width, merge_bins
from grpo_engine.store.schema import BLOCK

NAMES = ("reward_mean", "judge_mean", "entropy")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Store, str]]:
    """Two whole blocks of steps and some more; every fifth step has no judge."""
    with Store(tmp_path_factory.mktemp("bins") / "runs.db") as store:
        run_id = training_run(store)
        for step in range(1, 2 * BLOCK + 11):
            store.add_step(run_id, step, metrics(step) | ({"judge_mean": None} if step % 5 == 0 else {}), [])
        yield store, run_id


@pytest.mark.parametrize("width", [1, 4, BLOCK, 2 * BLOCK, 4 * BLOCK])
@pytest.mark.parametrize(("start", "stop"), [(1, None), (70, 100), (BLOCK + 1, 2 * BLOCK), (2 * BLOCK + 3, None)])
def test_several_metrics_at_once_are_the_same_as_brute_force(
    recorded: tuple[Store, str], width: int, start: int, stop: int | None
) -> None:
    store, run_id = recorded
    found = store.binned_metrics(run_id, NAMES, start, stop, width=width)
    last = store.run(run_id).step
    columns = store.steps(run_id, NAMES)
    for name in NAMES:
        expected = []
        for first in range((start - 1) // width * width + 1, (stop or last) + 1, width):
            values = columns[name][first - 1 : first - 1 + width]
            values = values[~np.isnan(values)]
            if values.size:
                end = min(first + width - 1, last)
                expected.append((first, end, values.size, values.min(), values.mean(), values.max()))
        bins = found[name]
        table = np.array([bins.first, bins.last, bins.count, bins.low, bins.mean, bins.high]).T
        np.testing.assert_allclose(table, np.array(expected).reshape(-1, 6), rtol=1e-12)
        assert bins.width == width


def test_without_a_width_it_is_the_narrowest_that_keeps_to_the_number_of_bins(recorded: tuple[Store, str]) -> None:
    store, run_id = recorded
    found = store.binned_metrics(run_id, NAMES, bins=20)
    assert {bins.width for bins in found.values()} == {bin_width(1, 2 * BLOCK + 10, 20)} == {8}
    assert [bin_width(1, stop, 4) for stop in (1, 4, 5, 8, 9, 17)] == [1, 1, 2, 2, 4, 8]


@pytest.mark.parametrize("width", [0, -2, 3, 100])
def test_a_width_that_is_no_power_of_two_is_refused(recorded: tuple[Store, str], width: int) -> None:
    store, run_id = recorded
    with pytest.raises(StoreError, match=f"width is {width}; ask for a power of two"):
        store.binned_metrics(run_id, NAMES, width=width)


def test_a_run_without_steps_has_no_bins(tmp_path: Path) -> None:
    with Store(tmp_path / "runs.db") as store:
        found = store.binned_metrics(training_run(store), NAMES)
    assert [len(bins) for bins in found.values()] == [0, 0, 0]


def test_a_bin_is_the_sum_of_its_blocks_and_of_the_steps_beyond_them() -> None:
    blocks = [("a", 0, 2, 1.0, 4.0, 3.0), ("a", 1, 1, 7.0, 7.0, 7.0)]
    rest = [(1, 3, 5.0, 20.0, 9.0, 0, None, 0.0, None)]
    found = merge_bins(["a", "b"], blocks, rest, 4, 7)
    bins = found["a"]
    assert (bins.first.tolist(), bins.last.tolist(), bins.count.tolist()) == ([1, 5], [4, 7], [2, 4])
    assert (bins.low.tolist(), bins.mean.tolist(), bins.high.tolist()) == ([1.0, 5.0], [2.0, 6.75], [3.0, 9.0])
    assert len(found["b"]) == 0
