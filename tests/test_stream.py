"""The streamed step on the real models: the plain path's gradients, whatever is faster than what, and clean ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_runs import (
    ListRecorder,
    RankScorer,
    assert_same_steps,
    create,
    equal,
    fresh_environment,
    gradients,
    perturb,
    recorded,
    saved,
    small,
    weights,
)

from grpo_engine.config import ConfigError, RunConfig
from grpo_engine.control import RunControl, StopRequested
from grpo_engine.environment import PureGRPOPromptEnvironment
from grpo_engine.image_model import ImageModel, RenderJob
from grpo_engine.loading import load_images
from grpo_engine.pipeline import HERE
from grpo_engine.placement import Placement
from grpo_engine.plan import Plan
from grpo_engine.policy import Poll, no_poll
from grpo_engine.reward import RewardModel, VqaScorer
from grpo_engine.rollout import Group, Picture
from grpo_engine.session import Session
from grpo_engine.store import Store
from grpo_engine.stream import GroupStream
from grpo_engine.trainer import PureGRPOTrainer

ALONE = "training.update_rows=0"  # each group goes through the policy by itself, as soon as it is whole
FOUR = (
    "training.batch_size=4",
    "training.steps=1",
    "training.max_grad_norm=1e6",
    "training.learning_rate=1e-3",
    ALONE,
)


@pytest.fixture(scope="module")
def images() -> list[ImageModel]:
    """Three image models, each with weights and a state of its own."""
    config = small()
    return [load_images(config, torch.device("cpu")) for _ in range(3)]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("lane-")] == []


class Replica:
    """A real image model that is late: each render first takes the next of ``delays``, in seconds."""

    def __init__(self, model: ImageModel, delays: Sequence[float] = (), fail_at: int = 0) -> None:
        self.model, self.config = model, model.config  # type: ignore[attr-defined]
        self.delays, self.fail_at = list(delays), fail_at
        self.batches: list[list[RenderJob]] = []

    def render(self, jobs: Sequence[RenderJob], *, poll: Poll = no_poll) -> list[Picture]:
        self.batches.append(list(jobs))
        if len(self.batches) == self.fail_at:
            raise OSError("the image model broke")
        until = time.monotonic() + (self.delays.pop(0) if self.delays else 0.0)
        while time.monotonic() < until:
            poll()
            time.sleep(0.005)
        return self.model.render(jobs, poll=poll)

    def cut_tokens(self, text: str) -> int:
        return self.model.cut_tokens(text)

    def told(self, kind: str, message: str) -> None:
        raise AssertionError(f"{kind}: {message}")


def made(
    config: RunConfig, replicas: Sequence[Replica], flat: Sequence[int] = (), control: RunControl | None = None
) -> tuple[PureGRPOTrainer, ListRecorder]:
    """A trainer on these replicas; the batch's prompts in ``flat`` have rewards without spread."""
    scorer = RankScorer()
    loaded = fresh_environment(config, scorer)
    for replica in replicas:
        replica.config = config.models.image
    environment = PureGRPOPromptEnvironment(
        loaded.policy, replicas[0], loaded.reward, config, further=replicas[1:]
    )  # fmt: skip
    recorder = ListRecorder()
    trained = PureGRPOTrainer(config, environment, Plan(config).train, recorder, control or RunControl())
    scorer.flat |= {prompt.text for index, prompt in enumerate(trained.batch(1)) if index in flat}
    perturb(trained)
    return trained, recorder


# -- the same numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "flat"),
    [
        (("models.image.batch_size=3",), [2]),
        (("models.image.batch_size=2", "objective.scale=batch"), []),
        (("objective.dynamic_sampling=2", "models.reward.failure=7"), [1]),
        (("training.inner_epochs=2", "training.minibatches=2", "sampling.prompts_per_pass=1"), []),
    ],
    ids=["group by group", "batch scaling", "dynamic sampling", "minibatches, sampled in passes"],
)
@pytest.mark.parametrize("count", [1, 3])
def test_streamed_gradients_and_figures_are_those_of_the_plain_path_bit_for_bit(
    images: list[ImageModel], count: int, overrides: tuple[str, ...], flat: list[int]
) -> None:
    found = []
    for streaming in ("never", "always"):
        # The first batches are the slowest: groups are whole in another order than that of the prompts.
        delays = [[0.25], [0.1, 0.1], []] if streaming == "always" else [[], [], []]
        replicas = [Replica(model, delay) for model, delay in zip(images, delays, strict=True)][:count]
        trained, recorder = made(small(*FOUR, *overrides, f"training.streaming={streaming}"), replicas, flat)
        trained.train()
        (metrics,), (groups,) = recorder.metrics, recorder.groups
        figures = {name: value for name, value in metrics.items() if not name.startswith("seconds")}
        pictures = [None if p is None else p.tobytes() for group in groups for p in group.pictures]
        batches = sorted(map(str, (batch for replica in replicas for batch in replica.batches)))
        found.append((gradients(trained), weights(trained), figures, pictures, batches, trained.stream.beside))
    plain, streamed = found
    assert (plain[-1], streamed[-1]) == (False, True)
    assert plain[0].norm() > 0
    assert torch.equal(plain[0], streamed[0])
    assert equal(plain[1], streamed[1])
    assert plain[2] == streamed[2]
    assert plain[3] == streamed[3]
    assert plain[4] == streamed[4], "what is rendered together must not depend on who is faster"


