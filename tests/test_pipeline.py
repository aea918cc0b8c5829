"""The scheduler: whatever the lanes do and however long they take, the same items come out, or the same error."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_engine.control import RunControl, StopRequested
from grpo_engine.pipeline import HERE, Pipeline, Stage
from grpo_engine.policy import Poll


def lane_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("lane-")]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterable[None]:
    yield
    assert lane_threads() == []


def sleeping(seconds: float, out: list[Any] | None = None) -> Callable[[Any, Poll], Iterable[Any]]:
    """Work that takes its time, in small pieces, and hands its item on."""

    def work(item: Any, poll: Poll) -> Iterable[Any]:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            poll()
            time.sleep(min(left, 0.01))
        if out is not None:
            out.append(item)
        return [item]

    return work


# -- what comes out ------------------------------------------------------------------------------------------

lanes = st.sampled_from([HERE, "a", "b", "c"])


@settings(max_examples=60, deadline=None)
@given(
    stages=st.lists(st.tuples(st.lists(lanes, min_size=1, max_size=3), st.integers(1, 3)), min_size=1, max_size=3),
    items=st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), max_size=8),
    delays=st.lists(st.sampled_from([0.0, 0.0, 0.0005, 0.003]), min_size=1, max_size=7),
)
def test_all_that_is_put_in_comes_out_whatever_the_lanes_and_delays(
    stages: list[tuple[list[Hashable], int]], items: list[list[int]], delays: list[float]
) -> None:
    """Each item says how many items it becomes in each stage; every copy is told apart by its path."""

    def run(entered: bool) -> list[tuple[int, ...]]:
        out: list[tuple[int, ...]] = []
        calls = [0]
        working: list[Hashable] = []

        def worker(stage: int, lane: Hashable) -> Callable[[Any, Poll], Iterable[Any]]:
            def work(item: tuple[tuple[int, ...], list[int]], poll: Poll) -> Iterable[Any]:
                if entered:
                    assert lane not in working, "a lane does one thing at a time"
                    working.append(lane)
                path, counts = item
                calls[0] += 1
                time.sleep(delays[calls[0] % len(delays)])
                if entered:
                    working.remove(lane)
                if stage + 1 == len(stages):
                    out.append(path)
                    return []
                return [((*path, copy), counts) for copy in range(counts[stage])]

            return work

        pipeline = Pipeline([
            Stage(f"stage {index}", [(lane, worker(index, lane)) for lane in of], capacity)
            for index, (of, capacity) in enumerate(stages)
        ])  # fmt: skip
        if entered:
            with pipeline:
                for number, counts in enumerate(items):
                    pipeline.put(((number,), counts))
                pipeline.settle()
        else:
            for number, counts in enumerate(items):
                pipeline.put(((number,), counts))
            pipeline.settle()
        return out

    assert sorted(run(entered=True)) == sorted(run(entered=False))


def test_without_other_lanes_there_are_no_threads_and_the_order_is_plain() -> None:
    order: list[tuple[str, int]] = []

    def noting(name: str) -> Callable[[Any, Poll], Iterable[Any]]:
        def work(item: int, poll: Poll) -> Iterable[int]:
            order.append((name, item))
            return [item]

        return work

    with Pipeline([Stage("1", [(HERE, noting("1"))], 9), Stage("2", [(HERE, noting("2"))], 9)]) as pipeline:
        pipeline.put(1)
        pipeline.put(2)
        assert order == [], "work is done when it is waited for"
        assert lane_threads() == []
        pipeline.settle()
    assert order == [("1", 1), ("2", 1), ("1", 2), ("2", 2)], "what was begun is finished first"


def test_lanes_work_side_by_side_and_one_lane_takes_turns() -> None:
    def took(lanes: list[Hashable]) -> float:
        out: list[int] = []
        begun = time.monotonic()
        with Pipeline([Stage("render", [(lane, sleeping(0.1, out)) for lane in lanes], 9)]) as pipeline:
            for item in range(4):
                pipeline.put(item)
            pipeline.settle()
        assert sorted(out) == [0, 1, 2, 3]
        return time.monotonic() - begun

    assert took(["a", "b"]) < 0.36  # 0.2 and a slow machine
    assert took(["a", "a"]) >= 0.4


def test_the_owner_does_the_work_of_its_own_lane_while_it_waits() -> None:
    where: list[str] = []

    def work(item: Any, poll: Poll) -> Iterable[Any]:
        time.sleep(0.02)
        where.append(threading.current_thread().name)
        return []

    with Pipeline([Stage("render", [(HERE, work), ("a", work)], 99)]) as pipeline:
        for item in range(10):
            pipeline.put(item)
        pipeline.settle()
    assert len(where) == 10
    assert set(where) == {"lane-a", threading.current_thread().name}


def test_a_full_queue_makes_whoever_fills_it_wait() -> None:
    most = [0]
    gate = threading.Event()

    def second(item: Any, poll: Poll) -> Iterable[Any]:
        while not gate.is_set():
            poll()
            time.sleep(0.005)
        return []

    done: list[int] = []
    pipeline = Pipeline([Stage("1", [("a", sleeping(0.0, done))], 2), Stage("2", [("b", second)], 3)])
    with pipeline:
        for item in range(6):  # one in the hands of b, three before it, two before a
            pipeline.put(item)
        time.sleep(0.1)
        most[0] = len(done)
        threading.Timer(0.1, gate.set).start()
        begun = time.monotonic()
        pipeline.put(6)
        assert time.monotonic() - begun > 0.05, "there was room where none should be"
        pipeline.settle()
    assert most[0] == 4
    assert sorted(done) == list(range(7))
    assert pipeline.idle_seconds > 0.05


def test_room_made_by_taking_an_item_wakes_whoever_waits_for_it() -> None:
    begin, gate = threading.Event(), threading.Event()
    deadline = time.monotonic() + 20.0

    class LateStart(Pipeline):
        """Lane b looks at its queue only once it is full, and lane a has found it so."""

        def _serve(self, lane: Hashable) -> None:
            if lane == "b":
                begin.wait()
            super()._serve(lane)

    def busy(item: Any, poll: Poll) -> Iterable[Any]:
        while not gate.is_set():
            poll()
            time.sleep(0.005)
        return []

    def poll() -> None:
        if time.monotonic() > deadline:
            begin.set()
            raise Broken("the first lane still waits, though the second has made room")

    passed: list[int] = []
    stages = [Stage("1", [("a", sleeping(0.0, passed))], 2), Stage("2", [("b", busy)], 3)]
    with LateStart(stages, poll=poll) as pipeline:
        for item in range(5):  # three before b, two before a
            pipeline.put(item)
        time.sleep(0.2)
        assert len(passed) == 3
        begin.set()
        pipeline.put(5)  # b holds the first, and works on it
        pipeline.until(lambda: len(passed) == 4)
        gate.set()
        pipeline.settle()
    assert len(passed) == 6


# -- errors, stops, pauses -----------------------------------------------------------------------------------


class Broken(Exception):
    """What a worker runs into."""


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("lane", ["a", HERE])
def test_an_error_in_any_stage_ends_everything_and_is_raised_as_it_is(stage: int, lane: Hashable) -> None:
    def broken(item: int, poll: Poll) -> Iterable[int]:
        if item == 2:
            raise Broken(f"at {item}")
        return [item]

    def build(index: int) -> Stage:
        return Stage(str(index), [(lane, broken)] if index == stage else [(f"b{index}", sleeping(0.001))], 4)

    begun = time.monotonic()
    with pytest.raises(Broken, match="at 2"), Pipeline([build(index) for index in range(3)]) as pipeline:
        for item in range(50):
            pipeline.put(item)
        pipeline.settle()
    assert time.monotonic() - begun < 2.0
    assert lane_threads() == []


def test_an_error_reaches_the_owner_in_its_own_long_work() -> None:
    def broken(item: int, poll: Poll) -> Iterable[int]:
        raise Broken

    with Pipeline([Stage("1", [("a", broken)], 4)]) as pipeline:
        pipeline.put(1)
        with pytest.raises(Broken):
            for _ in range(400):
                time.sleep(0.005)
                pipeline.poll()


def test_an_error_of_the_owner_ends_the_lanes() -> None:
    out: list[int] = []
    begun = time.monotonic()
    with pytest.raises(Broken), Pipeline([Stage("1", [("a", sleeping(30.0, out))], 4)]) as pipeline:
        pipeline.put(1)
        raise Broken
    assert time.monotonic() - begun < 2.0
    assert out == []


def test_a_stop_while_the_owner_waits_takes_under_two_seconds() -> None:
    control = RunControl()
    threading.Timer(0.1, control.command, ["stop"]).start()
    begun = time.monotonic()
    stages = [Stage("1", [("a", sleeping(30.0)), ("b", sleeping(30.0))], 4)]
    with pytest.raises(StopRequested), Pipeline(stages, poll=control.poll, held=lambda: control.paused) as pipeline:
        pipeline.put(1)
        pipeline.put(2)
        pipeline.settle()
    assert time.monotonic() - begun < 2.0


def test_a_pause_holds_every_lane_and_a_stop_ends_it() -> None:
    control = RunControl()
    ticks = [0]

    def ticking(item: int, poll: Poll) -> Iterable[int]:
        while True:
            poll()
            ticks[0] += 1
            time.sleep(0.002)

    seen: list[int] = []

    def script() -> None:
        control.command("pause")
        time.sleep(0.1)  # longer than a lane can be inside its work
        seen.append(ticks[0])
        time.sleep(0.2)
        seen.append(ticks[0])
        control.command("resume")
        time.sleep(0.3)
        seen.append(ticks[0])
        control.command("stop")

    thread = threading.Thread(target=script)
    with pytest.raises(StopRequested), Pipeline(
        [Stage("1", [("a", ticking)], 4)], poll=control.poll, held=lambda: control.paused
    ) as pipeline:  # fmt: skip
        pipeline.put(1)
        thread.start()
        pipeline.settle()
    thread.join()
    assert seen[0] == seen[1] < seen[2]


def test_to_wait_for_what_nobody_works_on_is_an_error_and_no_hang() -> None:
    with Pipeline([Stage("1", [("a", sleeping(0.0))], 4)]) as pipeline:
        pipeline.put(1)
        with pytest.raises(RuntimeError, match="has not happened"):
            pipeline.until(lambda: False)


def test_a_pipeline_can_be_entered_again_after_an_error() -> None:
    out: list[int] = []
    pipeline = Pipeline([Stage("1", [("a", sleeping(0.0, out))], 4)])
    with pytest.raises(Broken), pipeline:
        raise Broken
    with pipeline:
        pipeline.put(7)
        pipeline.settle()
    assert out[-1] == 7