def test_a_picture_does_not_depend_on_the_replica_that_made_it(images: list[ImageModel]) -> None:
    jobs = [RenderJob("a red circle", 1), RenderJob("a blue square", 2)]
    first, *others = ([picture.tobytes() for picture in model.render(jobs)] for model in images)
    assert all(pictures == first for pictures in others)


def test_the_update_begins_before_the_last_group_is_rendered(images: list[ImageModel]) -> None:
    replica = Replica(images[0], [0.0, 0.0, 0.0, 1.5])
    trained, recorder = made(small(*FOUR, "training.streaming=always", "models.image.batch_size=1"), [replica])
    seen: list[int] = []
    trained.parameters[-1].register_hook(lambda gradient: seen.append(len(replica.batches)))
    trained.train()
    total = sum(len(set(group.rewrites)) for group in recorder.groups[0])
    assert len(replica.batches) == total
    assert seen[0] < total, "the first backward pass waited for every picture"
    (metrics,) = recorder.metrics
    assert metrics["seconds_wait"] is not None and metrics["seconds_wait"] > 0.5
    assert metrics["seconds_update"] is not None and metrics["seconds"] is not None
    assert 0 < metrics["seconds_update"] < metrics["seconds"] - metrics["seconds_wait"] + 0.1


def test_with_a_device_of_its_own_a_model_works_beside_the_policy(images: list[ImageModel]) -> None:
    policy_free = RewardModel(RankScorer(), small().models.reward)
    asking = replace(policy_free, others={"vqa": VqaScorer(None)})  # type: ignore[arg-type]

    def lanes(
        streaming: str, policy: str, image: Sequence[str], reward: str, scores: RewardModel = policy_free
    ) -> tuple[list[object], object]:
        placed = Placement(torch.device(policy), tuple(map(torch.device, image)), torch.device(reward))
        config = small(f"training.streaming={streaming}")
        found = PureGRPOPromptEnvironment(
            None, images[0], scores, config, further=images[1 : len(image)], placement=placed  # type: ignore[arg-type]
        )  # fmt: skip
        return list(found.image_lanes), found.reward_lane

    assert lanes("auto", "cpu", ["cpu"], "cpu") == ([HERE], HERE)
    assert lanes("auto", "cuda:0", ["cuda:0"], "cuda:0") == ([HERE], HERE)
    assert lanes("auto", "cuda:0", ["cuda:1"], "cuda:2") == (["cuda:1"], "cuda:2")
    assert lanes("auto", "cuda:0", ["cuda:1", "cuda:2"], "cuda:2") == (["cuda:1", "cuda:2"], "cuda:2")
    assert lanes("auto", "cuda:0", ["cuda:0", "cuda:1"], "cuda:0") == ([HERE, "cuda:1"], HERE)
    assert lanes("never", "cuda:0", ["cuda:1", "cuda:2"], "cuda:2") == ([HERE, HERE], HERE)
    assert lanes("always", "cpu", ["cpu"], "cpu") == (["image 0"], "reward")
    # A reward that asks the policy can't be worked beside it.
    assert lanes("auto", "cuda:0", ["cuda:1"], "cuda:2", asking) == (["cuda:1"], HERE)
    assert lanes("always", "cpu", ["cpu"], "cpu", asking) == (["image 0"], HERE)


# -- clean ends ----------------------------------------------------------------------------------------------


class BrokenScorer(RankScorer):
    """Fails on its ``at``-th call."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def score(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> list[float]:
        self.at -= 1
        if self.at == 0:
            raise OSError("the reward model broke")
        return super().score(pictures, prompts)


@pytest.mark.parametrize("part", ["image", "reward", "update"])
def test_an_error_anywhere_in_a_step_ends_it_with_that_error(images: list[ImageModel], part: str) -> None:
    replicas = [Replica(images[0], fail_at=3 if part == "image" else 0), Replica(images[1], [0.3] * 9)]
    trained, _ = made(small(*FOUR, "training.streaming=always", "models.image.batch_size=2"), replicas)
    if part == "reward":
        trained.environment.reward = RewardModel(BrokenScorer(2), trained.config.models.reward)
    if part == "update":

        def broken(gradient: torch.Tensor) -> None:
            raise OSError("the backward pass broke")

        trained.parameters[-1].register_hook(broken)
    before = weights(trained)
    with pytest.raises(OSError, match="broke"):
        trained.train()
    assert equal(weights(trained), before)
    assert trained.step == 0


def test_a_stop_while_everything_is_under_way_takes_under_two_seconds(images: list[ImageModel]) -> None:
    control = RunControl()
    replicas = [Replica(model, [60.0] * 9) for model in images]
    trained, recorder = made(small(*FOUR, "training.streaming=always"), replicas, control=control)
    asked: list[float] = []

    def ask() -> None:
        while not all(replica.batches for replica in replicas):
            time.sleep(0.01)
        asked.append(time.monotonic())
        control.command("stop")

    thread = threading.Thread(target=ask)
    thread.start()
    with pytest.raises(StopRequested):
        trained.train()
    assert time.monotonic() - asked[0] < 2.0
    thread.join()
    assert recorder.metrics == []


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_streamed_run_stopped_and_resumed_ends_like_an_undisturbed_plain_one(
    images: list[ImageModel], tmp_path_factory: pytest.TempPathFactory, ahead: int
) -> None:
    def run(store: Store, run_id: str, config: RunConfig, stop_at: int) -> str:
        """Stops at the ``stop_at``-th backward pass; 0 = never."""
        control = RunControl()
        loaded = fresh_environment(config, RankScorer())
        first, second = (Replica(model) for model in images[:2])
        environment = PureGRPOPromptEnvironment(loaded.policy, first, loaded.reward, config, further=[second])
        seen = [0]

        def count(gradient: torch.Tensor) -> None:
            seen[0] += 1
            if seen[0] == stop_at:
                control.command("stop")

        list(loaded.policy.trainable().values())[-1].register_hook(count)
        return Session(store, run_id, control, loaded=environment).run()

    overrides = ("training.learning_rate=1e-2", "recording.images_every=0", f"training.async_steps={ahead}", ALONE)
    with Store(tmp_path_factory.mktemp("runs") / "runs.db") as store:
        plain, streamed = (small(*overrides, f"training.streaming={how}") for how in ("auto", "always"))
        undisturbed, disturbed = create(store, plain), create(store, streamed)
        assert run(store, undisturbed, plain, 0) == "finished"
        assert run(store, disturbed, streamed, 3) == "stopped"  # in step 2, between its two groups
        assert store.run(disturbed).step == 1
        assert run(store, disturbed, streamed, 0) == "finished"
        figures = recorded(store, undisturbed)
        assert_same_steps(figures, recorded(store, disturbed))
        assert saved(store, undisturbed, 3) == saved(store, disturbed, 3)
        assert figures["staleness"].tolist() == [0, ahead, ahead]
        # Before the first update the ratio is 1; a stale policy is another one.
        assert figures["ratio_error"][0] < 1e-4
        assert (figures["ratio_error"][1:] > 1e-3).all() == bool(ahead)
        kinds = [event.kind for event in store.events(disturbed, limit=None)]
        assert ("async" in kinds) == bool(ahead)


def test_going_ahead_is_refused_where_it_can_not_work() -> None:
    with pytest.raises(ConfigError, match=r"async_steps is 1, but objective\.dynamic_sampling"):
        small("training.async_steps=1", "objective.dynamic_sampling=1")
    with pytest.raises(ConfigError, match=r"async_steps is 1, but with training\.streaming 'never'"):
        small("training.async_steps=1", "training.streaming=never")
    with pytest.raises(ConfigError, match="async_steps is 2"):
        small("training.async_steps=2")


def test_a_step_ahead_is_rendered_while_its_predecessor_is_learned_from(images: list[ImageModel]) -> None:
    replica = Replica(images[0])
    trained, recorder = made(small(*FOUR, "training.steps=2", "training.async_steps=1", "training.streaming=always",
                                   "models.image.batch_size=2"), [replica])  # fmt: skip
    seen: list[int] = []
    trained.parameters[-1].register_hook(lambda gradient: seen.append(len(trained.ahead)))
    asked: list[int] = []
    sample = trained.stream.sample

    def noting(*arguments: Any) -> list[Group]:
        asked.append(len(seen))
        return sample(*arguments)

    trained.stream.sample = noting  # type: ignore[method-assign]
    trained.train()
    assert asked == [0, 0], "the second step was not sampled before the first update"
    assert [metrics["staleness"] for metrics in recorder.metrics] == [0.0, 1.0]
    assert [kind for kind, _ in recorder.events] == ["ratio_check"]
    assert seen == [0] * 4 + [4] * 4


def test_a_stream_that_was_not_entered_does_everything_when_it_is_waited_for(images: list[ImageModel]) -> None:
    trained, _ = made(small(*FOUR, "training.streaming=always"), [Replica(model) for model in images])
    groups, _ = trained.collect(1)
    stream: GroupStream = trained.stream
    assert all(not group.pictures for group in groups)
    stream.wait(groups)
    assert all(len(group.rewards) == len(group) for group in groups)
